"""What an RPC reply of a server means to whoever asked; also what a client agent needs of the server's side, which it
does not load."""

from __future__ import annotations

import msgspec

from node.backend import Applied, QueryResult, ReadMode, RefusalInfo
from node.protocol import ApplyReply, QueryReply
from node.views import VALUE_TYPES

SIGN_TIMEOUT_S = 10.0


def as_applied(reply: ApplyReply) -> Applied:
    """Return the outcome that a reply carries."""
    return Applied(reply.index, reply.value, RefusalInfo(*reply.refusal) if reply.refusal else None)


def as_result(reply: QueryReply, mode: ReadMode, name: str) -> QueryResult:
    """Return the answer that a reply carries; rows come as model types where they are of one."""
    value = msgspec.msgpack.decode(reply.value, type=VALUE_TYPES.get(name, object))
    return QueryResult(reply.index, reply.known_leader, reply.last_contact_ms, value, mode, reply.applied_index)
