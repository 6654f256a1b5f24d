"""Our end of HTTP/2 against the ``h2`` package's: the same frames, in the same order, and the same verdict.

Each example is a history of one connection: frames that come, well-formed and not, between things that we do. After
each step both have told the same events, have the same windows, and have answered with the same frames. Where one
ends the connection the other does, but for two things: ours may be stricter where :func:`stricter` says why, and what
the RFC calls an error of a stream, a malformed message above all (RFC 9113, section 8.1.1), ends the stream with ours
where the package ends the connection, by the same code.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import Any

import h2.config
import h2.connection
import h2.events
import pytest
from h2.errors import ErrorCodes
from h2.exceptions import H2Error, TooManyStreamsError
from h2.settings import SettingCodes
from hpack import Encoder
from hyperframe.frame import Frame, GoAwayFrame
from hypothesis import example, given, settings
from hypothesis import strategies as st

from proxy.http2.core import Core
from proxy.http2.errors import Http2Error
from proxy.http2.events import (
    DataCame,
    Event,
    GoneAway,
    Pinged,
    RequestCame,
    ResponseCame,
    SettingsCame,
    StreamWasReset,
    TrailersCame,
    WindowOpened,
)
from proxy.http2.frames import PREFACE, frame

STREAMS_MAX = 3
WINDOW = 128 * 1024
SETTINGS = frame(4, 0, 0, b"")
ACK = frame(4, 1, 0, b"")


class Theirs(h2.connection.H2Connection):
    """The package's, set up as ours is; a GOAWAY leaves its streams alone (RFC 9113, section 6.8)."""

    def __init__(self, *, client: bool) -> None:
        super().__init__(
            h2.config.H2Configuration(
                client_side=client,
                header_encoding=None,
                validate_outbound_headers=False,
                normalize_outbound_headers=False,
            )
        )
        self.initiate_connection()
        said: dict[SettingCodes | int, int] = {
            SettingCodes.INITIAL_WINDOW_SIZE: WINDOW,
            SettingCodes.MAX_CONCURRENT_STREAMS: STREAMS_MAX,
            SettingCodes.MAX_HEADER_LIST_SIZE: 64 * 1024,
        }
        if client:
            said[SettingCodes.ENABLE_PUSH] = 0
        self.update_settings(said)
        self.increment_flow_control_window(STREAMS_MAX * WINDOW - self.inbound_flow_control_window)

    def _receive_goaway_frame(self, frame: GoAwayFrame) -> tuple[list[Frame], list[h2.events.Event]]:
        event = h2.events.ConnectionTerminated()
        event.last_stream_id = frame.last_stream_id
        return [], [event]


def told_by_us(event: Event) -> tuple[Any, ...]:
    at = event.stream_id
    if isinstance(event, RequestCame):
        return "request", at, sorted(event.fields), event.end
    if isinstance(event, ResponseCame):
        return "response", at, sorted(event.fields), event.end
    if isinstance(event, DataCame):
        return "data", at, event.data, event.flow, event.end
    if isinstance(event, TrailersCame):
        return "trailers", at, sorted(event.fields)
    if isinstance(event, StreamWasReset):
        return "reset", at, int(event.code)
    if isinstance(event, WindowOpened):
        return "window", at
    if isinstance(event, GoneAway):
        return "goaway", event.last_stream_id
    assert isinstance(event, SettingsCame | Pinged)
    return ("settings" if isinstance(event, SettingsCame) else "ping",)


def told_by_them(event: h2.events.Event) -> tuple[Any, ...] | None:
    e = h2.events
    at: int = getattr(event, "stream_id", 0) or 0
    fields = sorted(tuple(each) for each in getattr(event, "headers", None) or ())
    if isinstance(event, e.RequestReceived):
        return "request", at, fields, event.stream_ended is not None
    if isinstance(event, e.ResponseReceived | e.InformationalResponseReceived):
        return "response", at, fields, getattr(event, "stream_ended", None) is not None
    if isinstance(event, e.DataReceived):
        return "data", at, event.data, event.flow_controlled_length, event.stream_ended is not None
    if isinstance(event, e.TrailersReceived):
        return "trailers", at, fields
    if isinstance(event, e.StreamReset):
        return "reset", at, int(event.error_code)
    if isinstance(event, e.WindowUpdated):
        return "window", at
    if isinstance(event, e.ConnectionTerminated):
        return "goaway", event.last_stream_id
    if isinstance(event, e.RemoteSettingsChanged):
        return ("settings",)
    return ("ping",) if isinstance(event, e.PingReceived) else None


def frames_of(data: bytes) -> list[tuple[int, int, int, bytes]]:
    """Return kind, flags, stream and payload of each frame."""
    found = []
    while data:
        high, low, kind, flags, stream_id = struct.unpack(">HBBBL", data[:9])
        size = (high << 8) + low
        found.append((kind, flags, stream_id, data[9 : 9 + size]))
        data = data[9 + size :]
    return found


ANSWERS = {3: "RST_STREAM", 6: "PING", 8: "WINDOW_UPDATE", 4: "SETTINGS"}


@dataclass
class Pair:
    client: bool
    ours: Core = field(init=False)
    theirs: Theirs = field(init=False)
    encoder: Encoder = field(default_factory=Encoder)
    ended: bool = False
    cancelled: set[int] = field(default_factory=set)
    """Streams that we have reset. The package does it again whenever something comes on them; ours says nothing more
    (section 5.1)."""

    def __post_init__(self) -> None:
        self.ours = Core(client=self.client, streams_max=STREAMS_MAX, stream_window=WINDOW, list_bytes_max=64 * 1024)
        self.theirs = Theirs(client=self.client)
        self.ours.to_send()
        self.theirs.data_to_send()
        begin = b"" if self.client else PREFACE
        self.ours.receive(begin + SETTINGS + ACK)
        self.theirs.receive_data(begin + SETTINGS + ACK + ACK)  # it has sent its settings in two frames
        self.ours.to_send()
        self.theirs.data_to_send()

    def come(self, data: bytes, *, strict: str = "", lenient: bool = False) -> None:
        """Both get these bytes; ``strict``: why ours may end the connection, or the stream, where theirs does not;
        ``lenient``: theirs may where ours does not."""
        wrong: Http2Error | None = None
        refused: H2Error | None = None
        ours: list[Event] = []
        theirs: list[h2.events.Event] = []
        try:
            ours = self.ours.receive(data)
        except Http2Error as error:
            wrong = error
        try:
            theirs = self.theirs.receive_data(data)
        except H2Error as error:
            refused = error
        told = [each for event in theirs if (each := told_by_them(event)) is not None]
        last = ours[-1] if ours else None
        ours_alone = isinstance(last, StreamWasReset) and last.text and told_by_us(last) not in told
        if refused is None and (wrong is not None or ours_alone):
            assert strict, (wrong, ours, theirs)
            self.ended = True
            return
        if refused is not None and wrong is None:
            sent = frames_of(self.ours.to_send())
            if lenient:
                assert [each[:3] for each in sent] in ([], [(3, 0, frames_of(data)[0][2])]), "a reset, at most"
            elif isinstance(last, StreamWasReset) and last.text:
                assert last.code == refused.error_code  # type: ignore[attr-defined]
                assert sent == [(3, 0, last.stream_id, struct.pack(">L", last.code))], "a reset, and nothing else"
            elif isinstance(refused, TooManyStreamsError):
                assert sent == [(3, 0, self.ours.last_stream_id, struct.pack(">L", ErrorCodes.REFUSED_STREAM))]
            else:
                raise AssertionError((refused, ours))
            self.ended = True
            return
        assert (wrong is None) == (refused is None), (wrong, refused, data)
        if wrong is not None:
            self.ended = True
            assert [each[0] for each in frames_of(self.ours.to_send())][-1:] == [7], "and says so"
            return
        assert [told_by_us(event) for event in ours] == told
        self.compare()

    def compare(self) -> None:
        """What was answered, and the windows."""
        sent, wanted = frames_of(self.ours.to_send()), frames_of(self.theirs.data_to_send())
        half_closed = {
            at
            for at, stream in self.theirs.streams.items()
            if stream.state_machine.state.name == "HALF_CLOSED_REMOTE"
        }

        def relevant(frames: list[tuple[int, int, int, bytes]]) -> list[tuple[int, int, int, bytes]]:
            # A window for a stream on which nothing more can come is of no use: ours does not open it.
            return [f for f in frames if f[0] in ANSWERS and not (f[0] == 8 and f[2] in half_closed)]

        wanted = [f for f in wanted if not (f[0] == 3 and f[2] in self.cancelled)]
        assert relevant(sent) == relevant(wanted)
        self.cancelled.update(f[2] for f in sent if f[0] == 3)
        for at in range(1, 12):
            try:
                room = self.theirs.local_flow_control_window(at)
                state = self.theirs.streams[at].state_machine.state.name
            except H2Error:
                room, state = -1, "CLOSED"
            if state in ("CLOSED", "HALF_CLOSED_LOCAL"):
                assert self.ours.room(at) == -1
            else:
                assert self.ours.room(at) == max(0, min(room, self.theirs.max_outbound_frame_size))

    def block(self, fields: list[tuple[bytes, bytes]]) -> bytes:
        return self.encoder.encode(fields, huffman=len(fields) % 2 == 0)

    # Things that we do

    def open(self, method: bytes, *, end: bool) -> None:
        if not self.client or self.theirs.open_outbound_streams >= min(
            8, self.theirs.remote_settings.max_concurrent_streams
        ):
            return
        at = self.theirs.get_next_available_stream_id()
        assert self.ours.open() == at
        fields = [(b":method", method), (b":scheme", b"http"), (b":authority", b"a"), (b":path", b"/")]
        assert self.ours.send_headers(at, fields, end=end)
        self.theirs.send_headers(at, fields, end_stream=end)
        self.compare()

    def answer(self, at: int, *, end: bool) -> None:
        stream = self.theirs.streams.get(at)
        if self.client or stream is None or (stream.state_machine.headers_sent and not end):
            return
        fields = [(b"x-end", b"1")] if stream.state_machine.headers_sent else [(b":status", b"200")]
        if stream.state_machine.state.name in ("CLOSED", "HALF_CLOSED_LOCAL"):
            assert not self.ours.send_headers(at, fields, end=end)
            return
        assert self.ours.send_headers(at, fields, end=end)
        self.theirs.send_headers(at, fields, end_stream=end)
        self.compare()

    def send(self, at: int, size: int, *, end: bool) -> None:
        room = self.ours.room(at)
        if room < 0:
            assert not self.ours.send_data(at, b"", end=end)
            return
        stream = self.theirs.streams[at]
        if not stream.state_machine.headers_sent:
            return
        data = b"s" * min(size, room)
        assert self.ours.send_data(at, data, end=end)
        self.theirs.send_data(at, data, end_stream=end)
        self.compare()

    def reset(self, at: int) -> None:
        self.ours.reset(at, ErrorCodes.CANCEL)
        stream = self.theirs.streams.get(at)
        if stream is not None and not stream.closed:
            self.theirs.reset_stream(at, ErrorCodes.CANCEL)
        self.compare()

    def give_back(self, at: int, size: int) -> None:
        if at % 2 == 0 or at > max(self.theirs.highest_inbound_stream_id, self.theirs.highest_outbound_stream_id):
            return
        self.ours.give_back(at, size)
        self.theirs.acknowledge_received_data(size, at)
        self.compare()


# Frames

ids = st.sampled_from([1, 1, 1, 3, 3, 5, 5, 7, 9, 2, 4, 0])
good_requests = st.sampled_from(
    [
        [(b":method", b"POST"), (b":scheme", b"http"), (b":authority", b"a"), (b":path", b"/a")],
        [(b":method", b"GET"), (b":scheme", b"http"), (b":path", b"/b"), (b"host", b"a"), (b"te", b"trailers")],
        [(b":method", b"CONNECT"), (b":authority", b"a:1")],
    ]
)
good_responses = st.sampled_from(
    [[(b":status", b"200")], [(b":status", b"404"), (b"x", b"y")], [(b":status", b"100")], [(b":status", b"103")]]
)
good_trailers = st.sampled_from([[(b"grpc-status", b"0")], [(b"x", b"y"), (b"cookie", b"a"), (b"cookie", b"b")], []])
pieces = st.sampled_from(
    [
        (b":method", b"GET"), (b":method", b"HEAD"), (b":scheme", b"https"), (b":authority", b"a"),
        (b":authority", b"b"), (b":path", b"/"), (b":path", b""), (b":status", b"200"), (b":status", b"100"),
        (b":protocol", b"websocket"), (b":other", b"x"), (b"host", b"a"), (b"host", b"b"), (b"te", b"trailers"),
        (b"te", b"gzip"), (b"te", b"Trailers"), (b"connection", b"close"), (b"keep-alive", b"1"),
        (b"proxy-connection", b"x"), (b"upgrade", b"h2c"), (b"transfer-encoding", b"chunked"), (b"x", b" y"),
        (b"x", b"y\t"), (b"x", b"a\nb"), (b"x", b"a\rb"), (b"x", b"a\0b"), (b"x", b""), (b"", b"x"), (b"X", b"y"),
        (b"x y", b"z"), (b"x\x7f", b"z"), (b"x\x80", b"z"), (b"x:", b"z"), (b"x:y", b"z"), (b"x", b"\x80\xff"),
        (b":", b"x"), (b"content-length", b"0"), (b"content-length", b"3"), (b"content-length", b"5"),
        (b"content-length", b"+3"), (b"content-length", b""), (b"content-length", b"3, 3"),
        (b"content-length", b"3_0"), (b"cookie", b"a=1"), (b"cookie", b"b=2"), (b"expect", b"100-continue"),
    ]
)  # fmt: skip


@st.composite
def field_lists(draw: st.DrawFn) -> list[tuple[bytes, bytes]]:
    """Field lists of every kind, with a few pieces more, fewer, or elsewhere."""
    fields = list(draw(good_requests | good_responses | good_trailers))
    for _ in range(draw(st.sampled_from([0, 0, 0, 1, 1, 2]))):
        place = draw(st.integers(0, len(fields)))
        if draw(st.booleans()) or not fields:
            fields.insert(place, draw(pieces))
        else:
            fields.pop(place % len(fields))
    return fields


bodies = st.sampled_from([b"", b"abc", b"hello", b"x" * 16000])
ways = st.sampled_from(["", "", "", "pad", "prio", "cut"])
steps = st.one_of(
    st.tuples(st.just("headers"), ids, field_lists(), st.booleans(), ways),
    st.tuples(st.just("headers"), ids, good_requests | good_responses, st.booleans(), st.just("")),
    st.tuples(st.just("data"), ids, bodies, st.booleans(), st.sampled_from([-1, -1, -1, 0, 3, 255])),
    st.tuples(st.just("rst"), ids, st.integers(0, 14)),
    st.tuples(st.just("window"), ids, st.sampled_from([1, 1000, 70_000, 0, (1 << 31) - 1, (1 << 31) - 65_536])),
    st.tuples(st.just("settings"), st.sampled_from([1, 2, 3, 4, 4, 5, 6, 8, 9, 255]), st.sampled_from(
        [0, 1, 2, 100, 4096, 16384, 65535, 70_000, (1 << 24) - 1, 1 << 24, (1 << 31) - 1, 1 << 31, (1 << 32) - 1])),
    st.tuples(st.just("ping"), st.booleans(), st.sampled_from([8, 8, 8, 7, 9, 0])),
    st.tuples(st.just("goaway"), st.integers(0, 9), st.sampled_from([8, 8, 12, 7])),
    st.tuples(st.just("raw"), st.sampled_from([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 99]), st.integers(0, 255), ids,
              st.binary(max_size=12)),
    st.tuples(st.just("open"), st.sampled_from([b"POST", b"GET", b"HEAD"]), st.booleans()),
    st.tuples(st.just("open"), st.sampled_from([b"POST", b"GET", b"HEAD"]), st.booleans()),
    st.tuples(st.just("answer"), ids, st.booleans()),
    st.tuples(st.just("send"), ids, st.sampled_from([0, 10, 20_000]), st.booleans()),
    st.tuples(st.just("reset"), ids),
    st.tuples(st.just("give"), ids, st.sampled_from([1, 5000, 70_000])),
)  # fmt: skip


def stricter(pair: Pair, step: tuple[Any, ...], data: bytes) -> str:
    """Return why ours may end the connection here and the package does not; empty where it may not."""
    kind, flags, at, _ = frames_of(data)[0]
    if kind == 5:
        return "a push that is not whole is a push"
    if kind == 3 and at > max(pair.theirs.highest_inbound_stream_id, pair.theirs.highest_outbound_stream_id):
        return "RST_STREAM of an idle stream (section 6.4)"
    if kind == 3 and at % 2 == 0:
        return "the same, of those that nobody opens"
    if kind == 1 and pair.client and at % 2 == 0:
        return "a client opens no stream for a server"
    if (
        kind == 1
        and step[0] == "headers"
        and any(
            name == b"cookie" and any(after[:1] == b":" for after, _ in step[2][place:])
            for place, (name, _) in enumerate(step[2])
        )
    ):
        return "a cookie before :path; the package puts cookies at the end, then looks (section 8.3)"
    if kind == 1 and flags & 1 and step[0] == "headers" and any(name == b"content-length" for name, _ in step[2]):
        return "a length is declared, and there is no body (section 8.1.1)"
    if kind == 1 and step[0] == "headers" and at in pair.theirs.streams and flags & 1:
        stream = pair.theirs.streams[at]
        if stream._expected_content_length not in (None, stream._actual_content_length):
            return "trailers end a body that is not as long as was said (section 8.1.1)"
    if kind == 1 and flags & 8 and flags & 32:
        return "a priority that is partly padding (section 6.2)"
    return ""


A_REQUEST = [(b":method", b"GET"), (b":scheme", b"http"), (b":authority", b"a"), (b":path", b"/")]


def late_hint(pair: Pair, step: tuple[Any, ...]) -> bool:
    """Whether an informational response comes on a stream that was cancelled. It was under way then: not its sender's
    fault, but the package ends the connection."""
    stream = pair.theirs.streams.get(step[1])
    informational = any(name == b":status" and value[:1] == b"1" for name, value in step[2])
    return (
        informational and stream is not None and stream.state_machine.state.name in ("CLOSED", "HALF_CLOSED_REMOTE")
    )


def apply(pair: Pair, step: tuple[Any, ...]) -> None:
    what, *rest = step
    if what == "headers":
        at, fields, end, how = rest
        block, flags = pair.block(fields), int(end)
        if how == "cut" and at:
            cut = len(block) // 2
            data = frame(1, flags, at, block[:cut]) + frame(9, 4, at, block[cut:])
        else:
            if how == "prio":
                block, flags = struct.pack(">LB", 11, 7) + block, flags | 32
            if how == "pad":
                block, flags = b"\x05" + block + bytes(5), flags | 8
                if len(block) <= 6:
                    return  # of this the package thinks otherwise: it takes no padding of an empty block
            data = frame(1, flags | 4, at, block)
        # A stream that was passed over, and reset for what came on it: ours heeds nothing more of it.
        lenient = late_hint(pair, step) or (step[1] in pair.cancelled and step[1] not in pair.theirs.streams)
        pair.come(data, strict=stricter(pair, step, data), lenient=lenient)
    elif what == "data":
        at, body, end, pad = rest
        flags = int(end) | (8 if pad >= 0 else 0)
        data = frame(0, flags, at, (bytes([pad]) + body + bytes(pad)) if pad >= 0 else body)
        pair.come(data)
    elif what == "raw":
        kind, flags, at, payload = rest
        if kind == 1 and (flags & 8 or flags & 32 or not flags & 4):
            return  # padding, priorities and pieces: above
        data = frame(kind, flags, at, payload)
        if kind == 4 and len(payload) > 6:
            return  # one setting at a time: of several the package heeds the last alone
        if kind == 0 and flags & 8 and not payload:
            return
        if kind in (7, 8) and payload[:1] >= b"\x80":
            return  # the reserved bit is to be ignored (6.8, 6.9); the package takes it for a part of the number
        pair.come(data, strict=stricter(pair, step, data))
    elif what == "rst":
        data = frame(3, 0, rest[0], struct.pack(">L", rest[1]))
        pair.come(data, strict=stricter(pair, step, data))
    elif what == "window":
        at, increment = rest
        stream = pair.theirs.streams.get(at)
        # What was on its way to a stream that is closed is ignored (5.1), even if it grants nothing.
        gone = at != 0 and (stream is None or stream.closed)
        pair.come(frame(8, 0, at, struct.pack(">L", increment)), lenient=gone and not increment)
    elif what == "settings":
        pair.come(frame(4, 0, 0, struct.pack(">HL", *rest)))
    elif what == "ping":
        pair.come(frame(6, int(rest[0]), 0, b"p" * rest[1]))
    elif what == "goaway":
        pair.come(frame(7, 0, 0, struct.pack(">LL", rest[0], 0).ljust(rest[1], b"d")[: rest[1]]))
    elif what == "open":
        pair.open(rest[0], end=rest[1])
    elif what == "answer":
        pair.answer(rest[0], end=rest[1])
    elif what == "send":
        pair.send(rest[0], rest[1], end=rest[2])
    elif what == "reset":
        pair.reset(rest[0])
    else:
        pair.give_back(*rest)


@pytest.mark.parametrize("client", [False, True])
@settings(max_examples=400, deadline=None)
@given(history=st.lists(steps, max_size=25))
@example(history=[("headers", 3, A_REQUEST, False, ""), ("window", 1, 0)])
@example(
    history=[("headers", 3, A_REQUEST, False, ""), ("data", 1, b"a", False, -1), ("headers", 1, A_REQUEST, False, "")]
)
def test_every_history_is_what_the_package_makes_of_it(client: bool, history: list[tuple[Any, ...]]) -> None:
    pair = Pair(client)
    for step in history:
        apply(pair, step)
        if pair.ended:
            return


@pytest.mark.parametrize("client", [False, True])
@settings(max_examples=300, deadline=None)
@given(fields=field_lists(), end=st.booleans(), after=st.booleans())
def test_every_field_list_gets_the_package_s_verdict(
    client: bool, fields: list[tuple[bytes, bytes]], end: bool, after: bool
) -> None:
    pair = Pair(client)
    pair.open(b"POST", end=False)
    if after:  # then they are trailers
        first = [(b":status", b"200")] if client else [
            (b":method", b"POST"), (b":scheme", b"http"), (b":authority", b"a"), (b":path", b"/a")
        ]  # fmt: skip
        apply(pair, ("headers", 1, first, False, ""))
    apply(pair, ("headers", 1, fields, end, ""))


@settings(max_examples=100, deadline=None)
@given(history=st.lists(steps, max_size=12), cuts=st.lists(st.integers(0, 400), max_size=20))
def test_it_does_not_matter_in_which_pieces_bytes_come(history: list[tuple[Any, ...]], cuts: list[int]) -> None:
    encoder = Encoder()
    data = PREFACE + SETTINGS + ACK
    for step in history:
        if step[0] == "headers":
            data += frame(1, 4 + int(step[3]), step[1], encoder.encode(step[2]))
        elif step[0] == "data":
            data += frame(0, int(step[3]), step[1], step[2][:300])
        elif step[0] == "raw":
            data += frame(*step[1:])

    def play(pieces: list[bytes]) -> tuple[list[tuple[Any, ...]], int, bytes]:
        core = Core(client=False, streams_max=STREAMS_MAX, stream_window=WINDOW, list_bytes_max=64 * 1024)
        told: list[tuple[Any, ...]] = []
        for piece in pieces:
            try:
                told += [told_by_us(event) for event in core.receive(piece)]
            except Http2Error as error:
                return told, error.code, core.to_send()
        return told, 0, core.to_send()

    whole, code, sent = play([data])
    places = sorted({min(cut, len(data)) for cut in cuts})
    pieces_ = [data[a:b] for a, b in zip([0, *places], [*places, len(data)], strict=True)]
    told, code_of_pieces, sent_of_pieces = play(pieces_)
    assert (code_of_pieces, sent_of_pieces) == (code, sent)
    # What came before a fault is not told when the fault is in the same read.
    assert told[: len(whole)] == whole
    if not code:
        assert told == whole
