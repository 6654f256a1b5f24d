"""How long nothing is written when the leader is killed (kill -9), as clients of the other servers see it.

    python -m tests.chaos.write_gap --kills 20

Default timings, real server processes. Prints each gap with the machine's load, without which the figures mean
little, then the median and the worst.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import aiohttp

from cli.cluster.supervisor import Supervisor
from tests.chaos.support_chaos import SETTLE_S, leader_of, server_processes, term_of

WRITERS = 4
CALM_S = 1.0
PAUSE_S = 0.005


async def _write(http: aiohttp.ClientSession, url: str, acknowledged: list[float]) -> None:
    for number in itertools.count():
        try:
            async with http.put(f"{url}/{number % 100}", data=b"x" * 256) as answer:
                if answer.status == 200:
                    acknowledged.append(time.monotonic())
                    continue
        except (aiohttp.ClientError, TimeoutError):
            pass  # the gap is what is measured
        await asyncio.sleep(PAUSE_S)


async def _until_written_after(acknowledged: list[float], moment: float) -> None:
    deadline = moment + SETTLE_S
    while not acknowledged or acknowledged[-1] < moment:
        if time.monotonic() > deadline:
            raise TimeoutError(f"nothing was written within {SETTLE_S:g} s")
        await asyncio.sleep(PAUSE_S)


async def gap_s(cluster: Supervisor) -> tuple[float, int]:
    """Kill the leader under load; return (seconds without an acknowledged write, terms it took)."""
    leader = await asyncio.to_thread(leader_of, cluster)
    before = await asyncio.to_thread(term_of, cluster)
    others = [name for name in cluster.names if name != leader]
    acknowledged: list[float] = []
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=SETTLE_S)) as http:
        writers = [
            asyncio.create_task(
                _write(http, f"http://{cluster.http_addr(others[n % len(others)])}/v1/kv/gap/{n}", acknowledged)
            )
            for n in range(WRITERS)
        ]
        try:
            await asyncio.sleep(CALM_S)
            await _until_written_after(acknowledged, time.monotonic())
            killed = time.monotonic()
            await asyncio.to_thread(cluster.kill, leader)
            await asyncio.sleep(CALM_S)
            await _until_written_after(acknowledged, time.monotonic())
        finally:
            for writer in writers:
                writer.cancel()
            await asyncio.gather(*writers, return_exceptions=True)
    terms = await asyncio.to_thread(term_of, cluster) - before
    await asyncio.to_thread(cluster.start, [leader])
    await asyncio.to_thread(cluster.wait_ready, [leader], lambda _text: None)
    last = max(moment for moment in acknowledged if moment < killed)
    moments = [last, *(moment for moment in acknowledged if moment >= killed)]
    return max(b - a for a, b in itertools.pairwise(moments)), terms


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--servers", type=int, default=3)
    args = parser.parse_args()
    gaps = []
    with tempfile.TemporaryDirectory(prefix="lictor-gap-") as directory:
        with server_processes(Path(directory) / "c", servers=args.servers) as cluster:
            for number in range(1, args.kills + 1):
                gap, terms = asyncio.run(gap_s(cluster))
                gaps.append(gap)
                print(f"kill {number:2d}: {gap:.2f} s, {terms} terms, load {os.getloadavg()[0]:.1f}", flush=True)
    median, worst = statistics.median(gaps), max(gaps)
    print(f"write gap at kill -9 of the leader: median {median:.2f} s, worst {worst:.2f} s of {len(gaps)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
