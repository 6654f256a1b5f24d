"""Any answer of an app, in any splits: the client gets the same well-formed responses, a 502, or a cut connection."""

from __future__ import annotations

import asyncio
from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.authz import Decision
from proxy.http import HttpCounters, HttpOptions, InboundHttp
from proxy.stream import Channel
from raftstate.model.identity import Identity
from tests.property.test_http_fuzz import Recorder

OPTIONS = HttpOptions(service="db", head_bytes_max=2000, header_count_max=20, linger_s=0.01)
ALLOWED = Decision(True, None, "test")


async def run(method: bytes, answer: list[bytes], *, app_ends: bool) -> tuple[bytes, bool]:
    """Return what the client got of one request, and whether it was cut off."""
    client = Recorder()
    apps: list[Recorder] = []

    async def dial(peer: Channel) -> Channel:
        app = Recorder()
        app.peer = peer
        apps.append(app)
        return app

    http = InboundHttp(OPTIONS)
    http.serve(client, peer=Identity(service="web"), dial=dial, decide=lambda _: ALLOWED, stats=HttpCounters())
    try:
        client.peer.write(method + b" / HTTP/1.1\r\nHost: a\r\n\r\n")
        for _ in range(4):
            await asyncio.sleep(0)
        (app,) = apps
        for piece in answer:
            if app.ended or app.aborted:
                break
            app.peer.write(piece)
        if app_ends and not (app.ended or app.aborted):
            app.peer.write_eof()
        return bytes(client.sent), client.aborted
    finally:
        await http.close()


def split(data: bytes, cuts: list[int]) -> list[bytes]:
    places = sorted({cut % (len(data) + 1) for cut in cuts} | {0, len(data)})
    return [data[a:b] for a, b in pairwise(places) if a < b]


tokens = st.sampled_from(
    [
        b"HTTP/1.1 200 OK\r\n",
        b"HTTP/1.0 200 OK\r\n",
        b"HTTP/1.1 204 No Content\r\n",
        b"HTTP/1.1 304 Not Modified\r\n",
        b"HTTP/1.1 100 Continue\r\n\r\n",
        b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n",
        b"HTTP/2.0 200 OK\r\n",
        b"Content-Length: 5\r\n",
        b"Content-Length: 0\r\n",
        b"Transfer-Encoding: chunked\r\n",
        b"Connection: close\r\n",
        b"X: y\r\n",
        b"X : y\r\n",
        b" folded\r\n",
        b"\r\n",
        b"\n",
        b"hello",
        b"5\r\nhello\r\n",
        b"0\r\n\r\n",
        b"0\r\nT: u\r\n\r\n",
        b"\x00",
        b"Y: " + b"v" * 1500 + b"\r\n",
    ]
)
cuts = st.lists(st.integers(0, 100_000), max_size=12)


@settings(max_examples=400, deadline=None)
@given(
    st.sampled_from([b"GET", b"HEAD", b"POST"]),
    st.one_of(st.lists(tokens, max_size=14).map(b"".join), st.binary(max_size=200)),
    cuts,
    st.booleans(),
)
def test_any_answer(method: bytes, data: bytes, where: list[int], app_ends: bool) -> None:
    sent, aborted = asyncio.run(run(method, split(data, where), app_ends=app_ends))
    assert sent == b"" or sent.startswith(b"HTTP/1.1 ")
    head = sent.partition(b"\r\n\r\n")[0]
    assert b"\x00" not in head
    if app_ends:
        assert sent or aborted, "an app that has ended leaves nobody waiting"


GOOD = [
    b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello",
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3;a=b\r\nabc\r\n2\r\nde\r\n0\r\nT: u\r\n\r\n",
    b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n",
    b"HTTP/1.1 204 No Content\r\nX: y\r\n\r\n",
    b"HTTP/1.0 200 OK\r\n\r\nuntil the end",
]


def content(sent: bytes) -> bytes:
    """What a response says, with its chunks joined: where these end may depend on the splits."""
    head, _, rest = sent.partition(b"\r\n\r\n")
    if b"transfer-encoding: chunked" not in head:
        return sent
    body = b""
    while True:
        size, _, rest = rest.partition(b"\r\n")
        count = int(size, 16)
        if not count:
            return head + b"\r\n\r\n" + body + b"|" + rest
        body, rest = body + rest[:count], rest[count + 2 :]


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(GOOD), cuts)
def test_the_splits_of_an_answer_make_no_difference(data: bytes, where: list[int]) -> None:
    whole, whole_aborted = asyncio.run(run(b"GET", [data], app_ends=True))
    parts, parts_aborted = asyncio.run(run(b"GET", split(data, where), app_ends=True))
    assert not whole_aborted
    assert not parts_aborted
    assert content(parts) == content(whole)
    assert b" 502 " not in whole
