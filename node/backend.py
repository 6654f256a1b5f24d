"""What the HTTP API, DNS and the local agent stand on: the same interface on a server and on a client agent.

Values are builtins in Consul's shape or model types; :class:`QueryResult` gives either form without the caller
knowing whether the value was read here or came over RPC.

Operator verbs (`Backend.operator`), with their parameters and values:

    raft.configuration {}               -> {"Index", "Servers": [{ID, Node, Address, Leader, ProtocolVersion, Voter}]}
    raft.add_peer {id, address}          -> None     joins as a non-voter, votes once it has caught up
    raft.remove_peer {id | address}      -> None
    raft.transfer_leader {id?}           -> None
    raft.status {}                       -> the answering server's own view: {id, state, term, leader, …}
    status.leader {}                     -> "ip:port" of the leader's RPC address, "" if none
    status.peers {}                      -> ["ip:port", ...]
    autopilot.health {}                  -> Consul's autopilot health object
    autopilot.configuration {}           -> Consul's autopilot configuration object, as it is acted on
    ca.rotate {}                         -> the new CARoot
    acl.write {token, command, request_id} -> {index, value, refusal}   a command of access control, as MessagePack,
                                           written if the token's secret may (`node.acl_writes`)
    faults.block {peers: [node, ...], one_way}   -> {"Blocked": [...]}   this node only; only with fault_injection
    node.servers {}                      -> this node's view of the servers and which one it talks to
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar

import msgspec

from node.errors import NodeError, Refused
from raftstate.model.wire import from_msgpack, to_json, to_msgpack

if TYPE_CHECKING:
    from raftstate.state.commands import Command

ReadMode = Literal["default", "stale", "consistent"]
READ_MODES: tuple[ReadMode, ...] = ("default", "stale", "consistent")
APPLY_TIMEOUT_S = 10.0
"""How long a write is retried while an election runs, unless the caller says otherwise."""
QUERY_TIMEOUT_S = 10.0
"""How long a read waits for a leader; a blocking query's own wait comes on top."""
WAIT_S_MAX = 660.0
"""Consul's longest blocking query: ten minutes, and a sixteenth of jitter."""

T = TypeVar("T")


class RefusalInfo(msgspec.Struct, frozen=True):
    """Why the state machine turned a command down."""

    code: str
    message: str
    http_status: int = 400


class Applied(msgspec.Struct, frozen=True):
    """A command's outcome: its log index, and either a value or a refusal."""

    index: int
    value: Any = None
    refusal: RefusalInfo | None = None

    def unwrap(self) -> Any:
        """Return the value. Raises Refused (with Consul's HTTP status) if the command was refused."""
        if self.refusal is not None:
            raise Refused(self.refusal.message, reason=self.refusal.code, http_status=self.refusal.http_status)
        return self.value


Told = Callable[[Applied | NodeError], None]
"""What is told of a write that was submitted."""


@dataclass(slots=True)
class QueryResult:
    """A read's answer and what it promises: Consul's `X-Consul-*` headers come from here."""

    index: int
    """At least 1; only grows for the same query on the same node."""
    known_leader: bool
    last_contact_ms: int
    """Age of what this answer rests on: 0 from the leader."""
    raw: Any
    """Model values or builtins, as found; prefer the methods below."""
    consistency: ReadMode = "default"
    applied_index: int = 0
    """Log index up to which the answering server had applied; grows even where `index` goes back by a restore."""
    _builtins: Any = field(default=msgspec.UNSET, repr=False)

    @property
    def value(self) -> Any:
        """The value as builtins in Consul's shape; bytes stay bytes (JSON shows them in base64)."""
        if self._builtins is msgspec.UNSET:
            self._builtins = msgspec.to_builtins(self.raw, builtin_types=(bytes,))
        return self._builtins

    def ends_wait(self, min_index: int) -> bool:
        """Whether a blocking query that knows `min_index` has its answer: something newer, or another past.

        An answer from a server that has not yet applied `min_index` is neither: it is only late.
        """
        return self.index > min_index or (self.index < min_index <= self.applied_index)

    def json(self) -> bytes:
        """The value as Consul's JSON, straight from the stored rows where it can be."""
        return to_json(self.raw)

    def decode(self, kind: type[T]) -> T:
        """The value as a model type, e.g. ``decode(tuple[InstanceHealth, ...])``."""
        return msgspec.convert(self.raw, kind, from_attributes=False)


@dataclass(frozen=True, slots=True)
class Contact:
    """How this node stands with the cluster now: what an answer from what it holds may say of itself."""

    known_leader: bool
    last_contact_ms: int
    """How old what is held here may be."""


@dataclass(frozen=True)
class ViewEvent:
    """One step of a subscription. Keys name rows within the view and mean nothing else."""

    index: int
    reset: bool
    """True: forget every row held before; `upserts` is the whole view. The first event always is one."""
    upserts: Mapping[str, Any]
    """Model values or builtins by row key; `decode` gives them as one type."""
    deletes: tuple[str, ...] = ()

    def decode(self, kind: type[T]) -> dict[str, T]:
        """Return `upserts` with every row as `kind`."""
        return {key: msgspec.convert(row, kind, from_attributes=False) for key, row in self.upserts.items()}

    @cached_property
    def packed(self) -> bytes:
        """The event as MessagePack, encoded once however many subscribers it goes to."""
        return to_msgpack((self.index, self.reset, dict(self.upserts), self.deletes))

    @classmethod
    def unpack(cls, data: bytes) -> ViewEvent:
        """Parse what `packed` made; rows come as builtins. Raises msgspec.ValidationError."""
        return cls(*from_msgpack(data, tuple[int, bool, dict[str, Any], tuple[str, ...]]))


class Backend(Protocol):
    """The cluster's state as seen from this node. All methods may raise the errors of `node.errors`."""

    async def apply(
        self, command: Command, *, request_id: str | None = None, timeout_s: float = APPLY_TIMEOUT_S
    ) -> Applied:
        """Write once, wherever the leader is; retried through elections for up to `timeout_s`.

        A refusal is a value (`Applied.unwrap` raises it). Raises UnknownOutcome when the time ran out after the
        command may have been proposed, NoLeader when it surely was not, Busy, BadRequest (too large).
        """

    def submit(self, command: Command, told: Told) -> bool:
        """Begin to write, if this node is the one that can, at once; else nothing has begun, and `apply` may be used.

        For who has no task to wait in: `told` gets what `apply` would return or raise, once, in a later turn of the
        loop. It must not raise.
        """

    async def query(
        self,
        name: str,
        params: Mapping[str, Any] | None = None,
        *,
        mode: ReadMode = "default",
        min_index: int = 0,
        wait_s: float = 0.0,
    ) -> QueryResult:
        """Read. With `min_index` > 0 and `wait_s` > 0 the answer waits until the query's index exceeds `min_index`.

        Raises NoLeader, TimedOut, BadRequest (unknown query or parameter).
        """

    async def newer(self, name: str, params: Mapping[str, Any], min_index: int, wait_s: float) -> None:
        """Return when the query's index may exceed `min_index` on this node, or after `wait_s`.

        What a blocking query does between its reads: any number of readers of one query can share one call. Raises
        what `query` does.
        """

    def contact(self) -> Contact:
        """Return whether a leader is known from here, and how long ago this node last heard of one."""

    def query_now(self, name: str, params: Mapping[str, Any]) -> QueryResult | None:
        """Return what ``query(name, params, mode="stale")`` would, if that needs no waiting; else None.

        Asking costs nothing more than the answer: it does not count as a use of the query. Raises BadRequest.
        """

    def subscribe(self, name: str, params: Mapping[str, Any] | None = None) -> AsyncIterator[ViewEvent]:
        """Follow a query's rows: first everything, then what changed. Survives leader and server changes.

        Never ends by itself; close the generator (``aclosing``) to stop.
        """

    async def sign_leaf(self, csr_pem: str, *, service: str, instance: str = "") -> str:
        """Return the leaf's certificate chain, PEM. Raises Refused with the rule that was broken."""

    async def operator(self, verb: str, params: Mapping[str, Any] | None = None) -> Any:
        """Run an operator's verb; see the module's text for verbs and values."""

    def snapshot_save(self) -> AsyncIterator[bytes]:
        """Yield a snapshot of the cluster's state, taken on the leader, in its checksummed file form."""

    async def snapshot_restore(self, chunks: AsyncIterator[bytes], *, foreign: bool = False) -> None:
        """Replace the cluster's state by a saved snapshot; checked whole before anything changes.

        Raises Refused (409) for the snapshot of a cluster of another trust domain, unless it may be ``foreign``.
        """
