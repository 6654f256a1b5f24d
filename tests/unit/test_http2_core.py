"""What an end of HTTP/2 refuses by itself, one example for each rule, and what it makes of bytes that are in order.

``tests/property/test_http2_core.py`` holds the same against the ``h2`` package, over histories of frames. Here are
the codes by which the other end is told, and what is stricter than the package.
"""

from __future__ import annotations

import struct

import pytest
from h2.errors import ErrorCodes
from hpack import Decoder, Encoder

from proxy.http2.core import BLOCK_BYTES_MAX, BLOCK_FRAMES_MAX, HINTS_MAX, REFUSALS_MAX, Core
from proxy.http2.errors import Http2Error
from proxy.http2.events import DataCame, Event, RequestCame, ResponseCame, StreamWasReset, TrailersCame
from proxy.http2.frames import PREFACE, frame
from proxy.http2.hpack import is_never_indexed

Fields = list[tuple[bytes, bytes]]
ASK: Fields = [(b":method", b"POST"), (b":scheme", b"http"), (b":authority", b"a"), (b":path", b"/a")]
SETTINGS = frame(4, 0, 0, b"")
ACK = frame(4, 1, 0, b"")


def server(*, known: bool = True, streams_max: int = 4) -> Core:
    core = Core(client=False, streams_max=streams_max, stream_window=100_000, list_bytes_max=65536)
    core.receive(PREFACE + SETTINGS + (ACK if known else b""))
    core.to_send()
    return core


def client(*, method: bytes = b"POST", end: bool = True) -> Core:
    """An end that has asked on stream 1."""
    core = Core(client=True, streams_max=4, stream_window=100_000, list_bytes_max=65536)
    assert core.open() == 1
    core.send_headers(1, [(b":method", method), *ASK[1:]], end=end)
    core.receive(SETTINGS + ACK)
    core.to_send()
    return core


def head(stream_id: int, fields: Fields, *, end: bool = False, flags: int = 4) -> bytes:
    """HEADERS whose block changes no table."""
    encoder = Encoder()
    return frame(1, flags + int(end), stream_id, encoder.encode(fields, huffman=False))


def data(stream_id: int, body: bytes = b"", *, end: bool = False) -> bytes:
    return frame(0, int(end), stream_id, body)


def number(value: int) -> bytes:
    return struct.pack(">L", value)


def setting(code: int, value: int) -> bytes:
    return frame(4, 0, 0, struct.pack(">HL", code, value))


OPEN = head(1, ASK)
E = ErrorCodes
WRONG: dict[str, tuple[bytes, ErrorCodes]] = {
    "a frame beyond 16 KiB, refused at its header": (b"\x00\x40\x01\x00\x00\x00\x00\x00\x01", E.FRAME_SIZE_ERROR),
    "DATA of no stream": (data(0), E.PROTOCOL_ERROR),
    "DATA of an idle stream": (data(1), E.PROTOCOL_ERROR),
    "DATA of a stream that only we could open": (data(2), E.PROTOCOL_ERROR),
    "DATA all padding and more": (OPEN + frame(0, 8, 1, b"\x06hello"), E.PROTOCOL_ERROR),
    "DATA that does not say its padding": (OPEN + frame(0, 8, 1, b""), E.FRAME_SIZE_ERROR),
    "HEADERS of no stream": (head(0, ASK), E.PROTOCOL_ERROR),
    "HEADERS of an even stream": (head(2, ASK), E.PROTOCOL_ERROR),
    "HEADERS of a lower stream that was never used": (head(5, ASK) + head(3, ASK), E.STREAM_CLOSED),
    "HEADERS whose priority is cut off": (frame(1, 0x24, 1, b"\x00\x00\x00\x00"), E.FRAME_SIZE_ERROR),
    "HEADERS that depend on themselves": (frame(1, 0x24, 1, number(1) + b"\x00"), E.PROTOCOL_ERROR),
    "HEADERS all padding": (frame(1, 0x0C, 1, b"\x01"), E.PROTOCOL_ERROR),
    "PRIORITY of no stream": (frame(2, 0, 0, number(1) + b"\x00"), E.PROTOCOL_ERROR),
    "PRIORITY of four bytes": (frame(2, 0, 1, number(3)), E.FRAME_SIZE_ERROR),
    "PRIORITY on itself": (frame(2, 0, 1, number(1) + b"\x00"), E.PROTOCOL_ERROR),
    "RST_STREAM of no stream": (frame(3, 0, 0, number(8)), E.PROTOCOL_ERROR),
    "RST_STREAM of an idle stream": (frame(3, 0, 1, number(8)), E.PROTOCOL_ERROR),
    "RST_STREAM of three bytes": (OPEN + frame(3, 0, 1, b"\x00\x00\x08"), E.FRAME_SIZE_ERROR),
    "SETTINGS on a stream": (frame(4, 0, 1, b""), E.PROTOCOL_ERROR),
    "SETTINGS of five bytes": (frame(4, 0, 0, b"\x00" * 5), E.FRAME_SIZE_ERROR),
    "an acknowledgement with settings": (frame(4, 1, 0, b"\x00" * 6), E.FRAME_SIZE_ERROR),
    "ENABLE_PUSH of 2": (setting(2, 2), E.PROTOCOL_ERROR),
    "INITIAL_WINDOW_SIZE beyond bounds": (setting(4, 1 << 31), E.FLOW_CONTROL_ERROR),
    "MAX_FRAME_SIZE too small": (setting(5, 16383), E.PROTOCOL_ERROR),
    "MAX_FRAME_SIZE too large": (setting(5, 1 << 24), E.PROTOCOL_ERROR),
    "ENABLE_CONNECT_PROTOCOL of 2": (setting(8, 2), E.PROTOCOL_ERROR),
    "a bad setting before a good one": (frame(4, 0, 0, struct.pack(">HLHL", 2, 2, 2, 0)), E.PROTOCOL_ERROR),
    "a push": (OPEN + frame(5, 4, 1, number(2)), E.PROTOCOL_ERROR),
    "PING on a stream": (frame(6, 0, 1, b"12345678"), E.PROTOCOL_ERROR),
    "PING of seven bytes": (frame(6, 0, 0, b"1234567"), E.FRAME_SIZE_ERROR),
    "GOAWAY on a stream": (frame(7, 0, 1, b"12345678"), E.PROTOCOL_ERROR),
    "GOAWAY of seven bytes": (frame(7, 0, 0, b"1234567"), E.FRAME_SIZE_ERROR),
    "WINDOW_UPDATE by nothing": (frame(8, 0, 0, number(0)), E.PROTOCOL_ERROR),
    "WINDOW_UPDATE of an idle stream": (frame(8, 0, 1, number(1)), E.PROTOCOL_ERROR),
    "WINDOW_UPDATE of three bytes": (frame(8, 0, 0, b"\x00\x00\x01"), E.FRAME_SIZE_ERROR),
    "a connection's window beyond bounds": (frame(8, 0, 0, number((1 << 31) - 1)), E.FLOW_CONTROL_ERROR),
    "a stream's window beyond bounds, by a setting": (
        OPEN + frame(8, 0, 1, number((1 << 31) - 1 - 65535)) + setting(4, 65536), E.FLOW_CONTROL_ERROR,
    ),
    "CONTINUATION of nothing": (frame(9, 4, 1, b""), E.PROTOCOL_ERROR),
    "a frame within a header block": (head(1, ASK, flags=0) + frame(6, 0, 0, b"12345678"), E.PROTOCOL_ERROR),
    "another stream's CONTINUATION": (head(1, ASK, flags=0) + frame(9, 4, 3, b""), E.PROTOCOL_ERROR),
    "an unknown frame within a header block": (head(1, ASK, flags=0) + frame(99, 0, 1, b""), E.PROTOCOL_ERROR),
    "a header block in too many pieces": (
        head(1, ASK, flags=0) + frame(9, 0, 1, b"") * BLOCK_FRAMES_MAX, E.ENHANCE_YOUR_CALM,
    ),
    "a header block of too many bytes": (
        head(1, ASK, flags=0) + frame(9, 0, 1, bytes(16384)) * (BLOCK_BYTES_MAX // 16384), E.ENHANCE_YOUR_CALM,
    ),
    "a block that is none": (frame(1, 4, 1, b"\xff\xff\xff\xff\xff\xff\xff"), E.COMPRESSION_ERROR),
    "an entry that no table has": (frame(1, 4, 1, b"\xbe"), E.COMPRESSION_ERROR),
    "more data than the stream has room for": (OPEN + data(1, bytes(16000)) * 7, E.FLOW_CONTROL_ERROR),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_ends_the_connection(name: str) -> None:
    wrong, code = WRONG[name]
    core = server()
    with pytest.raises(Http2Error) as caught:
        core.receive(wrong)
    assert caught.value.code == code, caught.value
    last = core.to_send()[-17:]
    assert last[3] == 7, "a GOAWAY says so"
    assert last[13:] == number(code)


LENGTH_3 = head(1, [*ASK, (b"content-length", b"3")])
MALFORMED: dict[str, bytes] = {
    "trailers that do not end": OPEN + head(1, [(b"x", b"y")]),
    "a pseudo field in trailers": OPEN + head(1, [(b":path", b"/")], end=True),
    "trailers with a capital": OPEN + head(1, [(b"X", b"y")], end=True),
    "a body longer than was said": LENGTH_3 + data(1, b"four"),
    "a body shorter than was said": LENGTH_3 + data(1, b"2!", end=True),
    "the same, ended by trailers": LENGTH_3 + data(1, b"2!") + head(1, [], end=True),
    "no body where one was said": head(1, [*ASK, (b"content-length", b"3")], end=True),
}


def reset_of(core: Core, wrong: bytes) -> int:
    """Return the code by which stream 1 is reset for these bytes, which end nothing else."""
    events = core.receive(wrong)
    assert isinstance(events[-1], StreamWasReset)
    assert events[-1].stream_id == 1
    assert events[-1].text, "it is told why"
    code = events[-1].code
    assert core.to_send().endswith(frame(3, 0, 1, number(code)))
    assert core.room(1) == -1
    return code


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_message_ends_its_stream_and_no_other(name: str) -> None:
    core = server()
    assert reset_of(core, MALFORMED[name]) == E.PROTOCOL_ERROR
    assert [event.stream_id for event in core.receive(head(3, ASK))] == [3]


def test_what_a_malformed_message_took_of_the_connection_s_window_is_given_back() -> None:
    core = server()
    for at in range(1, 401, 2):  # fifteen times the window
        core.receive(head(at, [*ASK, (b"content-length", b"3")]) + data(at, bytes(16000)))
    assert core.receive(head(401, ASK) + data(401, bytes(16000)))


def test_a_header_list_beyond_64_KiB_ends_its_stream() -> None:
    core = server()
    many = [(b"x-%d" % n, b"v" * 200) for n in range(75)]
    assert core.receive(head(1, [*ASK, *many]))
    (event,) = core.receive(frame(1, 4, 3, b"\xbe" * 400))
    assert isinstance(event, StreamWasReset)
    assert (event.stream_id, event.code) == (3, E.ENHANCE_YOUR_CALM)
    (event,) = core.receive(head(5, [*ASK, *many]))
    assert isinstance(event, RequestCame)


def test_a_field_that_is_malformed_spoils_none_but_those_that_refer_to_it() -> None:
    """Both tables go on alike, so that what was put there is there; and it is no better for that."""
    core, encoder = server(), Encoder()

    def ask(stream_id: int, *more: tuple[bytes, bytes]) -> list[Event]:
        return core.receive(frame(1, 4, stream_id, encoder.encode([*ASK, *more])))

    assert isinstance(ask(1, (b"x-a", b"good"), (b"X-Bad", b"y"), (b"x-b", b"last"))[0], StreamWasReset)
    (event,) = ask(3, (b"x-b", b"last"), (b"x-a", b"good"))
    assert isinstance(event, RequestCame)
    assert event.fields[4:] == [(b"x-b", b"last"), (b"x-a", b"good")]
    assert isinstance(ask(5, (b"X-Bad", b"y"))[0], StreamWasReset), "by its index"
    assert isinstance(ask(7, (b"X-Bad", b"z"))[0], StreamWasReset), "by its name's"
    assert isinstance(ask(9, (b"x-a", b"good"))[0], RequestCame)


def test_what_comes_first_must_be_settings() -> None:
    for first, said in ((frame(6, 0, 0, b"12345678"), "SETTINGS"), (ACK, "SETTINGS"), (OPEN, "SETTINGS")):
        core = Core(client=False, streams_max=4, stream_window=100_000, list_bytes_max=65536)
        with pytest.raises(Http2Error, match=said) as caught:
            core.receive(PREFACE + first)
        assert caught.value.code == E.PROTOCOL_ERROR
    core = Core(client=True, streams_max=4, stream_window=100_000, list_bytes_max=65536)
    with pytest.raises(Http2Error, match=r"HTTP/1\.1") as caught:
        core.receive(b"HTTP/1.1 400 Bad Request\r\n\r\n")
    assert caught.value.code == E.PROTOCOL_ERROR


def test_what_is_no_http2_is_found_at_the_first_octet_that_differs() -> None:
    for junk in (b"GET", b"PRI * HTTP/1", b"\x16\x03"):
        core = Core(client=False, streams_max=1, stream_window=1, list_bytes_max=1)
        with pytest.raises(Http2Error):
            core.receive(junk)
    core = Core(client=False, streams_max=1, stream_window=1, list_bytes_max=1)
    for octet in PREFACE:
        assert core.receive(bytes([octet])) == []


BAD_FIELDS: dict[str, Fields] = {
    "no method": ASK[1:],
    "no scheme": [ASK[0], *ASK[2:]],
    "no path": ASK[:3],
    "an empty path": [*ASK[:3], (b":path", b"")],
    "no authority": [*ASK[:2], ASK[3]],
    "two methods": [ASK[0], *ASK],
    "a path after a field": [*ASK[:3], (b"x", b"y"), ASK[3]],
    "a method of two words": [(b":method", b"GET /b HTTP/1.1"), *ASK[1:]],
    "an empty method": [(b":method", b""), *ASK[1:]],
    "a scheme that is a URL": [ASK[0], (b":scheme", b"http://b/?"), *ASK[2:]],
    "an empty scheme": [ASK[0], (b":scheme", b""), *ASK[2:]],
    "an empty authority": [*ASK[:2], (b":authority", b""), ASK[3]],
    "an empty host": [*ASK[:2], ASK[3], (b"host", b"")],
    "an authority with a user": [*ASK[:2], (b":authority", b"u@a"), ASK[3]],
    "an authority with a path": [*ASK[:2], (b":authority", b"a/b"), ASK[3]],
    "CONNECT without authority": [(b":method", b"CONNECT"), (b"host", b"a")],
    "a status": [*ASK, (b":status", b"200")],
    "an unknown pseudo field": [*ASK, (b":x", b"y")],
    "a protocol without CONNECT": [*ASK, (b":protocol", b"x")],
    "CONNECT with a path": [(b":method", b"CONNECT"), *ASK[1:]],
    "another host": [*ASK, (b"host", b"b")],
    "two hosts": [*ASK, (b"host", b"a"), (b"host", b"a")],
    "te": [*ASK, (b"te", b"gzip")],
    "connection": [*ASK, (b"connection", b"x")],
    "keep-alive": [*ASK, (b"keep-alive", b"x")],
    "proxy-connection": [*ASK, (b"proxy-connection", b"x")],
    "transfer-encoding": [*ASK, (b"transfer-encoding", b"chunked")],
    "upgrade": [*ASK, (b"upgrade", b"x")],
    "a capital": [*ASK, (b"X-a", b"y")],
    "an empty name": [*ASK, (b"", b"y")],
    "a space in a name": [*ASK, (b"a b", b"y")],
    "a line break in a name": [*ASK, (b"a\r\nb", b"y")],
    "a colon in a name": [*ASK, (b"a:b", b"y")],
    "a line feed in a value": [*ASK, (b"x", b"a\nb: c")],
    "a return in a value": [*ASK, (b"x", b"a\rb")],
    "a NUL in a value": [*ASK, (b"x", b"a\0b")],
    "a line break in the path": [*ASK[:3], (b":path", b"/\r\nx: y")],
    "white space before a value": [*ASK, (b"x", b" a")],
    "white space after a value": [*ASK, (b"x", b"a\t")],
    "a length with a sign": [*ASK, (b"content-length", b"+3")],
    "a length with spaces": [*ASK, (b"content-length", b"3 3")],
    "a length like a number of Python's": [*ASK, (b"content-length", b"3_0")],
    "a length that is empty": [*ASK, (b"content-length", b"")],
    "a length of very many digits": [*ASK, (b"content-length", b"1" * 5000)],
    "two lengths": [*ASK, (b"content-length", b"3"), (b"content-length", b"4")],
}


@pytest.mark.parametrize("name", BAD_FIELDS)
def test_which_requests_are_malformed(name: str) -> None:
    assert reset_of(server(), head(1, BAD_FIELDS[name])) == E.PROTOCOL_ERROR


@pytest.mark.parametrize(
    "fields",
    [
        [(b":status", b"99")], [(b":status", b"1000")], [(b":status", b"abc")], [(b":status", b"+20")],
        [(b":status", b"")], [(b":status", b"101")], [(b":status", b"099")], [(b":status", b"000")], [(b"x", b"y")],
        [(b":status", b"200"), (b":status", b"200")], [(b"x", b"y"), (b":status", b"200")],
        [(b":status", b"200"), (b":path", b"/")], [(b":status", b"200"), (b"connection", b"close")],
        [(b":status", b"200"), (b"content-length", b"x")],
    ],
)  # fmt: skip
def test_which_responses_are_malformed(fields: Fields) -> None:
    assert reset_of(client(), head(1, fields)) == E.PROTOCOL_ERROR


@pytest.mark.parametrize(
    "frames",
    [
        head(3, [(b":status", b"200")]),  # to nothing
        head(2, ASK),  # a server that asks
        head(1, [(b":status", b"103")]) * (HINTS_MAX + 1),
        setting(2, 1),
    ],
)
def test_what_a_server_must_not_send(frames: bytes) -> None:
    with pytest.raises(Http2Error):
        client().receive(frames)


@pytest.mark.parametrize(
    "frames",
    [
        data(1, b"x"),  # before the response
        head(1, [(b":status", b"100")], end=True),
        head(1, [(b":status", b"200")]) + head(1, [(b":status", b"100")]),
        head(1, [(b":status", b"200"), (b"content-length", b"5")], end=True),
        head(1, [(b":status", b"304"), (b"content-length", b"5")]) + data(1, b"hello"),
    ],
)
def test_what_a_server_must_not_answer(frames: bytes) -> None:
    assert reset_of(client(), frames) == E.PROTOCOL_ERROR


def test_responses_without_a_body_may_say_how_long_it_would_be() -> None:
    length = (b"content-length", b"5")
    for method, status in ((b"HEAD", b"200"), (b"GET", b"304")):
        for ending in (True, False):
            core = client(method=method)
            events = core.receive(head(1, [(b":status", status), length], end=ending))
            if not ending:
                events += core.receive(data(1, end=True))
            assert isinstance(events[0], ResponseCame)
            assert core.room(1) == -1
    assert reset_of(client(method=b"HEAD"), head(1, [(b":status", b"200"), length]) + data(1, b"h"))


def test_a_call_from_its_request_to_its_trailers() -> None:
    core = server()
    events = core.receive(OPEN + data(1, b"question") + head(1, [(b"x", b"y")], end=True))
    asked, body, trailers = events
    assert isinstance(asked, RequestCame)
    assert (asked.stream_id, asked.fields, asked.end) == (1, ASK, False)
    assert isinstance(body, DataCame)
    assert (body.data, body.flow, body.end) == (b"question", 8, False)
    assert isinstance(trailers, TrailersCame)
    assert core.send_headers(1, [(b":status", b"200")], end=False)
    assert core.send_data(1, b"answer", end=False)
    assert core.send_headers(1, [(b"grpc-status", b"0")], end=True)
    assert not core.send_data(1, b"", end=True), "it has ended"
    block = Decoder()
    sent = core.to_send()
    assert sent.startswith(frame(1, 4, 1, b"\x88"))
    assert data(1, b"answer") in sent
    assert block.decode(sent[-(len(sent) - 10 - 15) + 9 :], raw=True) == [(b"grpc-status", b"0")]
    assert core.to_send() == b""
    with pytest.raises(Http2Error) as caught:
        core.receive(head(1, [(b"x", b"y")], end=True))
    assert caught.value.code == E.STREAM_CLOSED


def test_what_ends_a_stream_and_no_more() -> None:
    after_end = head(1, ASK, end=True)
    too_wide = frame(8, 0, 1, number((1 << 31) - 1))
    for wrong, code in (
        (after_end + data(1, b"x"), E.STREAM_CLOSED),
        (after_end + head(1, [(b"x", b"y")], end=True), E.STREAM_CLOSED),
        (OPEN + too_wide, E.FLOW_CONTROL_ERROR),
        (OPEN + frame(8, 0, 1, number(0)), E.PROTOCOL_ERROR),
        (OPEN + frame(2, 0, 1, number(3)), E.FRAME_SIZE_ERROR),
    ):
        core = server()
        events: list[Event] = core.receive(wrong)
        assert isinstance(events[-1], StreamWasReset)
        assert events[-1].code == code
        assert core.to_send() == frame(3, 0, 1, number(code))
        assert core.room(1) == -1
        # What was under way when we reset it is of no interest, and no frame may be sent on it any more.
        assert core.receive(data(1, b"late") + head(1, [(b"x", b"y")], end=True) + frame(8, 0, 1, number(1))) == []
        assert core.to_send() == b""
        assert core.receive(head(3, ASK))


@pytest.mark.parametrize("known", [False, True])
def test_streams_beyond_the_limit_are_refused(known: bool) -> None:
    core = server(known=known)
    events = core.receive(b"".join(head(n, ASK) for n in range(1, 13, 2)))
    assert [event.stream_id for event in events] == [1, 3, 5, 7]
    assert core.to_send() == b"".join(frame(3, 0, n, number(E.REFUSED_STREAM)) for n in (9, 11))
    assert core.receive(data(9, b"under way")) == []
    more = b"".join(head(n, ASK) for n in range(13, 13 + 2 * REFUSALS_MAX, 2))
    with pytest.raises(Http2Error) as caught:
        core.receive(more)
    assert caught.value.code == E.ENHANCE_YOUR_CALM


def test_the_window_opens_again_as_bytes_are_dealt_with_and_for_those_that_nobody_takes() -> None:
    core = server()
    core.receive(OPEN)
    for _ in range(50):
        core.receive(data(1, bytes(16000)))
        core.give_back(1, 16000)
    opened = core.to_send()
    assert opened.count(b"\x00\x00\x04\x08\x00\x00\x00\x00\x01") >= 8
    core.reset(1, E.CANCEL)
    for _ in range(100):
        core.receive(data(1, bytes(16000)))  # four times the connection's window


def test_a_long_header_list_is_sent_in_pieces() -> None:
    core = server()
    core.receive(OPEN)
    core.to_send()
    fields = [(b":status", b"200"), *[(b"x-%d" % n, b"v" * 1000) for n in range(40)]]
    core.send_headers(1, fields, end=True)
    sent, block, kinds = core.to_send(), b"", []
    while sent:
        size = int.from_bytes(sent[:3], "big")
        assert size <= 16384
        kinds.append((sent[3], sent[4]))
        block += sent[9 : 9 + size]
        sent = sent[9 + size :]
    assert kinds == [(1, 1), (9, 0), (9, 4)]
    assert Decoder(max_header_list_size=100_000).decode(block, raw=True) == fields


def test_cookies_in_pieces_are_one_and_secret_if_one_of_them_is() -> None:
    core = server()
    fields = [*ASK[:4], (b"cookie", b"a=1"), (b"x", b"y"), (b"cookie", b"b=2")]
    (event,) = core.receive(head(1, fields))
    assert isinstance(event, RequestCame)
    assert event.fields == [*ASK, (b"x", b"y"), (b"cookie", b"a=1; b=2")]
    block = Encoder().encode([*ASK, (b"cookie", b"a=1", True), (b"cookie", b"b=2")])
    (event,) = core.receive(frame(1, 4, 3, block))
    assert isinstance(event, RequestCame)
    assert is_never_indexed(event.fields[-1])


def test_ids_are_used_once_and_run_out() -> None:
    core = Core(client=True, streams_max=1, stream_window=1, list_bytes_max=1)
    assert [core.open() for _ in range(3)] == [1, 3, 5]
    core._next_id = (1 << 31) - 1
    assert core.open() == (1 << 31) - 1
    assert core.open() == core.open() == 0


def test_what_is_unknown_is_ignored() -> None:
    core = server()
    assert core.receive(frame(99, 255, 5, b"junk") + frame(10, 0, 0, b"") + setting(99, 7)[:0]) == []
    assert core.receive(frame(2, 0, 77, number(3) + b"\x00") + frame(6, 1, 0, b"12345678")) == []
    assert core.to_send() == b""
