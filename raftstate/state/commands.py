"""What can be written: one immutable struct per command, and the envelope in which a command travels.

Commands are encoded as MessagePack arrays led by the command's name. A field may only be added at the end, with a
default: logs and snapshots outlive versions. Ids and times are made by the proposer, so that every replica gets
the same ones.
"""

from __future__ import annotations

from collections.abc import Callable
from hashlib import blake2b
from typing import Any

import msgspec

from raftstate.errors import RaftError
from raftstate.model.acl import Policy, Role, Token
from raftstate.model.autopilot import AutopilotConfig
from raftstate.model.catalog import Check, Node, ServiceInstance
from raftstate.model.connect import CARoot
from raftstate.model.intention import Intention
from raftstate.model.kv import Session

DEPTH_MAX = 32
"""Nesting of free-form values (``config``, ``definition`` …). Far below what makes a decoder's recursion limit,
which differs between replicas, decide."""


class MalformedCommand(RaftError, ValueError):
    """The bytes are not an envelope; the text names the place."""


class _Command(msgspec.Struct, frozen=True, array_like=True, tag=True):
    pass


class RegisterNode(_Command, frozen=True):
    """Register or update a node. Value: True."""

    node: Node


class RegisterService(_Command, frozen=True):
    """Register or update an instance; its node must be registered. Value: True."""

    service: ServiceInstance


class RegisterCheck(_Command, frozen=True):
    """Register or update a check; its node, and its service if it has one, must be registered. Value: True."""

    check: Check


class CatalogRegister(_Command, frozen=True):
    """Register a node with an instance and checks, all or nothing. Value: True."""

    node: Node
    service: ServiceInstance | None = None
    checks: tuple[Check, ...] = ()
    skip_node_update: bool = False
    """Leave a node that exists as it is."""


class DeregisterNode(_Command, frozen=True):
    """Remove a node with its instances and checks; its sessions end. Value: whether it existed."""

    node: str


class DeregisterService(_Command, frozen=True):
    """Remove an instance and its checks. Value: whether it existed."""

    node: str
    service_id: str


class DeregisterCheck(_Command, frozen=True):
    """Remove a check. Value: whether it existed."""

    node: str
    check_id: str


class UpsertIntention(_Command, frozen=True):
    """Create or change an intention. Value: the stored intention as builtins (``value["ID"]``).

    An ``intention.id`` that is stored names the intention to change; otherwise the pair of source and destination
    does, and ``id`` is taken for a new one. ``created_at``, ``updated_at`` and ``precedence`` are set here.
    """

    intention: Intention
    resolve: bool = True
    """Resolve names that no service has to instances; False takes them as services (still to come)."""
    replace: bool = True
    """False: refuse (``conflict``) when the pair has an intention already."""


class DeleteIntention(_Command, frozen=True):
    """Delete by id, or by the pair as ``intentions.exact`` finds it. Value: whether there was one."""

    id: str = ""
    source: str = ""
    destination: str = ""


class SetCAConfig(_Command, frozen=True):
    """Set the authority's configuration. Value: whether it was set (False: ``cas_index`` did not match)."""

    provider: str = "consul"
    config: dict[str, Any] = {}
    state: dict[str, str] = {}
    force_without_cross_signing: bool = False
    trust_domain: str = ""
    """Taken when none is stored yet; ignored later."""
    cas_index: int | None = None
    """Set only if the stored configuration has this ModifyIndex; 0: only if there is none."""


class SetAutopilot(_Command, frozen=True):
    """Set how servers are judged and cleaned up. Value: whether it was set (False: ``cas_index`` did not match)."""

    config: AutopilotConfig
    cas_index: int | None = None
    """Set only if the stored configuration has this ModifyIndex; 0: only if there is none."""


class AddCARoot(_Command, frozen=True):
    """Add a root to the bundle, or change one of the same id. Value: True."""

    root: CARoot
    sealed_key: bytes = b""
    make_active: bool = True
    expected_active_root_id: str | None = None
    """Refuse (``conflict``) unless this root is active; "" : unless none is."""


class RetireCARoot(_Command, frozen=True):
    """Drop a root that is not active, with its key. Value: whether it existed."""

    root_id: str


class Revoke(_Command, frozen=True):
    """Withdraw an identity. ``kind``: ``instance``, ``service`` or ``serial``. Value: True."""

    kind: str
    value: str
    service: str = ""
    reason: str = ""


class Restore(_Command, frozen=True):
    """Take a withdrawal back. Value: whether there was one."""

    kind: str
    value: str
    service: str = ""


class KVSet(_Command, frozen=True):
    """Set a key; a lock on it stays. Value: True."""

    key: str
    value: bytes = b""
    flags: int = 0


class KVDelete(_Command, frozen=True):
    """Delete a key. Value: True, also when it is gone; False when ``cas_index`` is not the entry's ModifyIndex."""

    key: str
    cas_index: int | None = None


class KVDeleteTree(_Command, frozen=True):
    """Delete every key that begins with ``prefix``. Value: True."""

    prefix: str


class KVCas(_Command, frozen=True):
    """Set a key if its ModifyIndex is ``index``; 0: if it does not exist. Value: whether it was set."""

    key: str
    value: bytes
    index: int
    flags: int = 0


class KVLock(_Command, frozen=True):
    """Set a key and lock it for a session. Value: whether the session now holds it."""

    key: str
    value: bytes
    session: str
    flags: int = 0


class KVUnlock(_Command, frozen=True):
    """Set a key and give up its lock. Value: False when the session does not hold it."""

    key: str
    value: bytes
    session: str
    flags: int = 0


class SessionCreate(_Command, frozen=True):
    """Create a session; node and checks must be there and not critical. Value: its id."""

    session: Session


class SessionDestroy(_Command, frozen=True):
    """End a session: its locks are released, or the keys deleted. Value: True."""

    id: str


class SessionRenew(_Command, frozen=True):
    """Note in the log that a session was renewed; changes no row. Value: the session as builtins, or None."""

    id: str


class TxnKV(_Command, frozen=True):
    """``verb``: set cas lock unlock get get-or-empty get-tree check-index check-session check-not-exists delete
    delete-tree delete-cas."""

    verb: str
    key: str
    value: bytes = b""
    flags: int = 0
    index: int = 0
    session: str = ""


class TxnNode(_Command, frozen=True):
    """``verb``: get set cas delete delete-cas."""

    verb: str
    node: Node
    index: int = 0


class TxnService(_Command, frozen=True):
    """``verb``: get set cas delete delete-cas."""

    verb: str
    service: ServiceInstance
    index: int = 0


class TxnCheck(_Command, frozen=True):
    """``verb``: get set cas delete delete-cas."""

    verb: str
    check: Check
    index: int = 0


TxnOp = TxnKV | TxnNode | TxnService | TxnCheck


class Txn(_Command, frozen=True):
    """Up to 64 operations, all or none. Value: ``{"Results": [...], "Errors": None}``, or ``Results`` None and
    ``Errors`` ``[{"OpIndex", "What"}]``."""

    ops: tuple[TxnOp, ...]


class SetConfigEntry(_Command, frozen=True):
    """Write a configuration entry (Consul's JSON form without the indexes). Value: whether it was written."""

    kind: str
    name: str
    entry: dict[str, Any]
    cas_index: int | None = None


class DeleteConfigEntry(_Command, frozen=True):
    """Delete a configuration entry. Value: True; False when ``cas_index`` did not match."""

    kind: str
    name: str
    cas_index: int | None = None


class UpsertToken(_Command, frozen=True):
    """Write a token. Value: True; False when ``only_first`` is set and a token exists."""

    token: Token
    only_first: bool = False
    """Write only if there is no token at all."""
    cas_index: int | None = None
    """Write only if the stored token has this ModifyIndex; 0: only if there is none."""


class DeleteToken(_Command, frozen=True):
    """Delete a token. Value: whether it existed."""

    accessor_id: str


class BootstrapACL(_Command, frozen=True):
    """Write the first token. Value: True; False when that was done already and ``reset_index`` does not name it."""

    token: Token
    reset_index: int = 0
    """ModifyIndex of the bootstrap that this one replaces."""


class UpsertPolicy(_Command, frozen=True):
    """Write a policy. Value: whether it was written (False: ``cas_index`` did not match)."""

    policy: Policy
    cas_index: int | None = None
    """Write only if the stored policy has this ModifyIndex; 0: only if there is none."""


class DeletePolicy(_Command, frozen=True):
    """Delete a policy. Value: whether it existed."""

    id: str


class UpsertRole(_Command, frozen=True):
    """Write a role. Value: whether it was written (False: ``cas_index`` did not match)."""

    role: Role
    cas_index: int | None = None
    """Write only if the stored role has this ModifyIndex; 0: only if there is none."""


class DeleteRole(_Command, frozen=True):
    """Delete a role. Value: whether it existed."""

    id: str


class ForgetRequests(_Command, frozen=True):
    """Forget the outcome of requests older than ``before`` (RFC 3339). Value: how many were forgotten."""

    before: str


Command = (
    RegisterNode | RegisterService | RegisterCheck | CatalogRegister
    | DeregisterNode | DeregisterService | DeregisterCheck
    | UpsertIntention | DeleteIntention
    | SetCAConfig | AddCARoot | RetireCARoot | Revoke | Restore
    | KVSet | KVDelete | KVDeleteTree | KVCas | KVLock | KVUnlock
    | SessionCreate | SessionDestroy | SessionRenew | Txn
    | SetAutopilot | SetConfigEntry | DeleteConfigEntry | UpsertToken | DeleteToken | ForgetRequests
    | BootstrapACL | UpsertPolicy | DeletePolicy | UpsertRole | DeleteRole
)  # fmt: skip


class Envelope(msgspec.Struct, frozen=True, array_like=True):
    """A command on its way through the log."""

    request_id: str
    """The same for every attempt of one write; its effect happens once. Empty: not remembered."""
    at: str
    """When it was proposed, RFC 3339 with an offset; the only time that the state machine knows."""
    command: Command


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Envelope)


def encode_envelope(envelope: Envelope) -> bytes:
    """Return the bytes that go into the log. Raises OverflowError for integers beyond 64 bits."""
    return _encoder.encode(envelope)


def fingerprint(data: bytes, envelope: Envelope) -> bytes:
    """Return what tells an encoded envelope's command from another one, whatever its request id and time."""
    start = 1 + _text_bytes(envelope.request_id) + _text_bytes(envelope.at)
    # A short piece is copied for less than a view of it costs.
    command = data[start:] if len(data) < _COPIED_BYTES else memoryview(data)[start:]
    return blake2b(command, digest_size=8).digest()


_COPIED_BYTES = 4096


def _text_bytes(text: str) -> int:
    """Bytes of a text in MessagePack."""
    size = len(text) if text.isascii() else len(text.encode())
    return size + (1 if size < 32 else 2 if size < 256 else 3 if size < 65536 else 5)


def decode_envelope(data: bytes) -> Envelope:
    """Parse what `encode_envelope` made. Raises MalformedCommand."""
    try:
        envelope = _decoder.decode(data)
    except RecursionError:
        raise MalformedCommand(_TOO_DEEP) from None
    except (msgspec.DecodeError, ValueError, TypeError, OverflowError) as error:
        raise MalformedCommand(f"not a command: {error}") from None
    _require_plain(envelope.command)
    return envelope


_TOO_DEEP = f"a free-form value is nested deeper than {DEPTH_MAX} levels or holds something that JSON cannot say"


def _require_plain(command: Any) -> None:
    """Refuse free-form values that are too deep or hold what JSON cannot say, wherever a command has some."""
    check = _FREE_FORM.get(type(command))
    if check is not None:
        check(command)


def _registration_plain(command: CatalogRegister) -> None:
    if command.service is not None:
        _service_plain(command.service)
    for check in command.checks:
        _plain(check.definition)


def _txn_plain(command: Txn) -> None:
    for op in command.ops:
        _require_plain(op)


def _service_plain(service: ServiceInstance) -> None:
    if service.tagged_addresses:
        _plain(service.tagged_addresses)
    if service.proxy is not None:
        _plain(service.proxy.config)
        for upstream in service.proxy.upstreams:
            _plain(upstream.config)


def _plain(value: Any, depth: int = 1) -> None:
    kind = type(value)
    if kind is dict:
        if depth > DEPTH_MAX:
            raise MalformedCommand(_TOO_DEEP)
        for key, item in value.items():
            if type(key) is not str:
                raise MalformedCommand(_TOO_DEEP)
            _plain(item, depth + 1)
    elif kind is list:
        if depth > DEPTH_MAX:
            raise MalformedCommand(_TOO_DEEP)
        for item in value:
            _plain(item, depth + 1)
    elif kind not in _PLAIN:
        raise MalformedCommand(_TOO_DEEP)


_PLAIN = frozenset((str, int, float, bool, type(None)))

_FREE_FORM: dict[type, Callable[[Any], None]] = {
    RegisterService: lambda command: _service_plain(command.service),
    TxnService: lambda command: _service_plain(command.service),
    RegisterCheck: lambda command: _plain(command.check.definition),
    TxnCheck: lambda command: _plain(command.check.definition),
    CatalogRegister: _registration_plain,
    Txn: _txn_plain,
    SetCAConfig: lambda command: _plain(command.config),
    SetConfigEntry: lambda command: _plain(command.entry),
    UpsertToken: lambda command: _plain(command.token.document),
    BootstrapACL: lambda command: _plain(command.token.document),
}
"""By command, what looks at its free-form values; commands without any are not here."""
