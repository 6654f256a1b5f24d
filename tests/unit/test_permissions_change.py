"""What the HTTP filters do with requests under way when permissions change."""

from __future__ import annotations

import asyncio
import contextlib

import h2.events
import pytest

from proxy.authz import Decision, Request
from proxy.http2.half import STREAM_WINDOW_BYTES, STREAMS_MAX
from raftstate.model.intention import HeaderMatch, HTTPMatch, Intention, Permission
from tests.support.http_filter import WEB, App, Seen, policy_of, rig
from tests.support.promises import PATIENCE_S
from tests.support.sidecars import until
from tests.unit.test_http2_inbound import setting

SOURCES = {(WEB.service, WEB.instance)}


def only(*matches: HTTPMatch) -> Intention:
    permissions = tuple(Permission("allow", match) for match in matches)
    return Intention(source_name="web", destination_name="db", permissions=permissions)


async def silent(app: App, seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(ConnectionError):
        await reader.read(1)
    raise ConnectionError


async def test_http1_is_decided_by_headers_and_only_of_those_whose_permissions_changed() -> None:
    policy = policy_of(only(HTTPMatch(path_prefix="/")))
    async with rig(App(answer=silent), policy) as r:
        reader, writer = await r.connect()
        writer.write(b"GET /a HTTP/1.1\r\nHost: db\r\nX-Key: 1\r\n\r\n")
        await until(lambda: bool(r.app.seen))
        r.policy = policy_of(only(HTTPMatch(path_prefix="/", header=(HeaderMatch(name="x-key", exact="1"),))))
        assert r.http.recheck(SOURCES) == 0
        r.policy = policy_of(only(HTTPMatch(path_prefix="/", header=(HeaderMatch(name="x-key", exact="2"),))))
        assert r.http.recheck({("other", "other-1")}) == 0
        assert r.http.recheck(SOURCES) == 1
        assert r.http.recheck(SOURCES) == 0, "it has ended"
        async with asyncio.timeout(PATIENCE_S):
            assert await reader.readline() == b"HTTP/1.1 403 Forbidden\r\n"
        assert r.stats.requests == {("GET", 403, "denied"): 1}
        writer.close()


async def test_a_path_that_the_app_may_read_in_another_way_is_not_allowed_afterwards() -> None:
    async with rig(App(answer=silent), policy_of(default=True)) as r:
        reader, writer = await r.connect()
        writer.write(b"GET /public/../secret/../public/a HTTP/1.1\r\nHost: db\r\n\r\n")
        await until(lambda: bool(r.app.seen))
        assert r.app.seen[0].target == "/public/../secret/../public/a", "no permissions: passed on as it came"
        r.policy = policy_of(only(HTTPMatch(path_prefix="/public")))
        assert r.http.recheck(SOURCES) == 1
        async with asyncio.timeout(PATIENCE_S):
            assert b" 403 " in await reader.readline()
        writer.close()


async def test_an_upload_under_way_is_ended_and_one_still_allowed_keeps_no_trailers() -> None:
    async with rig(App(), policy_of(default=True)) as r:
        kept, dropped = await r.connect(), await r.connect()
        for target, (_, writer) in ((b"kept", kept), (b"dropped", dropped)):
            writer.write(
                b"POST /" + target + b" HTTP/1.1\r\nHost: db\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n"
            )
        await until(lambda: r.app.raw.count(b"POST") == 2)
        r.policy = policy_of(only(HTTPMatch(path_exact="/kept")))
        assert r.http.recheck(SOURCES) == 1
        async with asyncio.timeout(PATIENCE_S):
            assert b" 403 " in await dropped[0].readline()
            kept[1].write(b"0\r\nX-Late: 1\r\n\r\n")
            assert b" 200 " in await kept[0].readline()
        (seen,) = r.app.seen
        assert seen.body == b"a"
        assert not seen.header("trailer:X-Late"), "trailers come after the decision"
        for _, writer in (kept, dropped):
            writer.close()


async def test_a_decision_that_fails_ends_the_request() -> None:
    class Broken(Exception):
        pass

    broken = False

    def decide(request: Request) -> Decision:
        if broken:
            raise Broken
        return Decision(True, None, "test")

    async with setting(decide) as s:
        s.request()
        await s.step()
        broken = True
        assert s.connection.recheck() == 1
        await s.step()
        assert dict(s.client.of(h2.events.ResponseReceived)[0].headers)[":status"] == "403"
        assert s.apps[0].of(h2.events.StreamReset)


async def test_http2_streams_end_each_by_itself() -> None:
    allowed = {"/begun", "/grpc", "/waiting", "/kept"}

    def decide(request: Request) -> Decision:
        return Decision(request.path in allowed, None, "test", (Permission("allow"),))

    async with setting(decide) as s:
        grpc = ("content-type", "application/grpc")
        ids = {path: s.request(path, *((grpc,) if path == "/grpc" else ()), end=False) for path in sorted(allowed)}
        await s.step()
        (app,) = s.apps
        seen = {dict(each.headers)[":path"]: each.stream_id for each in app.of(h2.events.RequestReceived)}
        for path in ("/begun", "/grpc", "/kept"):
            app.conn.send_headers(seen[path], [(":status", "200")])
            app.conn.send_data(seen[path], b"x")
        await s.step()
        allowed &= {"/kept"}
        assert s.connection.recheck() == 3
        await s.step()
        assert {each.stream_id for each in app.of(h2.events.StreamReset)} == {
            seen[path] for path in ("/begun", "/grpc", "/waiting")
        }
        (trailers,) = s.client.of(h2.events.TrailersReceived)
        assert (trailers.stream_id, dict(trailers.headers)["grpc-status"]) == (ids["/grpc"], "7")
        codes = {each.stream_id: each.error_code for each in s.client.of(h2.events.StreamReset)}
        assert codes[ids["/begun"]] == 8, "cut: something of the answer had gone"
        statuses = {e.stream_id: dict(e.headers)[":status"] for e in s.client.of(h2.events.ResponseReceived)}
        assert statuses[ids["/waiting"]] == "403"
        app.conn.send_data(seen["/kept"], b"y", end_stream=True)
        await s.step()
        assert ids["/kept"] in {each.stream_id for each in s.client.of(h2.events.StreamEnded)}
        assert not s.connection._exchanges
        assert s.counters.grpc_calls == {("/grpc", "7", "denied"): 1}


@pytest.mark.parametrize("how", ["reset by the client", "reset by the app", "denied"])
async def test_what_an_ended_stream_had_sent_is_given_back_to_the_connection(how: str) -> None:
    """Otherwise its window shrinks with each upload that is given up, until nothing comes any more."""
    allowed = True
    async with setting(lambda _: Decision(allowed, None, "test")) as s:
        s.request("/kept", end=False)
        await s.step()
        (app,) = s.apps
        for _ in range(STREAMS_MAX + 2):  # the connection's window is as much as that of so many
            stream_id = s.request("/up", end=False)
            for _ in range(STREAM_WINDOW_BYTES // 16384):
                s.client.conn.send_data(stream_id, b"x" * 16384)
            s.client.push()  # the app grants no more than 64 KiB: the rest is held here
            if how == "reset by the client":
                s.client.conn.reset_stream(stream_id)
            elif how == "reset by the app":
                app.push()
                app.conn.reset_stream(app.of(h2.events.RequestReceived)[-1].stream_id)
                app.push()
            else:
                allowed = False
                s.connection.recheck()
                allowed = True
            s.client.push()
        assert s.client.conn.outbound_flow_control_window > STREAM_WINDOW_BYTES
