"""Other people's programs against a real cluster, while a server is killed."""

from __future__ import annotations

import json
import subprocess
import threading
import urllib.request
from typing import Any

import consul
import pytest

from tests.e2e.support_e2e import Mesh, need, wait_until
from tests.support.promises import PATIENCE_S


def client_of(mesh: Mesh, host: int = 0, consistency: str = "default") -> Any:
    address, _, port = mesh.hosts[host].rpartition(":")
    return consul.Consul(host=address.removeprefix("http://"), port=int(port), consistency=consistency)


def dns_port(mesh: Mesh, host: int = 0) -> int:
    base = mesh.hosts[host] if "://" in mesh.hosts[host] else f"http://{mesh.hosts[host]}"
    with urllib.request.urlopen(f"{base}/v1/agent/self") as answer:
        return int(json.load(answer)["DebugConfig"]["DNSPort"])


class Reader(threading.Thread):
    """Reads in a loop until told to stop, counting what it got and keeping what went wrong."""

    def __init__(self, mesh: Mesh, host: int, consistency: str) -> None:
        super().__init__(daemon=True)
        self._client = client_of(mesh, host, consistency)
        self._halt = threading.Event()
        self.good = 0
        self.bad: list[str] = []

    def run(self) -> None:
        while not self._halt.is_set():
            try:
                _, nodes = self._client.health.service("steady", passing=True)
            except consul.ConsulException as error:
                self.bad.append(str(error))
                continue
            if [entry["Service"]["ID"] for entry in nodes] == ["steady-1"]:
                self.good += 1
            else:
                self.bad.append(f"gave {nodes}")
        self._client.http.session.close()

    def halt(self) -> None:
        self._halt.set()
        self.join(30)


class Watcher(threading.Thread):
    """Blocks on one service, as clients do, and keeps each (index, port) that it was woken with."""

    def __init__(self, mesh: Mesh, host: int) -> None:
        super().__init__(daemon=True)
        self._client = client_of(mesh, host)
        self.seen: list[tuple[int, int]] = []
        self.woken_falsely = 0
        self.last = 3

    def run(self) -> None:
        index = None
        while not self.seen or self.seen[-1][1] != self.last:
            new, nodes = self._client.health.service("watched", index=index, wait="60s")
            port = nodes[0]["Service"]["Port"] if nodes else 0
            if index is not None and int(new) == int(index):
                self.woken_falsely += 1
            elif not self.seen or port != self.seen[-1][1]:
                self.seen.append((int(new), port))
            index = new
        self._client.http.session.close()


def test_reads_and_watches_live_through_a_killed_leader(cluster: Mesh) -> None:
    here, there = client_of(cluster, 0), client_of(cluster, 1)
    assert here.agent.service.register("steady", service_id="steady-1", port=80)
    assert wait_until(lambda: there.health.service("steady", passing=True)[1], PATIENCE_S)
    assert here.agent.service.register("watched", port=1)
    readers = [Reader(cluster, 0, "default"), Reader(cluster, 1, "stale"), Reader(cluster, 0, "consistent")]
    watchers = [Watcher(cluster, host) for host in (0, 1)]
    for thread in (*readers, *watchers):
        thread.start()
    assert wait_until(lambda: all(watcher.seen for watcher in watchers), PATIENCE_S)
    assert wait_until(lambda: all(reader.good > 20 for reader in readers), PATIENCE_S), [
        one.bad[:3] for one in readers
    ]
    leader = cluster.wait_leader()
    cluster.cluster("kill", leader)
    try:
        cluster.wait_leader(other_than=leader)
        before = [reader.good for reader in readers]
        pairs = list(zip(readers, before, strict=True))
        assert wait_until(lambda: all(reader.good > was + 20 for reader, was in pairs), PATIENCE_S)
        assert here.agent.service.register("watched", port=2)
        assert wait_until(lambda: all(watcher.seen[-1][1] == 2 for watcher in watchers), PATIENCE_S)
    finally:
        cluster.cluster("start", leader)
    assert here.agent.service.register("watched", port=3)
    for thread in watchers:
        thread.join(PATIENCE_S)
    for reader in readers:
        reader.halt()
    assert [reader.bad for reader in readers] == [[], [], []]
    for watcher in watchers:
        assert [port for _, port in watcher.seen] == [1, 2, 3]
        assert [index for index, _ in watcher.seen] == sorted({index for index, _ in watcher.seen})
        assert watcher.woken_falsely == 0


@pytest.mark.parametrize("over", ["+notcp", "+tcp"])
def test_dig_finds_services_and_nodes(cluster: Mesh, over: str) -> None:
    need("dig")
    client = client_of(cluster)
    assert client.agent.service.register("dug", service_id="dug-1", port=4321, tags=["v1"])
    port = str(dns_port(cluster))

    def dig(name: str, kind: str) -> str:
        command = ["dig", "@127.0.0.1", "-p", port, "+short", "+tries=1", over, name, kind]
        return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=True).stdout.strip()

    assert wait_until(lambda: dig("dug.service.consul", "A") == "127.0.0.1", PATIENCE_S)
    assert dig("_dug._v1.service.lictor", "SRV").startswith("1 1 4321 ")
    node = client.agent.self()["Config"]["NodeName"]
    assert dig(f"{node}.node.consul", "A") == "127.0.0.1"
    assert dig("absent.service.consul", "A") == ""
