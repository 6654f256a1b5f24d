"""The access log, spans of traced requests, and that neither holds up a call."""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path
from typing import Any

import msgspec
import pytest

from proxy import access, span_export
from proxy.access import AccessLog, Entry
from proxy.errors import ProxyError
from proxy.sidecar import Sidecar, SidecarOptions
from proxy.tasks import Tasks
from tests.e2e.test_http_outbound import ask
from tests.support.http_filter import App, simple
from tests.support.loops import with_mesh
from tests.support.otlp import Collector
from tests.support.sidecars import Mesh, until

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
ENTRY = Entry("inbound", "http/1.1", "web", "web-1", "db", "db-1", "GET", "/x", 200, "app", 12, 0.5)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


@with_mesh
async def test_each_call_is_a_line_on_both_sides_and_a_traced_request_a_span(
    mesh: Mesh, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(span_export, "EXPORT_S", 0.01)
    collector = Collector()
    endpoint = await collector.start()
    app = App(answer=simple(b"hello"))
    made = await mesh.app(app.handle)
    logs = {"backend": tmp_path / "in.log", "web": tmp_path / "out.log"}
    options = {name: {"access_log": str(path), "otlp_endpoint": endpoint} for name, path in logs.items()}
    server = await mesh.member("backend", "backend-1", port=made.port, options=options["backend"])
    client = await mesh.member("web", "web-1", upstreams=("backend",), options=options["web"])
    await server.allow("web")
    await client.route("backend", server.endpoint)
    await ask(client, b"GET /raw HTTP/1.1\r\nHost: b\r\n\r\n")  # to both it is TCP

    me = server.sidecar.config.self
    assert me is not None
    await server.push(self=msgspec.structs.replace(me, protocol="http"))
    await client.route("backend", server.endpoint, protocol="http")
    traced = f"GET /a?secret=1 HTTP/1.1\r\nHost: b\r\ntraceparent: 00-{TRACE}-{PARENT}-01\r\n\r\n".encode()
    untraced = f"GET /b HTTP/1.1\r\nHost: b\r\ntraceparent: 00-{TRACE}-{PARENT}-00\r\n\r\n".encode()
    assert [status for status, _ in await ask(client, traced, untraced)] == [200, 200]
    assert app.seen[2].header("traceparent") == [f"00-{TRACE}-{PARENT}-00"], "not sampled, passed on untouched"

    for name, direction in (("backend", "inbound"), ("web", "outbound")):
        await until(lambda name=name: len(lines(logs[name])) == 3)  # type: ignore[misc]
        raw, first, second = lines(logs[name])
        assert (raw["protocol"], raw["origin"], raw["path"]) == ("tcp", "app", "")
        assert raw["bytes"] > 5
        for line in (raw, first, second):
            assert (line["direction"], line["source"], line["destination"]) == (direction, "web", "backend")
            assert (line["source_instance"], line["instance"]) == ("web-1", "backend-1")
            assert 0 <= line["duration_ms"] < 60_000  # uvloop's clock ticks in milliseconds
        assert (first["method"], first["path"], first["code"], first["trace_id"]) == ("GET", "/a", 200, TRACE)
        assert (second["path"], second["origin"]) == ("/b", "app")
        assert (raw["trace_id"], raw["span_id"]) == ("", "")
        assert (second["trace_id"], second["span_id"]) == (TRACE, ""), "not sampled: there is no span"
        assert first["bytes"] > 5

    await until(lambda: len(collector.spans) == 2)
    (ours,), (theirs,) = collector.of("web"), collector.of("backend")
    assert (ours.trace_id, ours.parent_span_id, theirs.parent_span_id) == (TRACE, PARENT, ours.span_id)
    assert app.seen[1].header("traceparent") == [f"00-{TRACE}-{theirs.span_id}-01"], (
        "the app's spans are its children"
    )
    assert lines(logs["web"])[1]["span_id"] == ours.span_id
    assert lines(logs["backend"])[1]["span_id"] == theirs.span_id

    await server.push(intentions=())
    await ask_refused(client)
    await until(lambda: lines(logs["backend"])[-1]["origin"] == "denied")
    await collector.stop()


async def ask_refused(client: Any) -> None:
    assert (await ask(client, b"GET /c HTTP/1.1\r\nHost: b\r\n\r\n"))[0][0] in (403, 503)


@with_mesh
async def test_the_log_is_opened_anew_after_it_was_moved_away(mesh: Mesh, tmp_path: Path) -> None:
    path, moved = tmp_path / "access.log", tmp_path / "access.log.1"
    tasks = Tasks("test")
    log = AccessLog(str(path), tasks)
    log.take(ENTRY)
    await until(lambda: len(lines(path)) == 1)
    path.rename(moved)
    log.take(ENTRY)
    log.reopen()
    log.take(ENTRY)
    log.close()
    log.close()
    assert (len(lines(moved)), len(lines(path)), log.dropped) == (2, 1, 0)
    assert os.stat(path).st_mode & 0o007 == 0
    await tasks.close()


async def test_what_does_not_fit_is_dropped_and_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(access, "LINES_MAX_BYTES", 1000)
    tasks = Tasks("test")
    log = AccessLog(str(tmp_path / "log"), tasks)
    for _ in range(100):
        log.take(ENTRY)
    log.close()
    assert len(lines(tmp_path / "log")) + log.dropped == 100
    assert log.dropped > 80


@with_mesh
async def test_spans_that_wait_when_a_sidecar_ends_are_sent(
    mesh: Mesh, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(span_export, "EXPORT_S", 3600.0)
    collector = Collector()
    endpoint = await collector.start()
    app = App(answer=simple(b"hello"))
    made = await mesh.app(app.handle)
    server = await mesh.member("backend", "backend-1", port=made.port, options={"otlp_endpoint": endpoint})
    client = await mesh.member("web", "web-1", upstreams=("backend",))
    await server.allow("web")
    me = server.sidecar.config.self
    assert me is not None
    await server.push(self=msgspec.structs.replace(me, protocol="http"))
    await client.route("backend", server.endpoint, protocol="http")
    request = f"GET /a HTTP/1.1\r\nHost: b\r\ntraceparent: 00-{TRACE}-{PARENT}-01\r\n\r\n".encode()
    assert [status for status, _ in await ask(client, request)] == [200]
    assert collector.spans == []
    await server.sidecar.drain(1.0)
    sent = [span.trace_id for span in collector.spans]
    await collector.stop()
    assert sent == [TRACE]


def test_a_log_that_cannot_be_written_is_one_error() -> None:
    async def make() -> None:
        Sidecar(SidecarOptions(access_log="/nowhere/access.log"))

    with pytest.raises(ProxyError, match=r"/nowhere/access\.log"):
        asyncio.run(make())


HOSTILE = [
    b'/"},{"code":200,"path":"', b"/%0a%0d{}", b"/\\u0000\\", b"/\xff\xfe\x85", b"/\xe2\x80\xa8<script>",
    b"/a?token=5ecret",
]  # fmt: skip
"""Targets by which a caller might write lines of its own, or what is not for logs."""


@with_mesh
async def test_what_a_caller_sends_forges_no_line_and_no_span(
    mesh: Mesh, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(span_export, "EXPORT_S", 0.01)
    collector = Collector()
    app, path = App(answer=simple(b"hello")), tmp_path / "log"
    made = await mesh.app(app.handle)
    options = {"access_log": str(path), "otlp_endpoint": await collector.start()}
    server = await mesh.member("backend", "backend-1", port=made.port)
    client = await mesh.member("web", "web-1", upstreams=("backend",), options=options)
    await server.allow("web")
    await client.route("backend", server.endpoint, protocol="http")
    bad = [
        b"", b"00", b"00-" + b"0" * 32 + b"-00f067aa0ba902b7-01", f"ff-{TRACE}-{PARENT}-01".encode(),
        f"00-{TRACE.upper()}-{PARENT}-01".encode(), b'00-"},{"' + b"x" * 4000,
    ]  # fmt: skip
    statuses = []
    for target, parent in zip(HOSTILE, bad, strict=True):
        head = b"GET %b HTTP/1.1\r\nHost: b\r\ntraceparent: %b\r\ntracestate: a=1,b=2\r\n\r\n" % (target, parent)
        statuses.append((await ask(client, head))[0][0])
    served = statuses.count(200)
    assert served >= 4
    await until(lambda: len(lines(path)) == len(HOSTILE))
    for line, status in zip(lines(path), statuses, strict=True):
        assert line["code"] == status
        assert (line["source"], line["trace_id"]) == ("web", "")
        assert "5ecret" not in line["path"]
    for seen in app.seen:
        assert (seen.header("traceparent"), seen.header("tracestate")) == ([], []), "invalid context ends here"
    traced = f"GET /a HTTP/1.1\r\nHost: b\r\ntraceparent: 00-{TRACE}-{PARENT}-01\r\n\r\n".encode()
    assert (await ask(client, traced))[0][0] == 200
    await until(lambda: bool(collector.spans))
    assert [span.trace_id for span in collector.spans] == [TRACE], "what is no trace context makes no span"
    await collector.stop()
