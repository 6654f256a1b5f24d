"""One agent's HTTP API on a local cluster: stale reads, parked blocking queries, memory; what writes cost a server.

    .venv/bin/python -m benchmarks.http_api [--seconds 5] [--clients 32] [--parked 10000] [--writes]

Starts a server and a client agent of its own (with --writes also two more servers), ends them, prints a table. CPU is
the process's own (user and system) as the kernel counts it, per 10,000 answers, beside the rate: the load generator
takes part of the machine too.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

import psutil

from benchmarks.http_load import Result, put_request, run_load

INSTANCES = 10
SERVICES = 20
VALUE = b"x" * 256


class Cluster:
    """A local cluster, started by ``lictor cluster up``."""

    def __init__(self, directory: Path, servers: int, offset: int) -> None:
        self.directory = directory
        self.lictor = str(Path(sys.executable).with_name("lictor"))
        words = ["-servers", str(servers), "-clients", "1", "-port-offset", str(offset)]
        up = [self.lictor, "cluster", "up", *words, "-dir", str(directory)]
        if subprocess.run(up, check=False, stdout=subprocess.DEVNULL).returncode:
            raise SystemExit("the cluster did not start: choose other ports (--port-offset)")
        self.nodes = {node["name"]: node for node in json.loads(self.run("cluster", "status", "--json"))}

    def run(self, *words: str) -> str:
        command = [self.lictor, *words, "-dir", str(self.directory)]
        done = subprocess.run(command, check=False, stdout=subprocess.PIPE, text=True)
        return done.stdout

    def address(self, name: str) -> tuple[str, int]:
        host, port = str(self.nodes[name]["http"]).rsplit(":", 1)
        return host, int(port)

    def process(self, name: str) -> psutil.Process:
        return psutil.Process(int(self.nodes[name]["pid"]))

    def leader(self) -> str:
        nodes = json.loads(self.run("cluster", "status", "--json"))
        return next(node["name"] for node in nodes if node.get("raft") == "leader")

    def put(self, name: str, path: str, body: object) -> None:
        host, port = self.address(name)
        data = json.dumps(body).encode()
        request = urllib.request.Request(f"http://{host}:{port}{path}", data=data, method="PUT")
        with urllib.request.urlopen(request, timeout=10) as answer:
            answer.read()

    def stop(self) -> None:
        self.run("cluster", "down")


def cpu_s(process: psutil.Process) -> float:
    """Return the CPU time a process has used, seconds."""
    times = process.cpu_times()
    return float(times.user + times.system)


def get_request(path: str) -> bytes:
    """Return the bytes of one keep-alive read, with the headers that Go's client sends."""
    return (
        f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1:8500\r\nUser-Agent: Go-http-client/1.1\r\n"
        "Accept-Encoding: gzip\r\n\r\n"
    ).encode()


def load(
    cluster: Cluster, name: str, label: str, make: Callable[[int], bytes], connections: int, seconds: float
) -> Result:
    """Run one load against one node and print its line."""
    process = cluster.process(name)
    before = cpu_s(process)
    result = asyncio.run(run_load([cluster.address(name)], make, connections=connections, seconds=seconds))
    used = cpu_s(process) - before
    if result.errors:
        raise RuntimeError(f"{label}: {result.errors[0]}")
    per_10k = used / max(len(result.latencies_s), 1) * 10_000
    p50, p99 = result.percentile_ms(0.5), result.percentile_ms(0.99)
    print(f"{label:44} {result.rate:8,.0f}/s  p50 {p50:6.2f} ms  p99 {p99:6.2f} ms  {per_10k:6.2f} CPU-s per 10k")
    return result


def register(cluster: Cluster) -> None:
    """Put a ten-instance service, one of them ill, into the catalog, and twenty services on the agent."""
    for number in range(INSTANCES):
        node, service = f"bench-{number}", {"ID": f"web-{number}", "Service": "web", "Port": 8000 + number}
        check = {"CheckID": f"web-{number}", "Name": "web", "ServiceID": service["ID"], "Status": "passing"}
        if number == 0:
            check["Status"] = "critical"
        body = {"Node": node, "Address": f"10.0.0.{number}", "Service": service | {"Tags": ["v1"]}, "Check": check}
        cluster.put("client-1", "/v1/catalog/register", body)
    for number in range(SERVICES):
        body = {"Name": f"local-{number}", "Port": 9000 + number, "Check": {"TTL": "1h", "Status": "passing"}}
        cluster.put("client-1", "/v1/agent/service/register", body)


def reads(cluster: Cluster, connections: int, seconds: float) -> None:
    """Stale reads of the ten-instance service from the client agent."""
    for path in (
        "/v1/health/service/web?stale",
        "/v1/health/service/web?passing&stale",
        "/v1/catalog/service/web?stale",
        "/v1/health/service/web?cached",
        "/v1/health/service/web",
    ):
        request = get_request(path)
        load(cluster, "client-1", f"GET {path}", lambda _, request=request: request, connections, seconds)  # type: ignore[misc]


def writes(cluster: Cluster, connections: int, seconds: float) -> None:
    """Writes through the leader's own HTTP API."""
    leader = cluster.leader()

    def catalog(number: int) -> bytes:
        service = {"ID": f"s-{number}", "Service": f"s-{number % 500}", "Port": 80}
        body = {"Node": f"n-{number % 50}", "Address": "127.0.0.1", "Service": service}
        return put_request("localhost", "/v1/catalog/register", json.dumps(body).encode())

    load(cluster, leader, "PUT /v1/kv/KEY (leader)", lambda n: put_request("localhost", f"/v1/kv/b/{n}", VALUE),
         connections, seconds)  # fmt: skip
    load(cluster, leader, "PUT /v1/catalog/register (leader)", catalog, connections, seconds)


class _Parked(asyncio.Protocol):
    """Asks once, and tells when the whole answer is there."""

    def __init__(self, request: bytes, answered: Callable[[bytes], None]) -> None:
        self.request, self.answered = request, answered
        self.data = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        transport.write(self.request)  # type: ignore[attr-defined]

    def data_received(self, data: bytes) -> None:
        self.data += data
        head, end, body = self.data.partition(b"\r\n\r\n")
        if end and len(body) == int(head.partition(b"Content-Length: ")[2].partition(b"\r\n")[0]):
            self.answered(body)


_PROBE = """
import socket, sys, time
sock = socket.create_connection((sys.argv[1], int(sys.argv[2])))
longest = 0.0
print("ready", flush=True)
ends = time.perf_counter() + float(sys.argv[3])
while time.perf_counter() < ends:
    began = time.perf_counter()
    sock.sendall(b"GET /v1/health/service/local-0?stale HTTP/1.1\\r\\nHost: localhost\\r\\n\\r\\n")
    data = b""
    while b"\\r\\n\\r\\n" not in data or not data.endswith(b"]"):
        data += sock.recv(65536)
    longest = max(longest, time.perf_counter() - began)
    time.sleep(0.001)
print(longest)
"""
"""Another client, in a process of its own: how long the agent kept it waiting."""


async def _park(cluster: Cluster, count: int, seconds: float) -> None:
    host, port = cluster.address("client-1")
    process = cluster.process("client-1")
    with urllib.request.urlopen(f"http://{host}:{port}/v1/health/service/web?stale", timeout=10) as answer:  # noqa: ASYNC210
        index = answer.headers["X-Consul-Index"]
    await asyncio.sleep(2)
    cpu_before = cpu_s(process)
    await asyncio.sleep(seconds)
    idle = (cpu_s(process) - cpu_before) / seconds
    memory = process.memory_info().rss
    request = get_request(f"/v1/health/service/web?stale&index={index}&wait=590s")
    answers = 0
    done = asyncio.Event()

    size = 0

    def answered(body: bytes) -> None:
        nonlocal answers, size
        assert b'"Port":7,' in body, "an answer without the change"
        answers, size = answers + 1, len(body)
        if answers == count:
            done.set()

    loop = asyncio.get_running_loop()
    made = []
    for start in range(0, count, 100):
        batch = [loop.create_connection(lambda: _Parked(request, answered), host, port) for _ in range(100)]
        made += await asyncio.gather(*batch[: count - start])
    await asyncio.sleep(3)
    grown = process.memory_info().rss - memory
    cpu_before = cpu_s(process)
    await asyncio.sleep(seconds)
    parked = (cpu_s(process) - cpu_before) / seconds
    assert answers == 0, "a parked query was answered while nothing changed"
    each = f"{grown / count / 1024:.1f} KiB each"
    print(f"{count:,} parked: {each}, {parked:.2%} of a core while nothing changes (idle agent: {idle:.2%})")
    words = [sys.executable, "-c", _PROBE, host, str(port), "5"]
    probe = await asyncio.create_subprocess_exec(*words, stdout=subprocess.PIPE)
    assert probe.stdout is not None
    await probe.stdout.readline()
    cpu_before = cpu_s(process)
    began = time.perf_counter()
    body = {"Node": "bench-1", "Address": "10.0.0.1", "Service": {"ID": "web-1", "Service": "web", "Port": 7}}
    await asyncio.to_thread(cluster.put, "client-1", "/v1/catalog/register", body)
    await asyncio.wait_for(done.wait(), 60)
    took = time.perf_counter() - began
    print(f"a change reached all {count:,} after {took:.2f} s ({size:,} bytes each)", end="")
    longest = float((await probe.communicate())[0])
    used = cpu_s(process) - cpu_before
    print(f", {used:.2f} CPU-s of the agent; another client meanwhile waited {longest * 1000:.0f} ms at most")
    for transport, _ in made:
        transport.close()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=5)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--parked", type=int, default=0)
    parser.add_argument("--writes", action="store_true")
    parser.add_argument("--no-reads", action="store_true")
    parser.add_argument("--port-offset", type=int, default=21000)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        cluster = Cluster(Path(directory), 3 if given.writes else 1, given.port_offset)
        try:
            register(cluster)
            time.sleep(1)
            rss = cluster.process("client-1").memory_info().rss
            print(f"client agent with {SERVICES} services: RSS {rss / 2**20:.1f} MiB")
            if not given.no_reads:
                reads(cluster, given.clients, given.seconds)
            if given.writes:
                writes(cluster, 64, given.seconds)
            if given.parked:
                asyncio.run(_park(cluster, given.parked, given.seconds))
        finally:
            cluster.stop()


if __name__ == "__main__":
    main()
