"""Durable writes through Lictor's HTTP API against a 3-node etcd's, in one run on one machine, both with fsync on.

    .venv/bin/python -m benchmarks.replication [--seconds 4] [--rounds 3] [--kills 8] [--registrations 10000]

Needs Debian's ``etcd-server``. Interleaves the two systems, prints medians, ratios of rates and of the three servers'
CPU, ends what it started. On a machine that does other work too, take short turns and believe the CPU:
``--seconds 1 --rounds 5 --kills 0 --registrations 2000``.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import functools
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import psutil

from benchmarks.http_load import Result, put_request, run_load

VALUE = os.urandom(192).hex()[:256].encode()


def free_ports(count: int) -> list[int]:
    """Return ports that were free a moment ago."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


class System(Protocol):
    """A replicated store under test."""

    name: str

    def leader(self) -> int:
        """Return which member leads, or -1."""

    def address(self, member: int) -> tuple[str, int]: ...
    def put(self, member: int) -> Callable[[int], bytes]:
        """Return a maker of requests that each write one 256-byte value durably."""

    def register(self, member: int) -> Callable[[int], bytes]:
        """Return a maker of requests that each register one service (etcd: put one such value)."""

    def pids(self) -> list[int]:
        """Return the servers' process ids."""

    def kill(self, member: int) -> None: ...
    def start(self, member: int) -> None: ...
    def stop(self) -> None: ...


class Etcd:
    """Three etcd members with their HTTP/JSON gateway."""

    name = "etcd"

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        ports = free_ports(6)
        self.clients, self.peers = ports[:3], ports[3:]
        self.processes: list[subprocess.Popen[bytes] | None] = [None] * 3
        for member in range(3):
            self.start(member)

    def start(self, member: int) -> None:
        url, peer = f"http://127.0.0.1:{self.clients[member]}", f"http://127.0.0.1:{self.peers[member]}"
        everyone = ",".join(f"m{n}=http://127.0.0.1:{p}" for n, p in enumerate(self.peers))
        command = [
            "etcd", "--name", f"m{member}", "--data-dir", str(self.directory / f"m{member}"),
            "--listen-client-urls", url, "--advertise-client-urls", url, "--listen-peer-urls", peer,
            "--initial-advertise-peer-urls", peer, "--initial-cluster", everyone, "--logger", "zap",
            "--log-level", "error",
        ]  # fmt: skip
        log = (self.directory / f"m{member}.log").open("ab")
        # In a session of its own, as each of Lictor's servers is: Linux shares processors out by sessions first, and
        # beside other work members that share the load generator's answer four times as many writes.
        self.processes[member] = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        log.close()

    def leader(self) -> int:
        for member in range(3):
            with contextlib.suppress(OSError, KeyError, ValueError):
                url = f"http://127.0.0.1:{self.clients[member]}/v3/maintenance/status"
                with urllib.request.urlopen(urllib.request.Request(url, data=b"{}"), timeout=1) as answer:
                    status = json.load(answer)
                if status.get("leader") == status["header"]["member_id"]:
                    return member
        return -1

    def address(self, member: int) -> tuple[str, int]:
        return "127.0.0.1", self.clients[member]

    def _put(self, prefix: str, member: int) -> Callable[[int], bytes]:
        value = base64.b64encode(VALUE).decode()

        def make(number: int) -> bytes:
            key = base64.b64encode(f"{prefix}/{number}".encode()).decode()
            body = json.dumps({"key": key, "value": value}).encode()
            return put_request("localhost", "/v3/kv/put", body, method="POST")

        return make

    def put(self, member: int) -> Callable[[int], bytes]:
        return self._put("bench", member)

    def register(self, member: int) -> Callable[[int], bytes]:
        return self._put("register", member)

    def pids(self) -> list[int]:
        return [process.pid for process in self.processes if process is not None]

    def kill(self, member: int) -> None:
        process = self.processes[member]
        assert process is not None
        process.kill()
        process.wait()

    def stop(self) -> None:
        for process in self.processes:
            if process is not None and process.poll() is None:
                process.kill()
                process.wait()


class Lictor:
    """Three Lictor servers, started by ``lictor cluster up``."""

    name = "lictor"

    def __init__(self, directory: Path, offset: int = 2000) -> None:
        self.directory = directory
        self.lictor = str(Path(sys.executable).with_name("lictor"))
        self._run("cluster", "up", "-servers", "3", "-clients", "0", "-port-base", str(offset))
        nodes = json.loads(self._run("cluster", "status", "--json"))
        self.nodes = [node["name"] for node in nodes]
        self.http = {node["name"]: node["http"] for node in nodes}

    def _run(self, *words: str) -> str:
        command = [self.lictor, *words, "-dir", str(self.directory)]
        done = subprocess.run(command, check=False, stdout=subprocess.PIPE, text=True)
        if done.returncode and words[1] != "status":  # status says 1 when a node is down, which here is no error
            raise RuntimeError(f"lictor {' '.join(words)} failed")
        return done.stdout

    def leader(self) -> int:
        nodes = json.loads(self._run("cluster", "status", "--json"))
        leading = [number for number, node in enumerate(nodes) if node["raft"] == "leader"]
        return max(leading, key=lambda number: int(nodes[number]["term"]), default=-1)

    def address(self, member: int) -> tuple[str, int]:
        host, port = self.http[self.nodes[member]].rsplit(":", 1)
        return host, int(port)

    def put(self, member: int) -> Callable[[int], bytes]:
        return lambda number: put_request("localhost", f"/v1/kv/bench/{number}", VALUE)

    def register(self, member: int) -> Callable[[int], bytes]:
        def make(number: int) -> bytes:
            body = {
                "Node": f"bench-{number % 50}",
                "Address": "127.0.0.1",
                "Service": {"ID": f"web-{number}", "Service": f"web-{number % 500}", "Port": 80},
            }
            return put_request("localhost", "/v1/catalog/register", json.dumps(body).encode())

        return make

    def pids(self) -> list[int]:
        return [int(node["pid"]) for node in json.loads(self._run("cluster", "status", "--json"))]

    def kill(self, member: int) -> None:
        self._run("cluster", "kill", self.nodes[member])

    def start(self, member: int) -> None:
        self._run("cluster", "start", self.nodes[member])

    def stop(self) -> None:
        self._run("cluster", "down")


def wait_leader(system: System, timeout_s: float = 30) -> int:
    """Return the leading member once one leads. Raises TimeoutError."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        member = system.leader()
        if member >= 0:
            return member
        time.sleep(0.05)
    raise TimeoutError(f"{system.name} has no leader after {timeout_s} s")


def cpu_s(pids: list[int]) -> float:
    """Return the CPU time that processes have used, user and system."""
    return sum(sum(psutil.Process(pid).cpu_times()[:2]) for pid in pids)


def _fixed(request: bytes, _number: int) -> bytes:
    return request


async def write_gap_s(system: System) -> float:
    """Kill the leader under a trickle of writes through the others; return the longest time without success."""
    leader = wait_leader(system)
    survivors = [member for member in range(3) if member != leader]
    deadline = time.perf_counter() + 15
    last_ok = killed_at = time.perf_counter()
    number, gap, killed = 10_000_000 + int(time.time() * 1000) % 1_000_000_000, 0.0, False
    while time.perf_counter() < deadline:
        member = survivors[number % 2]
        number += 1
        try:
            result = await asyncio.wait_for(
                run_load(
                    [system.address(member)],
                    functools.partial(_fixed, system.put(member)(number)),
                    connections=1,
                    seconds=5,
                    requests=1,
                ),
                0.4,
            )
            ok = bool(result.latencies_s)
        except (OSError, TimeoutError):
            ok = False
        now = time.perf_counter()
        if ok:
            if killed:
                gap = max(gap, now - last_ok)
                if now - killed_at > 3:
                    break
            last_ok = now
        if not killed and now > deadline - 14.5:
            system.kill(leader)
            killed, killed_at, last_ok = True, time.perf_counter(), time.perf_counter()
    else:
        gap = float("inf")
    system.start(leader)
    return gap


@contextlib.contextmanager
def running(*makers: Callable[[Path], System]) -> Iterator[list[System]]:
    """Start the systems in temporary directories and end them in any case."""
    systems: list[System] = []
    with tempfile.TemporaryDirectory(prefix="lictor-bench-") as root:
        try:
            for number, maker in enumerate(makers):
                directory = Path(root) / str(number)
                directory.mkdir()
                systems.append(maker(directory))
            yield systems
        finally:
            for system in systems:
                system.stop()


@dataclass
class Turn:
    """One system's turn at one load."""

    result: Result
    cpu_us: float
    """Of all three servers, for each write."""


async def take_turn(
    system: System,
    member: int,
    make: Callable[[int], bytes],
    *,
    clients: int,
    seconds: float,
    requests: int | None = None,
) -> Turn:
    """Load a member. Raises RuntimeError if any write fails."""
    pids = system.pids()
    before = cpu_s(pids)
    result = await run_load([system.address(member)], make, connections=clients, seconds=seconds, requests=requests)
    if result.errors:
        raise RuntimeError(f"{system.name}: {result.errors[:3]}")
    return Turn(result, (cpu_s(pids) - before) / len(result.latencies_s) * 1e6)


def _from(start: int, make: Callable[[int], bytes], number: int) -> bytes:
    return make(start + number)


async def measure(systems: list[System], options: argparse.Namespace) -> None:
    """Run all measurements and print the table."""
    turns: dict[tuple[str, str], list[Turn]] = {}
    for round_ in range(options.rounds):
        for clients in (1, 16, 64):
            for system in systems:
                leader = wait_leader(system)
                turn = await take_turn(system, leader, system.put(leader), clients=clients, seconds=options.seconds)
                turns.setdefault((system.name, f"put, {clients} clients"), []).append(turn)
        for system in systems:
            follower = (wait_leader(system) + 1) % 3
            turn = await take_turn(system, follower, system.put(follower), clients=1, seconds=options.seconds)
            turns.setdefault((system.name, "put, 1 client, via follower"), []).append(turn)
        count = options.registrations
        for system in systems:
            leader = wait_leader(system)
            make = functools.partial(_from, round_ * count, system.register(leader))
            turn = await take_turn(system, leader, make, clients=64, seconds=120, requests=count)
            turns.setdefault((system.name, f"{count:,} registrations, 64 in flight"), []).append(turn)
    print(f"{'':38}{'etcd':>46}{'lictor':>46}{'rate':>7}{'CPU':>7}")
    for what in dict.fromkeys(what for _, what in turns):
        cells, rates, cpus = [], [], []
        for system in systems:
            found = turns[system.name, what]
            rates.append(statistics.median(turn.result.rate for turn in found))
            cpus.append(statistics.median(turn.cpu_us for turn in found))
            p50, p99 = (statistics.median(t.result.percentile_ms(share) for t in found) for share in (0.5, 0.99))
            cells.append(f"{rates[-1]:,.0f}/s p50 {p50:.1f} p99 {p99:.1f} ms, {cpus[-1]:,.0f} us CPU")
        ratios = f"{rates[1] / rates[0]:>7.2f}{cpus[1] / cpus[0]:>7.2f}"
        print(f"{what:38}{cells[0]:>46}{cells[1]:>46}{ratios}", flush=True)
    if options.kills:
        for system in systems:
            gaps = [await write_gap_s(system) for _ in range(options.kills)]
            print(
                f"{system.name}: write gap at kill -9 of the leader, {options.kills} times: "
                f"median {statistics.median(gaps):.2f} s, worst {max(gaps):.2f} s"
            )


def main() -> None:
    """Parse the options and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--kills", type=int, default=8)
    parser.add_argument("--registrations", type=int, default=10_000, help="in each round")
    with running(Etcd, Lictor) as systems:
        asyncio.run(measure(systems, parser.parse_args()))


if __name__ == "__main__":
    main()
