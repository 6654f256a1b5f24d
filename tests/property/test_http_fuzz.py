"""Any bytes, in any splits: the filter answers or closes, holds little, and the app sees the same requests."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.authz import Decision, Request
from proxy.http import HttpCounters, HttpOptions, InboundConnection, InboundHttp
from proxy.stream import Channel, Data
from raftstate.model.identity import Identity

ALLOWED = Decision(True, None, "test")
DENIED = Decision(False, None, "test")
OPTIONS = HttpOptions(service="db", head_bytes_max=2000, header_count_max=20, linger_s=0.01)


class Recorder:
    """The outside of a channel, in memory."""

    def __init__(self) -> None:
        self.peer: Channel = self
        self.sent = bytearray()
        self.ended = self.aborted = False
        self.paused = False

    def write(self, data: Data) -> None:
        assert not self.ended, "written after the end"
        if not self.aborted:
            self.sent += data

    def write_eof(self) -> None:
        self.ended = True

    def abort(self, error: Exception | None = None) -> None:
        self.aborted = True

    def pause_reading(self) -> None:
        self.paused = True

    def resume_reading(self) -> None:
        self.paused = False


class AppConnection(Recorder):
    """Answers each whole request, later, as a socket would. Reads only what the filter may send; else it fails."""

    def __init__(self, app: FakeApp, peer: Channel) -> None:
        super().__init__()
        self.app = app
        self.peer = peer

    def write(self, data: Data) -> None:
        super().write(data)
        asyncio.get_running_loop().call_soon(self.serve)

    def serve(self) -> None:
        while not (self.aborted or self.ended) and (parsed := read_request(self.sent)) is not None:
            head, body, size = parsed
            del self.sent[:size]
            self.app.seen.append((head, body))
            answer = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n"
            self.peer.write(answer if head.startswith(b"HEAD ") else answer + b"ok")


class FakeApp:
    def __init__(self) -> None:
        self.seen: list[tuple[bytes, bytes]] = []
        self.connections: list[AppConnection] = []

    async def dial(self, peer: Channel) -> Channel:
        made = AppConnection(self, peer)
        self.connections.append(made)
        return made


def read_request(data: bytearray) -> tuple[bytes, bytes, int] | None:
    """Return (head, body, bytes taken) of one request in the strict form that the filter writes."""
    at = data.find(b"\r\n\r\n")
    if at < 0:
        return None
    head = bytes(data[:at])
    start, *lines = head.split(b"\r\n")
    assert start.count(b" ") == 2
    assert start.endswith(b" HTTP/1.1")
    names = [line.split(b": ", 1)[0].lower() for line in lines]
    assert names.count(b"content-length") + names.count(b"transfer-encoding") <= 1
    assert not any(c in line for line in lines for c in (b"\r", b"\n", b"\x00"))
    at += 4
    if b"transfer-encoding" in names:
        body = b""
        while True:
            end = data.find(b"\r\n", at)
            if end < 0:
                return None
            size = int(data[at:end], 16)
            at = end + 2
            if not size:
                stop = data.find(b"\r\n", at)
                while stop > at:
                    at = stop + 2
                    stop = data.find(b"\r\n", at)
                return None if stop < 0 else (head, body, at + 2)
            if len(data) < at + size + 2:
                return None
            body += data[at : at + size]
            assert data[at + size : at + size + 2] == b"\r\n"
            at += size + 2
    if b"content-length" in names:
        size = int(lines[names.index(b"content-length")].split(b": ")[1])
        return (head, bytes(data[at : at + size]), at + size) if len(data) >= at + size else None
    return head, b"", at


async def run(
    pieces: list[bytes], decide: Callable[[Request], Decision], *, eof: bool = True
) -> tuple[FakeApp, Recorder]:
    app, client = FakeApp(), Recorder()
    http = InboundHttp(OPTIONS)
    done: list[bool] = []
    connection = http.serve(
        client,
        peer=Identity(service="web"),
        dial=app.dial,
        decide=decide,
        stats=HttpCounters(),
        on_done=lambda: done.append(True),
    )
    try:
        for piece in pieces:
            if client.aborted or done:
                break
            client.peer.write(piece)
            for _ in range(3):
                await asyncio.sleep(0)
            check_bounds(connection, app)
            # A paused channel delivers no more: wait as a socket would, as long as something goes on.
            for _ in range(10_000):
                if not client.paused or client.aborted:
                    break
                await asyncio.sleep(0)
            assert not client.paused, "paused for good"
        if eof and not done:
            client.peer.write_eof()
            for _ in range(10_000):
                if done:
                    break
                await asyncio.sleep(0)
            assert done, "the connection hangs"
            assert client.ended or client.aborted
    finally:
        await http.close()
    return app, client


def check_bounds(connection: InboundConnection, app: FakeApp) -> None:
    parser = connection._parser
    queued = sum(len(piece) for message in parser.messages for piece in message.body)
    assert queued <= 16 * 1024
    assert sum(len(name) + len(value) for name, value in parser._fields) <= OPTIONS.head_bytes_max + 2 * 16 * 1024


def split(data: bytes, cuts: list[int]) -> list[bytes]:
    places = sorted({cut % (len(data) + 1) for cut in cuts} | {0, len(data)})
    return [data[a:b] for a, b in pairwise(places) if a < b]


tokens = st.sampled_from(
    [
        b"GET / HTTP/1.1\r\n",
        b"POST /x HTTP/1.1\r\n",
        b"HEAD /h HTTP/1.0\r\n",
        b"Host: a\r\n",
        b"\r\n",
        b"\n",
        b"\r",
        b"Content-Length: 5\r\n",
        b"Content-Length: 0\r\n",
        b"Transfer-Encoding: chunked\r\n",
        b"hello",
        b"5\r\nhello\r\n",
        b"0\r\n\r\n",
        b"0\r\nX: t\r\n\r\n",
        b"X: y\r\n",
        b"X : y\r\n",
        b" folded\r\n",
        b"Connection: close\r\n",
        b"\x00",
        b"Connection: upgrade\r\nUpgrade: websocket\r\n",
        b"Connection: upgrade\r\nUpgrade: h2c\r\n",
        b"/",
        b" ",
        b"%2f",
        b"Expect: 100-continue\r\n",
        b"GET /",
        b" HTTP/1.1\r\n",
        b"Connection: keep-alive\r\n",
        b"CONNECT a:1 HTTP/1.1\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"X: " + b"v" * 1500 + b"\r\n",
        b"Y" * 700,
    ]
)
GOOD = [
    b"GET /a?b HTTP/1.1\r\nHost: a\r\nX: y\r\n\r\n",
    b"POST /b HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nhello",
    b"POST /c HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n3;x=y\r\nabc\r\n2\r\nde\r\n0\r\nT: u\r\n\r\n",
    b"HEAD /d HTTP/1.1\r\nHost: a\r\n\r\n",
    b"GET http://a/e HTTP/1.1\r\nHost: a\r\nConnection: keep-alive, x-hop\r\nX-Hop: 1\r\n\r\n",
    b"GET /deny HTTP/1.1\r\nHost: a\r\n\r\n",
    b"GET /up HTTP/1.1\r\nHost: a\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n",
    b"POST /h2c HTTP/1.1\r\nHost: a\r\nConnection: upgrade\r\nUpgrade: h2c\r\nContent-Length: 3\r\n\r\nabc",
    b"GET /f HTTP/1.0\r\nConnection: keep-alive\r\n\r\n",
]
LAST = [
    b"",
    b"GET /last HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\nGET /never HTTP/1.1\r\nHost: a\r\n\r\n",
    b"GET /last HTTP/1.0\r\n\r\nGET /never HTTP/1.1\r\nHost: a\r\n\r\n",
    b"GET /bad HTTP/1.1\r\nHost : a\r\n\r\nGET /never HTTP/1.1\r\nHost: a\r\n\r\n",
    b"POST /bad HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
    b"zz\r\nGET /never HTTP/1.1\r\nHost: a\r\n\r\n",
    b"GET /cut",
    b"POST /cut HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\nabc",
]
cuts = st.lists(st.integers(0, 100_000), max_size=12)


def by_path(request: Request) -> Decision:
    return DENIED if request.target == "/deny" else ALLOWED


@settings(max_examples=300, deadline=None)
@given(st.one_of(st.lists(tokens, max_size=25).map(b"".join), st.binary(max_size=300)), cuts)
def test_any_bytes_in_any_splits(data: bytes, where: list[int]) -> None:
    app, client = asyncio.run(run(split(data, where), by_path))
    assert client.aborted or client.sent == b"" or client.sent.startswith(b"HTTP/1.1 ")
    assert not any(b"/deny " in head for head, _ in app.seen)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from(GOOD), max_size=8), st.sampled_from(LAST), cuts)
def test_the_splits_make_no_difference(messages: list[bytes], last: bytes, where: list[int]) -> None:
    data = b"".join(messages) + last
    whole, whole_client = asyncio.run(run([data], by_path))
    parts, parts_client = asyncio.run(run(split(data, where), by_path))
    assert parts.seen == whole.seen
    assert parts_client.sent == whole_client.sent
    wanted = sum(b"/deny" not in message for message in messages) + last.startswith(b"GET /last")
    assert len(whole.seen) == wanted
    assert whole_client.sent.count(b"HTTP/1.1 403 ") == sum(b"/deny" in message for message in messages)
    assert whole_client.sent.count(b"HTTP/1.1 400 ") == (b"/bad" in last)
    assert not any(b"/never" in head for head, _ in whole.seen)


def test_thousands_of_requests_in_one_piece() -> None:
    data = GOOD[0] * 5000
    app, client = asyncio.run(run([data], by_path))
    assert len(app.seen) == 5000
    assert client.sent.count(b"HTTP/1.1 200 OK") == 5000
    assert len(app.connections) == 1


def test_thousands_of_denials_in_one_piece() -> None:
    app, client = asyncio.run(run([GOOD[5] * 5000], by_path))
    assert client.sent.count(b"HTTP/1.1 403 ") == 5000
    assert app.connections == []


async def pressed(work: Callable[[Recorder, FakeApp], Awaitable[None]]) -> None:
    app, client = FakeApp(), Recorder()
    http = InboundHttp(OPTIONS)
    http.serve(client, peer=Identity(service="web"), dial=app.dial, decide=by_path, stats=HttpCounters())
    try:
        await work(client, app)
    finally:
        await http.close()


async def turns() -> None:
    for _ in range(50):
        await asyncio.sleep(0)


def test_a_client_that_takes_no_answers_gets_no_more_requests_served() -> None:
    async def work(client: Recorder, app: FakeApp) -> None:
        client.peer.write(GOOD[0])
        await turns()
        client.peer.pause_reading()
        client.peer.write((GOOD[0] + GOOD[5]) * 500)
        await turns()
        assert client.paused
        assert len(app.seen) <= 2
        served = len(client.sent)
        client.peer.resume_reading()
        await turns()
        assert len(client.sent) > served
        for _ in range(100):
            await turns()
        assert len(app.seen) == 501

    asyncio.run(pressed(work))


def test_an_app_that_takes_no_more_is_sent_no_more() -> None:
    async def work(client: Recorder, app: FakeApp) -> None:
        client.peer.write(b"PUT / HTTP/1.1\r\nHost: a\r\nContent-Length: 1000000\r\n\r\n")
        await turns()
        (connection,) = app.connections
        connection.peer.pause_reading()
        client.peer.write(bytes(500_000))
        await turns()
        assert client.paused
        assert len(connection.sent) <= 16 * 1024 + 100
        connection.peer.resume_reading()
        client.peer.write(bytes(500_000))
        await turns()
        assert not client.paused
        assert [len(body) for _, body in app.seen] == [1_000_000]

    asyncio.run(pressed(work))
