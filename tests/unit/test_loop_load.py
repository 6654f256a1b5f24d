"""Every way in which others ask a server for something is counted, so that raft does not make them wait."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any, cast

from node.dns import _Datagrams
from node.http.front.connection import Connection
from node.http.front.writes import Writes
from node.rpc.frames import Cancel
from node.rpc.server import ServerConnection
from raftstate.loop_load import LOOP


def ask(protocol: Any, *what: Any) -> int:
    """Let something come; return how many requests are counted for it."""
    before = LOOP.requests
    take = protocol.datagram_received if isinstance(protocol, asyncio.DatagramProtocol) else protocol.data_received
    take(*what)
    return LOOP.requests - before


def test_a_request_is_counted_whether_it_is_plain_or_was_handed_over_to_aiohttp() -> None:
    class Slow:
        got = b""

        def data_received(self, data: bytes) -> None:
            self.got += data

    connection, slow = Connection.__new__(Connection), Slow()
    taken: list[bytes] = []
    connection._slow, connection._deaf = None, False

    class Plain(Connection):
        __slots__ = ()

        def _take(self, data: bytes) -> None:
            taken.append(data)

    plain = Plain.__new__(Plain)
    plain._slow, plain._deaf = None, False
    assert ask(plain, b"GET /v1/status/leader HTTP/1.1\r\n\r\n") == 1
    assert len(taken) == 1
    connection._slow = slow  # type: ignore[assignment]
    assert ask(connection, b"HEAD / HTTP/1.1\r\n\r\n") == 1
    assert slow.got


def test_a_write_that_has_begun_waits_for_raft_itself() -> None:
    begun: list[object] = []

    def submit(command: object, _told: object) -> bool:
        begun.append(command)
        return command == "done at once"

    ctx: Any = SimpleNamespace(options=SimpleNamespace(body_bytes_max=10), backend=SimpleNamespace(submit=submit))
    writes = Writes(ctx, {("PUT", "/v1/kv/{key}"): lambda _ctx, _key, body: cast(Any, body.decode())})
    connection: Any = object()
    head: Any = SimpleNamespace(method="PUT", target="/v1/kv/a", fields=SimpleNamespace(may_write=True))
    before = LOOP.requests
    assert not writes.begin(head, b"later", connection)
    assert LOOP.requests == before, "its handler will see to it"
    ctx.options.body_bytes_max = 20
    assert writes.begin(head, b"done at once", connection)
    assert LOOP.requests == before - 1
    assert begun == ["later", "done at once"]


async def test_a_call_is_counted() -> None:
    connection = ServerConnection.__new__(ServerConnection)
    before = LOOP.requests
    connection._calls, connection._feeds, connection._direct = {}, {}, set()
    connection.frame_received(Cancel(7))
    assert LOOP.requests == before + 1


def test_a_question_is_counted() -> None:
    questions: list[bytes] = []
    assert ask(_Datagrams(lambda data, _address: questions.append(data)), b"web.service.consul", ("::1", 5353)) == 1
    assert questions
