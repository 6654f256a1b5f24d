"""What nodes say to one another over RPC: method names and the bodies of requests and answers."""

from __future__ import annotations

from typing import Any, TypeVar

import msgspec

from node.backend import READ_MODES, ReadMode
from node.errors import BadRequest

APPLY = "apply"
QUERY = "query"
SUBSCRIBE = "subscribe"
SIGN = "sign_leaf"
OPERATOR = "operator"
HEARTBEAT = "heartbeat"
HEARTBEATS = "heartbeats"
CROWDED = "crowded"
SNAPSHOT_SAVE = "snapshot.save"
SNAPSHOT_RESTORE = "snapshot.restore"


class _Body(msgspec.Struct, frozen=True, array_like=True):
    pass


class ApplyRequest(_Body, frozen=True):
    """A write. `forwarded`: from a server that takes the receiver for the leader; it is not passed on again."""

    request_id: str
    command: msgspec.Raw
    forwarded: bool = False


class ApplyReply(_Body, frozen=True):
    """The outcome; `refusal` is (code, message, http status)."""

    index: int
    value: Any = None
    refusal: tuple[str, str, int] | None = None


class QueryRequest(_Body, frozen=True):
    """A read; with `min_index` and `wait_s` a blocking one. `seen_index`: answer nothing older than this."""

    name: str
    params: dict[str, Any]
    mode: str = "default"
    min_index: int = 0
    wait_s: float = 0.0
    seen_index: int = 0
    forwarded: bool = False


class QueryReply(_Body, frozen=True):
    """`applied_index`: the log index that the answering server had applied."""

    index: int
    applied_index: int
    known_leader: bool
    last_contact_ms: int
    value: msgspec.Raw


class SubscribeRequest(_Body, frozen=True):
    """Follow a query; `from_index` is the index of the rows that the caller holds already."""

    name: str
    params: dict[str, Any]
    from_index: int = 0


class SignRequest(_Body, frozen=True):
    """A leaf for a service or instance. `node`: who asked, believed from servers only."""

    csr_pem: str
    service: str
    instance: str = ""
    node: str = ""


class OperatorRequest(_Body, frozen=True):
    """An operator's verb."""

    verb: str
    params: dict[str, Any] = {}
    forwarded: bool = False


class RestoreRequest(_Body, frozen=True):
    """A snapshot follows. `foreign`: it may be another cluster's."""

    foreign: bool = False


class HeartbeatReply(_Body, frozen=True):
    """`servers`: (name, address) of every server; the agent may talk to any of them. `beat_every_s`: there are
    so many agents that a sign of life this often is enough."""

    known_leader: bool
    last_contact_ms: int
    servers: tuple[tuple[str, str], ...]
    beat_every_s: float = 0.0


T = TypeVar("T")

ACL_COMMANDS = frozenset(
    {"UpsertToken", "DeleteToken", "BootstrapACL", "UpsertPolicy", "DeletePolicy", "UpsertRole", "DeleteRole"}
)
"""Commands of access control: written by the verb ``acl.write``, which asks for a token that may."""
SERVERS_ONLY = frozenset({"AddCARoot", "RetireCARoot", "ForgetRequests", *ACL_COMMANDS})
"""Commands that no agent may write: with a root of its own in the bundle, one stolen host could be anyone, and with
a token of its own anyone could use the API."""
QUERIES_SERVERS_ONLY = frozenset({"internal.ca_signing_material", "acl.tokens"})
"""Queries that no agent may ask: the authority's key, sealed as it is, is nobody else's business."""
VERBS_SERVERS_ONLY = frozenset({"raft.add_peer", "raft.leave"})
"""Verbs that no agent may ask for: a server comes in by asking for itself, with a server's certificate."""


def command_name(raw: bytes | bytearray | memoryview | msgspec.Raw) -> str:
    """Return a command's tag from its MessagePack form, an array led by a short text. Raises BadRequest."""
    head = bytes(memoryview(raw)[:64])
    if not head or not 0x90 <= head[0] <= 0x9F:
        raise BadRequest("malformed command: not an array led by its name")
    if len(head) > 1 and 0xA0 <= head[1] <= 0xBF:
        name = head[2 : 2 + (head[1] & 0x1F)]
        if len(name) == head[1] & 0x1F and name.isascii():
            return name.decode()
    raise BadRequest("malformed command: its name is not a short text")


_encoder = msgspec.msgpack.Encoder()


def encode(body: Any) -> bytes:
    """Return a body's bytes."""
    return _encoder.encode(body)


def decode(data: bytes, kind: type[T]) -> T:
    """Parse a body. Raises BadRequest that names the field."""
    try:
        return msgspec.msgpack.decode(data, type=kind)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise BadRequest(f"malformed {kind.__name__}: {error}") from None


def read_mode(text: str) -> ReadMode:
    """Return the mode. Raises BadRequest."""
    for mode in READ_MODES:
        if mode == text:
            return mode
    raise BadRequest(f"read mode must be one of {', '.join(READ_MODES)}, not {text!r}")
