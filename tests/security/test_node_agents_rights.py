"""What a client agent's certificate is not good for, whatever its bearer sends over RPC."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import msgspec
import pytest

from node.errors import NodeError, Refused
from node.pki import Peer
from node.protocol import ApplyRequest, OperatorRequest, QueryRequest, SubscribeRequest, encode
from node.rpc.server import Call
from node.server_rpc import ServerRpc
from raftstate.model.acl import Token
from raftstate.model.connect import CARoot
from raftstate.model.wire import to_msgpack
from raftstate.state import commands as c

AGENT, SERVER = Peer("client-1", "client", "dc1"), Peer("server-2", "server", "dc1")


class Reached(NodeError):
    """The request got past who may ask."""


class Anything:
    """Whatever stands behind the methods: to reach it is to have been let through."""

    def __getattr__(self, name: str) -> Any:
        raise Reached(name)


async def ask(method: str, body: object, peer: Peer) -> None:
    """Put one request before a server as ``peer``. Raises Refused, or Reached."""
    anything = cast(Any, Anything())
    rpc = ServerRpc(anything, anything, anything)
    call = Call(peer, encode(body), asyncio.get_running_loop().time() + 5)
    if method == "feed":
        rpc.feed(call, cast(Any, None))
    elif method == "subscribe":
        async for _ in rpc.subscribe(call):
            pass
    else:
        await getattr(rpc, method)(call)


def written(command: object) -> ApplyRequest:
    return ApplyRequest("request-1", msgspec.Raw(to_msgpack(command)))


@pytest.mark.parametrize(
    ("method", "body"),
    [
        ("apply", written(c.AddCARoot(CARoot(id="r", name="r", root_cert="pem"), b"sealed"))),
        ("apply", written(c.RetireCARoot("r"))),
        ("apply", written(c.ForgetRequests("2030-01-01T00:00:00+00:00"))),
        ("apply", written(c.UpsertToken(Token(accessor_id="a", secret_hash="0" * 64)))),
        ("apply", written(c.DeleteToken("a"))),
        ("query", QueryRequest("internal.ca_signing_material", {})),
        ("query", QueryRequest("internal.ca_signing_material", {}, mode="stale")),
        ("query", QueryRequest("internal.ca_signing_material", {}, forwarded=True)),
        ("query", QueryRequest("acl.tokens", {})),
        ("subscribe", SubscribeRequest("internal.ca_signing_material", {})),
        ("feed", SubscribeRequest("internal.ca_signing_material", {})),
        ("operator", OperatorRequest("raft.add_peer", {"id": "mine", "address": "10.0.0.9:8300"})),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, str) else value,
)
async def test_only_a_server_may(method: str, body: object) -> None:
    with pytest.raises(Refused, match="is for servers: client-1 has a client's certificate") as caught:
        await ask(method, body, AGENT)
    assert caught.value.http_status == 403
    with pytest.raises(Reached):
        await ask(method, body, SERVER)


@pytest.mark.parametrize(
    ("method", "body"),
    [
        ("apply", written(c.KVSet(key="k", value=b"v"))),
        ("query", QueryRequest("acl.token", {"secret_hash": "0" * 64}, mode="stale")),
        ("operator", OperatorRequest("raft.remove_peer", {"id": "server-9"})),
    ],
)
async def test_what_commands_typed_on_an_agents_host_need_is_let_through(method: str, body: object) -> None:
    with pytest.raises(Reached):
        await ask(method, body, AGENT)
