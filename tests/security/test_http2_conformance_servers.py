"""What a server does wrong by RFC 9113, section by section, and what of both ends takes more than one step.

As in ``test_http2_conformance.py``, to a real side of a sidecar: to what asks of the app, and of an instance.
"""

from __future__ import annotations

import asyncio

import pytest
from hpack import Decoder

from proxy.http2.core import HINTS_MAX
from proxy.http2.frames import PREFACE, frame
from tests.security.test_http2_floods import Victim, both, staged, turns
from tests.support.http2_cases import (
    ACK,
    ASK,
    ASKED_ALL,
    BLOCK,
    CLOSED,
    FINE,
    FLOW,
    LENGTH_3,
    MALFORMED,
    MAX,
    OPEN,
    PING,
    ROOT,
    SETTINGS,
    WRONG,
    Case,
    Connection,
    E,
    Fine,
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
from tests.support.sidecars import until

GREETS = SETTINGS + ACK
OK = b"\x88"
ANSWER = headers(OK)


def answer(rule: str, block: bytes) -> Case:
    """A response that is none."""
    return Case(rule, headers(block), MALFORMED, before=GREETS)


def serves(rule: str, sent: bytes, outcome: Stream | Connection | Fine, before: bytes = GREETS) -> Case:
    return Case(rule, sent, outcome, before=before)


BY_SERVERS = [
    serves("3.4 an answer of HTTP/1.1", b"HTTP/1.1 400 Bad Request\r\n\r\n", WRONG, before=b""),
    serves("3.4 a response comes first", ANSWER + SETTINGS, WRONG, before=b""),
    serves("3.4 an acknowledgement comes first", ACK + SETTINGS, WRONG, before=b""),
    serves("3.4 a farewell comes first", frame(7, 0, 0, bytes(8)), WRONG, before=b""),
    serves("5.1 idle: HEADERS", headers(OK, stream=5), WRONG),
    serves("5.1 idle: DATA", data(b"x", stream=5), WRONG),
    serves("5.1 idle: RST_STREAM", rst(5), WRONG),
    serves("5.1 idle: WINDOW_UPDATE", window(1, 5), WRONG),
    serves("5.1 closed: DATA", headers(OK, end=True) + data(b"x"), CLOSED),
    serves("5.1 closed: HEADERS", headers(OK, end=True) + headers(X, end=True), Connection(E.STREAM_CLOSED)),
    serves("5.1 closed: the rest", headers(OK, end=True) + rst() + window(1) + priority(1, 3), FINE),
    serves("5.1 closed by its reset: DATA", rst() + data(b"x"), CLOSED),
    serves("5.1 closed by ours: nothing is said of it again", data(b"x") * 2 + headers(X) * 2, MALFORMED),
    serves("5.1.1 a server asks", headers(ASK, stream=2), WRONG),
    serves("6.5.2 ENABLE_PUSH of 0", settings((2, 0)), FINE),
    serves("6.5.2 ENABLE_PUSH of 1", settings((2, 1)), WRONG),
    serves("6.6 a push that was declined", frame(5, 4, 1, number(2) + ASK), WRONG),
    serves("6.6 a push on an idle stream", frame(5, 4, 5, number(2) + ASK), WRONG),
    serves("6.8 the streams that were looked at go on", frame(7, 0, 0, number(3) + bytes(4)) + ANSWER, FINE),
    serves("6.9 by nothing", window(0), MALFORMED),
    serves("6.9.1 beyond", window(MAX), Stream(E.FLOW_CONTROL_ERROR)),
    serves("6.9.1 more DATA than a stream has room for", ANSWER + data(bytes(16384)) * 9, FLOW),
    serves("8.1 hints before the answer", headers(literal(b":status", b"103") + X) * HINTS_MAX + ANSWER, FINE),
    serves("8.1 trailers", ANSWER + data(b"x") + headers(X, end=True), FINE),
    serves("8.1 trailers that do not end", ANSWER + headers(X), MALFORMED),
    serves("8.1 a hint after the answer", ANSWER + headers(literal(b":status", b"103")), MALFORMED),
    serves("8.1 a hint that ends", headers(literal(b":status", b"103"), end=True), MALFORMED),
    serves("8.1 a second answer", ANSWER + headers(OK, end=True), MALFORMED),
    serves("8.1 DATA before the answer", data(b"x"), MALFORMED),
    serves("8.1 DATA behind a hint", headers(literal(b":status", b"103")) + data(b"x"), MALFORMED),
    serves("8.1.1 the length that was said", headers(OK + LENGTH_3) + data(b"123", end=True), FINE),
    serves("8.1.1 more than was said", headers(OK + LENGTH_3) + data(b"1234"), MALFORMED),
    serves("8.1.1 less than was said", headers(OK + LENGTH_3) + data(b"12", end=True), MALFORMED),
    serves("8.1.1 nothing where a length was said", headers(OK + LENGTH_3, end=True), MALFORMED),
    serves("8.1.1 304 says what it would be", headers(literal(b":status", b"304") + LENGTH_3, end=True), FINE),
    serves("8.1.1 DATA in a 304", headers(literal(b":status", b"304")) + data(b"x"), MALFORMED),
    serves("8.1.1 DATA in a 204", headers(literal(b":status", b"204")) + data(b"x"), MALFORMED),
    answer("8.1.1 two lengths", OK + LENGTH_3 + literal(b"content-length", b"4")),
    answer("8.2 a capital", OK + literal(b"X", b"y")),
    answer("8.2.1 a name of nothing", OK + literal(b"", b"y")),
    answer("8.2.1 LF in a value", OK + literal(b"x", b"a\nb")),
    answer("8.2.1 white space after a value", OK + literal(b"x", b"a ")),
    answer("8.2.2 connection", OK + literal(b"connection", b"close")),
    answer("8.2.2 transfer-encoding", OK + literal(b"transfer-encoding", b"chunked")),
    answer("8.2.2 upgrade", OK + literal(b"upgrade", b"h2c")),
    answer("8.3 a pseudo-header of requests", OK + ROOT),
    answer("8.3 an unknown pseudo-header", OK + literal(b":x", b"y")),
    answer("8.3 a pseudo-header after a field", X + OK),
    answer("8.3.2 no status", X),
    answer("8.3.2 two statuses", OK + OK),
    answer("8.3.2 a status of two digits", literal(b":status", b"20")),
    answer("8.3.2 a status of letters", literal(b":status", b"abc")),
    answer("8.3.2 a status below all", literal(b":status", b"099")),
    answer("8.6 101 is not of HTTP/2", literal(b":status", b"101")),
    serves("RFC 7541 2.3.3 an index beyond both tables", headers(OK + b"\xbe"), BLOCK),
]


@both
@named(BY_SERVERS)
async def test_a_server(direction: str, case: Case) -> None:
    """What ends a stream leaves the others alone, and the client is told of nothing that is not of its doing."""
    async with staged(direction) as v:
        v.send(PREFACE + SETTINGS + ACK + ASKED_ALL + headers(ASK, stream=3, end=True))
        await turns()
        assert v.far.frames[1] == 2
        v.far.peer.write(case.before)
        v.far.peer.write(case.sent)
        assert judged(case.outcome, (v.far.resets, v.far.codes)), (v.far.resets, v.far.codes)
        assert not v.client.over
        assert v.client.codes == []
        ended = isinstance(case.outcome, Connection)
        assert v.far.over is ended
        if ended:
            assert answers(v)[-1] == (3, b"502"), "the connection that served it is gone"
        else:
            if case.outcome == MALFORMED:
                assert (1, b"502") in answers(v) or v.client.resets == [(1, E.INTERNAL_ERROR)]
            pongs = v.far.frames[6]
            v.far.peer.write(PING + headers(OK, stream=3, end=True))
            assert v.far.frames[6] == pongs + 1, "the connection goes on"
            assert answers(v)[-1] == (3, b"200")


def answers(v: Victim) -> list[tuple[int, bytes]]:
    """Return stream and status of each answer that the client has had."""
    decoder = Decoder()
    fields = [(stream, dict(decoder.decode(block, raw=True))) for stream, block in v.client.blocks]
    return [(stream, each[b":status"]) for stream, each in fields if b":status" in each]


# What is more than one frame and its outcome


@both
async def test_8_1_1_what_is_malformed_is_counted_told_and_logged(
    direction: str, caplog: pytest.LogCaptureFixture
) -> None:
    told: list[tuple[object, ...]] = []
    async with staged(direction) as v:
        v.side.told = lambda party, protocol, request, answer, seconds, trace: told.append((request, answer))
        v.send(PREFACE + SETTINGS + ACK + headers(ASK + literal(b"X-Secret", b"s3cret"), end=True))
        v.send(headers(ASK + LENGTH_3, stream=3) + data(b"four", stream=3))
        assert v.connection._stats.requests == {("", 0, "malformed"): 1, ("POST", 0, "malformed"): 1}
        length, answer = (b"content-length", b"3"), (0, "malformed", 0)
        assert told == [((b"", b"", []), answer), ((b"POST", b"/", [length]), answer)]
    assert "is refused: a malformed message: a field's name is b'X-Secret'" in caplog.text
    assert "s3cret" not in caplog.text


@both
async def test_5_1_2_streams_beyond_the_limit_are_refused(direction: str) -> None:
    async with staged(direction) as v:
        most = v.connection._client.core._streams_max
        v.send(PREFACE + SETTINGS + ACK + v.requests(most + 2, end=False))
        await turns()
        assert v.client.resets == [(2 * most + at, E.REFUSED_STREAM) for at in (1, 3)]
        v.send(rst(1) + v.requests(1))
        assert v.client.resets == [(2 * most + at, E.REFUSED_STREAM) for at in (1, 3)], "there is room again"
        assert not v.client.over


@both
async def test_6_5_3_settings_and_6_7_pings_are_acknowledged(direction: str) -> None:
    async with staged(direction) as v:
        v.send(PREFACE + SETTINGS + settings((3, 5)) + frame(6, 0, 0, b"opaque!!"))
        assert v.client.latest.endswith(ACK * 2 + frame(6, 1, 0, b"opaque!!"))


@both
async def test_6_9_2_windows_follow_settings_below_nothing_and_back(direction: str) -> None:
    async with staged(direction) as v:
        v.send(PREFACE + settings((4, 10)) + ACK + ASKED_ALL)
        await turns()
        v.far.peer.write(GREETS + ANSWER + data(b"0123456789abcdefghij"))
        assert v.client.data == b"0123456789"
        v.send(settings((4, 4)))
        v.send(window(6))
        assert v.client.data == b"0123456789", "six less, six more: nothing"
        v.send(window(1))
        assert v.client.data == b"0123456789a"
        v.send(settings((4, 0)) + settings((4, 6)))
        assert v.client.data == b"0123456789abc", "by as much as it grew"
        v.send(window(100))
        assert v.client.data == b"0123456789abcdefghij"


@both
async def test_6_9_the_connection_s_window_holds_for_all(direction: str) -> None:
    async with staged(direction) as v:
        v.send(PREFACE + settings((4, MAX)) + ACK + ASKED_ALL)
        await turns()
        v.far.peer.write(GREETS + ANSWER)
        for _ in range(5):
            v.far.peer.write(data(bytes(16000)))
        assert len(v.client.data) == 65535
        v.send(window(1000))
        assert len(v.client.data) == 65535
        v.send(window(1000, 0))
        assert len(v.client.data) == 66535
        v.send(window(MAX - 1, 0))
        assert len(v.client.data) == 80000


@both
async def test_4_2_and_6_10_frames_are_no_larger_than_the_other_end_takes(direction: str) -> None:
    async with staged(direction) as v:
        v.send(PREFACE + settings((5, 20_000), (4, MAX)) + ACK + ASKED_ALL)
        await turns()
        large = b"".join(b"\x00\x01x\x7f\xa1\x1e" + b"v" * 4000 for _ in range(8))
        v.far.peer.write(GREETS + headers(OK + large[:16000], flags=0) + frame(9, 4, 1, large[16000:]))
        v.far.peer.write(data(bytes(16384)) + data(bytes(16384), end=True))
        assert max(v.client.sizes) == 20_000
        assert v.client.frames[9] == 1
        assert len(v.client.data) == 32768


@both
async def test_RFC_7541_4_2_the_encoder_says_that_its_table_was_shut(direction: str) -> None:
    async with staged(direction) as v:
        v.send(PREFACE + settings((1, 0), (1, 4096)) + ACK + ASKED_ALL)
        await turns()
        v.far.peer.write(GREETS + headers(OK, end=True))
        assert v.client.blocks == [(1, b"\x20\x3f\xe1\x1f" + OK)]


# 6.5.3: settings, and their acknowledgement, within a time

SHORT_S = 0.03


@both
@pytest.mark.parametrize("said", [PREFACE[:5], PREFACE, PREFACE + SETTINGS, PREFACE + SETTINGS + OPEN])
async def test_a_client_that_does_not_take_our_settings_is_cut_off(direction: str, said: bytes) -> None:
    async with staged(direction, greeting_timeout_s=SHORT_S) as v:
        v.send(said)
        await until(lambda: v.client.over)
        assert v.client.codes == [E.SETTINGS_TIMEOUT]


@both
@pytest.mark.parametrize("said", [b"", SETTINGS[:5], SETTINGS, SETTINGS + ANSWER])
async def test_a_server_that_says_no_settings_or_does_not_take_ours_is_cut_off(direction: str, said: bytes) -> None:
    async with staged(direction, greeting_timeout_s=SHORT_S) as v:
        v.send(PREFACE + SETTINGS + ACK + ASKED_ALL)
        await turns()
        v.far.peer.write(said)
        await until(lambda: v.far.over)
        assert v.far.codes == [E.SETTINGS_TIMEOUT]
        await until(lambda: v.under_way == 0)
        assert answers(v) == [(1, b"502")] or v.client.resets == [(1, E.INTERNAL_ERROR)]
        assert not v.client.over


@both
async def test_who_greets_is_waited_for_no_longer(direction: str) -> None:
    async with staged(direction, greeting_timeout_s=SHORT_S) as v:
        awaited = []
        for said in (b"", PREFACE + SETTINGS, ACK):
            v.send(said)
            awaited.append(v.connection._client._greeting is not None)
        assert awaited == [True, True, False]
        v.send(ASKED_ALL)
        await turns()
        v.far.peer.write(SETTINGS + ACK)
        v.far.peer.write(headers(OK, end=True))
        assert answers(v) == [(1, b"200")]
        later = asyncio.get_running_loop().time() + 2 * SHORT_S
        await until(lambda: asyncio.get_running_loop().time() > later)
        v.send(PING)
        assert v.client.frames[6] == 1
        assert not v.far.over
