"""What HTTP/2 holds for ends that take nothing is counted in the sidecar's memory budget, and bounded by it."""

from __future__ import annotations

from collections import deque

import h2.events
import pytest
from h2.errors import ErrorCodes
from hyperframe.frame import DataFrame, PingFrame, SettingsFrame

from proxy.http2.exchange import JOINED_BYTES, Part, Replay, add_data
from proxy.http2.half import STREAM_WINDOW_BYTES
from proxy.mux.flow import MemoryBudget
from tests.unit.test_http2_inbound import Setting, setting


def upload(s: Setting, size: int = STREAM_WINDOW_BYTES) -> int:
    """Begin a request and send so much of its body; the test's app grants no more than 64 KiB of it."""
    stream_id = s.request("/up", end=False)
    for at in range(0, size, 16384):
        s.client.conn.send_data(stream_id, b"x" * min(16384, size - at))
    s.client.push()
    return stream_id


async def test_what_is_held_is_counted_and_given_back() -> None:
    async with setting() as s:
        memory = s.side.memory
        first = upload(s)
        await s.step()
        assert STREAM_WINDOW_BYTES - 65535 <= memory.held <= STREAM_WINDOW_BYTES - 65535 + 1024
        (app,) = s.apps
        (seen,) = app.of(h2.events.RequestReceived)
        app.conn.acknowledge_received_data(65535, seen.stream_id)
        await s.step()
        assert memory.held < 1024, "the app took it"
        s.client.conn.reset_stream(first)
        await s.step()
        assert memory.held == 0
        # The other way: an answer that the client does not take.
        s.client.conn.update_settings({4: 0})
        s.request("/down")
        await s.step()
        stream_id = app.of(h2.events.RequestReceived)[-1].stream_id
        app.conn.send_headers(stream_id, [(":status", "200")])
        app.conn.send_data(stream_id, b"y" * 10_000)
        await s.step()
        assert 10_000 <= memory.held <= 11_000
        s.connection.cut()
        assert memory.held == 0


async def test_streams_beyond_the_budget_are_dropped_and_new_ones_refused_while_it_is_scarce() -> None:
    async with setting() as s:
        memory = s.side.memory = MemoryBudget(300_000)
        ids = [upload(s) for _ in range(12)]
        await s.step()
        assert memory.held <= 300_000
        codes = {each.stream_id: each.error_code for each in s.client.of(h2.events.StreamReset)}
        assert set(codes.values()) == {ErrorCodes.REFUSED_STREAM}
        assert set(codes) < set(ids), "some have room"
        s.connection.cut()
        assert memory.held == 0


async def test_a_stream_that_goes_over_the_budget_is_dropped_and_no_other() -> None:
    async with setting() as s:
        memory = s.side.memory = MemoryBudget(200_000)
        first, second, third = (s.request("/up", end=False) for _ in range(3))
        await s.step()
        for stream_id in (first, second, third):
            for _ in range(STREAM_WINDOW_BYTES // 16384):
                s.client.conn.send_data(stream_id, b"x" * 16384)
            s.client.push()
        await s.step()
        (reset,) = s.client.of(h2.events.StreamReset)
        assert (reset.stream_id, reset.error_code) == (third, ErrorCodes.ENHANCE_YOUR_CALM)
        assert memory.overruns == 1
        assert 0 < memory.held <= 200_000
        assert s.apps[0].of(h2.events.StreamReset)


async def test_large_heads_count() -> None:
    async with setting() as s:
        for _ in range(4):
            s.request("/a", ("x-large", "h" * 10_000))
        await s.step()
        assert 40_000 < s.side.memory.held < 42_000
        for each in s.apps[0].of(h2.events.RequestReceived):
            s.apps[0].conn.send_headers(each.stream_id, [(":status", "204")], end_stream=True)
        await s.step()
        assert s.side.memory.held == 0


@pytest.mark.parametrize("size", [0, 1])
async def test_many_small_frames_are_few_objects(size: int) -> None:
    async with setting() as s:
        stream_id = upload(s, 65535)
        await s.step()  # the app's window is used up
        frame = DataFrame(stream_id)
        frame.data = b"x" * size
        s.client.peer.write(frame.serialize() * 20_000)
        (exchange,) = s.connection._exchanges.values()
        assert sum(map(len, exchange.to_link)) == 20_000 * size
        assert len(exchange.to_link) <= 1 + 2 * 20_000 * size // JOINED_BYTES
        assert exchange.replay is not None
        assert len(exchange.replay.parts) <= 8


def test_joined_pieces_keep_bytes_window_and_end() -> None:
    parts: deque[Part] = deque()
    for n in range(5):
        add_data(parts, b"%d" % n, 3, end=False)
    add_data(parts, b"", 2, end=True)
    (part,) = parts
    assert (bytes(part.data), part.flow, part.end) == (b"01234", 17, True)
    add_data(parts, b"next", 4, end=False)
    assert len(parts) == 2, "nothing is put behind an end"
    replay = Replay(1000)
    for n in range(5):
        replay.add(b"%d" % n, end=n == 4)
    waiting: deque[Part] = deque()
    replay.rewind(waiting)
    assert [(bytes(each.data), each.end) for each in waiting] == [(b"01234", True)]
    assert replay.size == 0


async def test_an_app_that_makes_us_answer_but_reads_nothing_is_cut() -> None:
    for frame in (PingFrame(0, b"12345678"), SettingsFrame(0)):
        async with setting() as s:
            s.request()
            await s.step()
            (app,) = s.apps
            app.peer.pause_reading()  # its socket takes no more
            app.peer.write(frame.serialize() * 900)
            assert not app.aborted
            app.peer.write(frame.serialize() * 200)
            assert app.aborted
            await s.step()
            assert dict(s.client.of(h2.events.ResponseReceived)[0].headers)[":status"] == "502"
