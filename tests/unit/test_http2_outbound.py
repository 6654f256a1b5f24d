"""The caller's side of HTTP/2 in memory: what is sent again or not, what it holds, and junk from both ends."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Hashable
from contextlib import asynccontextmanager
from typing import Any

import h2.connection
import h2.events
import pytest
from h2.errors import ErrorCodes
from h2.settings import SettingCodes
from hyperframe.frame import GoAwayFrame
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.errors import ConnectFailed, StreamRefused
from proxy.http import HttpCounters, HttpOptions, OutboundOptions
from proxy.http.head import Field
from proxy.http2 import OutboundHttp2
from proxy.http2.half import PREFACE
from proxy.http2.head import RequestHead
from proxy.http2.link import Link
from proxy.stream import Channel
from tests.unit.test_http2_inbound import End, Sink, frames

GRPC = (("content-type", "application/grpc"), ("te", "trailers"))


class Aim:
    """As a route may say it."""

    def __init__(self, **said: Any) -> None:
        self.request_timeout_s = 0.0
        self.idle_timeout_s = 0.0
        self.attempts_max = 0
        self.retry_statuses: frozenset[int] = frozenset()
        self.retry_grpc: frozenset[bytes] = frozenset()
        self.retry_resets = False
        for name, value in said.items():
            assert hasattr(self, name)
            setattr(self, name, value)

    def target(self, target: bytes) -> bytes:
        return b"/to" + target

    def asked(self, fields: list[Field]) -> list[Field]:
        return [*fields, (b"x-asked", b"1")]

    def answered(self, fields: list[Field]) -> list[Field]:
        return [*fields, (b"x-answered", b"1")]


class Lease:
    def __init__(self, fleet: Fleet, key: Hashable) -> None:
        self.fleet, self.key = fleet, key
        self.over = False
        fleet.live.append(self)

    def link(self) -> Link | None:
        return self.fleet.links.get(self.key)

    async def connect(self) -> Link:
        await asyncio.sleep(0)
        if self.key in self.fleet.down:
            raise ConnectFailed("refused", f"{self.key} is down")
        return self.fleet.links.setdefault(self.key, self.fleet.make(self.key))

    def failed(self, reason: str) -> None:
        self.fleet.failures.append((self.key, reason))

    def silent(self, reason: str) -> None:
        self.fleet.silences.append((self.key, reason))

    def answered(self, status: int) -> None:
        self.fleet.statuses.append((self.key, status))

    def refusal(self, refused: StreamRefused) -> tuple[int, str] | None:
        return (403, "denied") if refused.code == 1 else None

    def done(self) -> None:
        if not self.over:
            self.over = True
            self.fleet.live.remove(self)


class Fleet:
    """Instances ``a``, ``b``, …, picked in this order."""

    def __init__(self, keys: str, aim: Aim | None, far: type[End | Sink]) -> None:
        self.keys, self.said, self.far = keys, aim, far
        self.links: dict[Hashable, Link] = {}
        self.ends: dict[Hashable, Any] = {}
        self.down: set[Hashable] = set()
        self.live: list[Lease] = []
        self.failures: list[tuple[Hashable, str]] = []
        self.silences: list[tuple[Hashable, str]] = []
        self.statuses: list[tuple[Hashable, int]] = []
        self.budget = 100

    def make(self, key: Hashable) -> Link:
        link = Link(linger_s=0.01, on_end=lambda link, error: self.links.pop(key, None) and None)
        end = self.ends[key] = End(client=False) if self.far is End else Sink()
        link.attach(end)
        return link

    def aim(self, head: RequestHead, client: Channel) -> Aim | None:
        return self.said

    def unavailable(self) -> str:
        return ""

    def pick(self, tried: set[Hashable], aim: object) -> Lease | None:
        key = next((key for key in self.keys if key not in tried), None)
        return None if key is None else Lease(self, key)

    def may_retry(self) -> bool:
        self.budget -= 1
        return self.budget >= 0


class _Connection(h2.connection.H2Connection):
    """h2's, but a GOAWAY leaves the streams under way alone (RFC 9113, section 6.8); h2 would end them all."""

    def _receive_goaway_frame(self, frame: GoAwayFrame) -> tuple[list[Any], list[h2.events.Event]]:
        event = h2.events.ConnectionTerminated()
        event.error_code = frame.error_code
        event.last_stream_id = frame.last_stream_id
        event.additional_data = frame.additional_data or None
        return [], [event]


class Client(End):
    """An app that goes on with what is under way after a GOAWAY, which the h2 package alone would not."""

    def __init__(self) -> None:
        super().__init__(client=True)
        self.conn = _Connection(self.conn.config)
        self.conn.initiate_connection()


class Setting:
    def __init__(self, keys: str, aim: Aim | None, far: type[End | Sink], **options: Any) -> None:
        self.fleet = Fleet(keys, aim, far)
        self.counters = HttpCounters()
        http = HttpOptions(service="db", sweep_s=0.01, **options)
        self.side = OutboundHttp2(OutboundOptions(http=http), self.fleet, self.counters)
        self.client: Any = Client() if far is End else Sink()
        self.done = False

        def on_done() -> None:
            self.done = True

        self.side.serve(self.client, on_done)

    async def step(self) -> None:
        """Let all ends exchange what they have until nothing moves."""
        for _ in range(20):
            self.client.push()
            for end in list(self.fleet.ends.values()):
                end.push()
            await asyncio.sleep(0)

    async def request(self, *extra: tuple[str, str], method: str = "POST", end: bool = True) -> int:
        stream_id: int = self.client.conn.get_next_available_stream_id()
        headers = [(":method", method), (":scheme", "http"), (":authority", "db"), (":path", "/a"), *extra]
        self.client.conn.send_headers(stream_id, headers, end_stream=end)
        await self.step()
        return stream_id

    async def answer(self, key: str, status: str = "200", stream_id: int = 0) -> None:
        end = self.fleet.ends[key]
        stream_id = stream_id or end.of(h2.events.RequestReceived)[-1].stream_id
        end.conn.send_headers(stream_id, [(":status", status)], end_stream=True)
        await self.step()

    def statuses(self) -> list[str]:
        return [dict(event.headers)[":status"] for event in self.client.of(h2.events.ResponseReceived)]


@asynccontextmanager
async def setting(
    keys: str = "ab", aim: Aim | None = None, far: type[End | Sink] = End, **options: Any
) -> AsyncIterator[Setting]:
    made = Setting(keys, aim, far, **options)
    try:
        yield made
        assert made.side.in_flight == len(made.fleet.live)
        assert made.side.pending == 0
    finally:
        await made.side.close()
        assert made.fleet.live == []


async def test_what_a_plan_says_is_done_to_request_and_response() -> None:
    async with setting(aim=Aim()) as s:
        await s.request(("x-forwarded-client-cert", "forged"))
        seen = s.fleet.ends["a"].of(h2.events.RequestReceived)[0].headers
        assert dict(seen)[":path"] == "/to/a"
        assert dict(seen)["x-asked"] == "1"
        assert "forged" not in dict(seen).values()
        await s.answer("a")
        assert dict(s.client.of(h2.events.ResponseReceived)[0].headers) == {":status": "200", "x-answered": "1"}
        assert s.fleet.statuses == [("a", 200)]


async def test_what_nobody_looked_at_goes_to_another_instance_with_all_that_was_sent() -> None:
    async with setting() as s:
        stream_id = await s.request(end=False)
        s.client.conn.send_data(stream_id, b"one")
        await s.step()
        end = s.fleet.ends["a"]
        end.conn.reset_stream(1, ErrorCodes.REFUSED_STREAM)
        await s.step()
        s.client.conn.send_data(stream_id, b"two")
        s.client.conn.send_headers(stream_id, [("x-end", "1")], end_stream=True)
        await s.step()
        other = s.fleet.ends["b"]
        assert b"".join(event.data for event in other.of(h2.events.DataReceived)) == b"onetwo"
        assert dict(other.of(h2.events.TrailersReceived)[0].headers) == {"x-end": "1"}
        await s.answer("b")
        assert s.statuses() == ["200"]
        assert s.fleet.budget == 100, "it cost nobody anything"


async def test_a_goaway_that_leaves_a_request_out_is_no_loss_and_the_others_go_on() -> None:
    async with setting() as s:
        await s.request()
        await s.request()
        s.fleet.ends["a"].peer.write(GoAwayFrame(stream_id=0, last_stream_id=1, error_code=0).serialize())
        await s.step()
        assert len(s.fleet.ends["b"].of(h2.events.RequestReceived)) == 1
        await s.answer("b")
        await s.answer("a", stream_id=1)
        assert s.statuses() == ["200", "200"]
        assert s.fleet.ends["a"].ended, "the link ended with its last stream"


async def test_what_is_too_long_to_be_kept_is_given_back_as_not_looked_at() -> None:
    async with setting() as s:
        stream_id = await s.request(end=False)
        for _ in range(6):
            s.client.conn.send_data(stream_id, b"x" * 16_000)
            await s.step()
            for event in s.fleet.ends["a"].of(h2.events.DataReceived):
                s.fleet.ends["a"].conn.acknowledge_received_data(event.flow_controlled_length, 1)
            s.fleet.ends["a"].events.clear()
            await s.step()
        s.fleet.ends["a"].conn.reset_stream(1, ErrorCodes.REFUSED_STREAM)
        await s.step()
        (reset,) = s.client.of(h2.events.StreamReset)
        assert reset.error_code == ErrorCodes.REFUSED_STREAM
        assert "b" not in s.fleet.ends


@pytest.mark.parametrize(("method", "again"), [("GET", True), ("POST", False)])
async def test_what_an_app_may_have_seen_is_sent_again_if_it_is_idempotent(method: str, again: bool) -> None:
    async with setting() as s:
        await s.request(method=method)
        s.fleet.ends["a"].peer.abort(ConnectionResetError("gone"))
        await s.step()
        if again:
            await s.answer("b")
        assert s.statuses() == (["200"] if again else ["502"])
        assert ("b" in s.fleet.ends) is again


async def test_a_route_may_ask_for_attempts_after_resets_statuses_and_grpc_statuses() -> None:
    async with setting(aim=Aim(retry_resets=True)) as s:
        await s.request()
        s.fleet.ends["a"].conn.reset_stream(1, ErrorCodes.INTERNAL_ERROR)
        await s.step()
        await s.answer("b")
        assert s.statuses() == ["200"]
    async with setting(aim=Aim(retry_statuses=frozenset((503,)))) as s:
        await s.request()
        await s.answer("a", "503")
        await s.answer("b", "503")
        await s.answer("a", "503")  # all were tried, so the first once more; that was the last attempt
        assert s.statuses() == ["503"]
    async with setting(aim=Aim(retry_grpc=frozenset((b"14",)))) as s:
        await s.request(*GRPC)
        s.fleet.ends["a"].conn.send_headers(1, [(":status", "200"), ("grpc-status", "14")], end_stream=True)
        await s.step()
        await s.answer("b")
        assert s.statuses() == ["200"]
        assert s.fleet.statuses == [("a", 503), ("b", 200)]


async def test_codes_of_resets_are_carried_both_ways() -> None:
    async with setting() as s:
        await s.request()
        s.fleet.ends["a"].conn.reset_stream(1, ErrorCodes.ENHANCE_YOUR_CALM)
        await s.step()
        assert s.client.of(h2.events.StreamReset)[0].error_code == ErrorCodes.ENHANCE_YOUR_CALM
        second = await s.request()
        s.client.conn.reset_stream(second, ErrorCodes.INTERNAL_ERROR)
        await s.step()
        assert s.fleet.ends["a"].of(h2.events.StreamReset)[-1].error_code == ErrorCodes.INTERNAL_ERROR
        assert s.side.in_flight == 0


async def test_a_link_that_is_lost_within_a_response_ends_a_grpc_call_by_a_status() -> None:
    async with setting() as s:
        for extra in (GRPC, ()):
            await s.request(*extra, end=False)
            end = s.fleet.ends["a"]
            end.conn.send_headers(1, [(":status", "200")])
            end.conn.send_data(1, b"part")
            await s.step()
            end.peer.abort(ConnectionResetError("gone"))
            await s.step()
        assert dict(s.client.of(h2.events.TrailersReceived)[0].headers)["grpc-status"] == "14"
        assert [event.stream_id for event in s.client.of(h2.events.StreamReset)] == [1, 3]
        errors = [event.error_code for event in s.client.of(h2.events.StreamReset)]
        assert errors == [ErrorCodes.NO_ERROR, ErrorCodes.INTERNAL_ERROR]


async def test_a_whole_response_is_delivered_though_its_link_is_gone() -> None:
    async with setting() as s:
        s.client.conn.update_settings({SettingCodes.INITIAL_WINDOW_SIZE: 0})
        stream_id = await s.request()
        end = s.fleet.ends["a"]
        end.conn.send_headers(1, [(":status", "200")])
        end.conn.send_data(1, b"all of it", end_stream=True)
        await s.step()
        end.peer.write_eof()
        await s.step()
        s.client.conn.increment_flow_control_window(100, stream_id)
        await s.step()
        assert s.client.of(h2.events.DataReceived)[0].data == b"all of it"
        assert s.client.of(h2.events.StreamEnded)


async def test_instances_that_cannot_be_reached_or_refuse_are_passed_over() -> None:
    async with setting("abc") as s:
        s.fleet.down.add("a")
        await s.request()
        assert s.fleet.failures == [("a", "a is down")]
        s.fleet.ends["b"].peer.abort(StreamRefused(9, "draining"))
        await s.step()
        await s.answer("c")
        assert s.statuses() == ["200"]
        await s.request()
        s.fleet.ends["b"].peer.abort(StreamRefused(1, "denied"))
        await s.step()
        assert s.statuses() == ["200", "403"]


async def test_a_response_that_does_not_begin_and_a_stream_that_is_silent_are_ended() -> None:
    async with setting("a", response_timeout_s=0.02) as s:
        await s.request()
        async with asyncio.timeout(5):
            while not s.statuses():
                await asyncio.sleep(0.01)
                await s.step()
        assert s.statuses() == ["504"]
        assert s.fleet.ends["a"].of(h2.events.StreamReset)
    async with setting("ab", aim=Aim(request_timeout_s=0.15)) as s:
        stream_id = await s.request(*GRPC, end=False)
        loop = asyncio.get_running_loop()
        began = loop.time()
        while loop.time() < began + 0.3:  # the request is still under way
            s.client.conn.send_data(stream_id, b"x")
            await s.step()
            await asyncio.sleep(0.02)
        assert s.statuses() == []
        s.client.conn.end_stream(stream_id)
        await s.step()
        s.fleet.ends["a"].conn.send_headers(1, [(":status", "200")])
        async with asyncio.timeout(5):
            while not s.client.of(h2.events.TrailersReceived):  # and the response never ends
                s.fleet.ends["a"].conn.send_data(1, b"x")
                await s.step()
                await asyncio.sleep(0.01)
        assert dict(s.client.of(h2.events.TrailersReceived)[0].headers)["grpc-status"] == "4"
        assert list(s.fleet.ends) == ["a"]
    async with setting("a", aim=Aim(idle_timeout_s=0.1)) as s:
        await s.request(*GRPC, end=False)
        end = s.fleet.ends["a"]
        end.conn.send_headers(1, [(":status", "200")])
        began = asyncio.get_running_loop().time()
        while asyncio.get_running_loop().time() < began + 0.25:  # it speaks, so it lives
            end.conn.send_data(1, b"x")
            await s.step()
            await asyncio.sleep(0.02)
        assert not s.client.of(h2.events.TrailersReceived)
        async with asyncio.timeout(5):
            while not s.client.of(h2.events.TrailersReceived):
                await asyncio.sleep(0.01)
                await s.step()
        assert dict(s.client.of(h2.events.TrailersReceived)[0].headers)["grpc-status"] == "4"


async def test_the_time_of_a_request_passes_while_a_connection_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    made = asyncio.Event()
    connect = Lease.connect

    async def slowly(lease: Lease) -> Link:
        await made.wait()
        return await connect(lease)

    monkeypatch.setattr(Lease, "connect", slowly)
    async with setting("a", aim=Aim(request_timeout_s=0.05)) as s:
        await s.request()
        async with asyncio.timeout(5):
            while not s.statuses():
                await asyncio.sleep(0.01)
                await s.step()
        assert s.statuses() == ["504"]
        assert s.fleet.silences == [], "nobody is to blame yet"
        made.set()
        await s.step()


async def test_bytes_are_acknowledged_only_when_they_have_gone_on() -> None:
    async with setting("a") as s:
        stream_id = await s.request(end=False)
        sent = 0
        for _ in range(200):
            room = min(s.client.conn.local_flow_control_window(stream_id), 16_384)
            if not room:
                break
            s.client.conn.send_data(stream_id, b"x" * room)
            sent += room
            await s.step()
        assert sent <= 128 * 1024 + 65_535, "a window of the filter, and what the instance took without asking"
        await s.answer("a", stream_id=1)
        assert s.statuses() == ["200"]


async def test_draining_ends_with_the_last_stream_and_names_what_it_has_not_looked_at() -> None:
    async with setting("a") as s:
        await s.request()
        s.side.drain()
        late = await s.request()
        assert s.client.of(h2.events.StreamReset)[0].stream_id == late
        assert s.client.of(h2.events.StreamReset)[0].error_code == ErrorCodes.REFUSED_STREAM
        await s.answer("a")
        assert s.statuses() == ["200"]
        assert s.done
        assert s.client.of(h2.events.ConnectionTerminated)[-1].last_stream_id == late


async def fuzz(pieces: list[tuple[bool, bytes]]) -> None:
    async with setting("ab", far=Sink) as s:
        s.client.peer.write(PREFACE + bytes.fromhex("000000040000000000"))
        # HEADERS: POST http / of "db", no end of stream
        s.client.peer.write(bytes.fromhex("00000701040000000183868441026462"))
        for _ in range(3):
            await asyncio.sleep(0)
        assert s.side.in_flight == len(s.fleet.ends) == 1
        for far, piece in pieces:
            ends = list(s.fleet.ends.values())
            (ends[0] if far and ends else s.client).peer.write(piece)
            await asyncio.sleep(0)
        s.client.peer.write_eof()
        assert s.done


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.one_of(frames, st.binary(max_size=60))), max_size=14))
def test_any_frames_of_either_side_end_in_good_order(pieces: list[tuple[bool, bytes]]) -> None:
    """No frames make the filter raise, hang, or keep a lease once the client has gone."""
    asyncio.run(fuzz(pieces))
