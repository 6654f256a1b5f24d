"""`lictor connect -sidecar-for`: a sidecar as an operator's own client has registered it, Consul's way."""

from __future__ import annotations

import sys
from pathlib import Path

from cli.demo_stage import answers_plainly, app, free_ports, wait_until
from tests.e2e.support_e2e import Mesh, running
from tests.support.promises import PATIENCE_S


def test_a_sidecar_runs_as_it_is_registered_and_stays_so(lictor: Mesh, tmp_path: Path) -> None:
    app_port, public, own, bind = free_ports(24000, 4)
    here, there = lictor.api(0), lictor.api(1)
    there.put(
        "/v1/agent/service/register",
        {
            "Name": "answerer", "ID": "answerer-1", "Port": app_port,
            "Connect": {"SidecarService": {"Port": public, "Tags": ["blue"], "Meta": {"team": "a"}}},
        },
    )  # fmt: skip
    upstream = {
        "DestinationName": "answerer", "LocalBindPort": bind,
        "Config": {"load_balancer": "round_robin", "connect_timeout_ms": 1500},
    }  # fmt: skip
    here.put(
        "/v1/agent/service/register",
        {
            "Name": "asker",
            "ID": "asker-1",
            "Connect": {"SidecarService": {"Port": own, "Proxy": {"Upstreams": [upstream]}}},
        },
    )  # fmt: skip
    lictor.lictor("intentions", "create", "asker", "answerer")
    for instance in ("answerer-1", "asker-1"):
        lictor.home(instance)
    with running([sys.executable, "-I", app("echo_server")], env=lictor.environment({"PORT": str(app_port)})):
        assert wait_until(lambda: answers_plainly(app_port), PATIENCE_S)
        lictor.sidecar("answerer-1", 1, ["-sidecar-for", "answerer-1"], {})
        lictor.sidecar("asker-1", 0, ["-sidecar-for", "asker-1"], {})
        assert wait_until(lambda: "Hello" in lictor.call(f"localhost:{bind}").stdout, PATIENCE_S)
        held = there.get("/v1/agent/service/answerer-1-sidecar-proxy").json()
        assert (held["Port"], held["Tags"], held["Meta"]) == (public, ["blue"], {"team": "a"})
        (kept,) = here.get("/v1/agent/service/asker-1-sidecar-proxy").json()["Proxy"]["Upstreams"]
        assert kept["Config"] == upstream["Config"]

        lictor.end_background("answerer-1")

        def statuses() -> list[str]:
            checks = there.get("/v1/agent/checks").json().values()
            return [check["Status"] for check in checks if check["ServiceID"] == "answerer-1-sidecar-proxy"]

        # Its owner's registration stays, and says that nobody is there.
        assert wait_until(lambda: "critical" in statuses(), PATIENCE_S), statuses()
        lictor.sidecar("answerer-1", 1, ["-sidecar-for", "answerer-1"], {})
        assert wait_until(lambda: "Hello" in lictor.call(f"localhost:{bind}").stdout, PATIENCE_S)
    for name, host in (("asker", 0), ("answerer", 1)):
        lictor.end_background(f"{name}-1")
        lictor.lictor("services", "deregister", "-id", f"{name}-1", host=host)
    lictor.lictor("intentions", "delete", "asker", "answerer")


def test_what_is_not_registered_or_cannot_be_had_is_said(lictor: Mesh) -> None:
    def told(*arguments: str) -> str:
        done = lictor.lictor("connect", *arguments, host=0, may_fail=True)
        assert done.returncode in (1, 2), done
        return done.stderr

    assert "no sidecar of nobody is registered" in told("-sidecar-for", "nobody")
    assert "-upstreams says it anew" in told("-sidecar-for", "nobody", "-upstreams", "a")
    for field, value, text in (
        ("LocalBindAddress", "0.0.0.0", "Upstreams[0]: LocalBindAddress is 0.0.0.0"),
        ("DestinationType", "prepared_query", "Upstreams[0]: DestinationType is prepared_query"),
    ):
        upstream = {"DestinationName": "x", "LocalBindPort": 21999, field: value}
        row = {"Name": "odd", "ID": "odd-1", "Connect": {"SidecarService": {"Proxy": {"Upstreams": [upstream]}}}}
        lictor.api(0).put("/v1/agent/service/register", row)
        assert text in told("-sidecar-for", "odd-1")
    lictor.lictor("services", "deregister", "-id", "odd-1", host=0)
