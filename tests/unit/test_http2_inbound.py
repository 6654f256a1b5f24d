"""The HTTP/2 filter in memory: what a client that misbehaves can make it hold, and what it holds back."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import h2.config
import h2.connection
import h2.errors
import h2.events
import h2.settings
from hpack import NeverIndexedHeaderTuple
from hyperframe.frame import GoAwayFrame, PingFrame, SettingsFrame
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.authz import Decision, Request
from proxy.http import HttpCounters, HttpOptions
from proxy.http2 import InboundHttp2, InboundHttp2Connection
from proxy.http2.connection import TURNED_AWAY_MAX
from proxy.http2.frames import LAST_STREAM_ID
from proxy.http2.half import PREFACE
from proxy.http_entry import HttpEntry, Undecided
from proxy.stream import READ_LIMIT_BYTES, Channel, Data, Early
from raftstate.model.identity import Identity
from raftstate.model.intention import Permission
from tests.support.sidecars import until

ALLOWED = Decision(True, None, "test")
DENIED = Decision(False, None, "test")
WEB = Identity(service="web", trust_domain="td", datacenter="dc1")


class End:
    """The far end of a channel: what the filter sends goes to an h2 connection of the test's."""

    def __init__(self, *, client: bool) -> None:
        self.peer: Channel = self
        config = h2.config.H2Configuration(
            client_side=client, header_encoding="utf-8", validate_outbound_headers=False
        )
        self.conn = h2.connection.H2Connection(config)
        self.conn.initiate_connection()
        self.events: list[h2.events.Event] = []
        self.sent = 0
        self.ended = self.aborted = False

    def write(self, data: Data) -> None:
        assert not self.ended
        self.sent += len(data)
        self.events += self.conn.receive_data(bytes(data))

    def write_eof(self) -> None:
        self.ended = True

    def abort(self, error: Exception | None = None) -> None:
        self.aborted = True

    def pause_reading(self) -> None: ...
    def resume_reading(self) -> None: ...

    def push(self) -> None:
        """Send what the test's connection wants to send to the filter."""
        data = self.conn.data_to_send()
        if data:
            self.peer.write(data)

    def of(self, kind: type[Any]) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]


class Setting:
    def __init__(self, decide: Callable[[Request], Decision], **options: Any) -> None:
        self.side = InboundHttp2(HttpOptions(service="db", sweep_s=0.01, **options))
        self.client = End(client=True)
        self.apps: list[End] = []
        self.counters = HttpCounters()
        self.done = False

        async def dial(peer: Channel) -> Channel:
            app = End(client=False)
            app.peer = peer
            self.apps.append(app)
            return app

        def on_done() -> None:
            self.done = True

        self.connection: InboundHttp2Connection = self.side.serve(
            self.client, peer=WEB, dial=dial, decide=decide, stats=self.counters, identity=b"URI=x", on_done=on_done
        )

    async def step(self) -> None:
        """Let all ends exchange what they have until nothing moves."""
        for _ in range(20):
            self.client.push()
            for app in self.apps:
                app.push()
            await asyncio.sleep(0)

    def request(self, path: str = "/a", *extra: tuple[str, str], end: bool = True) -> int:
        stream_id: int = self.client.conn.get_next_available_stream_id()
        headers = [(":method", "POST"), (":scheme", "http"), (":authority", "db"), (":path", path), *extra]
        self.client.conn.send_headers(stream_id, headers, end_stream=end)
        return stream_id


@asynccontextmanager
async def setting(
    decide: Callable[[Request], Decision] = lambda _: ALLOWED, **options: Any
) -> AsyncIterator[Setting]:
    made = Setting(decide, **options)
    try:
        yield made
    finally:
        await made.side.close()


async def test_a_request_and_its_answer() -> None:
    async with setting() as s:
        forged = [
            (name, "forged") for name in ("x-forwarded-client-cert", "x_forwarded_client-cert", "content_length")
        ]
        stream_id = s.request("/a?b", *forged, ("x_other", "1"))
        await s.step()
        (app,) = s.apps
        (seen,) = app.of(h2.events.RequestReceived)
        assert dict(seen.headers)[":path"] == "/a?b"
        assert [field for field in seen.headers if field[0][0] in "xc"] == [
            ("x_other", "1"), ("x-forwarded-client-cert", "URI=x")
        ]  # fmt: skip
        app.conn.send_headers(seen.stream_id, [(":status", "200")])
        app.conn.send_data(seen.stream_id, b"hello")
        app.conn.send_headers(seen.stream_id, [("grpc-status", "0")], end_stream=True)
        await s.step()
        assert s.client.of(h2.events.DataReceived)[0].data == b"hello"
        assert dict(s.client.of(h2.events.TrailersReceived)[0].headers) == {"grpc-status": "0"}
        assert s.client.of(h2.events.StreamEnded)[0].stream_id == stream_id
        assert s.counters.requests == {("POST", 200, "app"): 1}


async def test_trailers_of_a_request_pass_unless_permissions_decided_on_it() -> None:
    decided = Decision(True, None, "test", (Permission("allow"),))
    for decision, passed in ((ALLOWED, True), (decided, False)):
        async with setting(lambda _, decision=decision: decision) as s:
            stream_id = s.request(end=False)
            s.client.conn.send_data(stream_id, b"x")
            s.client.conn.send_headers(stream_id, [("x-debug", "1")], end_stream=True)
            await s.step()
            (app,) = s.apps
            assert bool(app.of(h2.events.TrailersReceived)) is passed
            assert app.of(h2.events.StreamEnded)


async def test_denied_for_grpc_and_for_others() -> None:
    async with setting(lambda _: DENIED) as s:
        s.request("/a", ("content-type", "application/grpc+proto"), end=False)
        s.request("/a")
        await s.step()
        grpc, other = s.client.of(h2.events.ResponseReceived)
        assert dict(grpc.headers)["grpc-status"] == "7"
        assert dict(other.headers)[":status"] == "403"
        assert s.client.of(h2.events.StreamReset)[0].error_code == 0
        assert s.apps == []


async def test_bytes_are_acknowledged_only_when_they_have_gone_on() -> None:
    async with setting() as s:
        s.request(end=False)
        await s.step()
        (app,) = s.apps
        sent = 0
        for _ in range(100):
            room = min(s.client.conn.local_flow_control_window(1), 16384)
            if not room:
                break
            s.client.conn.send_data(1, bytes(room))
            sent += room
            await s.step()
        assert s.client.conn.local_flow_control_window(1) == 0
        # The app acknowledged nothing: its window (65,535) has gone on, one window of ours is held.
        assert sum(len(event.data) for event in app.of(h2.events.DataReceived)) == 65535
        assert 128 * 1024 <= sent <= 65535 + 128 * 1024
        # Another stream is not held up by it.
        s.request("/b", end=False)
        s.client.conn.send_data(3, b"x", end_stream=True)
        app.conn.increment_flow_control_window(100_000)  # the connection's; the first stream's stays shut
        await s.step()
        assert app.of(h2.events.DataReceived)[-1].data == b"x"


async def test_a_client_that_takes_nothing_stops_its_own_answers_only() -> None:
    async with setting() as s:
        s.request()
        await s.step()
        (app,) = s.apps
        app.conn.send_headers(1, [(":status", "200")])
        s.connection.receiver.pause_reading()
        held = 0
        while (room := min(app.conn.local_flow_control_window(1), 16384)) > 0:
            app.conn.send_data(1, bytes(room))
            held += room
            await s.step()
        assert held == 128 * 1024, "one window, and no more, is held"
        before = s.client.sent
        s.connection.receiver.resume_reading()
        await s.step()
        assert s.client.sent - before > 60_000


async def test_pings_from_a_client_that_reads_nothing_are_not_answered_for_ever() -> None:
    async with setting() as s:
        await s.step()
        s.connection.receiver.pause_reading()
        ping = PingFrame(0, b"12345678").serialize() * 100
        for _ in range(100):
            s.client.peer.write(ping)
        assert s.client.aborted
        assert s.done
        assert s.client.sent < 100 * 100 * 17


async def test_an_answer_before_the_end_of_the_request_ends_both() -> None:
    async with setting() as s:
        s.request(end=False)
        await s.step()
        (app,) = s.apps
        app.conn.send_headers(1, [(":status", "413")], end_stream=True)
        await s.step()
        assert dict(s.client.of(h2.events.ResponseReceived)[0].headers)[":status"] == "413"
        assert s.client.of(h2.events.StreamReset)[0].error_code == 0
        assert app.of(h2.events.StreamReset)


async def test_an_app_that_leaves_finishes_what_it_has_and_is_dialled_again() -> None:
    async with setting() as s:
        s.request()
        await s.step()
        (app,) = s.apps
        frame = GoAwayFrame(stream_id=0, last_stream_id=1, error_code=0)
        app.peer.write(frame.serialize() + PingFrame(0, b"12345678").serialize())
        s.request("/second")
        await s.step()
        assert len(s.apps) == 2
        assert len(s.apps[1].of(h2.events.RequestReceived)) == 1
        app.conn.send_headers(1, [(":status", "200")], end_stream=True)
        await s.step()
        assert dict(s.client.of(h2.events.ResponseReceived)[0].headers)[":status"] == "200"
        assert app.ended, "the old connection ends with its last stream"


async def test_what_a_leaving_app_did_not_look_at_goes_to_its_next_connection_or_back() -> None:
    async with setting() as s:
        short, long = s.request(end=False), s.request(end=False)
        s.client.conn.send_data(short, b"x" * 100)
        s.client.conn.send_data(long, b"x" * 16_000)
        s.client.conn.send_data(long, b"x" * 1000)
        await s.step()
        s.apps[0].peer.write(GoAwayFrame(stream_id=0, last_stream_id=0, error_code=0).serialize())
        s.client.conn.send_data(short, b"y" * 100, end_stream=True)
        await s.step()
        (reset,) = s.client.of(h2.events.StreamReset)
        assert (reset.stream_id, reset.error_code) == (long, 7), "REFUSED_STREAM: the caller has it all, we have not"
        assert s.apps[0].ended
        (seen,) = s.apps[1].of(h2.events.RequestReceived)
        assert b"".join(event.data for event in s.apps[1].of(h2.events.DataReceived)) == b"x" * 100 + b"y" * 100
        s.apps[1].conn.send_headers(seen.stream_id, [(":status", "200")], end_stream=True)
        await s.step()
        assert s.client.of(h2.events.ResponseReceived)[0].stream_id == short


async def test_an_app_that_always_leaves_gets_a_request_so_often_and_no_more() -> None:
    async with setting() as s:
        s.request()
        for _ in range(20):
            await s.step()
            s.apps[-1].peer.write(GoAwayFrame(stream_id=0, last_stream_id=0, error_code=0).serialize())
        assert len(s.apps) == 1 + TURNED_AWAY_MAX
        assert s.client.of(h2.events.StreamReset)[0].error_code == 7


async def test_the_apps_limit_of_streams_is_kept() -> None:
    async with setting() as s:
        s.request()
        await s.step()
        (app,) = s.apps
        app.peer.write(SettingsFrame(0, settings={SettingsFrame.MAX_CONCURRENT_STREAMS: 1}).serialize())
        s.request()
        await s.step()
        assert s.client.of(h2.events.StreamReset)[0].error_code == 7
        assert len(app.of(h2.events.RequestReceived)) == 1


async def test_what_an_app_may_not_take_waits_until_it_says_what_it_takes() -> None:
    for limit, ends in ((120, False), (128, False), (0, True)):
        async with setting() as s:
            await s.step()  # our settings are known
            s.client.push()
            ids = [s.request() for _ in range(125)]
            s.client.push()
            for _ in range(3):
                await asyncio.sleep(0)  # the app is dialled, and says nothing yet
            (app,) = s.apps
            assert len(app.of(h2.events.RequestReceived)) == 100
            assert not s.client.of(h2.events.StreamReset)
            if ends:
                app.peer.abort(ConnectionResetError())
            else:
                app.conn.update_settings({h2.settings.SettingCodes.MAX_CONCURRENT_STREAMS: limit})
            await s.step()
            assert len(s.apps[-1].of(h2.events.RequestReceived)) == (25 if ends else min(limit, 125))
            refused = {each.stream_id for each in s.client.of(h2.events.StreamReset)}
            assert refused == (set() if ends else set(ids[limit:]))


async def test_what_came_as_never_to_be_indexed_is_sent_on_as_such_both_ways() -> None:
    secret: Any = NeverIndexedHeaderTuple("x-token", "secret")
    async with setting() as s:
        s.request("/a", secret)
        await s.step()
        (app,) = s.apps
        (seen,) = app.of(h2.events.RequestReceived)
        assert [type(field) for field in seen.headers if field[0] == "x-token"] == [NeverIndexedHeaderTuple]
        app.conn.send_headers(seen.stream_id, [(":status", "200"), secret])
        app.conn.send_headers(seen.stream_id, [secret], end_stream=True)
        await s.step()
        for kind in (h2.events.ResponseReceived, h2.events.TrailersReceived):
            (came,) = s.client.of(kind)
            assert [type(field) for field in came.headers if field[0] == "x-token"] == [NeverIndexedHeaderTuple]


async def test_an_answer_of_ours_whose_body_finds_no_room_does_not_declare_it() -> None:
    async with setting(lambda _: DENIED) as s:
        s.client.conn.update_settings({h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: 0})
        await s.step()
        s.request()
        await s.step()
        (answer,) = s.client.of(h2.events.ResponseReceived)
        assert dict(answer.headers)[":status"] == "403"
        assert "content-length" not in dict(answer.headers)
        assert s.client.of(h2.events.StreamEnded)


async def test_requests_that_wait_for_an_app_and_are_given_up_are_let_go_of() -> None:
    def decide(request: Request) -> Decision:
        return DENIED if request.path == "/denied" else ALLOWED

    async with setting(decide) as s:
        for _ in range(101):  # one more than an app that has said nothing may be sent
            s.request()
        s.client.push()
        await until(lambda: len(s.connection._held) == 1)
        for _ in range(50):
            s.request("/denied")
            stream_id = s.request()
            s.client.push()
            s.client.conn.reset_stream(stream_id)
            s.client.push()
        assert len(s.connection._exchanges) == 101
        assert s.counters.requests == {("POST", 403, "denied"): 50, ("POST", 0, "cut"): 50}
        assert len(s.connection._held) == 1
        assert not s.connection._waiting


async def test_an_answer_to_a_request_that_the_app_stopped_ends_the_clients_stream_too() -> None:
    async with setting() as s:
        stream_id = s.request(end=False)
        s.client.conn.update_settings({h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: 0})
        await s.step()
        (app,) = s.apps
        app.conn.send_headers(1, [(":status", "200")])
        app.conn.send_data(1, b"enough", end_stream=True)
        app.conn.reset_stream(1, 0)
        await s.step()
        assert not s.client.of(h2.events.StreamEnded)
        s.client.conn.increment_flow_control_window(100, stream_id)
        await s.step()
        assert s.client.of(h2.events.DataReceived)[0].data == b"enough"
        (reset,) = s.client.of(h2.events.StreamReset)
        assert (reset.stream_id, reset.error_code) == (stream_id, 0)
        assert s.counters.requests == {("POST", 200, "app"): 1}


async def test_a_whole_answer_is_kept_though_the_app_then_says_that_it_did_not_look() -> None:
    async with setting() as s:
        stream_id = s.request(end=False)
        s.client.conn.update_settings({h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: 0})
        await s.step()
        (app,) = s.apps
        app.conn.send_headers(1, [(":status", "200")])
        app.conn.send_data(1, b"done", end_stream=True)
        app.conn.reset_stream(1, h2.errors.ErrorCodes.REFUSED_STREAM)
        await s.step()
        s.client.conn.increment_flow_control_window(100, stream_id)
        await s.step()
        assert [each.data for each in s.client.of(h2.events.DataReceived)] == [b"done"]
        assert s.counters.requests == {("POST", 200, "app"): 1}


async def test_a_connection_to_the_app_whose_ids_are_used_up_is_followed_by_another() -> None:
    async with setting() as s:
        s.request()
        await s.step()
        (first,) = s.apps
        first.conn.send_headers(1, [(":status", "200")], end_stream=True)
        await s.step()
        assert s.connection._app is not None
        s.connection._app.half.core._next_id = LAST_STREAM_ID + 2
        s.request("/b")
        await s.step()
        _, second = s.apps
        (seen,) = second.of(h2.events.RequestReceived)
        assert dict(seen.headers)[":path"] == "/b"
        assert first.ended


async def test_the_end_of_the_app_is_a_502_or_a_reset() -> None:
    async with setting() as s:
        s.request("/begun")
        s.request("/not-begun")
        await s.step()
        (app,) = s.apps
        app.conn.send_headers(1, [(":status", "200")])
        await s.step()
        app.peer.abort(ConnectionResetError())
        await s.step()
        assert s.client.of(h2.events.StreamReset)[0].stream_id == 1
        answers = {e.stream_id: dict(e.headers)[":status"] for e in s.client.of(h2.events.ResponseReceived)}
        assert answers == {1: "200", 3: "502"}


async def test_a_slow_app_is_a_504_and_an_idle_connection_ends() -> None:
    async with setting(response_timeout_s=0.02, idle_timeout_s=0.05) as s:
        s.request()
        await s.step()
        async with asyncio.timeout(5):
            while not s.done:  # noqa: ASYNC110  (the filter's timers have no event)
                await asyncio.sleep(0.01)
        assert dict(s.client.of(h2.events.ResponseReceived)[0].headers)[":status"] == "504"
        assert s.client.of(h2.events.ConnectionTerminated)
        assert s.client.ended


async def test_a_streams_time_begins_at_its_requests_end_and_is_over_at_its_responses_end() -> None:
    loop = asyncio.get_running_loop()
    async with setting(response_timeout_s=0.1) as s:
        grpc = s.request("/p.S/M", ("content-type", "application/grpc"), end=False)
        other = s.request("/a", end=False)
        await s.step()
        (app,) = s.apps
        for stream_id in (grpc, other):
            app.conn.send_headers(stream_id, [(":status", "200")])
        began = loop.time()
        while loop.time() < began + 0.3:  # a client that streams, and an app that answers as it comes
            for stream_id in (grpc, other):
                s.client.conn.send_data(stream_id, b"x")
                app.conn.send_data(stream_id, b"x")
            await s.step()
            await asyncio.sleep(0.01)
        assert not s.client.of(h2.events.StreamReset)
        assert not s.client.of(h2.events.TrailersReceived)
        for stream_id in (grpc, other):
            s.client.conn.end_stream(stream_id)
        began = loop.time()
        while not (s.client.of(h2.events.StreamReset) and s.client.of(h2.events.TrailersReceived)):
            await s.step()
            await asyncio.sleep(0.01)
            assert loop.time() < began + 5
        assert loop.time() > began + 0.05
        (ended,) = s.client.of(h2.events.TrailersReceived)
        assert (ended.stream_id, dict(ended.headers)["grpc-status"]) == (grpc, "4")
        assert [event.stream_id for event in s.client.of(h2.events.StreamReset)] == [other]
        await s.step()
        assert len(app.of(h2.events.StreamReset)) == 2


async def test_which_http_it_is_the_first_bytes_tell() -> None:
    for first, later, is_http2 in (
        (b"P", b"RI * HTTP/2.0\r\n\r\nSM\r\n\r\n", True),
        (b"PR", b"OPFIND / HTTP/1.1\r\nHost: a\r\n\r\n", False),
        (b"P", b"OST / HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n", False),
        (b"GET / HTTP/1.1\r\n", b"Host: a\r\n\r\n", False),
    ):
        entry = HttpEntry(HttpOptions(service="db"))
        client = Sink()
        ended: list[bool] = []

        async def dial(peer: Channel) -> Channel:
            return Sink()

        Undecided(
            entry, client, None, Early(client), peer=WEB, dial=dial, decide=lambda _: DENIED, stats=HttpCounters(),
            on_done=lambda ended=ended: ended.append(True),
        )  # fmt: skip
        client.peer.write(first)
        client.peer.write(later)
        assert bool(entry.http2.connections) is is_http2
        assert bool(entry.http1.connections) is not is_http2
        assert client.out.startswith(b"HTTP/1.1 403 ") is not is_http2
        client.peer.abort()
        assert ended == [True]
        await entry.close()


async def test_what_the_app_says_before_the_client_has_said_anything_is_heard() -> None:
    app = End(client=False)
    app.conn.update_settings({h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: 1_000_000})
    early = Early(app)
    app.peer = early
    app.push()
    entry, client = HttpEntry(HttpOptions(service="db")), End(client=True)

    async def dial(peer: Channel) -> Channel:
        raise AssertionError("there is a connection to the app already")

    Undecided(
        entry, client, app, early, peer=WEB, dial=dial, decide=lambda _: ALLOWED, stats=HttpCounters(),
        on_done=lambda: None,
    )  # fmt: skip
    client.push()
    app.push()
    assert app.of(h2.events.SettingsAcknowledged), "the filter has taken the app's settings"
    await entry.close()


async def test_an_app_that_was_lost_before_the_first_request_is_dialed_again() -> None:
    for beginning in (PREFACE, b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"):
        lost, client = Sink(), Sink()
        early = Early(lost)
        lost.peer = early
        entry = HttpEntry(HttpOptions(service="db"))
        dialed: list[Sink] = []

        async def dial(peer: Channel, dialed: list[Sink] = dialed) -> Channel:
            dialed.append(Sink())
            return dialed[0]

        Undecided(
            entry, client, lost, early, peer=WEB, dial=dial, decide=lambda _: ALLOWED, stats=HttpCounters(),
            on_done=lambda: None,
        )  # fmt: skip
        lost.peer.abort(ConnectionResetError())
        first = beginning
        if beginning == PREFACE:
            conn = h2.connection.H2Connection(h2.config.H2Configuration(header_encoding="utf-8"))
            conn.initiate_connection()
            conn.send_headers(1, [(":method", "GET"), (":scheme", "http"), (":authority", "a"), (":path", "/")], True)
            first = conn.data_to_send()
        client.peer.write(first)
        await until(lambda dialed=dialed: bool(dialed and dialed[0].out))
        await entry.close()


def test_early_bytes_are_kept_in_bounds_and_released_in_order() -> None:
    class Source(Sink):
        reading = True

        def pause_reading(self) -> None:
            self.reading = False

        def resume_reading(self) -> None:
            self.reading = True

    source, to = Source(), Sink()
    early = Early(source)
    early.write(b"a" * READ_LIMIT_BYTES)
    assert source.reading
    early.write(b"b")
    assert not source.reading
    early.write_eof()
    early.release(to)
    assert source.reading
    assert to.out == b"a" * READ_LIMIT_BYTES + b"b"
    assert to.ended
    early = Early(source)
    early.write(b"c")
    early.abort()
    early.release(to)
    assert to.aborted


class Sink:
    ended = aborted = False

    def __init__(self) -> None:
        self.peer: Channel = self
        self.out = b""

    def write(self, data: Data) -> None:
        self.out += bytes(data)

    def write_eof(self) -> None:
        self.ended = True

    def abort(self, error: Exception | None = None) -> None:
        self.aborted = True

    def pause_reading(self) -> None: ...
    def resume_reading(self) -> None: ...


async def fuzz(pieces: list[bytes]) -> Sink:
    client = Sink()
    done: list[bool] = []
    side = InboundHttp2(HttpOptions(service="db"))

    async def dial(peer: Channel) -> Channel:
        app = Sink()
        app.peer = peer
        return app

    side.serve(
        client, peer=WEB, dial=dial, decide=lambda _: ALLOWED, stats=HttpCounters(), on_done=lambda: done.append(True)
    )
    client.peer.write(PREFACE)
    for piece in pieces:
        client.peer.write(piece)
        await asyncio.sleep(0)
    client.peer.write_eof()
    assert done == [True]
    assert side.memory.held == 0
    await side.close()
    return client


frames = st.builds(
    lambda kind, flags, stream, body: (
        len(body).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + body
    ),
    st.integers(0, 11),
    st.integers(0, 255),
    st.integers(0, 9),
    st.one_of(
        st.binary(max_size=40),
        st.just(bytes.fromhex("838684410264628704")),
        st.just(bytes.fromhex("8386844102646240047465737403616263")),
    ),
)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.one_of(frames, st.binary(max_size=60)), max_size=12))
def test_any_frames_end_in_good_order(pieces: list[bytes]) -> None:
    """No frames make the filter raise, hang or keep the connection once the client has gone."""
    asyncio.run(fuzz(pieces))


async def test_an_end_that_stays_open_after_ours_is_cut_after_a_while() -> None:
    async with setting(linger_s=0.02) as s:
        s.request()
        await s.step()
        (app,) = s.apps
        s.connection.receiver.write_eof()
        assert s.done
        assert s.client.ended
        await until(lambda: app.aborted)
        assert not s.client.aborted  # it had ended before us


async def test_an_end_that_ends_in_time_is_not_cut() -> None:
    async with setting(linger_s=0.02) as s:
        s.connection.drain()
        assert s.client.ended
        s.connection.receiver.write_eof()
        await asyncio.sleep(0.06)
        assert not s.client.aborted
