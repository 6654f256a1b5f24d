"""Floods of HTTP/2 frames, from a caller, from our own app and from an instance: what they make us hold, do and
answer is bounded, by counts that have nothing to do with how fast anything is.

The names are those by which the attacks went: rapid reset (CVE-2023-44487), MadeYouReset (CVE-2025-8671),
CONTINUATION floods (CVE-2024-27316 and others), and those of 2019: pings, settings, resets, empty frames.
"""

from __future__ import annotations

import asyncio
import struct
from collections import Counter, deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from h2.errors import ErrorCodes
from hpack import Encoder

from proxy.authz import Decision, Request
from proxy.http import HttpCounters, HttpOptions, OutboundOptions
from proxy.http2 import InboundHttp2, OutboundHttp2
from proxy.http2.connection import Http2Connection
from proxy.http2.core import BLOCK_BYTES_MAX
from proxy.http2.frames import PREFACE, frame
from proxy.http2.half import OWED_BYTES_MAX, STREAM_WINDOW_BYTES
from proxy.http2.link import Link
from proxy.mux.flow import MemoryBudget
from proxy.stream import Channel, Data
from tests.support.http2_cases import ACK, PING, SETTINGS
from tests.unit.test_http2_inbound import ALLOWED, DENIED, WEB
from tests.unit.test_http2_outbound import Fleet

READ_BYTES = 16 * 1024
"""What the floods send at once."""
CONTROLS = 1000
"""Pings and settings that are answered to an end that reads nothing."""
RESET = struct.pack(">L", ErrorCodes.CANCEL)
BEYOND = struct.pack(">L", (1 << 31) - 1)
WIDE = frame(8, 0, 0, struct.pack(">L", 1 << 30))
FIELDS = [(b":method", b"POST"), (b":scheme", b"http"), (b":authority", b"db"), (b":path", b"/a")]
ASKED = Encoder().encode(FIELDS, huffman=False)
"""It adds an entry to the other end's table, and needs none there."""


class Far:
    """The far end of a channel: it counts what it gets, by kind of frame."""

    def __init__(self) -> None:
        self.peer: Channel = self
        self.bytes = 0
        self.frames: Counter[int] = Counter()
        self.codes: list[int] = []
        """Of the GOAWAYs."""
        self.resets: list[tuple[int, int]] = []
        """Stream and code."""
        self.blocks: list[tuple[int, bytes]] = []
        """Stream and header block, as far as it came in HEADERS."""
        self.latest = self.data = b""
        self.sizes: list[int] = []
        """Of the frames."""
        self.ended = self.aborted = False
        self._rest = b""

    def write(self, data: Data) -> None:
        self.bytes += len(data)
        self.latest = bytes(data)
        self._rest += self.latest
        self._rest = self._rest.removeprefix(PREFACE)
        while len(self._rest) >= 9:
            size, kind = int.from_bytes(self._rest[:3], "big"), self._rest[3]
            stream_id, payload = int.from_bytes(self._rest[5:9], "big"), self._rest[9 : 9 + size]
            self.frames[kind] += 1
            if kind == 7:
                self.codes.append(int.from_bytes(payload[4:8], "big"))
            elif kind == 3:
                self.resets.append((stream_id, int.from_bytes(payload, "big")))
            elif kind == 1:
                self.blocks.append((stream_id, payload))
            elif kind == 0:
                self.data += payload
            self.sizes.append(size)
            self._rest = self._rest[9 + size :]

    def write_eof(self) -> None:
        self.ended = True

    def abort(self, error: Exception | None = None) -> None:
        self.aborted = True

    def pause_reading(self) -> None: ...
    def resume_reading(self) -> None: ...

    @property
    def over(self) -> bool:
        return self.ended or self.aborted


class Victim:
    """A side with one client and one connection beyond it, to an app or an instance, on which one request went."""

    def __init__(self, side: InboundHttp2 | OutboundHttp2, connection: Http2Connection, *ends: Far) -> None:
        self.side, self.connection = side, connection
        self.client, self.far = ends
        self._next = 1

    def send(self, data: bytes) -> None:
        """Send bytes as a client, some at once, until the connection is over."""
        for at in range(0, len(data), READ_BYTES):
            if self.client.over:
                return
            self.client.peer.write(data[at : at + READ_BYTES])

    def requests(self, count: int, *, after: bytes = b"", kind: int = 3, flags: int = 0, end: bool = True) -> bytes:
        """Return so many requests, each followed by a frame of ``kind`` with ``after`` in it."""
        made = []
        for _ in range(count):
            made.append(frame(1, 5 if end else 4, self._next, ASKED))
            if after:
                made.append(frame(kind, flags, self._next, after))
            self._next += 2
        return b"".join(made)

    @property
    def under_way(self) -> int:
        return len(self.connection._exchanges)


@asynccontextmanager
async def staged(direction: str, decision: Decision = ALLOWED, **options: Any) -> AsyncIterator[Victim]:
    """A side to which nothing was said yet."""
    client, far = Far(), Far()
    http = HttpOptions(service="db", sweep_s=0.01, **options)
    side: InboundHttp2 | OutboundHttp2
    if direction == "inbound":

        async def dial(peer: Channel) -> Channel:
            far.peer = peer
            return far

        def decide(request: Request) -> Decision:
            return decision

        side = InboundHttp2(http)
        connection: Http2Connection = side.serve(client, peer=WEB, dial=dial, decide=decide, stats=HttpCounters())
    else:
        fleet = Fleet("a", None, Far)  # type: ignore[arg-type]
        if decision is ALLOWED:
            greeting_s = http.greeting_timeout_s
            link = Link(linger_s=0.01, greeting_s=greeting_s, on_end=lambda link, error: fleet.links.clear())
            fleet.links["a"], fleet.ends["a"] = link, far
            link.attach(far)
        else:
            fleet.keys = ""  # there is nobody to ask
        side = OutboundHttp2(OutboundOptions(http=http), fleet, HttpCounters())
        connection = side.serve(client)
    victim = Victim(side, connection, client, far)
    try:
        yield victim
    finally:
        connection.cut()
        assert side.memory.held == 0
        assert victim.under_way == 0
        await side.close()


async def turns() -> None:
    """Let the connection to the app be made."""
    for _ in range(5):
        await asyncio.sleep(0)


@asynccontextmanager
async def attacked(direction: str, decision: Decision = ALLOWED, **options: Any) -> AsyncIterator[Victim]:
    """One with which all was well until now."""
    async with staged(direction, decision, **options) as victim:
        victim.send(PREFACE + SETTINGS + ACK + WIDE + victim.requests(1))
        await turns()
        if decision is ALLOWED:
            assert victim.far.frames[1] == 1
            victim.far.peer.write(SETTINGS + ACK + WIDE + frame(1, 5, 1, b"\x88"))
        assert victim.under_way == 0
        assert victim.client.frames[1] == 1
        yield victim


both = pytest.mark.parametrize("direction", ["inbound", "outbound"])


@both
@pytest.mark.parametrize(
    "how",
    [
        "RST_STREAM",
        "a window beyond bounds",
        "a window by nothing",
        "a PRIORITY of four bytes",
        "trailers that do not end",
        "DATA after the end",
    ],
)
async def test_rapid_reset(direction: str, how: str) -> None:
    """By resets of its own, and by those that it makes us send."""
    async with attacked(direction) as v:
        many = 20 * v.connection.resets_max
        most = v.connection.resets_max
        if how == "RST_STREAM":
            flood = v.requests(many, after=RESET)
        elif how == "a window beyond bounds":
            flood = v.requests(many, after=BEYOND, kind=8)
        elif how == "a window by nothing":
            flood = v.requests(many, after=bytes(4), kind=8)
        elif how == "a PRIORITY of four bytes":
            flood = v.requests(many, after=bytes(4), kind=2)
        elif how == "trailers that do not end":
            flood = v.requests(many, after=b"\x00\x01x\x01y", kind=1, flags=4, end=False)
        else:
            flood = v.requests(many, after=b"x", kind=0)
        v.send(flood)
        assert v.client.aborted
        assert v.client.codes == [ErrorCodes.ENHANCE_YOUR_CALM]
        assert v.far.frames[1] <= most + 2, "no more than so many got through"
        assert v.under_way == 0


@both
@pytest.mark.parametrize("how", ["a field's name", "no method", "a length and no body", "a body that is too long"])
async def test_malformed_requests_without_end(direction: str, how: str) -> None:
    """None of them is asked for; each counts as a stream that is reset."""
    malformed = {"a field's name": ASKED + b"\x00\x01X\x01y", "no method": b"\x84\x86"}
    length = ASKED + Encoder().encode([(b"content-length", b"3")], huffman=False)
    async with attacked(direction) as v:
        passed = v.far.frames[1]
        flood = []
        for at in range(v._next, v._next + 40 * v.connection.resets_max, 2):
            if how == "a body that is too long":
                flood += [frame(1, 4, at, length), frame(0, 0, at, b"four")]
            else:
                flood.append(frame(1, 5, at, malformed.get(how, length)))
        v.send(b"".join(flood))
        assert v.client.aborted
        assert v.client.codes == [ErrorCodes.ENHANCE_YOUR_CALM]
        assert v.client.frames[3] <= v.connection.resets_max + READ_BYTES // 10
        if how != "a body that is too long":
            assert v.far.frames[1] == passed
        assert v.under_way == 0


@both
async def test_resets_of_those_who_use_most_of_what_they_open_are_no_flood(direction: str) -> None:
    async with attacked(direction) as v:
        for _ in range(v.connection.resets_max + 100):
            at = v._next
            v.send(v.requests(2))
            v.send(frame(3, 0, at, RESET))
            v.far.peer.write(b"".join(frame(1, 5, n, b"\x88") for n in range(at, at + 4, 2)))
            assert not v.client.over
            assert v.under_way == 0


@both
@pytest.mark.parametrize("piece", [0, 100, 16384])
async def test_a_header_block_that_does_not_end(direction: str, piece: int) -> None:
    async with attacked(direction) as v:
        v.send(frame(1, 0, v._next, ASKED) + frame(9, 0, v._next, bytes(piece)) * 1000)
        assert v.client.ended
        assert v.client.codes == [ErrorCodes.ENHANCE_YOUR_CALM]
        core = v.connection._client.core
        assert (core._block, core._rest) == ([], b""), "nothing of it is kept"
        assert core._block_bytes <= BLOCK_BYTES_MAX + 16384
        assert v.far.frames[1] == 1, "nothing of it went on"


@both
async def test_a_header_list_that_unfolds(direction: str) -> None:
    """A few bytes that name one large entry of the table again and again."""
    async with attacked(direction) as v:
        large = b"\x40\x01x\x7f\xa1\x1e" + b"v" * 4000
        v.send(frame(1, 4, v._next, ASKED + large))
        at = v._next + 2
        v.send(frame(1, 4, at, ASKED + b"\xbf" * 10_000))
        assert v.client.resets == [(at, ErrorCodes.ENHANCE_YOUR_CALM)]
        assert v.far.frames[1] == 2
        assert v.connection._client.core._decoder._block == b""
        held = v.side.memory.held
        for n in range(2 * v.connection.resets_max):
            v.send(frame(1, 4, at + 2 + 2 * n, ASKED + b"\xbf" * 100))
        assert v.client.aborted
        assert v.client.codes == [ErrorCodes.ENHANCE_YOUR_CALM]
        assert v.far.frames[1] == 2
        assert v.side.memory.held <= held


@both
async def test_a_frame_that_says_to_be_large_is_not_waited_for(direction: str) -> None:
    async with attacked(direction) as v:
        v.send(b"\xff\xff\xff\x00\x00\x00\x00\x00\x01")
        assert v.client.codes == [ErrorCodes.FRAME_SIZE_ERROR]


@both
@pytest.mark.parametrize("control", [PING, SETTINGS])
async def test_pings_and_settings(direction: str, control: bytes) -> None:
    async with attacked(direction) as v:
        kind = control[3]
        before = v.client.frames[kind]
        v.send(control * 5000)
        assert v.client.frames[kind] == before + 5000, "who reads its answers gets them"
        v.connection.receiver.pause_reading()
        v.send(control * 50_000)
        assert v.client.aborted
        at_once = READ_BYTES // len(control) + 1
        assert v.client.frames[kind] <= before + 5000 + CONTROLS + at_once


@both
async def test_pings_from_beyond(direction: str) -> None:
    """An app or an instance that makes us answer and reads nothing."""
    async with attacked(direction) as v:
        v.far.peer.pause_reading()
        for _ in range(20):
            v.far.peer.write(PING * 100)
        assert v.far.aborted
        assert v.far.frames[6] <= CONTROLS + 100
        assert not v.client.over, "the client is asked to bear nothing of it"


@both
@pytest.mark.parametrize(
    "nothing",
    [
        frame(2, 0, 77, struct.pack(">LB", 0, 1)),
        frame(99, 0, 0, b"x" * 10),
        frame(8, 0, 1, struct.pack(">L", 1)),
        frame(3, 0, 1, RESET),
        frame(6, 1, 0, b"12345678"),
        frame(4, 1, 0, b""),
    ],
    ids=["priority", "unknown", "a window that is gone", "a reset of what is gone", "pong", "settings' ack"],
)
async def test_what_asks_for_nothing_is_not_answered_and_not_kept(direction: str, nothing: bytes) -> None:
    async with attacked(direction) as v:
        sent, passed = v.client.bytes, v.far.bytes
        v.send(nothing * 20_000)
        assert (v.client.bytes, v.far.bytes) == (sent, passed)
        assert not v.client.over
        assert v.connection._client.core._streams == {}
        assert v.side.memory.held == 0


@both
@pytest.mark.parametrize("size", [0, 1])
async def test_data_in_very_small_pieces(direction: str, size: int) -> None:
    async with attacked(direction) as v:
        stream_id = v._next
        v.send(v.requests(1, end=False))
        v.far.peer.write(frame(4, 0, 0, struct.pack(">HL", 4, 0)))  # it takes nothing, from now on
        sent = v.client.bytes
        v.send(frame(0, 0, stream_id, b"x" * size) * 50_000)
        (exchange,) = v.connection._exchanges.values()
        assert len(exchange.to_link) <= 8
        assert exchange.replay is not None
        assert len(exchange.replay.parts) <= 8
        assert v.client.bytes - sent <= 64, "no answer but a window or two"
        assert v.side.memory.held <= STREAM_WINDOW_BYTES + 1024


@both
async def test_data_beyond_a_window_of_which_nothing_was_given_back(direction: str) -> None:
    async with attacked(direction) as v:
        v.send(v.requests(1, end=False))
        v.far.peer.write(frame(4, 0, 0, struct.pack(">HL", 4, 0)))
        v.send(frame(0, 0, v._next - 2, bytes(16384)) * 100)
        assert v.client.codes == [ErrorCodes.FLOW_CONTROL_ERROR]
        assert v.side.memory.held == 0


@both
async def test_data_and_headers_of_streams_that_are_gone(direction: str) -> None:
    """A stream is reset once for it; what comes after that is neither answered nor kept (RFC 9113, section 5.1)."""
    async with attacked(direction) as v:
        v.send(frame(0, 0, 1, b"") * 1000)
        assert v.client.frames[3] == 1
        sent, refused = v.client.bytes, b"\x00\x01X\x01y"
        v.send((frame(0, 0, 1, b"x" * 100) + frame(1, 5, 1, refused)) * 10_000)
        windows = v.client.frames[8] * 13
        assert v.client.bytes <= sent + windows, "but the connection's window, which is to stay as wide as it is"
        assert not v.client.over
        assert v.connection._client.core._streams == {}


@both
async def test_requests_that_we_answer_ourselves(direction: str) -> None:
    """Whoever is denied, or gets nobody, asks again and again and reads no answer."""
    async with attacked(direction, DENIED) as v:
        v.connection.receiver.pause_reading()
        at_once, answer_bytes = 100, 256
        for _ in range(500):
            v.send(v.requests(at_once))
        assert v.client.aborted
        assert v.client.bytes <= OWED_BYTES_MAX + at_once * answer_bytes
        assert v.far.frames[1] == 0


@both
async def test_a_client_that_takes_nothing_of_what_it_asks_for(direction: str) -> None:
    """A window of 0 on all streams, each with a long answer."""
    async with attacked(direction) as v:
        budget = v.side.memory = MemoryBudget(1_000_000)
        v.send(frame(4, 0, 0, struct.pack(">HL", 4, 0)))
        peak = 0
        for _ in range(200):
            at = v._next
            if v.client.over:
                break
            v.send(v.requests(1))
            if v.far.frames[1] * 2 <= at:
                continue  # refused
            stream_id = 2 * v.far.frames[1] - 1
            v.far.peer.write(frame(1, 4, stream_id, b"\x88"))
            for _ in range(STREAM_WINDOW_BYTES // 16384):
                v.far.peer.write(frame(0, 0, stream_id, bytes(16384)))
            peak = max(peak, budget.held)
        assert 500_000 < peak <= 1_000_000
        assert v.under_way <= 1_000_000 // 16384 + 1
        assert v.client.frames[0] == 0
        assert v.client.frames[3] >= 100, "the others were turned away"


@both
async def test_informational_responses_without_end(direction: str) -> None:
    async with attacked(direction) as v:
        v.send(v.requests(1))
        before = v.client.frames[1]
        hint = Encoder().encode([(b":status", b"103")], huffman=False)
        for _ in range(1000):
            v.far.peer.write(frame(1, 4, 3, hint))
        assert v.far.over
        assert v.client.frames[1] - before <= 101
        assert v.under_way == 0


class Asked(deque[Any]):
    """What waits to be sent on a stream; it counts how often somebody asks whether anything does."""

    times = 0

    def __len__(self) -> int:
        Asked.times += 1
        return super().__len__()


@both
@pytest.mark.parametrize("whose", ["the client", "the far end"])
@pytest.mark.parametrize("by", ["WINDOW_UPDATE", "SETTINGS"])
async def test_windows_that_open_by_little_are_looked_at_once_for_all(direction: str, whose: str, by: str) -> None:
    async with attacked(direction) as v:
        v.send(v.requests(50))
        assert v.under_way == 50
        for exchange in v.connection._exchanges.values():
            exchange.to_client = Asked()
            exchange.to_link = Asked()
        Asked.times = 0
        peer = v.client.peer if whose == "the client" else v.far.peer
        if by == "SETTINGS":
            peer.write(b"".join(frame(4, 0, 0, struct.pack(">HL", 4, 65535 + n % 2)) for n in range(1, 502)))
        else:
            peer.write(frame(8, 0, 0, struct.pack(">L", 1)) * 500)
        assert Asked.times <= 50 * 4
        assert not v.client.over
