"""RFC 9113 and RFC 7541 section by section: what a client does wrong, and what is to become of it.

Each case is played to a real side of a sidecar, in process: to the inbound and to the outbound one. Then a stream has
been reset with this code, and all else goes on; or the connection has ended with this code; or neither. What goes on
answers a ping. ``test_http2_conformance_servers.py`` has what servers do wrong, and what takes more than one step.

Where the RFC leaves the choice (an error of a stream may be taken for one of the connection, section 5.4.1), the case
says what we do and why. Section numbers without a name are RFC 9113's.
"""

from __future__ import annotations

from proxy.http2.frames import PREFACE, frame
from tests.security.test_http2_floods import both, staged, turns
from tests.support.http2_cases import (
    ACK,
    ASK,
    ASKED_ALL,
    BLOCK,
    CLOSED,
    CUT,
    FINE,
    FLOW,
    HEAD_ENDS,
    HOST,
    HTTP,
    HUFFMAN,
    LARGE_FIELD,
    LENGTH_3,
    MALFORMED,
    MAX,
    OPEN,
    PADDED,
    PING,
    POST,
    PRIORITY,
    ROOT,
    SAYS_3,
    SETTINGS,
    SIZE,
    WRONG,
    Case,
    Connection,
    E,
    Stream,
    X,
    data,
    headers,
    judged,
    literal,
    named,
    number,
    priority,
    rst,
    settings,
    window,
)


def malformed(rule: str, block: bytes) -> Case:
    """A request that is refused before anything is decided on it."""
    return Case(rule, headers(block, end=True), MALFORMED, asked=0)


def asks(rule: str, block: bytes) -> Case:
    """A request that goes on."""
    return Case(rule, headers(block, end=True), FINE, asked=1)


BY_CLIENTS = [
    # 3. Starting HTTP/2
    Case("3.4 the preface is another protocol's", b"GET / HTTP/1.1\r\nHost: a\r\n\r\n", WRONG, before=b""),
    Case("3.4 the preface is nearly right", PREFACE[:-2] + b"\n\n" + SETTINGS, WRONG, before=b""),
    Case("3.4 SETTINGS may be empty", SETTINGS, FINE, before=PREFACE),
    Case("3.4 PING comes first", PING, WRONG, before=PREFACE),
    Case("3.4 a request comes first", OPEN, WRONG, before=PREFACE, asked=0),
    Case("3.4 an acknowledgement comes first", ACK + SETTINGS, WRONG, before=PREFACE),
    Case("3.4 an unknown frame comes first", frame(99, 0, 0, b"") + SETTINGS, WRONG, before=PREFACE),
    # 4. Frames
    Case("4.1 unknown frames are ignored", frame(99, 255, 0, b"junk") + frame(10, 0, 7, b"") + OPEN, FINE, asked=1),
    Case("4.1 flags that mean nothing are ignored", frame(6, 0xFE, 0, bytes(8)), FINE),
    Case("4.1 the reserved bit is ignored", frame(1, 4, 1 | 1 << 31, ASK), FINE, asked=1),
    Case("4.2 DATA of 16,384 bytes", OPEN + data(bytes(16384)), FINE),
    # Might be of a stream alone; to read it all would be to take in what was not agreed on.
    Case("4.2 DATA beyond 16,384 bytes", OPEN + data(bytes(16385)), SIZE),
    Case("4.2 HEADERS beyond 16,384 bytes", headers(ASK + bytes(16384)), SIZE),
    Case("4.2 SETTINGS beyond 16,384 bytes", settings(*[(99, 0)] * 2731), SIZE),
    Case("4.3 a block in two frames", headers(CUT, flags=0) + frame(9, 4, 1, ROOT + HOST), FINE, asked=1),
    Case("4.3 a block cut within a field", headers(ASK[:-1], flags=0) + frame(9, 4, 1, ASK[-1:]), FINE, asked=1),
    Case("4.3 a frame within a block", headers(CUT, flags=0) + PING, WRONG),
    Case("4.3 another stream's HEADERS within a block", headers(CUT, flags=0) + headers(ASK, stream=3), WRONG),
    # 5.1 Stream states
    Case("5.1 idle: DATA", data(b"x"), WRONG),
    Case("5.1 idle: RST_STREAM", rst(), WRONG),
    Case("5.1 idle: WINDOW_UPDATE", window(1), WRONG),
    Case("5.1 idle: CONTINUATION", frame(9, 4, 1, ASK), WRONG),
    Case("5.1 idle: PRIORITY", priority(1, 3), FINE),
    Case("5.1 half-closed (remote): DATA", ASKED_ALL + data(b"x"), CLOSED),
    Case("5.1 half-closed (remote): HEADERS", ASKED_ALL + headers(X, end=True), CLOSED),
    Case("5.1 half-closed (remote): CONTINUATION", ASKED_ALL + frame(9, 4, 1, X), WRONG),
    Case("5.1 half-closed (remote): WINDOW_UPDATE, PRIORITY", ASKED_ALL + window(1) + priority(1, 3), FINE),
    Case("5.1 half-closed (remote): RST_STREAM", ASKED_ALL + rst(), FINE),
    Case("5.1 closed by its reset: DATA", OPEN + rst() + data(b"x"), CLOSED),
    Case("5.1 closed by its reset: HEADERS", OPEN + rst() + headers(X, end=True), CLOSED),
    Case("5.1 closed by its reset: the rest", OPEN + rst() + window(1) + priority(1, 3) + rst(), FINE),
    Case("5.1 closed by ours: nothing is said of it again", headers(CUT) + data(b"x") + headers(X) * 2, MALFORMED),
    Case("5.1 closed by ours: WINDOW_UPDATE by nothing", headers(CUT) + window(0) + rst(), MALFORMED),
    Case("5.1.1 an even stream", headers(ASK, stream=2), WRONG),
    # It was skipped, and so is closed. PROTOCOL_ERROR by 5.1.1, STREAM_CLOSED by 5.1: which is not kept apart.
    Case("5.1.1 a lower stream", headers(ASK, stream=5) + headers(ASK, stream=3), Connection(E.STREAM_CLOSED)),
    Case("5.1.1 streams may be skipped", headers(ASK, stream=7) + headers(ASK, stream=99), FINE, asked=2),
    # 5.3 Priorities are not heeded, but for what RFC 7540, section 5.3.1, forbids
    Case("5.3 HEADERS with a priority", headers(number(3) + b"\x10" + ASK, flags=36), FINE, asked=1),
    Case("5.3 HEADERS that depend on themselves", headers(number(1) + b"\x10" + ASK, flags=36), WRONG),
    Case("5.3 PRIORITY that depends on itself", OPEN + priority(1, 1), WRONG),
    Case("5.5 an unknown frame within a block", headers(CUT, flags=0) + frame(99, 0, 1, b""), WRONG),
    # 6.1 DATA
    Case("6.1 of no stream", data(b"x", stream=0), WRONG),
    Case("6.1 as much padding as there is", OPEN + frame(0, PADDED, 1, b"\x05" + bytes(5)), FINE),
    Case("6.1 more padding than there is", OPEN + frame(0, PADDED, 1, b"\x06" + bytes(5)), WRONG),
    Case("6.1 no padding length", OPEN + frame(0, PADDED, 1, b""), SIZE),
    # 6.2 HEADERS
    Case("6.2 of no stream", headers(ASK, stream=0), WRONG),
    Case("6.2 padding", headers(b"\x02" + ASK + bytes(2), flags=HEAD_ENDS | PADDED), FINE, asked=1),
    Case("6.2 more padding than there is", headers(b"\x10" + CUT, flags=HEAD_ENDS | PADDED), WRONG),
    Case("6.2 a priority cut off", headers(bytes(4), flags=HEAD_ENDS | PRIORITY), SIZE),
    # 6.3 PRIORITY
    Case("6.3 of no stream", priority(0, 1), WRONG),
    Case("6.3 of four bytes", OPEN + frame(2, 0, 1, bytes(4)), Stream(E.FRAME_SIZE_ERROR)),
    # A stream that is idle cannot be reset (6.4).
    Case("6.3 of six bytes, of an idle stream", frame(2, 0, 1, bytes(6)), SIZE),
    # 6.4 RST_STREAM
    Case("6.4 of no stream", rst(0), WRONG),
    Case("6.4 of three bytes", OPEN + frame(3, 0, 1, bytes(3)), SIZE),
    Case("6.4 of five bytes", OPEN + frame(3, 0, 1, bytes(5)), SIZE),
    # 6.5 SETTINGS
    Case("6.5 of a stream", frame(4, 0, 1, b""), WRONG),
    Case("6.5 of five bytes", frame(4, 0, 0, bytes(5)), SIZE),
    Case("6.5 an acknowledgement with a setting", frame(4, 1, 0, bytes(6)), SIZE),
    Case("6.5 an acknowledgement of nothing", ACK * 3, FINE),
    Case("6.5.2 HEADER_TABLE_SIZE of 0 and of all", settings((1, 0)) + settings((1, (1 << 32) - 1)), FINE),
    Case("6.5.2 ENABLE_PUSH of 0 and of 1", settings((2, 0), (2, 1)), FINE),
    Case("6.5.2 ENABLE_PUSH of 2", settings((2, 2)), WRONG),
    Case("6.5.2 MAX_CONCURRENT_STREAMS of 0", settings((3, 0)) + OPEN, FINE, asked=1),
    Case("6.5.2 INITIAL_WINDOW_SIZE of all", settings((4, MAX)), FINE),
    Case("6.5.2 INITIAL_WINDOW_SIZE beyond", settings((4, 1 << 31)), FLOW),
    Case("6.5.2 MAX_FRAME_SIZE of the least and of the most", settings((5, 16384), (5, (1 << 24) - 1)), FINE),
    Case("6.5.2 MAX_FRAME_SIZE of too little", settings((5, 16383)), WRONG),
    Case("6.5.2 MAX_FRAME_SIZE of too much", settings((5, 1 << 24)), WRONG),
    Case("6.5.2 MAX_HEADER_LIST_SIZE of 0", settings((6, 0)), FINE),
    Case("6.5.2 an unknown setting", settings((99, 1), (0, 5)), FINE),
    Case("6.5.3 a wrong one before one that mends it", settings((2, 2), (2, 0)), WRONG),
    Case("RFC 8441 3 ENABLE_CONNECT_PROTOCOL of 2", settings((8, 2)), WRONG),
    # 6.6 PUSH_PROMISE
    Case("6.6 from a client", OPEN + frame(5, 4, 1, number(2) + ASK), WRONG),
    Case("6.6 from a client, cut off", OPEN + frame(5, 4, 1, b""), WRONG),
    # 6.7 PING
    Case("6.7 an acknowledgement of nothing", frame(6, 1, 0, bytes(8)), FINE),
    Case("6.7 of a stream", frame(6, 0, 1, bytes(8)), WRONG),
    Case("6.7 of seven bytes", frame(6, 0, 0, bytes(7)), SIZE),
    Case("6.7 of nine bytes", frame(6, 0, 0, bytes(9)), SIZE),
    # 6.8 GOAWAY
    Case("6.8 of a stream", frame(7, 0, 1, bytes(8)), WRONG),
    Case("6.8 of seven bytes", frame(7, 0, 0, bytes(7)), SIZE),
    Case("6.8 with what is under way", OPEN + frame(7, 0, 0, bytes(8) + b"why") + data(b"x"), FINE, asked=1),
    # 6.9 WINDOW_UPDATE
    Case("6.9 by nothing, of a stream", OPEN + window(0), MALFORMED),
    Case("6.9 by nothing, of all", window(0, 0), WRONG),
    Case("6.9 by nothing but the reserved bit", OPEN + window(1 << 31), MALFORMED),
    Case("6.9 of three bytes", OPEN + frame(8, 0, 1, bytes(3)), SIZE),
    Case("6.9 of five bytes", frame(8, 0, 0, bytes(5)), SIZE),
    Case("6.9.1 a stream's to the brim", OPEN + window(MAX - 65535), FINE),
    Case("6.9.1 a stream's beyond", OPEN + window(MAX), Stream(E.FLOW_CONTROL_ERROR)),
    Case("6.9.1 a stream's beyond, by two", OPEN + window(MAX - 65535) + window(1), Stream(E.FLOW_CONTROL_ERROR)),
    Case("6.9.1 the connection's to the brim", window(MAX - 65535, 0), FINE),
    Case("6.9.1 the connection's beyond", window(MAX, 0), FLOW),
    # Either is allowed: who sends more than there is room for sends it on every stream.
    Case("6.9.1 more DATA than a stream has room for", OPEN + data(bytes(16384)) * 17, FLOW),
    Case("6.9.2 a stream's beyond, by a setting", OPEN + window(MAX - 65535) + settings((4, 65536)), FLOW),
    Case("6.9.2 a stream's below nothing and back", settings((4, 9)) + OPEN + settings((4, 0), (4, 70000)), FINE),
    # 6.10 CONTINUATION
    Case("6.10 of no stream", headers(CUT, flags=0) + frame(9, 4, 0, b""), WRONG),
    Case("6.10 of another stream", headers(CUT, flags=0) + frame(9, 4, 3, b""), WRONG),
    Case("6.10 after a block's end", OPEN + frame(9, 4, 1, X), WRONG),
    Case("6.10 twice after a block's end", headers(CUT, flags=0) + frame(9, 4, 1, HOST + ROOT) * 2, WRONG),
    Case("6.10 without end", headers(ASK, flags=0) + frame(9, 0, 1, b"") * 1000, Connection(E.ENHANCE_YOUR_CALM)),
    # 7. Error codes
    Case("7 an unknown code of a stream", OPEN + rst(code=MAX), FINE),
    Case("7 an unknown code of the connection", OPEN + frame(7, 0, 0, number(0) + number(MAX)), FINE),
    # 8.1 Messages
    Case("8.1 trailers", OPEN + data(b"x") + headers(X, end=True), FINE),
    Case("8.1 trailers of nothing", OPEN + headers(b"", end=True), FINE),
    Case("8.1 trailers that do not end", OPEN + headers(X), MALFORMED),
    Case("8.1 DATA after trailers", OPEN + headers(X, end=True) + data(b"x"), CLOSED),
    Case("8.1 a pseudo-header in trailers", OPEN + headers(ROOT, end=True), MALFORMED),
    Case("8.1 a capital in trailers", OPEN + headers(literal(b"X", b"y"), end=True), MALFORMED),
    Case("8.1 Connection in trailers", OPEN + headers(literal(b"connection", b"x"), end=True), MALFORMED),
    Case("8.1.1 the length that was said", SAYS_3 + data(b"1") + data(b"23", end=True), FINE, asked=1),
    Case("8.1.1 padding is no part of the length", SAYS_3 + frame(0, PADDED, 1, b"\x02123" + bytes(2)), FINE),
    Case("8.1.1 more than was said", SAYS_3 + data(b"1234"), MALFORMED),
    Case("8.1.1 more than was said, in pieces", SAYS_3 + data(b"12") * 2, MALFORMED),
    Case("8.1.1 less than was said", SAYS_3 + data(b"12", end=True), MALFORMED),
    Case("8.1.1 less than was said, by trailers", SAYS_3 + headers(X, end=True), MALFORMED),
    malformed("8.1.1 nothing where a length was said", ASK + LENGTH_3),
    asks("8.1.1 nothing where nothing was said", ASK + literal(b"content-length", b"0")),
    malformed("8.1.1 two lengths", ASK + LENGTH_3 + literal(b"content-length", b"0")),
    malformed("8.1.1 a length that is none", ASK + literal(b"content-length", b"+0")),
    # 8.2 Fields
    malformed("8.2 a capital", ASK + literal(b"X", b"y")),
    malformed("8.2.1 a name of nothing", ASK + literal(b"", b"y")),
    malformed("8.2.1 a control in a name", ASK + literal(b"x\x1f", b"y")),
    malformed("8.2.1 a space in a name", ASK + literal(b"x y", b"z")),
    malformed("8.2.1 DEL in a name", ASK + literal(b"x\x7f", b"y")),
    malformed("8.2.1 more than ASCII in a name", ASK + literal(b"x\xc3\xa4", b"y")),
    malformed("8.2.1 a colon in a name", ASK + literal(b"x:y", b"z")),
    malformed("8.2.1 NUL in a value", ASK + literal(b"x", b"a\0b")),
    malformed("8.2.1 CR in a value", ASK + literal(b"x", b"a\rb")),
    malformed("8.2.1 LF in a value", ASK + literal(b"x", b"a\nb")),
    malformed("8.2.1 white space before a value", ASK + literal(b"x", b" a")),
    malformed("8.2.1 white space after a value", ASK + literal(b"x", b"a\t")),
    malformed("8.2.1 LF in a pseudo-header", POST + HTTP + HOST + literal(b":path", b"/\nx: y")),
    asks("8.2.1 an empty value", ASK + literal(b"x", b"")),
    asks("8.2.1 more than ASCII in a value", ASK + literal(b"x", b"\xc3\xa4")),
    *[
        malformed(f"8.2.2 {name.decode()}: {value.decode()}", ASK + literal(name, value))
        for name, value in (
            (b"connection", b"close"), (b"proxy-connection", b"x"), (b"keep-alive", b"300"), (b"upgrade", b"h2c"),
            (b"transfer-encoding", b"chunked"), (b"te", b"gzip"), (b"te", b"trailers, gzip"), (b"te", b""),
        )
    ],
    asks("8.2.2 te: trailers", ASK + literal(b"te", b"trailers")),
    asks("8.2.3 a cookie in pieces", ASK + literal(b"cookie", b"a=1") + literal(b"cookie", b"b=2")),
    # 8.3 Control data
    malformed("8.3 an unknown pseudo-header", ASK + literal(b":x", b"y")),
    malformed("8.3 a pseudo-header of responses", ASK + b"\x88"),
    malformed("8.3 a pseudo-header after a field", CUT + HOST + X + ROOT),
    malformed("8.3 a pseudo-header twice", ASK + ROOT),
    malformed("8.3.1 no method", HTTP + ROOT + HOST),
    malformed("8.3.1 no scheme", POST + ROOT + HOST),
    malformed("8.3.1 no path", POST + HTTP + HOST),
    malformed("8.3.1 an empty path", POST + HTTP + HOST + literal(b":path", b"")),
    malformed("8.3.1 neither authority nor host", POST + HTTP + ROOT),
    malformed("8.3.1 an empty authority", POST + HTTP + ROOT + literal(b":authority", b"")),
    malformed("8.3.1 an empty host", POST + HTTP + ROOT + literal(b"host", b"")),
    malformed("8.3.1 another host", ASK + literal(b"host", b"other")),
    malformed("8.3.1 a user before the host", POST + HTTP + ROOT + literal(b":authority", b"root@db")),
    asks("8.3.1 the same host", ASK + literal(b"host", b"db")),
    asks("8.3.1 a host alone", POST + HTTP + ROOT + literal(b"host", b"db")),
    asks("8.3.1 an address and a port", POST + HTTP + ROOT + literal(b":authority", b"[::1]:80")),
    asks("8.3.1 * for OPTIONS", literal(b":method", b"OPTIONS") + HTTP + HOST + literal(b":path", b"*")),
    # They are answered by 400 (8.1.1 lets a server do so before it ends the stream).
    Case("8.3.1 * for others", headers(POST + HTTP + HOST + literal(b":path", b"*"), end=True), FINE, asked=0),
    Case("8.3.1 a path without /", headers(POST + HTTP + HOST + literal(b":path", b"a"), end=True), FINE, asked=0),
    # 8.5 CONNECT: answered by 405; the extended one by 400, for it was not offered (RFC 8441, section 3).
    Case("8.5 CONNECT", headers(literal(b":method", b"CONNECT") + HOST, end=True), FINE, asked=0),
    malformed("8.5 CONNECT with a path", literal(b":method", b"CONNECT") + HOST + ROOT),
    malformed("8.5 CONNECT with a scheme", literal(b":method", b"CONNECT") + HOST + HTTP),
    malformed("8.5 CONNECT without authority", literal(b":method", b"CONNECT") + literal(b"host", b"db")),
    malformed("RFC 8441 4 :protocol without CONNECT", ASK + literal(b":protocol", b"websocket")),
    Case(
        "RFC 8441 4 :protocol that was not offered",
        headers(literal(b":method", b"CONNECT") + HOST + HTTP + ROOT + literal(b":protocol", b"websocket"), end=True),
        FINE,
        asked=0,
    ),
    # 10.3 What a request line of HTTP/1.1 could be forged with
    malformed("10.3 a method of several words", literal(b":method", b"GET /x HTTP/1.1") + HTTP + ROOT + HOST),
    malformed("10.3 a method of nothing", literal(b":method", b"") + HTTP + ROOT + HOST),
    malformed("10.3 a scheme that is a URL", POST + literal(b":scheme", b"http://x/?") + ROOT + HOST),
    malformed("10.3 a path in the authority", POST + HTTP + ROOT + literal(b":authority", b"db/x?")),
    # 10.5.1 A list beyond what we said to take: what it adds to the table counts all the same.
    Case(
        "10.5.1 a list beyond 64 KiB",
        headers(ASK + LARGE_FIELD) + headers(ASK + b"\xbe" * 20, stream=3) + headers(ASK + b"\xbe", stream=5),
        Stream(E.ENHANCE_YOUR_CALM, id=3),
        asked=2,
    ),
    Case(
        "10.5.1 a list beyond 64 KiB that adds to the table",
        headers(ASK + LARGE_FIELD + b"\xbe" * 20 + b"\x40\x01y\x01z") + headers(ASK + b"\xbe", stream=3),
        Stream(E.ENHANCE_YOUR_CALM),
        asked=1,
    ),
    Case("10.5.1 a long list that cannot be decoded", headers(ASK + LARGE_FIELD + b"\xbe" * 20 + b"\x80"), BLOCK),
    # RFC 7541: header compression
    Case("RFC 7541 2.3.3 index 0", headers(ASK + b"\x80"), BLOCK),
    Case("RFC 7541 2.3.3 an index beyond both tables", headers(ASK + b"\xbe"), BLOCK),
    Case("RFC 7541 2.3.3 a name's index beyond both tables", headers(ASK + b"\x7e\x01x"), BLOCK),
    asks("RFC 7541 2.3.3 the newest entry", ASK + b"\x40\x01x\x01y" + b"\xbe"),
    asks("RFC 7541 4.2 the table is shut and opened", b"\x20\x3f\xe1\x1f" + ASK),
    Case("RFC 7541 4.2 a size after a field", headers(ASK + b"\x20"), BLOCK),
    Case("RFC 7541 4.4 an entry larger than the table empties it", headers(
        b"\x3f\x02" + ASK + b"\x40\x01x\x01y" + b"\x40\x01x\x10" + b"v" * 16 + b"\xbe"), BLOCK),
    Case("RFC 7541 5.1 an integer that is too long", headers(ASK + b"\xff" + b"\xff" * 10), BLOCK),
    Case("RFC 7541 5.1 an integer of many zeros", headers(ASK + b"\xff" + b"\x80" * 10 + b"\x00"), BLOCK),
    Case("RFC 7541 5.1 an integer cut off", headers(ASK + b"\xff\xff"), BLOCK),
    Case("RFC 7541 5.2 a string cut off", headers(ASK + b"\x00\x05x"), BLOCK),
    Case("RFC 7541 5.2 no string", headers(ASK + b"\x00"), BLOCK),
    Case("RFC 7541 5.2 no value", headers(ASK + b"\x00\x01x"), BLOCK),
    Case("RFC 7541 5.2 a string longer than all", headers(ASK + b"\x00\x7f\xff\xff\xff\x7f"), BLOCK),
    asks("RFC 7541 5.2 Huffman's code", ASK + HUFFMAN + b"\x81\x1f"),
    Case("RFC 7541 5.2 eight bits of padding", headers(ASK + HUFFMAN + b"\x82\x1f\xff"), BLOCK),
    Case("RFC 7541 5.2 padding by zeros", headers(ASK + HUFFMAN + b"\x81\x18"), BLOCK),
    Case("RFC 7541 5.2 EOS", headers(ASK + HUFFMAN + b"\x84\xff\xff\xff\xff"), BLOCK),
    asks("RFC 7541 6.2.3 a field never to be indexed", ASK + b"\x10\x01x\x01y"),
    Case("RFC 7541 6.3 a table larger than was offered", headers(b"\x3f\xe2\x1f" + ASK), BLOCK),
    Case("RFC 7541 6.3 a block of a size alone", headers(b"\x20"), MALFORMED, asked=0),
]  # fmt: skip


@both
@named(BY_CLIENTS)
async def test_a_client(direction: str, case: Case) -> None:
    async with staged(direction) as v:
        v.send(case.before)
        v.send(case.sent)
        await turns()
        assert judged(case.outcome, (v.client.resets, v.client.codes)), (v.client.resets, v.client.codes)
        ended = isinstance(case.outcome, Connection)
        assert v.client.over is ended
        if not ended:
            pongs = v.client.frames[6]
            v.send(PING)
            assert v.client.frames[6] == pongs + 1, "the connection goes on"
        if case.asked is not None:
            assert v.far.frames[1] == case.asked
