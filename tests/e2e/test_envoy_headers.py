"""Headers by which Envoy lets a request steer it: a caller steers nothing, and an app sees none of Envoy's own."""

from __future__ import annotations

import http.client
import json
import time
from collections import Counter

import pytest

from cli.demo_stage import wait_until
from tests.e2e.support_e2e import Mesh
from tests.e2e.support_envoy import ENVOY, LICTOR, TIMEOUT_S, Web, allow, http_call, stand, upstream
from tests.e2e.test_envoy_withdrawal import Stranger
from tests.support.apps import serving_http

STEERING = {
    "x-envoy-retry-on": "5xx,retriable-4xx",
    "x-envoy-retry-grpc-on": "unavailable",
    "x-envoy-max-retries": "4",
    "x-envoy-upstream-rq-timeout-ms": "1",
    "x-envoy-upstream-alt-stat-name": "other",
    "x-envoy-internal": "true",
    "x-forwarded-for": "10.0.0.1",
}


@pytest.mark.parametrize("kind", [ENVOY, LICTOR])
def test_a_caller_steers_no_envoy_by_headers(stage: Mesh, kind: str) -> None:
    seen: Counter[str] = Counter()

    class App(Web):
        def do_GET(self) -> None:
            seen[self.path] += 1
            if self.path != "/fail":
                super().do_GET()
                return
            self.send_response(503)
            self.send_header("content-length", "0")
            self.end_headers()

    allow(stage, "shop", "site")
    with serving_http(App) as port:
        stand(stage, ENVOY, "site", port, "-protocol", "http")
        stand(stage, kind, "shop", 0, "-upstreams", "site")
        address = upstream(stage, "shop-1", "site")
        assert wait_until(lambda: http_call(address, "GET", "/")[0] == 200, TIMEOUT_S)
        host, _, number = address.partition(":")
        connection = http.client.HTTPConnection(host, int(number), timeout=TIMEOUT_S)
        connection.request("GET", "/fail", headers=STEERING)
        answer = connection.getresponse()
        answer.read()
        assert answer.status == 503
        assert seen["/fail"] == 1, "it was tried again because the caller said so"
        connection.request("GET", "/headers", headers=STEERING)
        answer = connection.getresponse()
        told = {name.lower() for name in json.loads(answer.read())}
        shown = {name.lower() for name, _ in answer.getheaders()}
        connection.close()
        print(kind, sorted(told), sorted(shown))
        assert not [name for name in told | shown if name.startswith("x-envoy-")]


def test_a_caller_that_never_finishes_a_requests_head_is_ended(stage: Mesh) -> None:
    allow(stage, "shop", "site")
    with serving_http(Web) as port:
        stand(stage, ENVOY, "site", port, "-protocol", "http")
        public = stage.api().get("/v1/agent/service/site-1-sidecar-proxy").json()["Port"]
        with Stranger(stage, "shop").connect(public, None) as stream:
            stream.sendall(b"GET / HTTP/1.1\r\nhost: a\r\nx-slow: ")
            since = time.monotonic()
            assert b"408" in stream.recv(999).partition(b"\r\n")[0]
            assert time.monotonic() - since < TIMEOUT_S
