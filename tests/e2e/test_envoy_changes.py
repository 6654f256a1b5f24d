"""An Envoy's configuration changes under load: what is used goes only when nothing uses it any more."""

from __future__ import annotations

import base64
import socket
import threading
import time

import pytest

from cli.demo_stage import wait_until
from tests.e2e.support_e2e import Mesh
from tests.e2e.support_envoy import ENVOY, TIMEOUT_S, Web, allow, call, echo, envoy_admin, http_call, stand, upstream
from tests.support.apps import serving_http

FLIPS = 12


def redirect(mesh: Mesh, service: str, to: str) -> None:
    mesh.api().put("/v1/config", {"Kind": "service-resolver", "Name": service, "Redirect": {"Service": to}})


@pytest.mark.parametrize("protocol", ["tcp", "http"])
def test_no_call_is_lost_while_an_upstream_leads_to_another_service(stage: Mesh, protocol: str) -> None:
    for name in ("blue", "green"):
        allow(stage, "shop", name)
    answers: dict[object, int] = {}
    stop = threading.Event()
    flags = ("-protocol", protocol)
    for name in ("blue", "green", "store"):
        stage.api().put("/v1/config", {"Kind": "service-defaults", "Name": name, "Protocol": protocol})
    with echo("one") as one, echo("two") as two, serving_http(Web) as web:
        ports = (one, two) if protocol == "tcp" else (web, web)
        for name, port in zip(("blue", "green"), ports, strict=True):
            stand(stage, ENVOY, name, port, *flags)
        redirect(stage, "store", "blue")
        stand(stage, ENVOY, "shop", 0, "-upstreams", "store")
        address = upstream(stage, "shop-1", "store")
        good = (
            (lambda: call(address) != b"") if protocol == "tcp" else lambda: http_call(address, "GET", "/")[0] == 200
        )
        assert wait_until(good, TIMEOUT_S)

        def load() -> None:
            while not stop.is_set():
                answer = call(address) if protocol == "tcp" else http_call(address, "GET", "/")[0]
                answers[answer] = answers.get(answer, 0) + 1

        threads = [threading.Thread(target=load, daemon=True) for _ in range(2)]
        for thread in threads:
            thread.start()
        try:
            for flip in range(FLIPS):
                before = sum(answers.values())
                redirect(stage, "store", ("green", "blue")[flip % 2])
                assert wait_until(lambda n=before: sum(answers.values()) > n + 20, TIMEOUT_S)
                time.sleep(0.2)
        finally:
            stop.set()
            for thread in threads:
                thread.join(TIMEOUT_S)
            for kind, names in (("service-resolver", ["store"]), ("service-defaults", ["blue", "green", "store"])):
                for name in names:
                    stage.api().write("DELETE", f"/v1/config/{kind}/{name}")
    print(answers)
    expected = {b"one hello\n", b"two hello\n"} if protocol == "tcp" else {200}
    assert set(answers) == expected, answers


def test_the_catalog_tells_what_an_envoy_does_not_take(stage: Mesh) -> None:
    def check() -> tuple[str, str]:
        rows = stage.api(1).get("/v1/health/checks/shop-sidecar-proxy").json()
        row = next((one for one in rows if one["CheckID"] == "service:shop-1-sidecar-proxy"), None)
        return ("", "") if row is None else (row["Status"], row["Output"])

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        stage.api().put("/v1/agent/service/register", {"Name": "shop", "ID": "shop-1"})
        way = {"DestinationName": "store", "LocalBindAddress": "127.0.0.1", "LocalBindPort": port}
        proxy = {"DestinationServiceName": "shop", "DestinationServiceID": "shop-1", "Upstreams": [way]}
        row = {"ID": "shop-1-sidecar-proxy", "Name": "shop-sidecar-proxy", "Kind": "connect-proxy", "Port": 20990}
        stage.api().put("/v1/agent/service/register", {**row, "Proxy": proxy})
        stand(stage, ENVOY, "shop", 0)
        assert wait_until(lambda: check()[0] == "warning", TIMEOUT_S), check()
        assert "Listener upstream:store" in check()[1], check()
        assert str(port) in check()[1], "with Envoy's words"
        dump = envoy_admin(stage, "shop-1", "config_dump?include_eds")
        assert "BEGIN CERTIFICATE" in dump or "inline_bytes" in dump, "it has its secrets"
        assert "PRIVATE KEY" not in dump
        assert base64.b64encode(b"-----BEGIN PRIVATE").decode()[:20] not in dump
    assert wait_until(lambda: check()[0] == "passing", TIMEOUT_S), check()
