"""npm's consul package, HAProxy and Prometheus, unmodified, on a real cluster that loses its leader under them."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import threading
import urllib.error
import urllib.request
from collections import Counter
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

import pytest

from cli.demo_stage import free_ports, wait_until
from tests.e2e.support_e2e import Mesh, need, running
from tests.e2e.support_foreign import Lines, is_root, leader_killed, npm_home
from tests.e2e.test_dns_haproxy import CONFIG, until_served_by
from tests.support.apps import QuietHandler, serving_http
from tests.support.promises import PATIENCE_S


def dns_port(cluster: Mesh, host: int = 0) -> int:
    """Return the port on which a host's agent answers DNS."""
    return int(cluster.api(host).get("/v1/agent/self").json()["DebugConfig"]["DNSPort"])


def app(name: str) -> AbstractContextManager[int]:
    """Serve the name, and metrics of it, on the port that is given."""

    class Handler(QuietHandler):
        def do_GET(self) -> None:
            if self.path == "/metrics":
                self.answer(200, f'app_up{{name="{name}"}} 1\n'.encode(), "text/plain; version=0.0.4")
            else:
                self.answer(200, name.encode())

    return serving_http(Handler)


def register(cluster: Mesh, host: int, service: str, instance: str, port: int, **more: Any) -> None:
    check = {"TTL": "300s", "Status": "passing"}
    body = {"Name": service, "ID": instance, "Port": port, "Check": check, **more}
    cluster.api(host).put("/v1/agent/service/register", body)


def test_npm_consul_reads_watches_and_locks_through_a_killed_leader(cluster: Mesh, tmp_path: Path) -> None:
    need("node", "npm")
    home = npm_home(tmp_path / "npm")
    api = cluster.api(1)
    with Lines(["node", "npm_consul.cjs", cluster.hosts[0]], cwd=home) as npm:
        npm.next("ready")

        def good() -> int:
            npm.tell("count")
            return int(json.loads(npm.next("counted"))["good"])

        ports: list[list[int]] = [json.loads(npm.next("watched"))["ports"]]
        indexes: list[int] = []

        def change(port: int) -> None:
            api.put("/v1/agent/service/register", {"Name": "npm-watched", "Port": port})
            seen = json.loads(npm.next("watched"))
            ports.append(seen["ports"])
            indexes.append(int(seen["index"]))

        change(1)
        with leader_killed(cluster):
            before = good()
            change(2)
            assert wait_until(lambda: good() > before + 20, PATIENCE_S)
        change(3)
        npm.tell("end")
        counted = json.loads(npm.next("ended"))
    assert ports == [[], [1], [2], [3]]
    assert indexes == sorted(set(indexes))
    assert (counted["wakes"], counted["bad"], counted["errors"]) == (4, [], [])


class Caller(threading.Thread):
    """Calls a URL without end and counts the answers."""

    def __init__(self, url: str) -> None:
        super().__init__(daemon=True)
        self.url, self.answers, self.bad = url, Counter[str](), list[str]()
        self.over = threading.Event()

    def run(self) -> None:
        while not self.over.wait(0.01):
            try:
                with urllib.request.urlopen(self.url, timeout=5) as answer:
                    self.answers[answer.read().decode()] += 1
            except OSError as error:
                self.bad.append(str(error))


def test_haproxy_balances_over_srv_records_through_a_killed_leader(cluster: Mesh, tmp_path: Path) -> None:
    need("haproxy")
    front = free_ports(23100, 1)[0]
    url = f"http://127.0.0.1:{front}/"
    (tmp_path / "haproxy.cfg").write_text(CONFIG.format(dns=dns_port(cluster), front=front))
    with ExitStack() as stack:
        for host, name in enumerate(("one", "two")):
            register(cluster, host, "web", name, stack.enter_context(app(name)))
        stack.enter_context(running(["haproxy", "-db", "-f", str(tmp_path / "haproxy.cfg")]))
        asyncio.run(until_served_by(url, {"one", "two"}))
        caller = Caller(url)
        caller.start()
        with leader_killed(cluster):
            # What changes while a server is away reaches HAProxy too.
            register(cluster, 1, "web", "three", stack.enter_context(app("three")))
            asyncio.run(until_served_by(url, {"one", "two", "three"}))
            cluster.api(0).put("/v1/agent/check/fail/service:one")
            asyncio.run(until_served_by(url, {"two", "three"}))
        caller.over.set()
        caller.join(10)
    assert caller.bad == []
    assert caller.answers["two"] > 10


class Digger(threading.Thread):
    """Asks DNS without end, with dig, and keeps every answer that is not one of those expected."""

    def __init__(self, port: int, name: str, expected: set[str]) -> None:
        super().__init__(daemon=True)
        self.command = ["dig", "@127.0.0.1", "-p", str(port), "+short", "+tries=1", "+timeout=5", name, "SRV"]
        self.expected, self.good, self.bad = expected, 0, list[str]()
        self.over = threading.Event()

    def ask(self) -> set[str]:
        """Return the ports of the answer; dig fails when it gets none."""
        done = subprocess.run(self.command, capture_output=True, text=True, timeout=20, check=False)
        return {line.split()[2] for line in done.stdout.splitlines()} if done.returncode == 0 else {done.stdout}

    def run(self) -> None:
        while not self.over.wait(0.02):
            found = self.ask()
            if found and found <= self.expected and "1" in found:
                self.good += 1
            else:
                self.bad.append(str(found))


def test_dig_is_answered_through_a_killed_leader(cluster: Mesh) -> None:
    need("dig")
    register(cluster, 1, "dug", "dug-1", 1)
    digger = Digger(dns_port(cluster), "_dug._tcp.service.consul", {"1", "2"})
    assert wait_until(lambda: digger.ask() == {"1"}, PATIENCE_S)
    digger.start()
    with leader_killed(cluster):
        before = digger.good
        register(cluster, 1, "dug", "dug-2", 2)
        assert wait_until(lambda: digger.ask() == {"1", "2"}, PATIENCE_S)
        assert wait_until(lambda: digger.good > before + 5, PATIENCE_S)
        cluster.api(1).put("/v1/agent/check/fail/service:dug-2")
        assert wait_until(lambda: digger.ask() == {"1"}, PATIENCE_S)
    digger.over.set()
    digger.join(30)
    assert digger.bad == []


PROMETHEUS = """
global: {{scrape_interval: 1s, scrape_timeout: 1s}}
scrape_configs:
- job_name: http
  http_sd_configs: [{{url: "http://{agent}/v1/discovery/prometheus?service=metrics", refresh_interval: 1s}}]
- job_name: dns
  dns_sd_configs: [{{names: [metrics.service.consul], type: SRV, refresh_interval: 1s}}]
"""
RESOLVER = "127.0.53.1"
"""Prometheus asks the servers of /etc/resolv.conf, on port 53."""


class Targets:
    """Prometheus' own account of what it has found."""

    def __init__(self, port: int) -> None:
        self.base = f"http://127.0.0.1:{port}"

    def active(self, job: str) -> dict[str, dict[str, Any]]:
        """Return a job's targets by their address."""
        try:
            with urllib.request.urlopen(f"{self.base}/api/v1/targets", timeout=5) as answer:
                found = json.load(answer)["data"]["activeTargets"]
        except OSError:
            return {}
        return {one["discoveredLabels"]["__address__"]: one for one in found if one["scrapePool"] == job}

    def up(self, job: str) -> int:
        """Return how many of a job's targets were scraped."""
        return sum(one["health"] == "up" for one in self.active(job).values())


@pytest.mark.parametrize("job", ["http", "dns"])
def test_prometheus_finds_targets_through_a_killed_leader(cluster: Mesh, tmp_path: Path, job: str) -> None:
    need("prometheus", "dnsmasq", "unshare")
    if job == "dns" and not is_root():
        pytest.skip("needs root: Prometheus asks DNS on port 53 of /etc/resolv.conf only")
    port = free_ports(23200, 1)[0]
    (tmp_path / "prometheus.yml").write_text(PROMETHEUS.format(agent=cluster.hosts[0]))
    (tmp_path / "resolv.conf").write_text(f"nameserver {RESOLVER}\n")
    prometheus = [
        shutil.which("prometheus") or "", f"--config.file={tmp_path}/prometheus.yml",
        f"--storage.tsdb.path={tmp_path}/data", f"--web.listen-address=127.0.0.1:{port}",
    ]  # fmt: skip
    targets = Targets(port)
    with ExitStack() as stack:
        ports = [stack.enter_context(app(name)) for name in ("m1", "m2", "m3")]
        register(cluster, 0, "metrics", "m1", ports[0], Tags=["a", "b"], Meta={"team": "x"}, Address="127.0.0.1")
        register(cluster, 1, "metrics", "m2", ports[1])
        if job == "dns":
            dnsmasq = [
                "dnsmasq", "--keep-in-foreground", "--conf-file=/dev/null", "--no-resolv",
                "--no-hosts", "--user=root",
                "--bind-interfaces", f"--listen-address={RESOLVER}", "--port=53", "--cache-size=0", "--pid-file=",
                f"--server=/consul/127.0.0.1#{dns_port(cluster)}",
            ]  # fmt: skip
            stack.enter_context(running(dnsmasq))
            mounted = 'mount --bind "$0" /etc/resolv.conf && exec "$@"'
            prometheus = ["unshare", "-m", "sh", "-c", mounted, str(tmp_path / "resolv.conf"), *prometheus]
        stack.enter_context(running(prometheus))
        assert wait_until(lambda: targets.up(job) == 2, PATIENCE_S), targets.active(job)
        if job == "http":
            assert_labels(cluster, targets.active(job)[f"127.0.0.1:{ports[0]}"]["discoveredLabels"], ports[0])
        with leader_killed(cluster):
            register(cluster, 1, "metrics", "m3", ports[2])
            assert wait_until(lambda: targets.up(job) == 3, PATIENCE_S), targets.active(job)
        cluster.api(1).put("/v1/agent/service/deregister/m3")
        assert wait_until(lambda: targets.up(job) == 2 == len(targets.active(job)), PATIENCE_S), targets.active(job)


def assert_labels(cluster: Mesh, labels: dict[str, str], port: int) -> None:
    """The labels are those that consul_sd gives, by names and values."""
    node = cluster.api(0).get("/v1/agent/self").json()["Config"]["NodeName"]
    wanted = {
        "address": "127.0.0.1", "dc": "dc1", "health": "passing", "node": node, "service": "metrics",
        "service_address": "127.0.0.1", "service_id": "m1", "service_port": str(port), "tags": ",a,b,",
        "service_metadata_team": "x",
    }  # fmt: skip
    assert {name: labels[f"__meta_consul_{name}"] for name in wanted} == wanted
    rest = {name for name in labels if name.startswith("__meta_consul_")} - {f"__meta_consul_{one}" for one in wanted}
    assert all(name.startswith(("__meta_consul_metadata_", "__meta_consul_tagged_address_")) for name in rest), rest
