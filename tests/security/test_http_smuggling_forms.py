"""Further known request smuggling forms, by what two parsers have been seen to disagree on.

Beside :mod:`tests.security.test_http_smuggling`. Sources: RFC 9112, sections 2.2,
2.3, 3, 5, 6, 7 and 11.2; RFC 9110, sections 5.5, 7.6.1, 7.8, 8.6, 10.1.1; PortSwigger's series on desync attacks
("HTTP/1 must die": 0.CL and ``Expect``); "Funky chunks" on what ends chunk extensions (TERM.EXT, EXT.TERM); the
http-garbage project's list of differences between servers.
"""

from __future__ import annotations

import asyncio
import logging

import pytest

from tests.support.http_filter import OWN_URI, App, Seen, rig
from tests.support.http_smuggling import CHUNKED, EVIL, GET, POLICY, POST, is_harmless, is_refused
from tests.support.sidecars import until

UPGRADE = b"Connection: upgrade\r\nUpgrade: websocket\r\n"

REFUSED = {
    "CL thousands of digits": POST + b"Content-Length: " + b"0" * 5000 + b"31\r\n\r\n" + EVIL,
    "CL thousands of digits beside an upgrade": POST
    + b"Connection: upgrade\r\nUpgrade: websocket\r\nContent-Length: "
    + b"0" * 5000
    + b"31\r\n\r\n"
    + EVIL,
    "CL trailing comma": POST + b"Content-Length: 31,\r\n\r\n" + EVIL,
    "CL leading comma": POST + b"Content-Length: ,31\r\n\r\n" + EVIL,
    "CL exponent": POST + b"Content-Length: 3e1\r\n\r\n" + EVIL,
    "CL fraction": POST + b"Content-Length: 31.0\r\n\r\n" + EVIL,
    "CL quoted": POST + b'Content-Length: "31"\r\n\r\n' + EVIL,
    "CL octal": POST + b"Content-Length: 0o37\r\n\r\n" + EVIL,
    "CL minus zero": POST + b"Content-Length: -0\r\n\r\n" + EVIL,
    "CL plus zero": POST + b"Content-Length: +0\r\n\r\n" + EVIL,
    "CL vertical tab": POST + b"Content-Length: \x0b31\r\n\r\n" + EVIL,
    "CL form feed": POST + b"Content-Length: 31\x0c\r\n\r\n" + EVIL,
    "CL nul": POST + b"Content-Length: 31\x00\r\n\r\n" + EVIL,
    "CL parameter": POST + b"Content-Length: 31;a=b\r\n\r\n" + EVIL,
    "CL twice, one in capitals": POST + b"Content-Length: 0\r\nCONTENT-LENGTH: 31\r\n\r\n" + EVIL,
    "CL twice, one empty": POST + b"Content-Length: 31\r\nContent-Length:\r\n\r\n" + EVIL,
    "0.CL by obs-fold": POST + b"Content-Length:\r\n 31\r\n\r\n" + EVIL,
    "0.CL by a bare LF": POST + b"Content-Length:\n 31\r\n\r\n" + EVIL,
    "TE.0": b"OPTIONS / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nContent-Length: 0\r\n\r\n1f\r\n"
    + EVIL
    + b"\r\n0\r\n\r\n",
    "CL.TE with TE obfuscated by a tab": POST
    + b"Content-Length: 6\r\nTransfer-Encoding:\tchunked\r\n\r\n0\r\n\r\nG"
    + EVIL,
    "TE trailing comma": POST + b"Transfer-Encoding: chunked,\r\n\r\n0\r\n\r\n" + EVIL,
    "TE single quoted": POST + b"Transfer-Encoding: 'chunked'\r\n\r\n0\r\n\r\n" + EVIL,
    "TE beginning": POST + b"Transfer-Encoding: chunk\r\n\r\n0\r\n\r\n" + EVIL,
    "TE form feed": POST + b"Transfer-Encoding: chunked\x0c\r\n\r\n0\r\n\r\n" + EVIL,
    "TE inner nul": POST + b"Transfer-Encoding: chun\x00ked\r\n\r\n0\r\n\r\n" + EVIL,
    "TE no-break space": POST + b"Transfer-Encoding:\xa0chunked\r\n\r\n0\r\n\r\n" + EVIL,
    "TE two words": POST + b"Transfer-Encoding: chunked gzip\r\n\r\n0\r\n\r\n" + EVIL,
    "TE deflate": POST + b"Transfer-Encoding: deflate\r\n\r\n0\r\n\r\n" + EVIL,
    "TE twice, in other cases": POST
    + b"Transfer-Encoding: chunked\r\nTRANSFER-ENCODING: identity\r\n\r\n0\r\n\r\n"
    + EVIL,
    "TE hidden by a bare LF in the name": POST + b"Transfer-Encoding\n : chunked\r\n\r\n0\r\n\r\n" + EVIL,
    "TE hidden by a bare CR": POST + b"Foo: bar\rTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + EVIL,
    "TE behind a folded line": POST + b"Foo: bar\r\n\tTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + EVIL,
    "TE on an upgrade": POST
    + b"Connection: upgrade\r\nUpgrade: websocket\r\nTransfer-Encoding: chunked\r\nContent-Length: 4\r\n\r\n0\r\n\r\n"
    + EVIL,
    "TE in HTTP/1.0 with an upgrade": b"POST / HTTP/1.0\r\nHost: a\r\n"
    + UPGRADE
    + b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
    + EVIL,
    "quoted name": POST + b'"Transfer-Encoding": chunked\r\n\r\n0\r\n\r\n' + EVIL,
    "vertical tab in a name": POST + b"Transfer-Encoding\x0b: chunked\r\n\r\n0\r\n\r\n" + EVIL,
    "vertical tab before a name": POST + b"\x0bTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + EVIL,
    "brackets in a name": POST + b"X[Y]: a\r\n\r\n" + EVIL,
    "parenthesis in a name": POST + b"X(Y: a\r\n\r\n" + EVIL,
    "slash in a name": POST + b"X/Y: a\r\n\r\n" + EVIL,
    "DEL in a name": POST + b"X\x7f: a\r\n\r\n" + EVIL,
    "space within a name": POST + b"X Content-Length: 31\r\n\r\n" + EVIL,
    "control in a value": POST + b"X: a\x01b\r\nContent-Length: 0\r\n\r\n" + EVIL,
    "DEL in a value": POST + b"X: a\x7fb\r\nContent-Length: 0\r\n\r\n" + EVIL,
    "LF CR at a line's end": POST + b"X: a\n\rContent-Length: 31\r\n\r\n" + EVIL,
    "CR alone ends the head": POST + b"Content-Length: 31\r\r" + EVIL,
    "LF LF ends the head": POST + b"Content-Length: 31\n\n" + EVIL,
    "CRLF LF ends the head": POST + b"X: a\r\n\n" + EVIL,
    "CRLF CR X ends the head": POST + b"X: a\r\n\rX" + EVIL,
    "space and CRLF end the head": POST + b"X: a\r\n \r\n" + EVIL,
    "colon as the first line": b"GET / HTTP/1.1\r\n: a\r\nHost: a\r\n\r\n",
    "chunk size in capitals 0X": CHUNKED + b"0X1F\r\n" + EVIL + b"\r\n0\r\n\r\n",
    "chunk size with a tab": CHUNKED + b"1f\t\r\n" + EVIL + b"\r\n0\r\n\r\n",
    "chunk size with a comma": CHUNKED + b"1f,0\r\n" + EVIL + b"\r\n0\r\n\r\n",
    "chunk size quoted": CHUNKED + b'"1f"\r\n' + EVIL + b"\r\n0\r\n\r\n",
    "chunk size no hex": CHUNKED + b"1g\r\n" + EVIL + b"\r\n0\r\n\r\n",
    "chunk size nul": CHUNKED + b"1f\x00\r\n" + EVIL + b"\r\n0\r\n\r\n",
    "chunk size of two words": CHUNKED + b"1f 0\r\n" + EVIL + b"\r\n0\r\n\r\n",
    "chunk data ends in a bare LF": CHUNKED + b"1\r\nx\n0\r\n\r\n" + EVIL,
    "chunk data ends in a bare CR": CHUNKED + b"1\r\nx\r0\r\n\r\n" + EVIL,
    "chunk data ends in LF CR": CHUNKED + b"1\r\nx\n\r0\r\n\r\n" + EVIL,
    "last chunk with a bare LF": CHUNKED + b"0\n\n" + EVIL,
    "last chunk, then a bare LF": CHUNKED + b"0\r\n\n" + EVIL,
    "last chunk, then a bare CR": CHUNKED + b"0\r\n\r" + EVIL,
    "last chunk signed": CHUNKED + b"-0\r\n\r\n" + EVIL,
    "chunk extension with nul": CHUNKED + b"1;a\x00b\r\nx\r\n0\r\n\r\n" + EVIL,
    "chunk extension ended by a bare LF (TERM.EXT)": CHUNKED + b"2;\nxx\r\n1f\r\n0\r\n\r\n" + EVIL + b"\r\n0\r\n\r\n",
    "chunk extension ended by a bare CR": CHUNKED + b"2;\rxx\r\n0\r\n\r\n" + EVIL,
    "chunk extension without a semicolon": CHUNKED + b"1 a=b\r\nx\r\n0\r\n\r\n" + EVIL,
    "chunk extension on the last chunk, bare LF": CHUNKED + b"0;a=b\n\r\n" + EVIL,
    "chunk extension open quote": CHUNKED + b'1;a="b\r\nx\r\n0\r\n\r\n' + EVIL,
    "TE in a trailer": CHUNKED + b"0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + EVIL,
    "trailer with a bare LF": CHUNKED + b"0\r\nX: a\nY: b\r\n\r\n" + EVIL,
    "trailer with a nul": CHUNKED + b"0\r\nX: a\x00\r\n\r\n" + EVIL,
    "trailer without a colon": CHUNKED + b"0\r\nGET /evil HTTP/1.1\r\n\r\n",
    "too many trailers": CHUNKED + b"0\r\n" + b"X: a\r\n" * 200 + b"\r\n" + EVIL,
    "trailers too large": CHUNKED + b"0\r\nX: " + b"a" * 70_000 + b"\r\n\r\n" + EVIL,
    "chunk extension too large": CHUNKED + b"1;" + b"a" * 100_000 + b"\r\nx\r\n0\r\n\r\n" + EVIL,
    "space before the method": b" GET / HTTP/1.1\r\nHost: a\r\n\r\n",
    "nul before the method": b"\x00GET / HTTP/1.1\r\nHost: a\r\n\r\n",
    "byte order mark": b"\xef\xbb\xbfGET / HTTP/1.1\r\nHost: a\r\n\r\n",
    "form feed in the start line": b"GET\x0c/ HTTP/1.1\r\nHost: a\r\n\r\n",
    "start line ends in a bare LF": b"GET / HTTP/1.1\nHost: a\r\n\r\n",
    "start line ends in a bare CR": b"GET / HTTP/1.1\rHost: a\r\n\r\n",
    "space behind the version": b"GET / HTTP/1.1 \r\nHost: a\r\n\r\n",
    "word behind the version": b"GET / HTTP/1.1 x\r\nHost: a\r\n\r\n",
    "version in lower case": b"GET / http/1.1\r\nHost: a\r\n\r\n",
    "version with zeros": b"GET / HTTP/01.1\r\nHost: a\r\n\r\n",
    "version with more digits": b"GET / HTTP/1.10\r\nHost: a\r\n\r\n",
    "version signed": b"GET / HTTP/+1.1\r\nHost: a\r\n\r\n",
    "HTTP/3": b"GET / HTTP/3\r\nHost: a\r\n\r\n",
    "another protocol": b"GET / HTPP/1.1\r\nHost: a\r\n\r\n",
    "target with DEL": b"GET /\x7fevil HTTP/1.1\r\nHost: a\r\n\r\n",
    "target with a vertical tab": b"GET /\x0b/evil HTTP/1.1\r\nHost: a\r\n\r\n",
    "target with a backslash first": b"GET \\evil HTTP/1.1\r\nHost: a\r\n\r\n",
    "asterisk for a GET": b"GET * HTTP/1.1\r\nHost: a\r\n\r\n",
    "absolute target with one slash": b"GET http:/a/evil HTTP/1.1\r\nHost: a\r\n\r\n",
    "absolute target without a host": b"GET http:///evil HTTP/1.1\r\nHost: a\r\n\r\n",
    "absolute target with a port that Host has not": b"GET http://a:81/ HTTP/1.1\r\nHost: a\r\n\r\n",
    "absolute target with a backslash": b"GET http://a\\@b/ HTTP/1.1\r\nHost: a\r\n\r\n",
    "absolute target of websocket": b"GET ws://a/ HTTP/1.1\r\nHost: a\r\n\r\n",
    "absolute target with an empty Host": b"GET http://a/ HTTP/1.1\r\nHost:\r\n\r\n",
    "absolute target without Host": b"GET http://a/ HTTP/1.0\r\n\r\n",
    "authority as a target": b"GET a:80 HTTP/1.1\r\nHost: a:80\r\n\r\n",
    "two Hosts, the same": b"GET / HTTP/1.1\r\nHost: a\r\nHost: a\r\n\r\n",
    "two Hosts, in other cases": b"GET / HTTP/1.1\r\nHost: a\r\nhOST: b\r\n\r\n",
    "Host folded": b"GET / HTTP/1.1\r\nHost: a\r\n b\r\n\r\n",
    "Host with space before the colon": b"GET / HTTP/1.1\r\nHost: a\r\nHost : b\r\n\r\n",
    "Host with userinfo": b"GET / HTTP/1.1\r\nHost: a@b\r\n\r\n",
    "Host with a query": b"GET / HTTP/1.1\r\nHost: a?b\r\n\r\n",
    "Host with a fragment": b"GET / HTTP/1.1\r\nHost: a#b\r\n\r\n",
    "Host with a backslash": b"GET / HTTP/1.1\r\nHost: a\\b\r\n\r\n",
    "Host with a tab": b"GET / HTTP/1.1\r\nHost: a\tb\r\n\r\n",
    "Host with a high byte": b"GET / HTTP/1.1\r\nHost: a\xe4\r\n\r\n",
    "Host quoted": b'GET / HTTP/1.1\r\nHost: "a"\r\n\r\n',
    "CONNECT with a body": b"CONNECT evil:80 HTTP/1.1\r\nHost: evil:80\r\nContent-Length: 31\r\n\r\n" + EVIL,
    "TLS within TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    "too many headers": b"GET / HTTP/1.1\r\nHost: a\r\n" + b"X: a\r\n" * 200 + b"\r\n" + EVIL,
    "headers too large": b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"a" * 70_000 + b"\r\n\r\n" + EVIL,
    "target too large": b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\nHost: a\r\n\r\n" + EVIL,
}


@pytest.mark.parametrize("pieces", [0, 1])
@pytest.mark.parametrize("name", REFUSED)
async def test_refused(name: str, pieces: int, caplog: pytest.LogCaptureFixture) -> None:
    await is_refused(REFUSED[name], pieces)
    assert [each for each in caplog.records if each.levelno >= logging.ERROR] == [], "nothing failed for it"


@pytest.mark.parametrize("pieces", [0, 1])
@pytest.mark.parametrize("size", [b"10000001f", b"ffffffffffffffff", b"7fffffffffffffff"])
async def test_a_chunk_that_never_ends_is_never_a_request(size: bytes, pieces: int) -> None:
    """A size of more than 32 bits must not wrap around to one behind which a request begins."""
    async with rig(policy=POLICY) as r:
        with pytest.raises(ConnectionError):
            await r.exchange(CHUNKED + size + b"\r\n" + EVIL + b"\r\n0\r\n\r\n" + EVIL, pieces=pieces)
        await until(lambda: not r.app.writers)
        assert r.app.seen == []


HARMLESS = {
    # (what is sent, targets and bodies that the app may see)
    "TE with a tab": (POST + b"Transfer-Encoding:\tchunked\r\n\r\n1\r\nx\r\n0\r\n\r\n", [("/", b"x")]),
    "CL with blanks around": (POST + b"Content-Length: \t1 \t\r\n\r\nx", [("/", b"x")]),
    "CL of twenty digits": (POST + b"Content-Length: 00000000000000000001\r\n\r\nx", [("/", b"x")]),
    "chunk size in capitals": (CHUNKED + b"1F\r\n" + EVIL + b"\r\n0\r\n\r\n", [("/", EVIL)]),
    "trailers of framing and routing": (
        CHUNKED + b"1\r\nx\r\n0\r\nHost: evil\r\nX-Forwarded-Client-Cert: evil\r\nConnection: close\r\n\r\n",
        [("/", b"x")],
    ),
    "TE, the field": (GET + b"TE: trailers, chunked\r\n\r\n", [("/", b"")]),
    "HTTP/1.0 kept alive": (
        b"GET / HTTP/1.0\r\nHost: a\r\nConnection: keep-alive\r\n\r\n" + EVIL,
        [("/", b"")],
    ),
    "HTTP/1.0 that ends": (b"GET / HTTP/1.0\r\nHost: a\r\n\r\n" + EVIL, [("/", b"")]),
    "RTSP is read as HTTP/1.0, and passed on as HTTP": (b"GET / RTSP/1.0\r\nHost: a\r\n\r\n" + EVIL, [("/", b"")]),
    "Icecast too": (b"SOURCE / ICE/1.0\r\nHost: a\r\n\r\n" + EVIL, [("/", b"")]),
    "absolute target in another case": (b"GET HTTP://A/x HTTP/1.1\r\nHost: a\r\n\r\n", [("/x", b"")]),
    "absolute target with a query alone": (b"GET http://a?b HTTP/1.1\r\nHost: a\r\n\r\n", [("/?b", b"")]),
    "two slashes first": (b"GET //evil HTTP/1.1\r\nHost: a\r\n\r\n", []),
    "dots": (b"GET /x/../evil HTTP/1.1\r\nHost: a\r\n\r\n", []),
    "an escaped letter": (b"GET /%65vil HTTP/1.1\r\nHost: a\r\n\r\n", []),
    "asterisk": (b"OPTIONS * HTTP/1.1\r\nHost: a\r\n\r\n", [("*", b"")]),
    "several empty lines first": (b"\r\n\r\n\r\n" + GET + b"\r\n", [("/", b"")]),
    "empty line between": (GET + b"\r\n\r\n" + GET + b"\r\n", [("/", b""), ("/", b"")]),
    # Upgrade
    "h2c": (
        GET + b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n\r\n" + EVIL,
        [("/", b"")],
    ),
    "h2c beside websocket": (GET + b"Connection: Upgrade\r\nUpgrade: websocket, h2c\r\n\r\n" + EVIL, [("/", b"")]),
    "h2c in a second line": (
        GET + b"Connection: Upgrade\r\nUpgrade: websocket\r\nUpgrade: h2c\r\n\r\n" + EVIL,
        [("/", b"")],
    ),
    "upgrade that Connection does not name": (GET + b"Upgrade: websocket\r\n\r\n" + EVIL, [("/", b"")]),
    "upgrade of HTTP/1.0": (b"GET / HTTP/1.0\r\nHost: a\r\n" + UPGRADE + b"\r\n" + EVIL, [("/", b"")]),
    "upgrade to TLS": (GET + b"Connection: upgrade\r\nUpgrade: TLS/1.0\r\n\r\n" + EVIL, [("/", b"")]),
    "upgrade with a chunked body": (
        POST + UPGRADE + b"Transfer-Encoding: chunked\r\n\r\n1f\r\n" + EVIL + b"\r\n0\r\n\r\n",
        [("/", EVIL)],
    ),
    # Expect
    "Expect with the body behind it": (
        POST + b"Expect: 100-continue\r\nContent-Length: 31\r\n\r\n" + EVIL,
        [("/", EVIL)],
    ),
    "Expect obfuscated": (POST + b"Expect: y 100-continue\r\nContent-Length: 31\r\n\r\n" + EVIL, [("/", EVIL)]),
    "Expect twice": (
        POST + b"Expect: 100-continue\r\nExpect: x\r\nContent-Length: 31\r\n\r\n" + EVIL,
        [("/", EVIL)],
    ),
    "Expect of nothing": (GET + b"Expect: 100-continue\r\n\r\n" + EVIL, [("/", b"")]),
    "Expect of HTTP/1.0": (
        b"POST / HTTP/1.0\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 31\r\n\r\n" + EVIL,
        [("/", EVIL)],
    ),
    # Connection
    "Connection names what carries identity and framing": (
        POST
        + b"Connection: close, x-forwarded-client-cert, authorization, cookie, host, content-length"
        + b", transfer-encoding\r\nAuthorization: b\r\nCookie: c\r\nContent-Length: 31\r\n\r\n"
        + EVIL,
        [("/", EVIL)],
    ),
    "Connection in several lines": (
        GET + b"Connection: keep-alive\r\nConnection: x-a\r\nX-A: 1\r\nConnection: close\r\n\r\n" + EVIL,
        [("/", b"")],
    ),
}


@pytest.mark.parametrize("pieces", [0, 1])
@pytest.mark.parametrize("name", HARMLESS)
async def test_harmless_with_one_reading(name: str, pieces: int) -> None:
    data, wanted = HARMLESS[name]
    for seen in await is_harmless(data, wanted, pieces):
        names = [field.lower() for field, _ in seen.headers]
        assert not {"upgrade", "connection", "http2-settings", "te", "x-a"} & set(names)
        assert [each for each in seen.headers if "client" in each[0].lower()] == [
            ("x-forwarded-client-cert", seen.header("x-forwarded-client-cert")[0])
        ]
        assert seen.header("x-forwarded-client-cert")[0].startswith(f"By={OWN_URI};Hash=")
        assert not [field for field in names if field.startswith("trailer:")]
        if b"Authorization" in data:
            assert (seen.header("authorization"), seen.header("cookie")) == (["b"], ["c"])


async def test_a_body_that_was_announced_is_no_request_though_the_app_would_not_have_it() -> None:
    """``Expect``: the app says no at once, and the client sends what may be the body, or the next request."""

    async def refuse(app: App, seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 417 Expectation Failed\r\ncontent-length: 0\r\n\r\n")

    async with rig(App(answer=refuse, read_body=False)) as r:
        reader, writer = await r.connect()
        writer.write(POST + b"Expect: 100-continue\r\nContent-Length: 31\r\n\r\n")
        async with asyncio.timeout(10):
            answer = await reader.readuntil(b"\r\n\r\n")
            writer.write(EVIL + GET + b"\r\n")
            answer += await reader.read()
        assert answer.count(b"HTTP/1.1 ") == 1
        assert answer.startswith(b"HTTP/1.1 417 ")
        assert b"evil" not in r.app.raw
        assert len(r.app.seen) == 1
        writer.close()
