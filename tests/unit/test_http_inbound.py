"""The inbound HTTP filter, request by request, over real sockets."""

from __future__ import annotations

import asyncio
import json
import socket
import struct

import pytest

from raftstate.model.intention import HTTPMatch, Intention, Permission
from tests.support.http_filter import App, Rig, Seen, policy_of, rig, simple
from tests.support.promises import PATIENCE_S

GET = b"GET /x HTTP/1.1\r\nHost: db\r\n\r\n"
ONLY_PUBLIC = policy_of(
    Intention(
        source_name="web",
        destination_name="db",
        permissions=(
            Permission("deny", HTTPMatch(path_prefix="/public/secret")),
            Permission("allow", HTTPMatch(path_prefix="/public", methods=("GET", "POST", "HEAD"))),
        ),
    )
)


def replies(data: bytes) -> list[tuple[int, dict[str, str], bytes]]:
    """Split a run of responses that have a Content-Length or are chunked."""
    found = []
    while data:
        head, _, data = data.partition(b"\r\n\r\n")
        start, *lines = head.split(b"\r\n")
        headers = {k.lower().decode(): v.decode() for k, v in (line.split(b": ", 1) for line in lines)}
        status, body = int(start.split()[1]), b""
        if headers.get("transfer-encoding") == "chunked":
            while True:
                size, _, data = data.partition(b"\r\n")
                count = int(size, 16)
                if not count:
                    while data[:2] != b"\r\n":
                        _, _, data = data.partition(b"\r\n")
                    data = data[2:]
                    break
                body += data[:count]
                assert data[count : count + 2] == b"\r\n"
                data = data[count + 2 :]
        elif status >= 200 and status not in (204, 304):
            size = int(headers["content-length"])
            body, data = data[:size], data[size:]
        found.append((status, headers, body))
    return found


async def wait_for(condition: object, timeout_s: float = PATIENCE_S) -> None:
    """Await a condition that the filter's timers bring about."""
    assert callable(condition)
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110  (what is awaited has no event)
            await asyncio.sleep(0.005)


async def test_requests_are_forwarded_on_one_kept_connection() -> None:
    async with rig() as r:
        reader, writer = await r.connect()
        for _ in range(3):
            writer.write(GET)
            head = await reader.readuntil(b"\r\n\r\n")
            assert head == b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n"
            assert await reader.readexactly(2) == b"ok"
        writer.close()
        assert r.app.connections == 1
        assert [seen.target for seen in r.app.seen] == ["/x"] * 3
        assert r.stats.requests == {("GET", 200, "app"): 3}
        assert r.stats.latency_count == 3
        await wait_for(lambda: not r.http.connections)


async def test_the_identity_is_set_and_what_came_from_outside_is_stripped() -> None:
    async with rig() as r:
        await r.exchange(
            b"GET / HTTP/1.1\r\nHost: db\r\nX-Forwarded-Client-Cert: URI=spiffe://evil\r\nConnection: "
            b"x-forwarded-client-cert, x-hop\r\nX_Forwarded_Client_Cert: a\r\nX-Hop: 1\r\nX-Keep: 2\r\n"
            b"Keep-Alive: 5\r\nTE: trailers\r\nProxy-Connection: close\r\n\r\n"
        )
        (seen,) = r.app.seen
        assert seen.headers == [
            ("Host", "db"),
            ("X-Keep", "2"),
            (
                "x-forwarded-client-cert",
                f"By=spiffe://td.consul/ns/default/dc/dc1/svc/db;Hash={'ab' * 32};"
                "URI=spiffe://td.consul/ns/default/dc/dc1/svc/web",
            ),
        ]


async def test_a_denied_request_gets_a_403_and_never_reaches_the_app() -> None:
    async with rig(policy=ONLY_PUBLIC) as r:
        data = await r.exchange(
            b"GET /admin HTTP/1.1\r\nHost: db\r\n\r\n"
            b"DELETE /public/a HTTP/1.1\r\nHost: db\r\n\r\n"
            b"HEAD /public/secret/1 HTTP/1.1\r\nHost: db\r\n\r\n"
            b"GET /public/../admin HTTP/1.1\r\nHost: db\r\n\r\n"
            b"GET /public/%2e%2e%2fadmin HTTP/1.1\r\nHost: db\r\n\r\n"
        )
        assert data.count(b"HTTP/1.1 403 Forbidden") == 4
        assert data.count(b"HTTP/1.1 400 Bad Request") == 1
        assert r.app.connections == 0
        body = json.loads(data.partition(b"\r\n\r\n")[2].partition(b"\n")[0])
        assert body == {"error": "destination 'db' denies this request of source 'web'"}
        assert b"secret" not in data
        assert r.stats.requests[("GET", 403, "denied")] == 2
        assert r.stats.requests[("GET", 400, "malformed")] == 1


async def test_the_path_that_was_decided_on_is_the_path_that_is_sent() -> None:
    async with rig(policy=ONLY_PUBLIC) as r:
        await r.exchange(b"GET /x/..//public/%61?q=/../ HTTP/1.1\r\nHost: db\r\n\r\n")
        assert r.app.seen[0].target == "/public/a?q=/../"
    async with rig() as r:
        await r.exchange(b"GET /x/..//public/%61?q=/../ HTTP/1.1\r\nHost: db\r\n\r\n")
        assert r.app.seen[0].target == "/x/..//public/%61?q=/../", "without permissions nothing is rewritten"


async def test_pipelined_requests_are_answered_in_order() -> None:
    async def slow_first(app: App, seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if seen.target == "/0":
            await asyncio.sleep(0.02)
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(seen.target), seen.target.encode()))

    async with rig(App(answer=slow_first), policy=ONLY_PUBLIC) as r:
        r.policy = policy_of(default=True)
        wanted = [f"/{n}".encode() for n in range(200)]
        data = await r.exchange(b"".join(b"GET %b HTTP/1.1\r\nHost: a\r\n\r\n" % target for target in wanted))
        assert [body for _, _, body in replies(data)] == wanted
        assert r.app.connections == 1


async def test_the_next_request_is_decided_by_the_new_policy() -> None:
    async with rig() as r:
        reader, writer = await r.connect()
        writer.write(GET)
        assert b" 200 " in await reader.readuntil(b"\r\n\r\n")
        await reader.readexactly(2)
        r.policy = policy_of()
        writer.write(GET)
        assert b" 403 " in await reader.readuntil(b"\r\n\r\n")
        writer.close()
        assert len(r.app.seen) == 1


@pytest.mark.parametrize("chunked", [True, False])
async def test_bodies_pass_both_ways(chunked: bool) -> None:
    async def echo(app: App, seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
        for at in range(0, len(seen.body), 10_000):
            piece = seen.body[at : at + 10_000]
            writer.write(b"%x\r\n%b\r\n" % (len(piece), piece))
        writer.write(b"0\r\nx-sum: 7\r\nSet-Cookie: a=b\r\n\r\n")

    body = bytes(range(256)) * 1200
    if chunked:
        request = b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
        for at in range(0, len(body), 7777):
            piece = body[at : at + 7777]
            request += b"%x;ext=1\r\n%b\r\n" % (len(piece), piece)
        request += b"0\r\nX-Trailer: t\r\nX-Forwarded-Client-Cert: evil\r\nHost: evil\r\n\r\n"
    else:
        request = b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
    async with rig(App(answer=echo)) as r:
        data = await r.exchange(request + GET, pieces=50_000)
        first, second = replies(data)
        assert first[2] == body
        assert second[0] == 200
        assert b"\r\n0\r\nx-sum: 7\r\n\r\nHTTP/1.1" in data, "trailers without those that may not be trailers"
        trailers = [(n, v) for n, v in r.app.seen[0].headers if n.startswith("trailer:")]
        assert trailers == ([("trailer:X-Trailer", "t")] if chunked else [])


async def test_a_large_body_is_not_held_in_memory_when_the_app_does_not_read() -> None:
    started = asyncio.Event()
    go_on = asyncio.Event()

    async def stall(app: App, seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        started.set()
        await go_on.wait()
        seen.body = await app.body(seen, reader)
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")

    size = 64 << 20
    async with rig(App(answer=stall, read_body=False)) as r:
        reader, writer = await r.connect()
        writer.write(b"PUT / HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % size)
        await started.wait()
        sent = 0
        piece = bytes(1 << 20)
        try:
            while sent < size:
                writer.write(piece)
                await asyncio.wait_for(writer.drain(), 0.3)
                sent += len(piece)
        except TimeoutError:
            pass
        assert sent < size // 2, "the filter took everything although the app read nothing"
        go_on.set()
        while sent < size:
            writer.write(piece)
            await writer.drain()
            sent += len(piece)
        # One piece was written twice at most: the one whose drain timed out.
        assert b" 200 " in await reader.readuntil(b"\r\n\r\n")
        writer.close()
        assert len(r.app.seen[0].body) == size


async def test_a_large_response_is_not_held_when_the_client_does_not_read() -> None:
    written = 0

    async def flood(app: App, seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal written
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % (64 << 20))
        for _ in range(64):
            writer.write(bytes(1 << 20))
            await writer.drain()
            written += 1

    async with rig(App(answer=flood)) as r:
        reader, writer = await r.connect()
        writer.write(GET)
        await reader.readuntil(b"\r\n\r\n")
        before = -1
        while written != before:
            before = written
            await asyncio.sleep(0.1)
        assert written < 40
        assert len(await reader.readexactly(64 << 20)) == 64 << 20
        writer.close()


async def test_head_204_and_304_have_no_body() -> None:
    for answer, method in (
        (simple(b"12345"), b"HEAD"),
        (simple(b"", "204 No Content"), b"GET"),
        (simple(b"", "304 Not Modified"), b"GET"),
    ):
        async with rig(App(answer=answer)) as r:
            request = method + b" / HTTP/1.1\r\nHost: a\r\n\r\n"
            data = await r.exchange(request * 3)
            assert data.count(b"HTTP/1.1 ") == 3
            assert data.endswith(b"\r\n\r\n")
            assert r.app.connections == 1


async def test_head_of_a_chunked_response_keeps_the_connection() -> None:
    async def answer(app: App, seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")

    async with rig(App(answer=answer)) as r:
        data = await r.exchange(b"HEAD / HTTP/1.1\r\nHost: a\r\n\r\n" * 2)
        assert data == b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n" * 2
        assert r.app.connections == 1


async def test_100_continue_passes() -> None:
    async def answer(app: App, seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        assert seen.header("expect") == ["100-continue"]
        writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        seen.body = await app.body(seen, reader)
        writer.write(b"HTTP/1.1 201 Created\r\ncontent-length: 0\r\n\r\n")

    async with rig(App(answer=answer, read_body=False)) as r:
        reader, writer = await r.connect()
        writer.write(b"POST / HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 4\r\n\r\n")
        assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        writer.write(b"body")
        assert b" 201 " in await reader.readuntil(b"\r\n\r\n")
        writer.close()
        assert r.app.seen[0].body == b"body"


async def test_expect_is_refused_before_the_body_is_sent() -> None:
    async with rig(policy=ONLY_PUBLIC) as r:
        reader, writer = await r.connect()
        writer.write(b"POST /admin HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 4\r\n\r\n")
        data = await asyncio.wait_for(reader.read(), PATIENCE_S)
        assert b" 403 " in data
        assert b"connection: close" in data
        writer.close()
        assert r.app.connections == 0


async def test_websocket_passes_raw_after_101() -> None:
    async def answer(app: App, seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        assert seen.header("upgrade") == ["websocket"]
        assert seen.header("connection") == ["upgrade"]
        writer.write(b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\nhello")
        while data := await reader.read(100):
            writer.write(data.upper())
        writer.write(b"bye")
        writer.write_eof()
        await writer.drain()

    async with rig(App(answer=answer)) as r:
        reader, writer = await r.connect()
        writer.write(b"GET /ws HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\nearly GET /")
        head = await reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 101 ")
        assert await reader.readexactly(5 + 11) == b"helloEARLY GET /"
        writer.write(b"more")
        assert await reader.readexactly(4) == b"MORE"
        r.http.drain()
        writer.write(b"x")
        assert await reader.readexactly(1) == b"X", "draining does not cut a websocket"
        writer.write_eof()
        assert await reader.read() == b"bye"
        writer.close()
        await wait_for(lambda: not r.http.connections)


async def test_a_websocket_can_be_cut() -> None:
    ended = asyncio.Event()

    async def answer(app: App, seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
        try:
            await reader.read(1)
        finally:
            ended.set()

    async with rig(App(answer=answer)) as r:
        reader, writer = await r.connect()
        writer.write(b"GET /ws HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
        await reader.readuntil(b"\r\n\r\n")
        for connection in list(r.http.connections):
            connection.cut()
        await asyncio.wait_for(ended.wait(), PATIENCE_S)
        with pytest.raises(ConnectionError):
            await reader.read()
        writer.close()


async def test_an_upgrade_that_is_declined_leaves_http() -> None:
    async with rig() as r:
        data = await r.exchange(
            b"GET /ws HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n" + GET
        )
        assert [status for status, _, _ in replies(data)] == [200, 200]
        assert [seen.target for seen in r.app.seen] == ["/ws", "/x"]


async def test_a_denied_upgrade_leaves_http() -> None:
    async with rig(policy=ONLY_PUBLIC) as r:
        data = await r.exchange(
            b"GET /ws HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
            b"GET /public HTTP/1.1\r\nHost: a\r\n\r\n"
        )
        assert [status for status, _, _ in replies(data)] == [403, 200]


@pytest.mark.parametrize("body", [b"", b"abc"])
async def test_h2c_is_not_asked_for(body: bytes) -> None:
    """After such an upgrade requests would go past the permissions."""
    async with rig() as r:
        data = await r.exchange(
            b"POST /a HTTP/1.1\r\nHost: a\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\n"
            b"HTTP2-Settings: AAMAAABkAAQAAP__\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body) + GET
        )
        assert [status for status, _, _ in replies(data)] == [200, 200]
        assert r.app.seen[0].body == body
        assert r.app.seen[0].header("upgrade") == r.app.seen[0].header("http2-settings") == []
        assert r.app.seen[1].target == "/x"


async def test_http10_closes_unless_asked_to_keep() -> None:
    async def unsized(app: App, seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n")

    async with rig() as r:
        data = await r.exchange(b"GET / HTTP/1.0\r\n\r\n", eof=False)
        assert data == b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\nconnection: close\r\n\r\nok"
        await r.exchange(b"GET / HTTP/1.0\r\nHost: a\r\n\r\n", eof=False)
        hosts = [seen.header("host") for seen in r.app.seen]
        assert hosts == [["db"], ["a"]], "what is sent on is HTTP/1.1, which needs one"
        data = await r.exchange(b"GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n" * 2)
        assert data == b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\nconnection: keep-alive\r\n\r\nok" * 2
    async with rig(App(answer=unsized)) as r:
        data = await r.exchange(b"GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n", eof=False)
        assert data == b"HTTP/1.1 200 OK\r\nconnection: close\r\n\r\nabc"


async def test_a_response_without_length_ends_with_the_apps_connection() -> None:
    async def until_eof(app: App, seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.0 200 OK\r\n\r\nabc")
        await writer.drain()
        writer.write(b"def")
        writer.close()

    async with rig(App(answer=until_eof)) as r:
        data = await r.exchange(GET * 2)
        assert [body for _, _, body in replies(data)] == [b"abcdef"] * 2
        assert r.app.connections == 2


async def test_an_app_that_closes_between_requests_is_dialled_again() -> None:
    async def once(app: App, seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")
        await writer.drain()
        writer.close()

    async with rig(App(answer=once)) as r:
        reader, writer = await r.connect()
        for _ in range(5):
            writer.write(GET)
            assert b" 200 " in await reader.readuntil(b"\r\n\r\n")
        writer.close()
        assert len(r.app.seen) == 5


async def test_an_app_that_says_it_closes_gets_no_other_request() -> None:
    async def closing(app: App, seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 0\r\n\r\n")

    post = b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\n\r\nx"
    async with rig(App(answer=closing)) as r:
        data = await r.exchange(post * 3)
        assert [status for status, _, _ in replies(data)] == [200] * 3
        assert r.app.connections == 3


async def test_only_a_repeatable_request_is_sent_again_when_a_kept_connection_breaks() -> None:
    async def die_on_second(app: App, seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(app.seen) == 2:
            writer.transport.abort()
            return
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")

    async with rig(App(answer=die_on_second)) as r:
        data = await r.exchange(GET * 2)
        assert [status for status, _, _ in replies(data)] == [200, 200]
        assert len(r.app.seen) == 3
    async with rig(App(answer=die_on_second)) as r:
        data = await r.exchange(GET + b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n")
        assert [status for status, _, _ in replies(data)] == [200, 502]
        assert len(r.app.seen) == 2


async def test_an_app_that_is_down_is_a_503() -> None:
    async with rig() as r:
        r.app.port = 1
        data = await r.exchange(GET * 2)
        assert [status for status, _, _ in replies(data)] == [503, 503]
        assert json.loads(replies(data)[0][2]) == {"error": "'db' cannot be reached"}


async def test_a_slow_app_is_a_504() -> None:
    never = asyncio.Event()

    async def hang(app: App, seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await never.wait()

    async with rig(App(answer=hang), response_timeout_s=0.05) as r:
        data = await r.exchange(GET)
        assert replies(data)[0][0] == 504
        assert r.stats.requests == {("GET", 504, "timeout"): 1}
        never.set()


async def test_a_response_that_never_ends_is_cut_but_a_long_upload_is_not() -> None:
    async def trickle(app: App, seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
        while True:
            writer.write(b"." if seen.method == "GET" else b"." * 100_000)
            await writer.drain()
            if seen.method != "GET":
                return
            await asyncio.sleep(0.01)

    async with rig(App(answer=trickle), response_timeout_s=1.0) as r:
        reader, writer = await r.connect()
        writer.write(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 4\r\n\r\n")
        for _ in range(4):
            await asyncio.sleep(0.3)  # the upload takes longer than the response may
            writer.write(b"x")
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200 ")
        await reader.readexactly(100_000)
        writer.write(GET)
        await reader.readuntil(b"\r\n\r\n")
        with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
            await asyncio.wait_for(reader.readexactly(100_000), PATIENCE_S)
        assert r.stats.requests == {("POST", 200, "app"): 1, ("GET", 0, "cut"): 1}
        assert not r.http.connections
        writer.close()


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\nabcd",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\nContent-Length: 0\n\n",
        b"HTTP/1.1 200 OK\r\nX: a\x00b\r\n\r\n",
        b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n",
        b"HTTP/2.0 200 OK\r\nContent-Length: 0\r\n\r\n",
        b"SSH-2.0-OpenSSH\r\n",
        b"",
    ],
)
async def test_an_unusable_answer_is_a_502(answer: bytes) -> None:
    async def broken(app: App, seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(answer)
        await writer.drain()
        writer.close()

    async with rig(App(answer=broken)) as r:
        data = await r.exchange(GET)
        assert [status for status, _, _ in replies(data)] == [502]
        assert b"nodebug" not in data


async def test_a_cut_response_is_cut_for_the_client_too() -> None:
    async def half(app: App, seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nabc")
        await writer.drain()
        writer.close()

    async with rig(App(answer=half)) as r:
        reader, writer = await r.connect()
        writer.write(GET)
        await reader.readuntil(b"\r\n\r\n")
        with pytest.raises(ConnectionError):
            await reader.readexactly(10)
        writer.close()
        assert r.stats.requests == {("GET", 0, "cut"): 1}


async def test_what_the_app_sends_unasked_is_not_the_next_answer() -> None:
    async def double(app: App, seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 1\r\n\r\naHTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nevil")

    async with rig(App(answer=double)) as r:
        data = await r.exchange(GET * 3)
        assert [body for _, _, body in replies(data)] == [b"a"] * 3
        assert r.app.connections == 3


async def test_the_app_is_let_go_when_the_client_leaves() -> None:
    gone = asyncio.Event()

    async def hang(app: App, seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await reader.read(1)
        finally:
            gone.set()

    async with rig(App(answer=hang)) as r:
        _, writer = await r.connect()
        writer.write(GET)
        await wait_for(lambda: r.app.seen)
        # A reset; the mere end of what the client sends does not mean that it awaits no answer.
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.transport.abort()
        await asyncio.wait_for(gone.wait(), PATIENCE_S)
        await wait_for(lambda: not r.http.connections)


async def test_an_early_answer_ends_the_upload() -> None:
    async def too_large(app: App, seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 413 Content Too Large\r\ncontent-length: 0\r\n\r\n")

    async with rig(App(answer=too_large, read_body=False)) as r:
        reader, writer = await r.connect()
        writer.write(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1000000\r\n\r\nabc")
        assert b" 413 " in await reader.read()
        writer.close()
        await wait_for(lambda: not r.http.connections)


async def test_a_head_that_trickles_is_a_408_and_an_idle_connection_ends() -> None:
    async with rig(head_timeout_s=0.3) as r:
        reader, writer = await r.connect()
        writer.write(b"GET / HT")
        assert b" 408 " in await asyncio.wait_for(reader.read(), PATIENCE_S)
        writer.close()
    async with rig(idle_timeout_s=0.3) as r:
        reader, writer = await r.connect()
        writer.write(GET)
        data = await asyncio.wait_for(reader.read(), PATIENCE_S)
        assert data.endswith(b"ok")
        writer.close()


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\nHost: a\r\n" + b"X: %b\r\n" % (b"a" * 2000) + b"\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\n" + b"X: a\r\n" * 30 + b"\r\n",
        b"GET /%b HTTP/1.1\r\nHost: a\r\n\r\n" % (b"a" * 2000),
        b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"a" * 200_000,
        b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nX: " + b"a" * 200_000,
        b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n3;x=" + b"a" * 200_000,
        b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n" + b"X: a\r\n" * 30 + b"\r\n",
    ],
)
async def test_limits(data: bytes) -> None:
    async with rig(head_bytes_max=1000, header_count_max=20) as r:
        reader, writer = await r.connect()
        writer.write(data)
        answer = await asyncio.wait_for(reader.read(), PATIENCE_S)
        writer.close()
        assert b" 431 " in answer
        assert r.app.seen == []


async def test_draining_lets_requests_end_and_closes() -> None:
    go_on = asyncio.Event()

    async def wait(app: App, seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await go_on.wait()
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")

    async def busy_and_idle(r: Rig) -> None:
        idle_reader, idle_writer = await r.connect()
        reader, writer = await r.connect()
        writer.write(GET)
        await wait_for(lambda: r.app.seen and len(r.http.connections) == 2)
        r.http.drain()
        assert await asyncio.wait_for(idle_reader.read(), PATIENCE_S) == b""
        go_on.set()
        answer = await asyncio.wait_for(reader.read(), PATIENCE_S)
        assert answer.endswith(b"ok")
        assert b"\r\nconnection: close\r\n" in answer, "or the client would send its next request on it"
        idle_writer.close()
        writer.close()

    async with rig(App(answer=wait)) as r:
        await busy_and_idle(r)


async def test_a_decision_that_fails_is_a_refusal() -> None:
    async with rig() as r:
        r.policy = None  # type: ignore[assignment]
        data = await r.exchange(GET)
        assert replies(data)[0][0] == 500
        assert r.app.connections == 0
