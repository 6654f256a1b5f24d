"""The mux layer: any bytes, any sizes, any order of taking and not taking."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.errors import MuxError, StreamClosed
from proxy.mux import frames
from proxy.mux.core import OUT_HIGH_BYTES, OUT_MAX_BYTES, TURN_BYTES, MuxCore, MuxStream
from proxy.mux.flow import (
    INITIAL_WINDOW_BYTES,
    MAX_WINDOW_BYTES,
    NEAR_WINDOW_BYTES,
    GrowthBudget,
    MemoryBudget,
    ReceiveWindow,
    SendCredit,
    window_for,
)
from proxy.stream import Channel, Data

control_kinds = st.sampled_from([frames.FIN, frames.WINDOW, frames.OPEN, frames.ACCEPT, frames.REFUSE, frames.RESET])
whole_frames = st.one_of(
    st.tuples(st.just(frames.DATA), st.integers(1, 2**32 - 1), st.binary(min_size=1, max_size=3000)),
    st.tuples(control_kinds, st.integers(1, 2**32 - 1), st.binary(max_size=200)),
    st.tuples(st.sampled_from([frames.PING, frames.PONG, frames.GOAWAY]), st.just(0), st.binary(max_size=8)),
)


@given(st.lists(whole_frames, max_size=12), st.data())
def test_frames_come_back_whole_however_they_are_cut(
    wanted: list[tuple[int, int, bytes]], data: st.DataObject
) -> None:
    wire = b"".join(frames.frame(*each) for each in wanted)
    parser = frames.FrameParser()
    got: list[list[Any]] = []
    position = 0
    open_data = 0  # bytes still to come of the DATA frame that is being put together
    while position < len(wire):
        step = data.draw(st.integers(1, max(1, min(len(wire) - position, 2000))))
        for kind, stream_id, payload in parser.feed(wire[position : position + step]):
            if kind == frames.DATA and open_data:
                got[-1][2] = bytes(got[-1][2]) + bytes(payload)
                open_data -= len(payload)
            else:
                if kind == frames.DATA:
                    open_data = len(wanted[len(got)][2]) - len(payload)
                got.append([kind, stream_id, bytes(payload)])
        assert parser.held_bytes < frames.HEADER_BYTES + frames.MAX_CONTROL_BYTES
        position += step
    assert [tuple(each) for each in got] == wanted


@given(st.lists(st.binary(max_size=500), max_size=20))
def test_any_bytes_give_frames_or_an_error(chunks: list[bytes]) -> None:
    parser = frames.FrameParser()
    with contextlib.suppress(MuxError):
        for chunk in chunks:
            for kind, _, payload in parser.feed(chunk):
                assert kind == frames.DATA or len(payload) <= frames.MAX_CONTROL_BYTES
            assert parser.held_bytes < frames.HEADER_BYTES + frames.MAX_CONTROL_BYTES


@given(st.lists(st.binary(max_size=300), max_size=20), st.booleans())
def test_any_bytes_leave_a_core_alive_or_end_it_with_an_error(chunks: list[bytes], accepting: bool) -> None:
    core = MuxCore(acceptor=(lambda stream: stream.accept()) if accepting else None)
    with contextlib.suppress(MuxError):
        for chunk in chunks:
            core.receive(chunk)
            core.take_output()


@pytest.mark.parametrize("data", [b"x", b"x" * 20_000])
def test_a_peer_that_reads_nothing_is_cut_off_by_a_frame_of_data_too(data: bytes) -> None:
    core = MuxCore(acceptor=lambda stream: stream.accept())
    core.receive(frames.frame(frames.OPEN, 1, b"web"))
    core.send_control(bytes(OUT_MAX_BYTES))
    with pytest.raises(MuxError, match="reads nothing"):
        core.receive(frames.header(frames.DATA, 1, len(data)) + data)


@given(st.lists(st.tuples(st.integers(1, 300_000), st.booleans()), max_size=40))
def test_window_and_credit_agree_and_stay_bounded(steps: list[tuple[int, bool]]) -> None:
    """What the sender may send is exactly what the receiver will take, at most the largest window."""
    budget = GrowthBudget(1 << 20)
    credit, window = SendCredit(), ReceiveWindow(budget, MemoryBudget())
    for wanted, taking in steps:
        if taking:
            credit.grant(window.resume())
        else:
            window.pause()
        sent = min(wanted, credit.left)
        if sent:
            credit.left -= sent
            credit.grant(window.received(sent))
        assert credit.left == window.left
        assert window.size <= MAX_WINDOW_BYTES
        if taking:
            assert credit.left > 0, "an app that takes is never starved"
    window.close()
    assert budget.left == 1 << 20


def test_sending_beyond_the_window_is_an_error() -> None:
    window = ReceiveWindow(GrowthBudget(0), MemoryBudget())
    window.pause()
    window.received(INITIAL_WINDOW_BYTES)
    with pytest.raises(MuxError, match="beyond"):
        window.received(1)


class Sink:
    """A stream's peer that keeps what comes, and whether the stream is to be read."""

    def __init__(self) -> None:
        self.peer: Channel = self
        self.got = bytearray()
        self.pauses_at = -1
        self.stream: MuxStream | None = None

    def write(self, data: Data) -> None:
        self.got += data
        if 0 <= self.pauses_at <= len(self.got) and self.stream is not None:
            self.stream.pause_reading()

    def write_eof(self) -> None:
        pass

    def abort(self, error: Exception | None = None) -> None:
        self.got += b"<cut>"

    def pause_reading(self) -> None:
        pass

    def resume_reading(self) -> None:
        pass


class Taker:
    """An accepting core with one stream open, under a memory budget of its own."""

    def __init__(self) -> None:
        self.sink = Sink()
        self.core = MuxCore(acceptor=self._accept, memory=MemoryBudget(400_000))
        self.core.receive(frames.frame(frames.OPEN, 1, b"web"))
        self.error = ""

    def _accept(self, stream: MuxStream) -> None:
        self.sink.stream, stream.peer = stream, self.sink
        stream.accept()

    def receive(self, *pieces: bytes) -> None:
        try:
            for piece in pieces:
                if not self.error:
                    self.core.receive(piece)
        except MuxError as error:
            self.error = str(error)

    def state(self) -> list[object]:
        stream, core = self.sink.stream, self.core
        assert stream is not None
        window = stream._window
        return [
            bytes(self.sink.got), self.error, b"".join(core.out), core.out_bytes, sorted(core.streams), stream.closed,
            (window.size, window.left, window.held, window.taking, window._parked),
            (core.memory.held, core.memory.growth_left, core.memory.overruns, core.growth.left),
        ]  # fmt: skip


data_steps = st.one_of(
    st.tuples(st.just("data"), st.integers(1, 70_000)),
    st.tuples(st.just("data"), st.integers(1, 300)),
    st.tuples(st.sampled_from(["pause", "resume", "other", "fin", "gone"]), st.just(0)),
    st.tuples(st.just("pause at"), st.integers(0, 200_000)),
)


@settings(max_examples=300, deadline=None)
@given(st.lists(data_steps, max_size=40))
def test_one_frame_in_one_record_is_taken_as_any_frame_is(steps: list[tuple[str, int]]) -> None:
    """The short way and the long one hand on, count, grant, hold and refuse the same."""
    short, long = Taker(), Taker()
    for action, size in steps:
        for taker in (short, long):
            stream = taker.sink.stream
            assert stream is not None
            if action == "pause":
                stream.pause_reading()
            elif action == "resume":
                stream.resume_reading()
            elif action == "pause at":
                taker.sink.pauses_at = size
        if action in ("pause", "resume", "pause at"):
            continue
        stream_id = {"other": 3, "gone": 2}.get(action, 1)
        frame = frames.frame(frames.FIN, 1) if action == "fin" else frames.header(frames.DATA, stream_id, size or 5)
        frame += b"" if action == "fin" else b"d" * (size or 5)
        short.receive(frame)
        long.receive(frame[:5], frame[5:])
        assert short.state() == long.state()


@settings(max_examples=300, deadline=None)
@given(st.lists(data_steps, max_size=40))
def test_what_a_stream_counts_by_itself_is_what_its_window_would_count(steps: list[tuple[str, int]]) -> None:
    taker, growth, memory = Taker(), GrowthBudget(64 * 1024 * 1024), MemoryBudget(400_000)
    twin = ReceiveWindow(growth, memory)
    stream = taker.sink.stream
    assert stream is not None
    for action, size in steps:
        taker.core.take_output()
        wanted = 0
        if action == "pause":
            stream.pause_reading()
            twin.pause()
        elif action == "resume":
            wanted = 0 if twin.taking else twin.resume()
            stream.resume_reading()
        elif action == "data" and not stream.closed and size <= twin.left:
            wanted = twin.received(size)
            taker.receive(frames.header(frames.DATA, 1, size) + b"d" * size)
        if stream.closed:
            assert memory.over
            return
        window = stream._window
        assert (window.size, window.left, window.held, window.taking, window._parked) == (
            twin.size, twin.left, twin.held, twin.taking, twin._parked,
        )  # fmt: skip
        granted = b"".join(taker.core.take_output())
        assert granted == (frames.window(1, wanted) if wanted else b"")
        assert (taker.core.memory.held, taker.core.memory.growth_left) == (memory.held, memory.growth_left)


class Side:
    """An app's end of a stream in the model: what it got, whether it takes, whether it was told to pause."""

    def __init__(self) -> None:
        self.peer: Channel = self
        self.stream: MuxStream | None = None
        self.got = bytearray()
        self.ended = False
        self.error: Exception | None = None
        self.paused = False

    def write(self, data: Data) -> None:
        assert not self.ended
        self.got += data

    def write_eof(self) -> None:
        assert not self.ended
        self.ended = True

    def abort(self, error: Exception | None = None) -> None:
        self.error = error

    def pause_reading(self) -> None:
        assert not self.paused
        self.paused = True

    def resume_reading(self) -> None:
        self.paused = False

    def stream_accepted(self, stream: MuxStream) -> None:
        pass

    def stream_refused(self, stream: MuxStream, code: int, text: str) -> None:
        self.error = StreamClosed(text)

    def stream_closed(self, stream: MuxStream) -> None:
        pass


class Wire:
    """Two cores, and the bytes on their way."""

    def __init__(self) -> None:
        self.servers: list[Side] = []
        self.client = MuxCore(acceptor=None)
        self.server = MuxCore(acceptor=self._accept)
        self.flying: dict[MuxCore, bytearray] = {self.client: bytearray(), self.server: bytearray()}

    def _accept(self, stream: MuxStream) -> None:
        side = Side()
        side.stream = stream
        stream.peer = side
        self.servers.append(side)
        stream.accept()

    def open(self) -> Side:
        side = Side()
        side.stream = self.client.open("backend", side, side)
        return side

    def flush(self, core: MuxCore) -> None:
        core.pump()
        assert core.out_bytes <= OUT_HIGH_BYTES + 2 * 200_000
        self.flying[core] += b"".join(core.take_output())

    def deliver(self, core: MuxCore, count: int) -> None:
        other = self.server if core is self.client else self.client
        data, self.flying[core] = bytes(self.flying[core][:count]), self.flying[core][count:]
        if data:
            other.receive(data)

    def settle(self) -> None:
        for _ in range(10_000):
            for core in (self.client, self.server):
                core.blocked = False
                self.flush(core)
                self.deliver(core, len(self.flying[core]))
            busy = any(self.flying.values()) or any(core.out or core.waiting for core in (self.client, self.server))
            if not busy:
                return
        raise AssertionError("the two sides never come to rest")


actions = st.one_of(
    st.tuples(st.just("send"), st.integers(0, 3), st.booleans(), st.integers(1, 200_000)),
    st.tuples(st.just("take"), st.integers(0, 3), st.booleans(), st.booleans()),
    st.tuples(st.just("end"), st.integers(0, 3), st.booleans(), st.none()),
    st.tuples(st.just("flush"), st.none(), st.booleans(), st.booleans()),
    st.tuples(st.just("deliver"), st.none(), st.booleans(), st.integers(1, 100_000)),
)


@settings(max_examples=150, deadline=None)
@given(st.lists(actions, max_size=60))
def test_streams_carry_everything_in_order_whatever_happens(steps: list[tuple[str, int, bool, object]]) -> None:
    wire = Wire()
    clients = [wire.open() for _ in range(4)]
    wire.settle()
    pairs = list(zip(clients, wire.servers, strict=True))
    sent: dict[Side, bytearray] = {side: bytearray() for pair in pairs for side in pair}
    ended: set[Side] = set()
    for action, index, at_client, argument in steps:
        core = wire.client if at_client else wire.server
        if action == "flush":
            core.blocked = bool(argument)
            wire.flush(core)
        elif action == "deliver":
            assert isinstance(argument, int)
            wire.deliver(core, argument)
        else:
            side = pairs[index][0 if at_client else 1]
            stream = side.stream
            assert stream is not None
            if action == "take":
                (stream.resume_reading if argument else stream.pause_reading)()
            elif action == "end" and side not in ended:
                ended.add(side)
                stream.write_eof()
            elif action == "send" and side not in ended and not side.paused:
                assert isinstance(argument, int)
                data = bytes((len(sent[side]) + offset) % 251 for offset in range(0, argument, 997)) * 997
                data = data[:argument]
                sent[side] += data
                stream.write(data)
    for pair in pairs:
        for side in pair:
            assert side.stream is not None
            side.stream.resume_reading()
    wire.settle()
    for client, server in pairs:
        for sender, receiver in ((client, server), (server, client)):
            assert bytes(receiver.got) == bytes(sent[sender])
            assert receiver.ended == (sender in ended)
            assert receiver.error is None
            assert not sender.paused
        assert client.stream is not None
        assert client.stream.closed == (client in ended and server in ended)
    assert (wire.client.memory.held, wire.server.memory.held) == (0, 0)


def test_paused_stream_holds_no_more_than_its_window() -> None:
    wire = Wire()
    slow, quick = wire.open(), wire.open()
    wire.settle()
    assert wire.servers[0].stream is not None
    wire.servers[0].stream.pause_reading()
    assert slow.stream is not None
    assert quick.stream is not None
    while not slow.paused:
        slow.stream.write(bytes(50_000))
        wire.settle()
    assert len(wire.servers[0].got) <= INITIAL_WINDOW_BYTES
    assert 0 < wire.server.memory.held <= INITIAL_WINDOW_BYTES
    assert wire.client.memory.held >= 1
    quick.stream.write(b"still moving")
    wire.settle()
    assert bytes(wire.servers[1].got) == b"still moving"


def test_streams_beyond_the_memory_of_the_process_are_dropped_and_its_budget_comes_back() -> None:
    wire = Wire()
    wire.server.memory.limit = 3 * INITIAL_WINDOW_BYTES
    sides = [wire.open() for _ in range(6)]
    wire.settle()
    for server in wire.servers:
        assert server.stream is not None
        server.stream.pause_reading()
    for side in sides:
        assert side.stream is not None
        side.stream.write(bytes(INITIAL_WINDOW_BYTES))
        wire.settle()
    assert wire.server.memory.held <= wire.server.memory.limit
    dropped = [side for side in sides if side.error is not None]
    assert len(dropped) == wire.server.memory.overruns == 3
    late = wire.open()
    wire.settle()
    assert isinstance(late.error, StreamClosed)  # refused, so that another instance gets it
    for side in sides:
        assert side.stream is not None
        side.stream.abort()
    wire.settle()
    assert (wire.server.memory.held, wire.client.memory.held) == (0, 0)
    assert wire.server.memory.growth_left == wire.client.memory.growth_left


def test_windows_grow_to_what_the_way_asks_for() -> None:
    assert window_for(0.0001) == window_for(0.0) == NEAR_WINDOW_BYTES
    assert NEAR_WINDOW_BYTES < window_for(0.002) < MAX_WINDOW_BYTES
    assert window_for(0.05) == window_for(float("inf")) == MAX_WINDOW_BYTES
    budget = GrowthBudget(1 << 30)
    budget.window_max = NEAR_WINDOW_BYTES
    window = ReceiveWindow(budget, MemoryBudget())
    for _ in range(10):
        window.received(window.size // 2 + 1)
    assert window.size == NEAR_WINDOW_BYTES


@pytest.mark.parametrize("streams", [1, 2, 3])
def test_who_waits_alone_sends_in_one_piece_and_others_take_turns(streams: int) -> None:
    wire = Wire()
    sides = [wire.open() for _ in range(streams)]
    wire.settle()
    wire.client.blocked = True
    for side in sides:
        assert side.stream is not None
        side.stream.write(b"d" * INITIAL_WINDOW_BYTES)
    wire.client.blocked = False
    sent: list[tuple[int, int]] = []
    while wire.client.waiting:
        wire.client.pump()
        parsed = frames.FrameParser().feed(b"".join(wire.client.take_output()))
        sent += [(stream_id, len(payload)) for kind, stream_id, payload in parsed if kind == frames.DATA]
    ids = [side.stream.id for side in sides if side.stream is not None]
    if streams == 1:
        assert sent == [(ids[0], INITIAL_WINDOW_BYTES)]
        return
    turns = sent[:streams]
    assert [stream_id for stream_id, _ in turns] == ids
    assert {size for _, size in turns} == {TURN_BYTES}
    for stream_id in ids:
        assert sum(size for each, size in sent if each == stream_id) == INITIAL_WINDOW_BYTES
