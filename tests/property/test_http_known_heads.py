"""A head that is known by its bytes is what llhttp makes of them: messages, and what is sent on of them.

The parsers leave to llhttp what is no ``bytes`` object, so each example is given to them as bytes, once to be known,
perhaps, and once more, and as a view.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from proxy.http.head import RequestHead, ResponseHead
from proxy.http.known_heads import KEPT_BYTES_MAX, KEPT_MAX, forget_all, known_request, known_response, sizes
from proxy.http.options import HttpOptions
from proxy.http.parser import RequestParser
from proxy.http.upstream import Upstream
from proxy.mux.flow import MemoryBudget
from proxy.stream import NOBODY, Data

OPTIONS = HttpOptions(service="db", head_bytes_max=2000, header_count_max=20)
PLAIN = [
    b"GET /a?b=c HTTP/1.1\r\nHost: a\r\n\r\n",
    b"GET /api/v1/users/42?full=1 HTTP/1.1\r\nHost: db.service.consul:80\r\nUser-Agent: Mozilla/5.0 (X11; Linux)\r\n"
    b"Accept: text/html,application/json\r\nCookie: session=0123456789abcdef\r\nX-Request-Id: 7d4c\r\n"
    b"x_forwarded-client_cert: URI=forged\r\nTE: trailers\r\nKeep-Alive: 5\r\nConnection: keep-alive\r\n\r\n",
    b"POST /b HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: 5\r\n\r\nhello",
    b"DELETE /%2e%2E/*'()<>[]{}|\\^`\"~@:;= HTTP/1.1\r\nhost: [::1]:80\r\n!#$%&'*+-.^_`|~09: "
    b'\xff\x80 "x": y\r\n\r\n',
    b"OPTIONS / HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n",
]
ANSWERS = [
    b"HTTP/1.1 200 OK\r\nServer: nginx\r\nDate: Mon, 01 Jan 2024 00:00:00 GMT\r\nContent-Type: text/plain\r\n"
    b"Content-Length: 13\r\nConnection: keep-alive\r\n\r\nhello, world\n",
    b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\nKeep-Alive: timeout=5\r\nX_Y: z\r\nExpect: x\r\nHost: y\r\n\r\n",
    b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 2\r\n\r\n\r\n",
]
PIECES = [
    b"\r\n", b"\r", b"\n", b"\t", b" ", b"  ", b":", b": ", b"\x00", b"\x7f", b"\x80", b"\xff", b"\x0b", b"#",
    b"\\", b"0", b"5", b"+5", b"HTTP/1.1", b"HTTP/1.0", b"1.2", b"Host: b\r\n", b"Host:c\r\n", b"X:\r\n",
    b"X: \r\n", b"X\r\n", b" fold\r\n", b"Content-Length: 5\r\n", b"Content-Length: 0\r\n",
    b"Content-Length: 05\r\n", b"Content-Length: 6\r\n", b"content-length: 5, 5\r\n",
    b"Transfer-Encoding: chunked\r\n", b"Connection: close\r\n", b"Connection: x, close\r\n", b"Connection: x\r\n",
    b"connection: Keep-Alive\r\n", b"Proxy-Connection: close\r\n", b"Upgrade: websocket\r\n",
    b"Connection: upgrade\r\n", b"Expect: 100-continue\r\n", b"TE: x\r\n", b"X-Forwarded-Client-Cert: y\r\n",
    b"hello", b"GET / HTTP/1.1\r\nHost: a\r\n\r\n", b"PRI", b"get", b"QUERY", b"CONNECT", b"http://a/", b"*",
    b"204", b"304", b"101", b"99", b"1000", b"OK", b"Trailer: x\r\n", b"HTTP2-Settings: x\r\n",
]  # fmt: skip


@st.composite
def mangled(draw: st.DrawFn, good: list[bytes]) -> bytes:
    """A good message in which some pieces were put in, taken out or put in another's place."""
    data = draw(st.sampled_from(good))
    for _ in range(draw(st.integers(0, 3))):
        # Mostly at the seams, where a difference matters.
        seams = [
            at for at in range(len(data) + 1) if data[at : at + 1] in b" :\r\n" or data[at - 1 : at] in b" :\r\n"
        ]
        at = draw(st.one_of(st.sampled_from(seams), st.integers(0, len(data))))
        gone = draw(st.sampled_from([0, 0, 0, 1, 2, 4]))
        piece = draw(st.one_of(st.sampled_from(PIECES), st.binary(max_size=2)))
        data = data[:at] + piece + data[at + gone :]
    return data


def read(data: Data, before: Data = b"") -> list[object]:
    """Return all that a parser makes of ``data``, and the state that it is left in."""
    parser = RequestParser(OPTIONS, MemoryBudget())
    if before:
        parser.feed(before)
    parser.feed(data)
    found: list[object] = [parser.begun, parser.stopped, None if parser.held is None else bytes(parser.held)]
    for message in parser.messages:
        refusal = message.refusal
        found.append((b"".join(message.body), message.trailers, message.complete, refusal and refusal.status))
        if (head := message.head) is not None:
            found.append((head.method, head.target, head.http10, head.keep_alive, head.fields, head.lines))
            found.append((head.length, head.chunked, head.upgrade, head.expects))
            found.append(head.wire(head.target, b"URI=x"))
    return found


@settings(max_examples=400, deadline=None)
@given(mangled(PLAIN), st.sampled_from(PLAIN), st.sampled_from([b"", *PLAIN]))
@example(b"Host: a\r\n\r\n", PLAIN[0], b"")
@example(b"GET / HTTP/1.1\r\nHost\r\n\r\n", PLAIN[0], PLAIN[0])
@example(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nContent-Length: 5\r\n\r\nhello", PLAIN[0], b"")
@example(b"PUT / HTTP/1.1\r\nGET / HTTP/1.1\r\nHost: a\r\n\r\n", b"\r\nGET / HTTP/1.1\r\nHost: a\r\n\r\n", b"")
def test_requests_are_known_as_llhttp_reads_them(data: bytes, other: bytes, before: bytes) -> None:
    expected = read(memoryview(data), memoryview(before))
    assert read(data, before) == expected
    assert read(data, before) == expected
    # The lines below the first, known from behind another first line.
    read(other.partition(b"\r\n")[0] + b"\r\n" + data.partition(b"\r\n")[2])
    read(other)
    assert read(data, before) == expected


@dataclass
class Told:
    """An owner that keeps what it is told."""

    said: list[object] = field(default_factory=list)
    sent: bytes = b""

    def response_output(self, upstream: Upstream, pieces: list[bytes]) -> None:
        self.sent += b"".join(pieces)

    def response_complete(self, upstream: Upstream) -> None:
        self.said.append(("complete", upstream.reusable, upstream.keep_client, upstream.busy))

    def response_switched(self, upstream: Upstream, rest: Data) -> None:
        self.said.append(("switched", bytes(rest)))

    def upstream_lost(self, upstream: Upstream, error: Exception | None) -> None:
        self.said.append(("lost", type(error)))

    def upstream_full(self, upstream: Upstream, full: bool) -> None:
        raise AssertionError("nothing says so here")


def answered(data: Data, method: bytes, *, http10: bool, keep_client: bool, before: Data = b"") -> list[object]:
    told = Told()
    upstream = Upstream(told, OPTIONS, MemoryBudget())
    upstream.channel = NOBODY
    request = RequestHead(method, b"/", http10=http10, keep_alive=True)
    if before:
        upstream.begin(request, keep_client=True)
        upstream.write(before)
    upstream.begin(request, keep_client=keep_client)
    upstream.write(data)
    head = upstream.head
    shape = head and (head.status, head.reason, head.fields, head.lines, head.length, head.chunked, head.upgrade)
    return [told.sent, told.said, upstream.busy, upstream.reusable, upstream.lost, upstream.heard, shape]


@settings(max_examples=400, deadline=None)
@given(
    mangled(ANSWERS),
    st.sampled_from([b"GET", b"POST", b"HEAD"]),
    st.booleans(),
    st.booleans(),
    st.sampled_from(ANSWERS),
)
@example(b"HTTP/1.1 204 No Content\r\nContent-Length: 5\r\n\r\nhello", b"GET", False, True, ANSWERS[0])
@example(b"HTTP/1.1 304 Not Modified\r\nContent-Length: 5\r\n\r\nhello", b"GET", False, True, ANSWERS[0])
@example(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nContent-Length: 0\r\n\r\n", b"GET", False, True, ANSWERS[0])
def test_responses_are_known_as_llhttp_reads_them(
    data: bytes, method: bytes, http10: bool, keep_client: bool, before: bytes
) -> None:
    first = before if method != b"HEAD" else b""

    def answer(data: Data, before: Data) -> list[object]:
        return answered(data, method, http10=http10, keep_client=keep_client, before=before)

    async def all_ways() -> list[list[object]]:
        # The second time it may be known, and after an answer to GET as well.
        ways = [answer(memoryview(data), memoryview(first)), answer(data, first), answer(data, first)]
        answered(data, b"GET", http10=False, keep_client=True)
        return [*ways, answer(data, first)]

    parsed, *ways = asyncio.run(all_ways())
    for way in ways:
        assert way == parsed


@pytest.mark.parametrize("data", PLAIN)
def test_ordinary_requests_are_known_the_next_time_whatever_their_first_line(data: bytes) -> None:
    forget_all()
    assert known_request(data, 2000, 20) is None
    read(data)
    data = b"PATCH /another" + data[data.index(b" HTTP/1.1") :]
    found = known_request(data, 2000, 20)
    assert found is not None
    head, end = found
    assert (head.method, head.target) == (b"PATCH", b"/another")
    assert data[end - 4 : end] == b"\r\n\r\n"
    assert known_request(data + b"x", 2000, 20) is None
    assert known_request(data, end - 1, 20) is None
    assert known_request(data, 2000, data[:end].count(b"\r\n") - 3) is None


@pytest.mark.parametrize("data", ANSWERS)
def test_ordinary_responses_are_known_the_next_time(data: bytes) -> None:
    forget_all()
    asyncio.run(_answer_once(data, b"HEAD"))
    assert known_response(data, 2000, 20) is None
    asyncio.run(_answer_once(data, b"GET"))
    found = known_response(data, 2000, 20)
    assert found is not None
    assert data[found[1] - 4 : found[1]] == b"\r\n\r\n"
    assert known_response(data + b"x", 2000, 20) is None
    assert known_response(data, found[1] - 1, 20) is None


async def _answer_once(data: bytes, method: bytes) -> None:
    answered(data, method, http10=False, keep_client=True)


def test_a_final_response_behind_an_interim_one_is_not_taken_for_the_interim_one() -> None:
    both = b"HTTP/1.1 103 Early Hints\r\nContent-Length: 4\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"
    forget_all()
    asyncio.run(_answer_once(both, b"GET"))
    assert sizes()[2] == 0


def test_an_edit_of_a_response_is_not_kept() -> None:
    forget_all()
    for _ in range(2):
        told = Told()
        upstream = Upstream(told, OPTIONS, MemoryBudget())
        upstream.edit = _with_a_line
        upstream.begin(RequestHead(b"GET", b"/", http10=False, keep_alive=True), keep_client=True)
        upstream.write(ANSWERS[0])
        assert told.sent.count(b"x-edited") == 1


def _with_a_line(head: ResponseHead) -> None:
    head.fields, head.lines = [*head.fields, (b"x-edited", b"1")], [*head.lines, b"x-edited: 1"]


def test_what_is_known_is_bounded() -> None:
    forget_all()
    for number in range(KEPT_MAX * 2 + 1):
        read(b"GET /%d HTTP/1.1\r\nHost: a\r\nX: %d\r\n\r\n" % (number, number))
        asyncio.run(_answer_once(b"HTTP/1.1 200 OK\r\nX: %d\r\nContent-Length: 0\r\n\r\n" % number, b"GET"))
        assert max(sizes()) <= KEPT_MAX
    forget_all()
    read(b"GET / HTTP/1.1\r\nHost: a\r\nX: %b\r\n\r\n" % (b"y" * KEPT_BYTES_MAX))
    assert sizes()[0] == 0
