"""Known request smuggling forms against the filter, with an app behind it that counts the requests it saw.

Whatever two parsers could disagree on is refused, or rewritten into a form with one reading. Sources: RFC 9112,
section 11.2; PortSwigger's "HTTP Desync Attacks" and "HTTP/1 must die" series; llhttp's and gunicorn's advisories.
"""

from __future__ import annotations

import re

import pytest

from raftstate.model.intention import HeaderMatch, HTTPMatch, Intention, Permission
from tests.support.http_filter import Answer, App, Seen, policy_of, rig, simple
from tests.support.http_smuggling import CHUNKED, EVIL, POLICY, POST, is_harmless, is_refused

REFUSED = {
    # Two lengths
    "CL.TE": POST + b"Content-Length: 6\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nG" + EVIL,
    "TE.CL": POST + b"Transfer-Encoding: chunked\r\nContent-Length: 4\r\n\r\n5c\r\n" + EVIL + b"0\r\n\r\n",
    "CL.CL differing": POST + b"Content-Length: 0\r\nContent-Length: 31\r\n\r\n" + EVIL,
    "CL.CL the same": POST + b"Content-Length: 0\r\nContent-Length: 0\r\n\r\n" + EVIL,
    "CL list": POST + b"Content-Length: 0, 31\r\n\r\n" + EVIL,
    "CL list of one": POST + b"Content-Length: 0, 0\r\n\r\n" + EVIL,
    # Numbers that are none
    "CL plus": POST + b"Content-Length: +31\r\n\r\n" + EVIL,
    "CL minus": POST + b"Content-Length: -1\r\n\r\n" + EVIL,
    "CL hex": POST + b"Content-Length: 0x1f\r\n\r\n" + EVIL,
    "CL underscore": POST + b"Content-Length: 3_1\r\n\r\n" + EVIL,
    "CL inner space": POST + b"Content-Length: 3 1\r\n\r\n" + EVIL,
    "CL empty": POST + b"Content-Length:\r\n\r\n" + EVIL,
    "CL huge": POST + b"Content-Length: 18446744073709551647\r\n\r\n" + EVIL,
    "CL arabic digits": POST + "Content-Length: \u0663\r\n\r\n".encode() + EVIL,
    # Transfer codings other than exactly chunked
    "TE xchunked": POST + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n" + EVIL,
    "TE identity": POST + b"Transfer-Encoding: identity\r\nContent-Length: 31\r\n\r\n" + EVIL,
    "TE gzip, chunked": POST + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n" + EVIL,
    "TE chunked, identity": POST + b"Transfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n" + EVIL,
    "TE chunked, chunked": POST + b"Transfer-Encoding: chunked, chunked\r\n\r\n0\r\n\r\n" + EVIL,
    "TE twice": POST + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + EVIL,
    "TE twice, second cow": POST + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: cow\r\n\r\n0\r\n\r\n" + EVIL,
    "TE quoted": POST + b'Transfer-Encoding: "chunked"\r\n\r\n0\r\n\r\n' + EVIL,
    "TE parameter": POST + b"Transfer-Encoding: chunked;q=1\r\n\r\n0\r\n\r\n" + EVIL,
    "TE empty": POST + b"Transfer-Encoding:\r\n\r\n0\r\n\r\n" + EVIL,
    "TE comma": POST + b"Transfer-Encoding: ,chunked\r\n\r\n0\r\n\r\n" + EVIL,
    "TE vertical tab": POST + b"Transfer-Encoding:\x0bchunked\r\n\r\n0\r\n\r\n" + EVIL,
    "TE nul": POST + b"Transfer-Encoding: chunked\x00\r\n\r\n0\r\n\r\n" + EVIL,
    "TE in HTTP/1.0": b"POST / HTTP/1.0\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + EVIL,
    "TE and CL on a GET": CHUNKED.replace(b"POST", b"GET").replace(b"\r\n\r\n", b"\r\nContent-Length: 5\r\n\r\n"),
    # Header lines that are none
    "space before colon, TE": POST + b"Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n" + EVIL,
    "space before colon, CL": POST + b"Content-Length : 31\r\n\r\n" + EVIL,
    "tab before colon": POST + b"Transfer-Encoding\t: chunked\r\n\r\n0\r\n\r\n" + EVIL,
    "space before name": b"POST / HTTP/1.1\r\n Host: a\r\nContent-Length: 0\r\n\r\n" + EVIL,
    "obs-fold": POST + b"X: a\r\n Content-Length: 31\r\n\r\n" + EVIL,
    "obs-fold TE": POST + b"Transfer-Encoding:\r\n chunked\r\n\r\n0\r\n\r\n" + EVIL,
    "obs-fold tab": POST + b"X: a\r\n\tContent-Length: 31\r\n\r\n" + EVIL,
    "bare LF": POST + b"X: a\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + EVIL,
    "bare LF throughout": POST.replace(b"\r\n", b"\n") + b"Content-Length: 0\n\n" + EVIL,
    "bare LF at the end": POST + b"Content-Length: 31\r\n\n" + EVIL,
    "bare CR": POST + b"X: a\rTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + EVIL,
    "CR CR LF": POST + b"X: a\r\r\nContent-Length: 0\r\n\r\n" + EVIL,
    "nul in a value": POST + b"X: a\x00b\r\nContent-Length: 0\r\n\r\n" + EVIL,
    "nul in a name": POST + b"Transfer\x00-Encoding: chunked\r\n\r\n0\r\n\r\n" + EVIL,
    "no colon": POST + b"Content-Length\r\n\r\n" + EVIL,
    "no name": POST + b": chunked\r\n\r\n" + EVIL,
    "name with high byte": POST + b"Transfer-Encoding\xa0: chunked\r\n\r\n0\r\n\r\n" + EVIL,
    "semicolon name": POST + b"Content-Length;: 31\r\n\r\n" + EVIL,
    # Chunks
    "chunk size with 0x": CHUNKED + b"0x1f\r\n" + EVIL + b"\r\n0\r\n\r\n",
    "chunk size with plus": CHUNKED + b"+1f\r\n" + EVIL + b"\r\n0\r\n\r\n",
    "chunk size with minus": CHUNKED + b"-1\r\n\r\n0\r\n\r\n" + EVIL,
    "chunk size with underscore": CHUNKED + b"1_f\r\n" + EVIL + b"\r\n0\r\n\r\n",
    "chunk size with leading space": CHUNKED + b" 1f\r\n" + EVIL + b"\r\n0\r\n\r\n",
    "chunk size with trailing space": CHUNKED + b"1f \r\n" + EVIL + b"\r\n0\r\n\r\n",
    "chunk size empty": CHUNKED + b"\r\n\r\n" + EVIL,
    "chunk size overflow": CHUNKED + b"10000000000000001f\r\n" + EVIL + b"\r\n0\r\n\r\n",
    "chunk size bare LF": CHUNKED + b"1f\n" + EVIL + b"\n0\n\n",
    "chunk size bare CR": CHUNKED + b"1f\r" + EVIL + b"\r\n0\r\n\r\n",
    "chunk longer than said": CHUNKED + b"3\r\nabcd\r\n0\r\n\r\n" + EVIL,
    "chunk shorter than said": CHUNKED + b"5\r\nabc\r\n0\r\n\r\n" + EVIL,
    "chunk without its end": CHUNKED + b"3\r\nabc0\r\n\r\n" + EVIL,
    "chunk extension with bare LF": CHUNKED + b"1;a=\n5\r\n" + EVIL + b"\r\n0\r\n\r\n",
    "chunk extension with bare CR": CHUNKED + b"1;a=\rb\r\nx\r\n0\r\n\r\n" + EVIL,
    "quoted chunk extension with CRLF": CHUNKED + b'1;a="\r\nx\r\n0\r\n\r\n"\r\n' + EVIL,
    "CL in a trailer": CHUNKED + b"0\r\nContent-Length: 31\r\n\r\n" + EVIL,
    "bad trailer": CHUNKED + b"0\r\nX : a\r\n\r\n" + EVIL,
    "folded trailer": CHUNKED + b"0\r\nX: a\r\n b\r\n\r\n" + EVIL,
    # Start lines
    "HTTP/0.9": b"GET /evil\r\n\r\n",
    "HTTP/1.2": b"GET / HTTP/1.2\r\nHost: a\r\n\r\n",
    "HTTP/2.0": b"GET / HTTP/2.0\r\nHost: a\r\n\r\n",
    "version with spaces": b"GET / HTTP/ 1.1\r\nHost: a\r\n\r\n",
    "tab in the start line": b"GET\t/evil HTTP/1.1\r\nHost: a\r\n\r\n",
    "two targets": b"GET / /evil HTTP/1.1\r\nHost: a\r\n\r\n",
    "target with high byte": b"GET /\x80evil HTTP/1.1\r\nHost: a\r\n\r\n",
    "target with nul": b"GET /\x00 HTTP/1.1\r\nHost: a\r\n\r\n",
    "target without slash": b"GET evil HTTP/1.1\r\nHost: a\r\n\r\n",
    "target with fragment": b"GET /#/../evil HTTP/1.1\r\nHost: a\r\n\r\n",
    "absolute target with fragment": b"GET http://a/x#/../evil HTTP/1.1\r\nHost: a\r\n\r\n",
    "method in lower case": b"get / HTTP/1.1\r\nHost: a\r\n\r\n",
    "method with junk": b"G\x00ET / HTTP/1.1\r\nHost: a\r\n\r\n",
    "CONNECT": b"CONNECT evil:80 HTTP/1.1\r\nHost: evil:80\r\n\r\n" + EVIL,
    "h2 preface within HTTP/1.1": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + EVIL,
    # Hosts
    "no Host": b"GET / HTTP/1.1\r\n\r\n",
    "two Hosts": b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
    "Host with space": b"GET / HTTP/1.1\r\nHost: a b\r\n\r\n",
    "Host with slash": b"GET / HTTP/1.1\r\nHost: a/evil\r\n\r\n",
    "Host and target differ": b"GET http://b/ HTTP/1.1\r\nHost: a\r\n\r\n",
    "target with userinfo": b"GET http://a@b/ HTTP/1.1\r\nHost: b\r\n\r\n",
    "target of another scheme": b"GET ftp://a/ HTTP/1.1\r\nHost: a\r\n\r\n",
}


@pytest.mark.parametrize("pieces", [0, 1])
@pytest.mark.parametrize("name", REFUSED)
async def test_refused(name: str, pieces: int) -> None:
    await is_refused(REFUSED[name], pieces)


HARMLESS = {
    # (what is sent, targets and bodies that the app may see)
    "body that looks like a request": (POST + b"Content-Length: 31\r\n\r\n" + EVIL, [("/", EVIL)]),
    "chunk that looks like a request": (CHUNKED + b"1f\r\n" + EVIL + b"\r\n0\r\n\r\n", [("/", EVIL)]),
    "TE in capitals": (POST + b"Transfer-Encoding: CHUNKED\r\n\r\n1\r\nx\r\n0\r\n\r\n", [("/", b"x")]),
    "TE with spaces": (POST + b"Transfer-Encoding:  chunked \r\n\r\n1\r\nx\r\n0\r\n\r\n", [("/", b"x")]),
    "chunk size with zeros": (CHUNKED + b"0001\r\nx\r\n000\r\n\r\n", [("/", b"x")]),
    "chunk extension": (CHUNKED + b'1;a=b;c="d"\r\nx\r\n0\r\n\r\n', [("/", b"x")]),
    "TE underscore": (
        POST + b"Transfer_Encoding: chunked\r\nContent-Length: 1\r\n\r\nx",
        [("/", b"x")],
    ),
    "body on a GET": (b"GET / HTTP/1.1\r\nHost: a\r\nContent-Length: 31\r\n\r\n" + EVIL, [("/", EVIL)]),
    "body on a HEAD": (b"HEAD / HTTP/1.1\r\nHost: a\r\nContent-Length: 31\r\n\r\n" + EVIL, [("/", EVIL)]),
    "empty line first": (b"\r\nGET / HTTP/1.1\r\nHost: a\r\n\r\n", [("/", b"")]),
    "double space": (b"GET /  HTTP/1.1\r\nHost: a\r\n\r\n", [("/", b"")]),
    "absolute target": (b"GET http://a/x?y HTTP/1.1\r\nHost: a\r\n\r\n", [("/x?y", b"")]),
    "absolute target without path": (b"GET http://a HTTP/1.1\r\nHost: a\r\n\r\n", [("/", b"")]),
    "CL with zeros": (POST + b"Content-Length: 0001\r\n\r\nx", [("/", b"x")]),
    "Connection: close": (b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n" + EVIL, [("/", b"")]),
    "Connection names Content-Length": (
        POST + b"Connection: content-length\r\nContent-Length: 31\r\n\r\n" + EVIL,
        [("/", EVIL)],
    ),
    "Connection names Host": (b"GET / HTTP/1.1\r\nHost: a\r\nConnection: host\r\n\r\n", [("/", b"")]),
    "absolute target to evil": (b"GET http://a/evil HTTP/1.1\r\nHost: a\r\n\r\n", []),
    "upgrade with a body": (
        POST + b"Connection: upgrade\r\nUpgrade: websocket\r\nContent-Length: 31\r\n\r\n" + EVIL,
        [("/", EVIL)],
    ),
    "pipelined after an upgrade": (
        b"GET / HTTP/1.1\r\nHost: a\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n" + EVIL,
        [("/", b"")],
    ),
    "pipelined": (
        b"GET / HTTP/1.1\r\nHost: a\r\n\r\n" + EVIL + POST + b"Content-Length: 0\r\n\r\n",
        [("/", b""), ("/", b"")],
    ),
}


@pytest.mark.parametrize("pieces", [0, 1])
@pytest.mark.parametrize("name", HARMLESS)
async def test_harmless_with_one_reading(name: str, pieces: int) -> None:
    await is_harmless(*HARMLESS[name], pieces)


def splitting(value: bytes) -> Answer:
    async def answer(app: App, seen: Seen, reader: object, writer: object) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nX: " + value + b"\r\nContent-Length: 0\r\n\r\n")  # type: ignore[attr-defined]

    return answer


@pytest.mark.parametrize("value", [b"a\nSet-Cookie: b", b"a\rb", b"a\x00b"])
async def test_an_app_cannot_split_responses(value: bytes) -> None:
    async with rig(App(answer=splitting(value))) as r:
        answer = await r.exchange(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        assert answer.startswith(b"HTTP/1.1 502 ")
        assert b"Set-Cookie" not in answer


async def test_hop_by_hop_fields_cannot_carry_a_header_past_a_permission() -> None:
    """``Connection: x-role`` takes the field away from app and permission alike."""
    needs_role = policy_of(
        Intention(
            source_name="web",
            destination_name="db",
            permissions=(Permission("allow", HTTPMatch(header=(HeaderMatch(name="x-role", exact="admin"),))),),
        )
    )
    async with rig(App(answer=simple()), policy=needs_role) as r:
        answer = await r.exchange(
            b"GET / HTTP/1.1\r\nHost: a\r\nX-Role: admin\r\nConnection: X-Role\r\n\r\n"
            b"GET / HTTP/1.1\r\nHost: a\r\nX-Role: admin \t\r\n\r\n"
        )
        assert re.findall(rb"HTTP/1\.1 (\d+) ", answer) == [b"403", b"200"]
        assert r.app.seen[0].header("x-role") == ["admin"]


async def test_names_that_gateways_take_for_those_of_framing_do_not_reach_an_app() -> None:
    """To CGI-like servers ``Transfer_Encoding`` may be ``Transfer-Encoding``: they would read another body."""
    names = ("Transfer_Encoding: chunked", "content_length: 31", "TRANSFER_encoding: identity")
    async with rig(policy=POLICY) as r:
        head = "POST / HTTP/1.1\r\nHost: a\r\n" + "".join(f"{name}\r\n" for name in names) + "X_Other: 1\r\n"
        data = await r.exchange(head.encode() + b"Content-Length: 5\r\n\r\n0\r\n\r\n")
        assert data.startswith(b"HTTP/1.1 200 ")
        (seen,) = r.app.seen
        assert (seen.body, seen.header("x_other")) == (b"0\r\n\r\n", ["1"])
        assert [name for name, _ in seen.headers if "_" in name] == ["X_Other"]


@pytest.mark.parametrize("decided", [True, False])
async def test_a_trailer_cannot_carry_a_header_past_a_permission(decided: bool) -> None:
    """Some apps merge trailers into the headers; what permissions decided on must stay what the app sees."""
    no_debug = policy_of(
        Intention(
            source_name="web",
            destination_name="db",
            permissions=(
                Permission("deny", HTTPMatch(header=(HeaderMatch(name="x-debug", present=True),))),
                Permission("allow", HTTPMatch()),
            ),
        )
    )
    async with rig(policy=no_debug if decided else policy_of(default=True)) as r:
        answer = await r.exchange(CHUNKED + b"1\r\nx\r\n0\r\nX-Debug: 1\r\n\r\n")
        assert answer.startswith(b"HTTP/1.1 200 ")
        assert [v for n, v in r.app.seen[0].headers if n.lower() == "trailer:x-debug"] == ([] if decided else ["1"])
