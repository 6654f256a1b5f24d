"""ServerBackend: the backend of a server, over its replica; writes and strong reads go to the leader."""

from __future__ import annotations

import asyncio
import datetime
import itertools
import secrets
from collections.abc import AsyncIterator, Callable, Mapping
from typing import TYPE_CHECKING, Any, cast

import msgspec

from node import protocol
from node.backend import (
    APPLY_TIMEOUT_S,
    QUERY_TIMEOUT_S,
    WAIT_S_MAX,
    Applied,
    Contact,
    QueryResult,
    ReadMode,
    Told,
    ViewEvent,
)
from node.errors import BadRequest, NodeError, TimedOut
from node.leader_route import LeaderRoute
from node.protocol import (
    ApplyReply,
    ApplyRequest,
    OperatorRequest,
    QueryReply,
    QueryRequest,
    SignRequest,
    decode,
    encode,
)
from node.raft_errors import translate
from node.replies import SIGN_TIMEOUT_S, as_applied, as_result
from node.store_reads import StoreReads
from node.tasks import Tasks
from raftstate.errors import RaftError
from raftstate.model.wire import to_msgpack
from raftstate.state.commands import Envelope, SessionRenew

if TYPE_CHECKING:
    from node.ca.authority import Authority
    from node.operator_verbs import OperatorVerbs
    from node.rpc.client import ClientConnection
    from raftstate.replica import ReadStamp, Replica
    from raftstate.state.commands import Command
    from raftstate.state.machine import StateMachine

SEEN_WAIT_S = 2.0
"""How long a read waits for this server to catch up with what its client has seen elsewhere."""
SNAPSHOT_TIMEOUT_S = 600.0
_PLAIN = (bool, int, str, type(None))


class _Envelope(msgspec.Struct, frozen=True, array_like=True):
    """`raftstate.state.commands.Envelope` with the command as the bytes it came in."""

    request_id: str
    at: str
    command: msgspec.Raw


def _is_renewal(command: Command | msgspec.Raw) -> bool:
    if isinstance(command, msgspec.Raw):
        return protocol.command_name(command) == "SessionRenew"
    return isinstance(command, SessionRenew)


def _owned(reply: ApplyReply) -> Applied:
    """Return the outcome with a value of its own: the state's must not be changed."""
    return as_applied(reply if isinstance(reply.value, _PLAIN) else decode(encode(reply), ApplyReply))


class ServerBackend:
    """Backend of a server. `seen_index` keeps every later read on this node from being older."""

    def __init__(self, replica: Replica, route: LeaderRoute, *, node: str) -> None:
        self.replica, self.route, self.node = replica, route, node
        machine = cast("StateMachine", replica.machine)
        self.reads = StoreReads(machine, replica.watches, lambda: replica.applied_index)
        self.authority: Authority | None = None
        self.verbs: OperatorVerbs | None = None
        self.on_session_renewed: Any = lambda session: None
        self._seen_index = 0
        self._tasks = Tasks("writes")
        self._loop = asyncio.get_running_loop()
        self._tick = (-1.0, "")
        # Request ids of this process's own writes: nobody else has or guesses the first part.
        self._boot, self._count = secrets.token_hex(12), itertools.count()

    @property
    def applied_index(self) -> int:
        """Index up to which this server has applied, as rows carry it."""
        return self.replica.applied_index

    # -- writes ----------------------------------------------------------------------------------------------------

    async def apply(
        self, command: Command, *, request_id: str | None = None, timeout_s: float = APPLY_TIMEOUT_S
    ) -> Applied:
        """See Backend.apply."""
        return await self._apply(command, request_id or self._new_request_id(), timeout_s)

    async def _apply(self, command: Command, request_id: str, timeout_s: float, *, begun: bool = False) -> Applied:
        try:
            raw = msgspec.Raw(to_msgpack(command))
        except (TypeError, OverflowError) as error:
            raise BadRequest(f"the command cannot be encoded: {error}") from None
        request = ApplyRequest(request_id, raw)

        async def here(left_s: float) -> Applied:
            return _owned(await self._apply_here(request, left_s))

        async def there(leader: ClientConnection, left_s: float) -> Applied:
            return as_applied(decode(await self._forward(request, leader, left_s), ApplyReply))

        applied = await self.route.run(here, there, timeout_s=timeout_s, write=True, begun=begun)
        self._seen_index = max(self._seen_index, applied.index)
        return applied

    def submit(self, command: Command, told: Told) -> bool:
        """See Backend.submit. What goes wrong with the first attempt goes the way of `apply`, under the same id."""
        if not self.replica.is_leader:
            return self._submit_there(command, told)
        request_id = self._new_request_id()
        deadline = self._loop.time() + APPLY_TIMEOUT_S

        def attempted(applied: Any, error: RaftError | None) -> None:
            if error is None:
                outcome = _owned(self._reply(command, applied))
                self._seen_index = max(self._seen_index, outcome.index)
                told(outcome)
            else:
                self._tasks.spawn(self._go_on(command, request_id, deadline, told))

        try:
            self.replica.submit(encode(Envelope(request_id, self._now(), command)), attempted, APPLY_TIMEOUT_S)
        except (TypeError, OverflowError, RaftError):
            return False  # nothing was proposed: `apply` waits for what stands in the way, or has the words for it
        return True

    def _submit_there(self, command: Command, told: Told) -> bool:
        leader = self.route.connection_now()
        if leader is None:
            return False
        request_id = self._new_request_id()
        deadline = asyncio.get_running_loop().time() + APPLY_TIMEOUT_S

        def answered(answer: bytes | NodeError) -> None:
            try:
                if isinstance(answer, NodeError):
                    raise answer
                outcome = as_applied(decode(answer, ApplyReply))
            except NodeError:
                self._tasks.spawn(self._go_on(command, request_id, deadline, told))
            else:
                self._seen_index = max(self._seen_index, outcome.index)
                told(outcome)

        try:
            body = encode(ApplyRequest(request_id, msgspec.Raw(to_msgpack(command)), True))
            leader.begin(protocol.APPLY, body, APPLY_TIMEOUT_S, answered)
        except (TypeError, OverflowError, NodeError):
            return False  # nothing was sent
        return True

    async def _go_on(self, command: Command, request_id: str, deadline: float, told: Told) -> None:
        left_s = deadline - self._loop.time()
        try:
            told(await self._apply(command, request_id, left_s, begun=True))
        except NodeError as error:
            told(error)

    def submit_raw(self, request: ApplyRequest, timeout_s: float, told: Callable[[bytes | NodeError], None]) -> bool:
        """As `submit`, for `apply_raw`: ``told`` gets an encoded ApplyReply. False: nothing has begun."""
        deadline = asyncio.get_running_loop().time() + timeout_s

        def attempted(applied: Any, error: RaftError | None) -> None:
            if error is None:
                told(encode(self._reply(request.command, applied)))
            elif request.forwarded:
                told(translate(error))  # whoever forwarded it looks for the next leader
            else:
                self._tasks.spawn(self._go_on_raw(request, deadline, told))

        try:
            self.replica.submit(
                encode(_Envelope(request.request_id, self._now(), request.command)), attempted, timeout_s
            )
        except RaftError:
            return False
        return True

    async def _go_on_raw(
        self, request: ApplyRequest, deadline: float, told: Callable[[bytes | NodeError], None]
    ) -> None:
        left_s = deadline - self._loop.time()
        try:
            told(await self.apply_raw(request, left_s, begun=True))
        except NodeError as error:
            told(error)

    async def apply_raw(self, request: ApplyRequest, timeout_s: float, *, begun: bool = False) -> bytes:
        """Write a command that is encoded already; return an encoded ApplyReply.

        `begun`: an attempt before this call may have reached the log.
        """

        async def here(left_s: float) -> bytes:
            return encode(await self._apply_here(request, left_s))

        async def there(leader: ClientConnection, left_s: float) -> bytes:
            return await self._forward(request, leader, left_s)

        return await self.route.run(
            here, there, timeout_s=timeout_s, write=True, forwarded=request.forwarded, begun=begun
        )

    async def _apply_here(self, request: ApplyRequest, left_s: float) -> ApplyReply:
        envelope = encode(_Envelope(request.request_id, self._now(), request.command))
        return self._reply(request.command, await self.replica.apply(envelope, left_s))

    def _reply(self, command: Command | msgspec.Raw, applied: Any) -> ApplyReply:
        refusal = applied.refusal
        if refusal is not None:
            return ApplyReply(applied.index, applied.value, (refusal.code, refusal.message, refusal.http_status))
        if _is_renewal(command):
            self.on_session_renewed(applied.value)
        return ApplyReply(applied.index, applied.value)

    @staticmethod
    async def _forward(request: ApplyRequest, leader: ClientConnection, left_s: float) -> bytes:
        body = encode(ApplyRequest(request.request_id, request.command, True))
        return await leader.call(protocol.APPLY, body, left_s)

    def _now(self) -> str:
        """Return the time, RFC 3339; made once for each tick of the loop's clock, a millisecond with uvloop."""
        tick = self._loop.time()
        if tick != self._tick[0]:
            self._tick = tick, datetime.datetime.now(datetime.UTC).isoformat()
        return self._tick[1]

    def _new_request_id(self) -> str:
        return f"{self._boot}-{next(self._count):x}"

    # -- reads -----------------------------------------------------------------------------------------------------

    async def query(
        self,
        name: str,
        params: Mapping[str, Any] | None = None,
        *,
        mode: ReadMode = "default",
        min_index: int = 0,
        wait_s: float = 0.0,
    ) -> QueryResult:
        """See Backend.query. A blocking query is parked here, so a leader change neither wakes nor loses it."""
        params = params or {}
        loop = asyncio.get_running_loop()
        deadline = loop.time() + min(wait_s, WAIT_S_MAX)
        while True:
            result = await self._read(name, params, mode)
            left_s = deadline - loop.time()
            if min_index <= 0 or left_s <= 0 or result.ends_wait(min_index):
                return result
            await self.reads.park(name, params, min_index, left_s)

    async def newer(self, name: str, params: Mapping[str, Any], min_index: int, wait_s: float) -> None:
        """See Backend.newer."""
        await self.reads.park(name, params, min_index, wait_s)

    async def _read(self, name: str, params: Mapping[str, Any], mode: ReadMode) -> QueryResult:
        if mode == "stale":
            return await self._read_here(name, params, mode, QUERY_TIMEOUT_S)
        if self.replica.is_leader:
            try:
                return await self._read_here(name, params, mode, QUERY_TIMEOUT_S)
            except RaftError:
                pass  # leadership is in question: take the way that waits for it
        body = await self.query_leader(QueryRequest(name, dict(params), mode, forwarded=True), forwarded=False)
        result = as_result(decode(body, QueryReply), mode, name)
        self._seen_index = max(self._seen_index, result.index)
        return result

    def contact(self) -> Contact:
        """See Backend.contact."""
        status = self.replica.status()
        return Contact(status.leader is not None, status.last_contact_ms)

    def query_now(self, name: str, params: Mapping[str, Any]) -> QueryResult | None:
        """See Backend.query_now. A stale barrier never waits: its one step gives the stamp."""
        if self.replica.applied_index < self._seen_index:
            return None
        barrier = self.replica.read_barrier("stale")
        try:
            barrier.send(None)
        except StopIteration as done:
            stamp: ReadStamp = done.value
        except RaftError:
            return None
        else:
            barrier.close()
            return None
        found = self.reads.ask(name, params)
        return QueryResult(found.index, stamp.known_leader, stamp.last_contact_ms, found.value, "stale", stamp.index)

    async def _read_here(self, name: str, params: Mapping[str, Any], mode: ReadMode, left_s: float) -> QueryResult:
        """Read this server's state. Raises RaftError when it may not be read in this mode."""
        if mode == "stale":
            await self.catch_up(self._seen_index)
        stamp = await self.replica.read_barrier(mode, left_s)
        answer = self.reads.ask(name, params)
        return QueryResult(answer.index, stamp.known_leader, stamp.last_contact_ms, answer.value, mode, stamp.index)

    async def catch_up(self, index: int) -> None:
        """Wait until this server has applied `index`. Raises TimedOut."""
        try:
            await self.replica.wait_applied(index, SEEN_WAIT_S)
        except RaftError as error:
            raise TimedOut(
                f"this server has not caught up with what you have seen already ({error}): retry, or ask another"
            ) from None

    async def query_leader(self, request: QueryRequest, *, forwarded: bool) -> bytes:
        """Read what the leader knows; return an encoded QueryReply."""
        mode = protocol.read_mode(request.mode)
        forward = encode(request)

        async def here(left_s: float) -> bytes:
            return self.reply_of(await self._read_here(request.name, request.params, mode, left_s))

        return await self.route.run(
            here,
            lambda leader, left_s: leader.call(protocol.QUERY, forward, left_s),
            timeout_s=QUERY_TIMEOUT_S,
            write=False,
            forwarded=forwarded,
        )

    def reply_of(self, result: QueryResult) -> bytes:
        """Encode a result of this server."""
        return encode(
            QueryReply(
                result.index,
                result.applied_index,
                result.known_leader,
                result.last_contact_ms,
                msgspec.Raw(to_msgpack(result.raw)),
            )
        )

    def subscribe(self, name: str, params: Mapping[str, Any] | None = None) -> AsyncIterator[ViewEvent]:
        """See Backend.subscribe."""
        return self.reads.subscribe(name, params)

    # -- the leader's other work -----------------------------------------------------------------------------------

    async def sign_leaf(self, csr_pem: str, *, service: str, instance: str = "") -> str:
        """See Backend.sign_leaf."""
        body = await self.sign_raw(SignRequest(csr_pem, service, instance, self.node), forwarded=False)
        return body.decode()

    async def sign_raw(self, request: SignRequest, *, forwarded: bool) -> bytes:
        """Sign for `request.node`; return the chain, PEM."""

        async def here(left_s: float) -> bytes:
            await self.replica.read_barrier("default", left_s)
            await self._await_registration(request)
            assert self.authority is not None, "a server has an authority from its start"
            chain = self.authority.sign(
                request.csr_pem, service=request.service, instance=request.instance, node=request.node
            )
            return chain.encode()

        body = encode(request)
        return await self.route.run(
            here,
            lambda leader, left_s: leader.call(protocol.SIGN, body, left_s),
            timeout_s=SIGN_TIMEOUT_S,
            write=False,
            forwarded=forwarded,
        )

    async def _await_registration(self, request: SignRequest) -> None:
        """An agent asks for a leaf as soon as an instance is registered with it: its write may be on the way."""
        store = cast(Any, self.replica.machine).store
        key = (request.node, request.instance)
        if request.instance and key not in store.services.rows:
            params = {"node": request.node}
            index = self.reads.ask("catalog.node", params).index
            await self.reads.park("catalog.node", params, index, SEEN_WAIT_S)

    async def operator(self, verb: str, params: Mapping[str, Any] | None = None) -> Any:
        """See Backend.operator."""
        assert self.verbs is not None, "a server has its verbs from its start"
        body = await self.verbs.run(OperatorRequest(verb, dict(params or {})))
        return msgspec.msgpack.decode(body)

    async def snapshot_save(self) -> AsyncIterator[bytes]:
        """See Backend.snapshot_save."""
        assert self.verbs is not None, "a server has its verbs from its start"
        async for piece in self.verbs.snapshot_save(forwarded=False):
            yield piece

    async def snapshot_restore(self, chunks: AsyncIterator[bytes], *, foreign: bool = False) -> None:
        """See Backend.snapshot_restore."""
        assert self.verbs is not None, "a server has its verbs from its start"
        await self.verbs.snapshot_restore(chunks, forwarded=False, foreign=foreign)
