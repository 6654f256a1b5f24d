"""The access log of sidecars that run as their users run them: moved away and opened anew, and spans at the end."""

from __future__ import annotations

import json
import signal
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from cli.demo_stage import wait_until
from tests.e2e.support_e2e import Mesh
from tests.e2e.support_envoy import TIMEOUT_S, allow, call, echo, http_call, stand, upstream
from tests.support.apps import serving
from tests.support.otlp import decode


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().splitlines()] if path.exists() else []


@pytest.mark.parametrize("more", [(), ("-workers", "2")], ids=["one process", "workers"])
def test_sighup_opens_the_log_anew_and_ends_nothing(stage: Mesh, more: tuple[str, ...]) -> None:
    log = stage.directory / "access.log"
    moved = stage.directory / "access.log.1"
    log.unlink(missing_ok=True)
    moved.unlink(missing_ok=True)
    allow(stage, "shop", "store")
    with echo() as port:
        stand(stage, "lictor", "store", port)
        stand(stage, "lictor", "shop", 0, "-upstreams", "store", "-access-log", str(log), "-drain", "1s", *more)
        address = upstream(stage, "shop-1", "store")
        assert wait_until(lambda: call(address) == b"one hello\n", TIMEOUT_S)
        assert wait_until(lambda: any(row["destination"] == "store" for row in lines(log)), TIMEOUT_S)
        sidecar = next(one for one in stage.backgrounds if one.name == "shop-1")
        log.rename(moved)
        before = len(lines(moved))
        sidecar.process.send_signal(signal.SIGHUP)
        assert wait_until(log.exists, TIMEOUT_S), "the log is opened anew"
        for _ in range(8):
            assert call(address) == b"one hello\n"
        assert wait_until(lambda: len(lines(log)) + len(lines(moved)) >= before + 8, TIMEOUT_S)
        # A worker of several may take its word a moment later; from then on nothing goes to the old file.
        assert wait_until(lambda: _settled(address, log, moved), TIMEOUT_S)
        assert sidecar.process.poll() is None, "SIGHUP ends no sidecar that has a log"
        assert {row["origin"] for row in lines(log)} == {"app"}


def _settled(address: str, log: Path, moved: Path) -> bool:
    """Whether eight more calls are all told in the new file."""
    old, new = len(lines(moved)), len(lines(log))
    for _ in range(8):
        call(address)
    return wait_until(lambda: len(lines(log)) >= new + 8, 2.0) and len(lines(moved)) == old


class _Collector(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        self.server.bodies.append(self.rfile.read(int(self.headers["Content-Length"])))  # type: ignore[attr-defined]
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *ignored: Any) -> None:
        pass


class _Site(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"{}")

    def log_message(self, *ignored: Any) -> None:
        pass


@contextmanager
def collecting() -> Iterator[tuple[int, list[bytes]]]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Collector)
    server.bodies = []  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server.server_address[1], server.bodies  # type: ignore[attr-defined]
    finally:
        server.shutdown()
        server.server_close()
        thread.join(5)


TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"


def traced(address: str) -> int:
    """Send one traced request; return the status."""
    request = urllib.request.Request(
        f"http://{address}/x", headers={"traceparent": f"00-{TRACE}-00f067aa0ba902b7-01", "Connection": "close"}
    )
    with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
        return int(answer.status)


@pytest.mark.parametrize("more", [(), ("-workers", "2")], ids=["one process", "workers"])
def test_spans_of_the_last_second_reach_the_collector_when_a_sidecar_is_told_to_end(
    stage: Mesh,
    more: tuple[str, ...],
) -> None:
    allow(stage, "shop", "site")
    with serving(ThreadingHTTPServer(("127.0.0.1", 0), _Site)) as port, collecting() as (collector, bodies):
        stage.api().put("/v1/config", {"Kind": "service-defaults", "Name": "site", "Protocol": "http"})
        stand(stage, "lictor", "site", port, "-otlp-endpoint", f"http://127.0.0.1:{collector}", "-drain", "1s", *more)
        stand(stage, "lictor", "shop", 0, "-upstreams", "site")
        address = upstream(stage, "shop-1", "site")
        assert wait_until(lambda: http_call(address, "GET", "/")[0] == 200, TIMEOUT_S)
        assert traced(address) == 200
        sidecar = next(one for one in stage.backgrounds if one.name == "site-1")
        sidecar.process.send_signal(signal.SIGTERM)
        assert sidecar.process.wait(TIMEOUT_S) == 0
        spans = [one for body in bodies for one in decode(body)]
        assert [span.trace_id for _, span in spans] == [TRACE]
        assert [resource["service.instance.id"] for resource, _ in spans] == ["site-1"]
        stage.api().write("DELETE", "/v1/config/service-defaults/site")


def test_a_trace_goes_through_two_sidecars(stage: Mesh) -> None:
    allow(stage, "shop", "site")
    with serving(ThreadingHTTPServer(("127.0.0.1", 0), _Site)) as port, collecting() as (collector, bodies):
        endpoint = ("-otlp-endpoint", f"http://127.0.0.1:{collector}", "-drain", "1s")
        stage.api().put("/v1/config", {"Kind": "service-defaults", "Name": "site", "Protocol": "http"})
        stand(stage, "lictor", "site", port, *endpoint)
        stand(stage, "lictor", "shop", 0, "-upstreams", "site", *endpoint, "-otlp-sample", "1", "-workers", "2")
        address = upstream(stage, "shop-1", "site")
        assert wait_until(lambda: http_call(address, "GET", "/")[0] == 200, TIMEOUT_S)
        assert traced(address) == 200
        for name in ("shop-1", "site-1"):
            sidecar = next(one for one in stage.backgrounds if one.name == name)
            sidecar.process.send_signal(signal.SIGTERM)
            assert sidecar.process.wait(TIMEOUT_S) == 0
        spans = [one for body in bodies for one in decode(body)]
        ours = {span.span_id: span for resource, span in spans if resource["service.name"] == "shop"}
        chains = [(ours[span.parent_span_id], span) for resource, span in spans if resource["service.name"] == "site"]
        assert [first.parent_span_id for first, _ in chains if first.trace_id == TRACE] == ["00f067aa0ba902b7"]
        began = [(first, second) for first, second in chains if first.trace_id != TRACE]
        assert began, "the request that came without a trace has begun one"
        for first, second in began:
            assert (first.parent_span_id, first.trace_id, first.kind, second.kind) == ("", second.trace_id, 3, 2)
        stage.api().write("DELETE", "/v1/config/service-defaults/site")
