"""What HTTP/1.1 holds of heads and trailers that do not arrive whole counts in the memory budget."""

from __future__ import annotations

import asyncio
import tracemalloc
from collections.abc import Callable

import pytest

from proxy.http import HttpCounters, HttpOptions, InboundConnection, InboundHttp
from proxy.http.head import RequestHead
from proxy.http.upstream import Upstream
from proxy.mux.flow import MemoryBudget
from proxy.stream import NOBODY, Channel, Data
from tests.support.http_filter import ALLOW_ALL, OWN_URI, WEB
from tests.support.sidecars import until

HEAD = b"GET /x HTTP/1.1\r\nHost: db\r\nX-One: 1\r\n"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
ANSWER = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\nx-one: 1\r\n"


class Wire:
    """The far end of a connection: keeps what it is sent."""

    def __init__(self) -> None:
        self.peer: Channel = NOBODY
        self.got = b""
        self.ended = self.aborted = False

    def write(self, data: Data) -> None:
        self.got += bytes(data)

    def write_eof(self) -> None:
        self.ended = True

    def abort(self, error: Exception | None = None) -> None:
        self.aborted = True

    def pause_reading(self) -> None:
        """Nothing is held back here."""

    def resume_reading(self) -> None:
        """As above."""

    @property
    def status(self) -> int:
        return int(self.got.split()[1]) if self.got else 0


class Filter:
    """An inbound filter between wires; each request's connection to the app is in ``apps``."""

    def __init__(self, limit: int, **options: float) -> None:
        self.side = InboundHttp(HttpOptions(service="db", uri=OWN_URI, **options))  # type: ignore[arg-type]
        self.memory = self.side.memory = MemoryBudget(limit)
        self.stats = HttpCounters()
        self.apps: list[Wire] = []
        self.dialled = asyncio.Event()

    async def _dial(self, peer: Channel) -> Channel:
        wire = Wire()
        wire.peer = peer
        self.apps.append(wire)
        self.dialled.set()
        return wire

    def connect(self) -> tuple[Wire, InboundConnection]:
        wire = Wire()
        connection = self.side.serve(
            wire,
            peer=WEB,
            dial=self._dial,
            decide=lambda request: ALLOW_ALL.decide_request(WEB, "db", "db-1", request),
            stats=self.stats,
        )
        return wire, connection

    async def asked(self, request: bytes = b"GET / HTTP/1.1\r\nHost: db\r\n\r\n") -> tuple[Wire, Wire]:
        """Send a request; return the client's end and the app's, which has it."""
        client, connection = self.connect()
        self.dialled.clear()
        connection.write(request)
        return client, await self.app()

    async def app(self) -> Wire:
        """Return the app's end, once it has the request."""
        await self.dialled.wait()
        await until(lambda: bool(self.apps[-1].got))
        return self.apps[-1]


async def test_thousands_of_slow_heads_take_no_more_than_the_budget() -> None:
    limit = 4 << 20
    made = Filter(limit)
    clients = [made.connect() for _ in range(3000)]
    piece = b"x-%d: " + b"y" * 8000 + b"\r\n"
    for _, connection in clients:
        connection.write(HEAD)
    for round in range(4):
        for _, connection in clients:
            connection.write(piece % round)
            assert made.memory.held <= limit
    refused = [wire for wire, _ in clients if wire.status]
    assert {wire.status for wire in refused} == {503}
    assert b"holds too many requests" in refused[0].got
    assert 0 < len(clients) - len(refused) <= limit // 32000
    assert made.memory.overruns == len(refused) == made.stats.requests["", 503, "overloaded"]
    for wire, connection in clients:
        if not wire.status:
            connection.write(b"\r\n")
    assert made.memory.held == 0
    await made.side.close()


async def test_a_request_is_refused_at_its_beginning_while_memory_is_scarce() -> None:
    made = Filter(100_000)
    _, filling = made.connect()
    filling.write(HEAD + b"a: " + b"x" * 12_000)
    filling.write(b"x" * 14_000)
    made.memory.held += 60_000
    assert made.memory.scarce
    late, connection = made.connect()
    connection.write(HEAD)
    assert late.status == 503
    filling.write(b"x" * 100)
    assert filling in made.side.connections, "it may go on"
    whole, _ = await made.asked(), None
    assert whole[1].got.startswith(b"GET / "), "what arrives whole holds nothing"
    await made.side.close()
    assert made.memory.held == 60_000


async def test_what_counts_is_what_it_takes() -> None:
    """The shortest fields take the most beside their bytes."""
    made = Filter(64 << 20)
    clients = [made.connect() for _ in range(200)]
    lines = b"a:b\r\n" * 120
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        for _, connection in clients:
            connection.write(HEAD)
            connection.write(lines)
        taken = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert made.memory.held > 0
    assert taken <= made.memory.held * 1.5, (taken, made.memory.held)
    await made.side.close()


async def test_more_headers_than_may_be_are_refused_before_the_head_is_whole() -> None:
    made = Filter(64 << 20, header_count_max=10)
    wire, connection = made.connect()
    connection.write(HEAD)
    connection.write(b"a:b\r\n" * 11)
    assert wire.status == 431
    assert made.memory.held == 0
    app = await made.asked()
    app[1].peer.write(ANSWER + b"a:b\r\n" * 11)
    assert app[0].status == 502
    assert made.memory.held == 0
    await made.side.close()


End = Callable[[Filter, Wire, InboundConnection], None]
REQUEST_ENDS: dict[str, tuple[bytes, End]] = {
    "whole": (HEAD, lambda f, w, c: c.write(b"\r\n")),
    "whole, and the next begun": (HEAD, lambda f, w, c: (c.write(b"\r\n" + HEAD), c.abort())[0]),
    "the last one, and junk": (HEAD + b"Connection: close\r\n", lambda f, w, c: c.write(b"\r\njunk")),
    "malformed": (HEAD, lambda f, w, c: c.write(b"a b c\r\n\r\n")),
    "too large": (HEAD, lambda f, w, c: c.write(b"x" * 90_000)),
    "upgrade": (HEAD, lambda f, w, c: c.write(b"Connection: upgrade\r\nUpgrade: websocket\r\n\r\n")),
    "upgrade not passed on": (HEAD, lambda f, w, c: c.write(b"Connection: upgrade\r\nUpgrade: h2c\r\n\r\n")),
    "CONNECT": (b"CONNECT db:1 HTTP/1.1\r\nHost: db\r\n", lambda f, w, c: c.write(b"\r\n")),
    "trailers whole": (CHUNKED + b"0\r\nx: y\r\n", lambda f, w, c: c.write(b"\r\n")),
    "trailers behind a body": (
        CHUNKED + b"1\r\na\r\n0\r\nx: " + b"y" * 9000,
        lambda f, w, c: c.write(b"\r\n\r\n"),
    ),
    "trailers malformed": (CHUNKED + b"0\r\nx: y\r\n", lambda f, w, c: c.write(b"a b\r\n")),
    "the client's end": (HEAD, lambda f, w, c: c.write_eof()),
    "the client's loss": (HEAD, lambda f, w, c: c.abort(ConnectionResetError())),
    "the deadline": (HEAD, lambda f, w, c: c.expire()),
    "cut": (HEAD, lambda f, w, c: c.cut()),
}  # fmt: skip


@pytest.mark.parametrize("case", list(REQUEST_ENDS))
async def test_a_request_gives_back_what_it_held_however_it_ends(case: str) -> None:
    begun, end = REQUEST_ENDS[case]
    made = Filter(1 << 20)
    wire, connection = made.connect()
    connection.write(begun)
    assert made.memory.held >= min(len(begun), 9000) // 2, "it is counted"
    if b"\r\n\r\n" in begun:
        await made.app()
    end(made, wire, connection)
    assert made.memory.held == 0
    await made.side.close()
    assert made.memory.held == 0


@pytest.mark.parametrize("at", range(1, len(HEAD) + 2))
async def test_a_head_split_anywhere_is_served_and_counted_no_more(at: int) -> None:
    whole = HEAD + b"\r\n"
    made = Filter(1 << 20)
    _, connection = made.connect()
    connection.write(whole[:at])
    assert made.memory.held > 0
    connection.write(whole[at:])
    assert made.memory.held == 0
    await made.dialled.wait()
    await made.side.close()


async def test_the_side_closing_gives_back_everything() -> None:
    made = Filter(1 << 20)
    for _ in range(10):
        made.connect()[1].write(HEAD)
    client, app = await made.asked()
    app.peer.write(ANSWER)
    assert made.memory.held > 10 * len(HEAD)
    await made.side.close()
    assert made.memory.held == 0
    assert client.aborted


ResponseEnd = Callable[[Wire, Wire], object]
RESPONSE_ENDS: dict[str, tuple[bytes, ResponseEnd]] = {
    "whole": (ANSWER, lambda client, app: app.peer.write(b"\r\nok")),
    "whole, and junk": (ANSWER, lambda client, app: app.peer.write(b"\r\nokjunk")),
    "malformed": (ANSWER, lambda client, app: app.peer.write(b"a b\r\n\r\n")),
    "too large": (ANSWER, lambda client, app: [app.peer.write(b"x" * 60_000) for _ in range(4)]),
    "the app's end": (ANSWER, lambda client, app: app.peer.write_eof()),
    "the app's loss": (ANSWER, lambda client, app: app.peer.abort(ConnectionResetError())),
    "the client's loss": (ANSWER, lambda client, app: client.peer.abort()),
    "trailers whole": (
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n1\r\na\r\n0\r\nx: " + b"y" * 9000,
        lambda client, app: app.peer.write(b"\r\n\r\n"),
    ),
    "trailers and the app's end": (
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n1\r\na\r\n0\r\nx: " + b"y" * 9000,
        lambda client, app: app.peer.write_eof(),
    ),
    "until its end": (b"HTTP/1.1 200 OK\r\nx-one: 1\r\n", lambda client, app: app.peer.write(b"\r\nbody")),
    "interim": (
        b"HTTP/1.1 103 Early Hints\r\nx-one: 1\r\n",
        lambda client, app: app.peer.write(b"\r\n" + ANSWER + b"\r\nok"),
    ),
    "no content": (b"HTTP/1.1 204 No Content\r\nx-one: 1\r\n", lambda client, app: app.peer.write(b"\r\n")),
}  # fmt: skip


@pytest.mark.parametrize("case", list(RESPONSE_ENDS))
async def test_a_response_gives_back_what_it_held_however_it_ends(case: str) -> None:
    begun, end = RESPONSE_ENDS[case]
    made = Filter(1 << 20)
    client, app = await made.asked()
    assert made.memory.held == 0
    app.peer.write(begun)
    assert made.memory.held >= min(len(begun), 9000) // 2, "it is counted"
    end(client, app)
    assert made.memory.held == 0
    await made.side.close()
    assert made.memory.held == 0


async def test_a_switch_of_protocols_gives_back_what_its_head_held() -> None:
    made = Filter(1 << 20)
    ask = b"GET /x HTTP/1.1\r\nHost: db\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n"
    client, app = await made.asked(ask)
    app.peer.write(b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\n")
    assert made.memory.held > 0
    app.peer.write(b"upgrade: websocket\r\n\r\nhello")
    assert made.memory.held == 0
    assert client.got.endswith(b"hello")
    await made.side.close()


async def test_slow_responses_take_no_more_than_the_budget_and_callers_are_told() -> None:
    limit = 1 << 20
    made = Filter(limit)
    pairs = [await made.asked() for _ in range(200)]
    for _, app in pairs:
        app.peer.write(ANSWER)
    for round in range(3):
        for _, app in pairs:
            app.peer.write(b"x-%d: " % round + b"y" * 8000 + b"\r\n")
            assert made.memory.held <= limit
    refused = [client for client, _ in pairs if client.status]
    assert refused
    assert {client.status for client in refused} == {503}
    for client, app in pairs:
        if client not in refused:
            app.peer.write(b"\r\nok")
    assert made.memory.held == 0
    assert {client.status for client, _ in pairs} == {200, 503}
    await made.side.close()


async def test_a_head_that_arrives_whole_needs_no_budget() -> None:
    made = Filter(0)
    client, app = await made.asked()
    app.peer.write(ANSWER + b"\r\nok")
    assert client.status == 200
    assert made.memory.overruns == 0
    split, connection = made.connect()
    connection.write(HEAD)
    assert split.status == 503
    await made.side.close()


async def test_a_kept_connection_holds_nothing_between_responses() -> None:
    """A response whose request was given up is lost with its connection, and what it held."""

    class Nobody:
        def response_output(self, upstream: Upstream, pieces: list[bytes]) -> None: ...

        def response_complete(self, upstream: Upstream) -> None: ...

        def response_switched(self, upstream: Upstream, rest: Data) -> None: ...

        def upstream_lost(self, upstream: Upstream, error: Exception | None) -> None: ...

        def upstream_full(self, upstream: Upstream, full: bool) -> None: ...

    memory = MemoryBudget(1 << 20)
    upstream = Upstream(Nobody(), HttpOptions(linger_s=0.0), memory)
    upstream.channel = Wire()
    upstream.begin(RequestHead(b"GET", b"/", http10=False, keep_alive=True), keep_client=True)
    upstream.write(ANSWER)
    assert memory.held > 0
    upstream.close()
    assert memory.held == 0
    upstream.write(b"\r\nok")
    assert memory.held == 0
