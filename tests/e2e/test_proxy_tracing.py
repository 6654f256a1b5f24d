"""Traces through sidecars: each is a span between the caller's and the app's, on every version of HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import h2.events
import msgspec
import pytest

from proxy import span_export
from proxy.tracing import read_traceparent
from raftstate.model.intention import HTTPMatch, Intention, Permission
from tests.e2e.test_http2_grpc import Raw
from tests.e2e.test_http2_outbound import UNARY, GrpcStage
from tests.e2e.test_http_outbound import ask, get
from tests.e2e.test_proxy_freed import at_rest, nothing_left_to_the_collector
from tests.support.http_filter import App, Seen, simple
from tests.support.loops import with_mesh
from tests.support.otlp import Collector, Span
from tests.support.sidecars import Member, Mesh, hang_up, until
from tests.support.tls_peers import context
from tests.support.traffic import Stage

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
CALLERS = f"00-{TRACE}-{PARENT}-01"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(span_export, "EXPORT_S", 0.01)


def traced(*lines: str, path: str = "/a?token=5ecret", parent: str = CALLERS) -> bytes:
    head = (f"GET {path} HTTP/1.1", "Host: backend:8080", f"traceparent: {parent}", *lines)
    return "\r\n".join((*head, "", "")).encode()


@contextlib.asynccontextmanager
async def collecting() -> AsyncIterator[Collector]:
    collector = Collector()
    await collector.start()
    try:
        yield collector
    finally:
        await collector.stop()


async def speaking(member: Member, protocol: str) -> None:
    me = member.sidecar.config.self
    assert me is not None
    await member.push(self=msgspec.structs.replace(me, protocol=protocol))


async def pair(
    mesh: Mesh, app: App, caller: dict[str, Any], callee: dict[str, Any], *, workers: int = 0
) -> tuple[Member, Member]:
    """``web``, which calls ``backend`` by HTTP, with these options."""
    made = await mesh.app(app.handle)
    server = await mesh.member("backend", "backend-1", port=made.port, options=callee)
    client = await mesh.member("web", "web-1", upstreams=("backend",), options=caller, workers=workers)
    await server.allow("web")
    await speaking(server, "http")
    await client.route("backend", server.endpoint, protocol="http")
    return client, server


def parent_of(seen: Seen) -> str:
    """The span that the app was given as its parent."""
    (value,) = seen.header("traceparent")
    found = read_traceparent(value.encode())
    assert found is not None
    assert found.trace_id == TRACE
    return found.parent_id


def check_chain(ours: Span, theirs: Span, *, parent: str = PARENT) -> None:
    """A caller's sidecar, then the callee's."""
    assert (ours.kind, theirs.kind) == (3, 2)
    assert ours.trace_id == theirs.trace_id
    assert ours.parent_span_id == parent
    assert theirs.parent_span_id == ours.span_id
    assert int(ours.start_time_unix_nano) <= int(theirs.end_time_unix_nano)


# HTTP/1.1


@with_mesh
async def test_a_request_is_a_chain_from_app_to_app(mesh: Mesh) -> None:
    async with collecting() as collector:
        app, options = App(answer=simple(b"hello")), {"otlp_endpoint": collector.endpoint}
        client, server = await pair(mesh, app, options, options)
        (status, _), = await ask(client, traced("tracestate: a=1,b=2", "TraceState: c=3"))  # fmt: skip
        assert status == 200
        await until(lambda: len(collector.spans) == 2)
        (ours,), (theirs,) = collector.of("web"), collector.of("backend")
        check_chain(ours, theirs)
        assert parent_of(app.seen[0]) == theirs.span_id
        assert app.seen[0].header("tracestate") == ["a=1,b=2", "c=3"], "passed on untouched"
        assert ours.trace_state == theirs.trace_state == "a=1,b=2,c=3"
        public = server.ports.public_port
        assert ours.values == {
            "http.request.method": "GET", "url.path": "/a", "url.scheme": "http", "url.full": "http://backend:8080/a",
            "http.response.status_code": 200, "server.address": "backend", "server.port": 8080,
            "network.peer.address": "127.0.0.1", "network.peer.port": public,
            "network.protocol.name": "http", "network.protocol.version": "1.1", "lictor.source": "web",
            "lictor.destination": "backend", "lictor.instance": "backend-1", "lictor.origin": "app",
        }  # fmt: skip
        assert theirs.values["network.peer.address"] == theirs.values["client.address"] == "127.0.0.1"
        assert int(theirs.values["network.peer.port"]) not in (0, public)
        assert (ours.status.code, theirs.status.code) == (0, 0)
        expected = {"service.instance.id": "backend-1", "lictor.node": "node", "lictor.datacenter": "dc1"}
        assert expected.items() <= collector.resource("backend").items()
        # The collector has them before the sidecar has its answer.
        await until(lambda: "lictor_spans_exported_total 1" in server.sidecar.metrics.render())
        rendered = server.sidecar.metrics.render()
        assert 'lictor_spans_dropped_total{reason="full"} 0' in rendered


@with_mesh
async def test_equal_requests_are_spans_of_their_own(mesh: Mesh) -> None:
    """Heads that were seen before are not parsed again: nothing of one request's span may stay with them."""
    async with collecting() as collector:
        app, options = App(answer=simple(b"hello")), {"otlp_endpoint": collector.endpoint}
        client, _ = await pair(mesh, app, options, options)
        answers = await ask(client, *[traced("tracestate: a=1")] * 20)
        assert [status for status, _ in answers] == [200] * 20
        await until(lambda: len(collector.spans) == 40)
        ours, theirs = collector.of("web"), collector.of("backend")
        assert len({span.span_id for span in collector.spans}) == 40
        assert {span.parent_span_id for span in ours} == {PARENT}
        assert [span.parent_span_id for span in theirs] == [span.span_id for span in ours]
        assert [parent_of(seen) for seen in app.seen] == [span.span_id for span in theirs]
        assert {tuple(seen.header("tracestate")) for seen in app.seen} == {("a=1",)}


@with_mesh
async def test_one_that_exports_nothing_passes_all_of_it_on(mesh: Mesh) -> None:
    app = App(answer=simple(b"hello"))
    client, _ = await pair(mesh, app, {}, {})
    sent = [
        ("traceparent: junk", "tracestate: a=1"), ("TraceParent: " + CALLERS, "traceparent: " + CALLERS),
        ("tracestate: a=1",), ("traceparent: cc-later-version",),
    ]  # fmt: skip
    heads = ["\r\n".join(("GET / HTTP/1.1", "Host: b", *lines, "", "")).encode() for lines in sent]
    await ask(client, *heads)
    for seen, lines in zip(app.seen, sent, strict=True):
        got = [f"{name}: {value}" for name, value in seen.headers if name.lower().startswith("trace")]
        assert got == list(lines)


@with_mesh
async def test_each_sidecar_alone_takes_part(mesh: Mesh) -> None:
    async with collecting() as collector:
        app = App(answer=simple(b"hello"))
        client, _ = await pair(mesh, app, {}, {"otlp_endpoint": collector.endpoint})
        await ask(client, traced())
        await until(lambda: len(collector.spans) == 1)
        (theirs,) = collector.spans
        assert (theirs.kind, theirs.parent_span_id, theirs.span_id) == (2, PARENT, parent_of(app.seen[0]))


@with_mesh
async def test_invalid_context_ends_at_a_sidecar_that_takes_part(mesh: Mesh) -> None:
    async with collecting() as collector:
        app = App(answer=simple(b"hello"))
        client, _ = await pair(mesh, app, {"otlp_endpoint": collector.endpoint}, {})
        await ask(
            client, traced("tracestate: a=1", parent="junk"), traced("tracestate: a=1", "traceparent: " + CALLERS),
            b"GET / HTTP/1.1\r\nHost: b\r\ntracestate: a=1\r\n\r\n",
            traced("tracestate: a=1", parent=f"00-{TRACE}-{PARENT}-00"),
        )  # fmt: skip
        *invalid, unsampled = app.seen
        for seen in invalid:
            assert (seen.header("traceparent"), seen.header("tracestate")) == ([], [])
        assert unsampled.header("traceparent") == [f"00-{TRACE}-{PARENT}-00"]
        assert unsampled.header("tracestate") == ["a=1"]
        await ask(client, traced())
        await until(lambda: bool(collector.spans))
        assert len(collector.spans) == 1


@with_mesh
async def test_the_access_log_names_the_spans(mesh: Mesh, tmp_path: Path) -> None:
    async with collecting() as collector:
        app = App(answer=simple(b"hello"))
        logs = tmp_path / "web.log", tmp_path / "backend.log"
        options = [{"otlp_endpoint": collector.endpoint, "access_log": str(path)} for path in logs]
        client, _ = await pair(mesh, app, *options)
        await ask(client, traced(), get())
        await until(lambda: len(collector.spans) == 2)
        await until(lambda: all(path.exists() and len(path.read_bytes().splitlines()) == 2 for path in logs))
        for path, service in zip(logs, ("web", "backend"), strict=True):
            first, second = (json.loads(line) for line in path.read_bytes().splitlines())
            assert (first["trace_id"], first["span_id"]) == (TRACE, collector.of(service)[0].span_id)
            assert (second["trace_id"], second["span_id"]) == ("", "")


@with_mesh
async def test_a_request_that_is_tried_again_is_one_span_of_its_caller(mesh: Mesh) -> None:
    async with collecting() as collector:
        stage = Stage(traced_by(mesh, collector))
        for instance, answer in (("b1", simple(b"no", status="503 Busy")), ("b2", simple(b"yes"))):
            await speaking(await stage.server("backend", instance, answer=answer), "http")
        await stage.caller()
        await stage.follow(router_backend={"Routes": [
            {"Match": {"HTTP": {"PathPrefix": "/"}}, "Destination": {"NumRetries": 3, "RetryOnStatusCodes": [503]}},
        ]})  # fmt: skip
        busy, serving = stage.apps["b1"], stage.apps["b2"]
        for _ in range(40):
            assert await ask(stage.client, traced()) == [(200, b"yes")]
            if busy.seen:
                break
        await until(lambda: len(collector.of("backend")) == len(busy.seen) + len(serving.seen))
        await until(lambda: len(collector.of("web")) == len(serving.seen))
        (again,) = [span for span in collector.of("web") if "http.request.resend_count" in span.values]
        assert again.values["http.request.resend_count"] == 1
        assert again.values["lictor.instance"] == "b2", "the last attempt's"
        assert again.values["network.peer.port"] == stage.servers["b2"].ports.public_port
        assert again.status.code == 0
        tries = [span for span in collector.of("backend") if span.parent_span_id == again.span_id]
        tries.sort(key=lambda span: str(span.values["lictor.instance"]))
        assert [(span.values["lictor.instance"], span.status.code) for span in tries] == [("b1", 2), ("b2", 0)]
        assert [parent_of(seen) for seen in busy.seen] == [tries[0].span_id]


@with_mesh
async def test_what_a_sidecar_answers_itself_is_a_span_too(mesh: Mesh) -> None:
    async with collecting() as collector:
        app, options = App(answer=simple(b"hello")), {"otlp_endpoint": collector.endpoint}
        client, server = await pair(mesh, app, options, options)
        only_b = Permission("allow", HTTPMatch(path_exact="/b"))
        intention = Intention(source_name="web", destination_name="backend", action="", permissions=(only_b,))
        await server.push(intentions=(intention,))
        assert (await ask(client, traced()))[0][0] == 403
        await until(lambda: len(collector.spans) == 2)
        (ours,), (theirs,) = collector.of("web"), collector.of("backend")
        check_chain(ours, theirs)
        assert (theirs.status.code, theirs.values["lictor.origin"]) == (0, "denied")
        assert (ours.status.code, ours.values["error.type"]) == (2, "403")
        assert app.seen == []

        await client.route("backend", protocol="http")
        assert (await ask(client, traced()))[0][0] == 503
        await until(lambda: len(collector.of("web")) == 2)
        unsent = collector.of("web")[1]
        assert (unsent.status.code, unsent.values["error.type"]) == (2, "app-down")
        assert "network.peer.address" not in unsent.values


@with_mesh
async def test_a_websocket_is_a_span_until_it_is_one(mesh: Mesh) -> None:
    async def upgrade(app: App, seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
        writer.write(await reader.readexactly(4))

    async with collecting() as collector:
        app, options = App(answer=upgrade), {"otlp_endpoint": collector.endpoint}
        client, _ = await pair(mesh, app, options, options)
        reader, writer = await client.dial()
        writer.write(traced("Connection: Upgrade", "Upgrade: websocket") + b"ping")
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 101")
        assert await reader.readexactly(4) == b"ping"
        await until(lambda: len(collector.spans) == 2)
        (ours,), (theirs,) = collector.of("web"), collector.of("backend")
        check_chain(ours, theirs)
        assert parent_of(app.seen[0]) == theirs.span_id
        assert ours.values["http.response.status_code"] == 101
        await hang_up(writer)


@with_mesh
async def test_a_foreign_peers_request_is_a_span_with_its_address(mesh: Mesh) -> None:
    async with collecting() as collector:
        app = App(answer=simple(b"hello"))
        _, server = await pair(mesh, app, {}, {"otlp_endpoint": collector.endpoint})
        tls = context(mesh.ca.leaf("web", "web-9"), mesh.ca.root_pem)
        reader, writer = await asyncio.open_connection("127.0.0.1", server.ports.public_port, ssl=tls)
        writer.write(traced())
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200")
        await until(lambda: len(collector.spans) == 1)
        (theirs,) = collector.spans
        assert theirs.values["network.peer.port"] == writer.get_extra_info("sockname")[1]
        assert (theirs.parent_span_id, parent_of(app.seen[0])) == (PARENT, theirs.span_id)
        await hang_up(writer)


@with_mesh
async def test_traces_begin_where_a_ratio_says_so(mesh: Mesh) -> None:
    async with collecting() as collector:
        app, options = App(answer=simple(b"hello")), {"otlp_endpoint": collector.endpoint}
        client, _ = await pair(mesh, app, {**options, "otlp_sample": 1.0}, options)
        await ask(client, get("/one"), b"GET /two HTTP/1.1\r\nHost: b\r\ntracestate: a=1\r\ntraceparent: x\r\n\r\n")
        await ask(client, traced(parent=f"00-{TRACE}-{PARENT}-00"))
        assert app.seen[2].header("traceparent") == [f"00-{TRACE}-{PARENT}-00"], "another's decision stands"
        await until(lambda: len(collector.spans) == 4)
        for number, (ours, theirs) in enumerate(zip(collector.of("web"), collector.of("backend"), strict=True)):
            check_chain(ours, theirs, parent="")
            assert app.seen[number].header("traceparent") == [f"00-{ours.trace_id}-{theirs.span_id}-03"]
            assert app.seen[number].header("tracestate") == []
        assert len({span.trace_id for span in collector.spans}) == 2


@with_mesh
async def test_those_who_get_a_request_hear_that_it_is_not_recorded(mesh: Mesh) -> None:
    async with collecting() as collector:
        app, options = App(answer=simple(b"hello")), {"otlp_endpoint": collector.endpoint}
        client, _ = await pair(mesh, app, {**options, "otlp_sample": 1e-15}, {**options, "otlp_sample": 1.0})
        await ask(client, get(), get())
        for seen in app.seen:
            (value,) = seen.header("traceparent")
            assert value.endswith("-02")
        await ask(client, traced())
        await until(lambda: len(collector.spans) == 2)
        assert {span.trace_id for span in collector.spans} == {TRACE}


async def test_several_workers_take_part_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    async with collecting() as collector, Mesh() as mesh:
        app = App(answer=simple(b"hello"))
        shown = (("X-Scope-OrgID", "team"),)
        options = {"otlp_endpoint": collector.endpoint, "otlp_sample": 1.0, "otlp_headers": shown}
        client, _ = await pair(mesh, app, options, {}, workers=2)
        assert [status for status, _ in await ask(client, traced(), get())] == [200, 200]
        await until(lambda: len(collector.spans) == 2)
        first, second = collector.spans
        assert (first.parent_span_id, first.span_id) == (PARENT, parent_of(app.seen[0]))
        assert second.parent_span_id == ""
        assert {headers["X-Scope-OrgID"] for headers in collector.headers} == {"team"}


@with_mesh
async def test_a_route_has_the_last_word_on_what_is_sent(mesh: Mesh) -> None:
    async with collecting() as collector:
        stage = Stage(traced_by(mesh, collector))
        await stage.server("backend", "b1")
        await stage.caller()
        await stage.follow(router_backend={"Routes": [
            {"Match": {"HTTP": {"PathPrefix": "/out"}},
             "Destination": {"RequestHeaders": {"Remove": ["traceparent", "tracestate"]}}},
        ]})  # fmt: skip
        await ask(stage.client, traced("tracestate: a=1", path="/out"), traced("tracestate: a=1", path="/in"))
        out, within = stage.apps["b1"].seen
        assert (out.header("traceparent"), out.header("tracestate")) == ([], [])
        assert (len(within.header("traceparent")), within.header("tracestate")) == (1, ["a=1"])
        await until(lambda: len(collector.of("web")) == 2)


@with_mesh
async def test_what_traced_requests_leave_is_freed_at_once(mesh: Mesh) -> None:
    async with collecting() as collector:
        app, options = App(answer=simple(b"hello")), {"otlp_endpoint": collector.endpoint}
        client, _ = await pair(mesh, app, options, options)
        await ask(client, traced())
        await until(lambda: len(collector.spans) == 2)
        with nothing_left_to_the_collector():
            for _ in range(3):
                assert [status for status, _ in await ask(client, traced(), traced())] == [200, 200]
            await until(lambda: len(collector.spans) == 14 and at_rest(client))


# HTTP/2 and gRPC


def traced_by(mesh: Mesh, collector: Collector) -> Mesh:
    """Let every member of the mesh export to the collector."""
    make = mesh.member

    async def member(service: str, instance: str, **arguments: Any) -> Member:
        options = {**(arguments.pop("options", None) or {}), "otlp_endpoint": collector.endpoint}
        return await make(service, instance, options=options, **arguments)

    mesh.member = member  # type: ignore[method-assign]
    return mesh


@contextlib.asynccontextmanager
async def grpc_stage(*instances: str) -> AsyncIterator[tuple[GrpcStage, Collector]]:
    async with collecting() as collector, Mesh() as mesh, asyncio.timeout(60):
        made = GrpcStage(traced_by(mesh, collector))
        for instance in instances:
            await made.echo(instance)
        await made.caller()
        try:
            yield made, collector
        finally:
            for echo in made.echoes.values():
                await echo.server.stop(0)


METADATA = (("traceparent", CALLERS), ("tracestate", "a=1"))


async def test_a_grpc_call_is_a_chain_from_app_to_app() -> None:
    async with grpc_stage("b1") as (stage, collector), stage.channel() as channel:
        assert await channel.unary_unary(UNARY)(b"hello", metadata=METADATA) == b"b1hello"
        await until(lambda: len(collector.spans) == 2)
        (ours,), (theirs,) = collector.of("web"), collector.of("backend")
        check_chain(ours, theirs)
        seen = stage.echoes["b1"].metadata
        assert (seen["traceparent"], seen["tracestate"]) == (f"00-{TRACE}-{theirs.span_id}-01", "a=1")
        for span in (ours, theirs):
            assert span.name == "test.Echo/Unary"
            expected = {
                "rpc.system.name": "grpc", "rpc.method": "test.Echo/Unary", "rpc.response.status_code": "OK",
                "network.protocol.version": "2", "network.peer.address": "127.0.0.1", "server.address": "127.0.0.1",
            }  # fmt: skip
            assert expected.items() <= span.values.items()
            assert span.status.code == 0
        assert ours.values["network.peer.port"] == stage.servers["b1"].ports.public_port


@pytest.mark.parametrize("late", [False, True])
async def test_a_grpc_calls_status_is_the_spans(late: bool) -> None:
    async with grpc_stage("b1") as (stage, collector), stage.channel() as channel:
        echo = stage.echoes["b1"]
        echo.fail, echo.fail_late = grpc.StatusCode.NOT_FOUND, late
        with pytest.raises(grpc.aio.AioRpcError):
            await channel.unary_unary(UNARY)(b"", metadata=METADATA)
        await until(lambda: len(collector.spans) == 2)
        (ours,), (theirs,) = collector.of("web"), collector.of("backend")
        check_chain(ours, theirs)
        assert ours.values["rpc.response.status_code"] == theirs.values["rpc.response.status_code"] == "NOT_FOUND"
        assert (ours.status.code, theirs.status.code) == (2, 0), "the caller's error, not the server's"
        assert ours.values["error.type"] == "NOT_FOUND"


async def test_grpc_calls_that_are_denied_or_find_no_instance() -> None:
    async with grpc_stage("b1") as (stage, collector), stage.channel() as channel:
        await stage.servers["b1"].push(intentions=())
        with pytest.raises(grpc.aio.AioRpcError):
            await channel.unary_unary(UNARY)(b"", metadata=METADATA)
        await until(lambda: len(collector.of("web")) == 1)
        (ours,) = collector.of("web")
        assert (ours.values["error.type"], ours.values["lictor.origin"]) == ("PERMISSION_DENIED", "denied")


async def test_a_grpc_call_that_is_tried_again_is_one_span_of_its_caller() -> None:
    async with grpc_stage("b1", "b2") as (stage, collector), stage.channel() as channel:
        failing, serving = stage.echoes["b1"], stage.echoes["b2"]
        failing.fail = grpc.StatusCode.UNAVAILABLE
        await stage.follow(router_backend={"Routes": [
            {"Match": {"HTTP": {"PathPrefix": "/"}}, "Destination": {"NumRetries": 3, "RetryOn": ["unavailable"]}},
        ]})  # fmt: skip
        for _ in range(40):
            assert await channel.unary_unary(UNARY)(b"", metadata=METADATA) == b"b2"
            if failing.calls[UNARY]:
                break
        await until(lambda: len(collector.of("backend")) == failing.calls[UNARY] + serving.calls[UNARY])
        failed = next(span for span in collector.of("backend") if span.values["lictor.instance"] == "b1")
        tries = [span for span in collector.of("backend") if span.parent_span_id == failed.parent_span_id]
        assert sorted(span.values["lictor.instance"] for span in tries) == ["b1", "b2"]
        await until(lambda: any(span.span_id == failed.parent_span_id for span in collector.of("web")))
        assert len(collector.of("web")) == serving.calls[UNARY], "one for each call of the app"


async def test_plain_http2_takes_part_as_well() -> None:
    async with grpc_stage("b1") as (stage, collector):
        reader, writer = await stage.client.dial()
        raw = Raw(reader, writer)
        for extra in ((METADATA[0],), (("traceparent", "junk"), METADATA[1])):
            stream_id = raw.request(*extra, ("content-type", "application/grpc"), ("te", "trailers"), end=False)
            raw.conn.send_data(stream_id, b"\0\0\0\0\0", end_stream=True)
            writer.write(raw.conn.data_to_send())
            await raw.next(h2.events.StreamEnded, stream_id)
        await until(lambda: len(collector.spans) == 2)
        check_chain(*collector.of("web"), *collector.of("backend"))
        assert not {"traceparent", "tracestate"} & set(stage.echoes["b1"].metadata), "invalid context ends here"
        await hang_up(writer)
