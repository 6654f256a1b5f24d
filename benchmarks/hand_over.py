"""How long nobody can write while the leader is stopped in good order (SIGTERM), and with it `lictor leave`.

    .venv/bin/python -m benchmarks.hand_over [-rounds 12] [-leave]

One closed loop of durable writes through each surviving server; a gap is the longest time between two successes of
either, around the stop. The same is taken of as long a time without a stop, for comparison: the machine's own stalls.
"""

from __future__ import annotations

import argparse
import http.client
import statistics
import tempfile
import threading
import time
from pathlib import Path

from cli.client import Api
from cli.cluster.layout import Layout, Plan, write_plan
from cli.cluster.supervisor import Supervisor
from cli.demo_stage import free_offset

SERVERS = 3
BEFORE_S, AFTER_S = 1.0, 1.5


class Loop(threading.Thread):
    """Writes through one server, one at a time, on one connection."""

    def __init__(self, address: str, name: str) -> None:
        super().__init__(daemon=True)
        self._address, self._key = address, name
        self._ended = threading.Event()
        self.done_at: list[float] = []
        self.failures: list[str] = []

    def run(self) -> None:
        host, _, port = self._address.partition(":")
        connection = http.client.HTTPConnection(host, int(port), timeout=10)
        number = 0
        while not self._ended.is_set():
            number += 1
            try:
                connection.request("PUT", f"/v1/kv/{self._key}/{number % 100}", b"x" * 256)
                answer = connection.getresponse()
                body = answer.read()
            except (OSError, http.client.HTTPException) as error:
                self.failures.append(repr(error))
                connection.close()
                continue
            if answer.status == 200:
                self.done_at.append(time.perf_counter())
            else:
                self.failures.append(f"{answer.status} {body[:80]!r}")
        connection.close()

    def end(self) -> None:
        """Finish the write under way."""
        self._ended.set()
        self.join(15)


def gap_s(loops: list[Loop], begin: float, end: float) -> float:
    """Return the longest time without a success of any loop between two times."""
    times = sorted(at for loop in loops for at in loop.done_at if begin <= at <= end)
    return max(after - before for before, after in zip([begin, *times], [*times, end], strict=True))


def one_round(supervisor: Supervisor, number: int, *, leave: bool) -> tuple[float, float, list[str]]:
    """Stop the leader once; return the gap around it, that of quiet time before, and what failed."""
    leader = supervisor.leader()
    loops = [Loop(supervisor.http_addr(name), f"{number}/{name}") for name in supervisor.names if name != leader]
    for loop in loops:
        loop.start()
    time.sleep(0.5 + AFTER_S)
    stopped_at = time.perf_counter()
    if leave:
        Api(supervisor.http_addr(leader)).put("/v1/agent/leave")
    else:
        supervisor.stop([leader])
    time.sleep(max(0.0, stopped_at + AFTER_S + 0.2 - time.perf_counter()))
    for loop in loops:
        loop.end()
    found = gap_s(loops, stopped_at, stopped_at + AFTER_S)
    quiet = gap_s(loops, stopped_at - AFTER_S, stopped_at)
    if leave:
        supervisor.stop([leader])
    supervisor.start([leader])
    supervisor.wait_ready(supervisor.names, lambda line: None)
    return found, quiet, [failure for loop in loops for failure in loop.failures]


def measure(rounds: int, *, leave: bool = False) -> tuple[list[float], list[float], list[str]]:
    """Run rounds on a cluster of its own; return the gaps, the quiet gaps (seconds), and failed writes."""
    with tempfile.TemporaryDirectory(prefix="lictor-hand-over-") as root:
        layout = Layout(Path(root) / "cluster")
        write_plan(layout, Plan(SERVERS, 0, free_offset(SERVERS, 0)))
        supervisor = Supervisor(layout)
        gaps, quiet, failures = [], [], []
        try:
            supervisor.start(supervisor.names)
            supervisor.wait_ready(supervisor.names, lambda line: None)
            for number in range(rounds):
                gap, still, failed = one_round(supervisor, number, leave=leave)
                gaps.append(gap)
                quiet.append(still)
                failures += failed
        finally:
            supervisor.stop(supervisor.names)
        return gaps, quiet, failures


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-rounds", type=int, default=12)
    parser.add_argument("-leave", action="store_true", help="by `lictor leave` instead of SIGTERM")
    options = parser.parse_args()
    gaps, quiet, failures = measure(options.rounds, leave=options.leave)
    for name, values in (("leader stopped", gaps), ("nothing stopped", quiet)):
        each = " ".join(f"{value * 1e3:.0f}" for value in values)
        print(
            f"{name}: longest time without a write, {len(values)} rounds: median "
            f"{statistics.median(values) * 1e3:.0f} ms, worst {max(values) * 1e3:.0f} ms ({each})"
        )
    print(f"failed writes: {len(failures)} {failures[:3]}")


if __name__ == "__main__":
    main()
