"""Known response smuggling forms: an app, or who speaks for it, answers what two parsers read differently.

The next request on the connection gets its own answer or none, whatever came before. Sources: RFC 9112, sections 4, 6
and 9.2; RFC 9110, sections 6.4.1, 8.6 and 15; PortSwigger, "HTTP/2: the sequel is always worse" (response queues).
"""

from __future__ import annotations

import asyncio
import re

import pytest

from tests.support.http_filter import Answer, App, Seen, rig

OK = b"HTTP/1.1 200 OK\r\n"
CHUNKS = OK + b"Transfer-Encoding: chunked\r\n\r\n"
EVIL = b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\nX: evil\r\n\r\nevil"
SECOND = b"HTTP/1.1 200 OK\r\nX: second\r\nContent-Length: 6\r\n\r\nsecond"

REFUSED = {
    # No part of them is passed on: a 502 in their place
    "CL beside TE": OK + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + EVIL,
    "TE beside CL": OK + b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n" + EVIL,
    "CL twice": OK + b"Content-Length: 0\r\nContent-Length: 44\r\n\r\n" + EVIL,
    "CL twice, the same": OK + b"Content-Length: 0\r\nContent-Length: 0\r\n\r\n" + EVIL,
    "CL list": OK + b"Content-Length: 0, 44\r\n\r\n" + EVIL,
    "CL plus": OK + b"Content-Length: +0\r\n\r\n" + EVIL,
    "CL minus": OK + b"Content-Length: -1\r\n\r\n" + EVIL,
    "CL hex": OK + b"Content-Length: 0x0\r\n\r\n" + EVIL,
    "CL empty": OK + b"Content-Length:\r\n\r\n" + EVIL,
    "CL huge": OK + b"Content-Length: 18446744073709551616\r\n\r\n" + EVIL,
    "CL thousands of digits": OK + b"Content-Length: " + b"0" * 5000 + b"\r\n\r\n" + EVIL,
    "CL nul": OK + b"Content-Length: 0\x00\r\n\r\n" + EVIL,
    "TE xchunked": OK + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n" + EVIL,
    "TE identity": OK + b"Transfer-Encoding: identity\r\nContent-Length: 0\r\n\r\n" + EVIL,
    "TE gzip, chunked": OK + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n" + EVIL,
    "TE chunked, gzip": OK + b"Transfer-Encoding: chunked, gzip\r\n\r\n0\r\n\r\n" + EVIL,
    "TE twice": OK + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + EVIL,
    "TE vertical tab": OK + b"Transfer-Encoding:\x0bchunked\r\n\r\n0\r\n\r\n" + EVIL,
    "space before colon": OK + b"Content-Length : 0\r\n\r\n" + EVIL,
    "obs-fold": OK + b"X: a\r\n Content-Length: 0\r\n\r\n" + EVIL,
    "bare LF": OK + b"X: a\nContent-Length: 0\r\n\r\n" + EVIL,
    "bare LF throughout": b"HTTP/1.1 200 OK\nContent-Length: 0\n\n" + EVIL,
    "bare CR": OK + b"X: a\rContent-Length: 0\r\n\r\n" + EVIL,
    "nul in a name": OK + b"Content\x00-Length: 0\r\n\r\n" + EVIL,
    "nul in a value": OK + b"X: \x00\r\nContent-Length: 0\r\n\r\n" + EVIL,
    "no colon": OK + b"Content-Length\r\n\r\n" + EVIL,
    "status of two digits": b"HTTP/1.1 20 OK\r\nContent-Length: 0\r\n\r\n" + EVIL,
    "status of four digits": b"HTTP/1.1 2000 OK\r\nContent-Length: 0\r\n\r\n" + EVIL,
    "status below 100": b"HTTP/1.1 099 OK\r\nContent-Length: 0\r\n\r\n" + EVIL,
    "status signed": b"HTTP/1.1 +20 OK\r\nContent-Length: 0\r\n\r\n" + EVIL,
    "HTTP/1.2": b"HTTP/1.2 200 OK\r\nContent-Length: 0\r\n\r\n" + EVIL,
    "HTTP/2": b"HTTP/2 200\r\nContent-Length: 0\r\n\r\n" + EVIL,
    "HTTP/0.9": b"<html>" + EVIL,
    "version in lower case": b"http/1.1 200 OK\r\nContent-Length: 0\r\n\r\n" + EVIL,
    "space before the status line": b" HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n" + EVIL,
    "status line ends in a bare LF": b"HTTP/1.1 200 OK\nContent-Length: 0\r\n\r\n" + EVIL,
    "ICY": b"ICY 200 OK\r\nContent-Length: 0\r\n\r\n" + EVIL,
    "a request for an answer": b"GET / HTTP/1.1\r\nHost: a\r\n\r\n" + EVIL,
    "101 unasked": b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n" + EVIL,
    "101 without a protocol": b"HTTP/1.1 101 Switching Protocols\r\n\r\n" + EVIL,
    "101 to h2c": b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: h2c\r\n\r\n" + EVIL,
    "too many headers": OK + b"X: a\r\n" * 200 + b"Content-Length: 0\r\n\r\n" + EVIL,
    "headers too large": OK + b"X: " + b"a" * 200_000 + b"\r\nContent-Length: 0\r\n\r\n" + EVIL,
    "status of zeros": b"HTTP/1.1 000 OK\r\nContent-Length: 0\r\n\r\n" + EVIL,
    "101 at once, and an answer": b"HTTP/1.1 101 x\r\nConnection: upgrade\r\nUpgrade: websocket, h2c\r\n\r\n" + EVIL,
}
CUT = {
    # Their heads had gone out: the client learns that the answer is not whole
    "chunk size with junk": CHUNKS + b"2x\r\nok\r\n0\r\n\r\n" + EVIL,
    "chunk size signed": CHUNKS + b"-2\r\nok\r\n0\r\n\r\n" + EVIL,
    "chunk size overflow": CHUNKS + b"10000000000000002\r\nok\r\n0\r\n\r\n" + EVIL,
    "chunk with a bare LF": CHUNKS + b"2\nok\n0\n\n" + EVIL,
    "chunk longer than said": CHUNKS + b"2\r\nokok\r\n0\r\n\r\n" + EVIL,
    "length in a trailer": CHUNKS + b"2\r\nok\r\n0\r\nContent-Length: 44\r\n\r\n" + EVIL,
}
ONE = {
    # (what the app sends, what the client may have of it before the answer to its second request)
    "interim with a length": (
        b"HTTP/1.1 103 Early Hints\r\nContent-Length: 44\r\n\r\n" + OK + b"Content-Length: 2\r\n\r\nok",
        b"HTTP/1.1 103 Early Hints\r\n\r\n" + OK + b"Content-Length: 2\r\n\r\nok",
    ),
    "interim chunked": (
        b"HTTP/1.1 103 Early Hints\r\nTransfer-Encoding: chunked\r\n\r\n" + OK + b"Content-Length: 2\r\n\r\nok",
        b"HTTP/1.1 103 Early Hints\r\n\r\n" + OK + b"Content-Length: 2\r\n\r\nok",
    ),
    "204 with a length": (
        b"HTTP/1.1 204 No Content\r\nContent-Length: 44\r\n\r\n" + EVIL,
        b"HTTP/1.1 204 No Content\r\n\r\n",
    ),
    "204 chunked": (
        b"HTTP/1.1 204 No Content\r\nTransfer-Encoding: chunked\r\n\r\n2c\r\n" + EVIL + b"\r\n0\r\n\r\n",
        b"HTTP/1.1 204 No Content\r\n\r\n",
    ),
    "304 with a length": (
        b"HTTP/1.1 304 Not Modified\r\nContent-Length: 44\r\n\r\n" + EVIL,
        b"HTTP/1.1 304 Not Modified\r\nContent-Length: 44\r\n\r\n",
    ),
    "304 chunked": (
        b"HTTP/1.1 304 Not Modified\r\nTransfer-Encoding: chunked\r\n\r\n2c\r\n" + EVIL + b"\r\n0\r\n\r\n",
        b"HTTP/1.1 304 Not Modified\r\ntransfer-encoding: chunked\r\n\r\n",
    ),
    "205 with a body": (
        b"HTTP/1.1 205 Reset Content\r\nContent-Length: 0\r\n\r\n" + EVIL,
        b"HTTP/1.1 205 Reset Content\r\nContent-Length: 0\r\n\r\n",
    ),
    "two answers": (OK + b"Content-Length: 2\r\n\r\nok" + EVIL, OK + b"Content-Length: 2\r\n\r\nok"),
    "two answers, the first chunked": (
        CHUNKS + b"2\r\nok\r\n0\r\n\r\n" + EVIL,
        OK + b"transfer-encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n",
    ),
    "junk behind an answer": (OK + b"Content-Length: 2\r\n\r\nokjunk", OK + b"Content-Length: 2\r\n\r\nok"),
    "RTSP is read as HTTP/1.0": (
        b"RTSP/1.0 200 OK\r\nContent-Length: 0\r\n\r\n" + EVIL,
        OK + b"Content-Length: 0\r\n\r\n",
    ),
    "HTTP/1.0 that ends with the connection's end is not cut short by a request": (
        b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nok" + EVIL,
        OK + b"Content-Length: 2\r\n\r\nok",
    ),
}


def raw(data: bytes, pieces: int = 0) -> Answer:
    """Answer the first request so, and the second as it should be."""

    async def answer(app: App, seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if seen.target != "/first":
            writer.write(SECOND)
            return
        for at in range(0, len(data), pieces or len(data)):
            writer.write(data[at : at + (pieces or len(data))])
            await asyncio.sleep(0)

    return answer


async def ask_twice(data: bytes, pieces: int, method: bytes = b"GET") -> bytes:
    """Return all that a client gets for two requests, the second of which is its last."""
    async with rig(App(answer=raw(data, 997 if pieces and len(data) > 3000 else pieces))) as r:
        reader, writer = await r.connect()
        writer.write(method + b" /first HTTP/1.1\r\nHost: a\r\n\r\n")
        writer.write(b"GET /second HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
        received = bytearray()
        try:
            async with asyncio.timeout(10):
                while part := await reader.read(65536):
                    received += part
        except ConnectionError:
            received += b"<cut>"
        finally:
            writer.close()
        return bytes(received)


def without_first(answer: bytes) -> bytes:
    """Return what follows the first answer, which must be a 502 of the filter's own."""
    first = re.match(rb'HTTP/1\.1 502 Bad Gateway\r\n(?:[^\r]+\r\n)*\r\n(?:\{"error": "[^"]*"\}\n)?', answer)
    assert first is not None, answer
    return answer[first.end() :]


OURS = SECOND.replace(b"\r\n\r\n", b"\r\nconnection: close\r\n\r\n")


@pytest.mark.parametrize("method", [b"GET", b"HEAD"])
@pytest.mark.parametrize("pieces", [0, 1])
@pytest.mark.parametrize("name", REFUSED)
async def test_refused(name: str, pieces: int, method: bytes) -> None:
    assert without_first(await ask_twice(REFUSED[name], pieces, method)) == OURS


@pytest.mark.parametrize("pieces", [0, 1])
@pytest.mark.parametrize("name", CUT)
async def test_cut(name: str, pieces: int) -> None:
    answer = await ask_twice(CUT[name], pieces)
    assert answer.endswith(b"<cut>")
    assert b"evil" not in answer
    assert b"\r\n0\r\n" not in answer
    assert b"second" not in answer


@pytest.mark.parametrize("name", ONE)
async def test_one_answer_and_no_more(name: str) -> None:
    """What is at hand behind an answer is dropped with its connection. What comes when the next request was sent on
    can't be told from its answer, by anyone."""
    data, wanted = ONE[name]
    assert await ask_twice(data, 0) == wanted + OURS


@pytest.mark.parametrize("name", ["CL", "chunked"])
async def test_an_answer_to_head_has_no_body_whatever_it_says(name: str) -> None:
    framing = b"Content-Length: 44" if name == "CL" else b"Transfer-Encoding: chunked"
    body = EVIL if name == "CL" else b"2c\r\n" + EVIL + b"\r\n0\r\n\r\n"
    answer = await ask_twice(OK + framing + b"\r\n\r\n" + body, 0, b"HEAD")
    assert answer.lower() == (OK + framing + b"\r\n\r\n" + OURS).lower()


async def test_a_flood_of_interim_answers_passes_and_is_not_kept() -> None:
    interim = b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n"
    answer = await ask_twice(interim * 20_000 + OK + b"Content-Length: 2\r\n\r\nok", 0)
    assert answer == interim * 20_000 + OK + b"Content-Length: 2\r\n\r\nok" + OURS
