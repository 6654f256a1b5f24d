"""A follower that stops reading, and writes of the largest size: neither slows, fills or deposes a leader."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator

import aiohttp
import psutil
import pytest

from cli.cluster.supervisor import NodeStatus, Supervisor
from node.http.context import HttpOptions
from tests.chaos.support_chaos import leader_of, server_processes
from tests.support.promises import PATIENCE_S

HEALTHY_S, STOPPED_S, STOPPED_S_MAX = 3.0, 22.0, 90.0
WRITERS = 8
MEMORY_GROWTH_MAX = 96 << 20
"""What a leader may need more meanwhile: the log between two snapshots, and no queue for the one that is deaf."""
BYTES_WRITTEN_MIN = 2 * MEMORY_GROWTH_MAX
LARGEST = HttpOptions().kv_value_bytes_max


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Supervisor]:
    with server_processes(tmp_path_factory.mktemp("slow") / "c") as supervisor:
        yield supervisor


def _status(cluster: Supervisor, node: str) -> NodeStatus:
    return next(one for one in cluster.status() if one.name == node)


class _Load:
    """Writers in a closed loop, each on a key of its own."""

    def __init__(self, http: aiohttp.ClientSession, addresses: list[str], size: int) -> None:
        self._http, self._addresses, self._value = http, addresses, "v" * size
        self.answers: Counter[int] = Counter()
        self.bytes = 0

    async def _write(self, writer: int) -> None:
        url = f"http://{self._addresses[writer % len(self._addresses)]}/v1/kv/slow/{writer}"
        while True:
            async with self._http.put(url, data=self._value) as answer:
                self.answers[answer.status] += 1
                self.bytes += len(self._value)

    @contextlib.asynccontextmanager
    async def running(self, writers: int) -> AsyncIterator[None]:
        """Write until the block ends; a writer that fails makes it fail."""
        tasks = [asyncio.create_task(self._write(writer)) for writer in range(writers)]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            for result in await asyncio.gather(*tasks, return_exceptions=True):
                assert isinstance(result, asyncio.CancelledError), result


def _session() -> aiohttp.ClientSession:
    return aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=PATIENCE_S))


@pytest.mark.timeout(240)
async def test_a_stopped_follower_costs_the_leader_neither_pace_nor_memory_and_catches_up(
    cluster: Supervisor,
) -> None:
    leader = leader_of(cluster)
    follower = next(name for name in cluster.names if name != leader)
    before = _status(cluster, leader)
    process = psutil.Process(before.pid)
    async with _session() as http:
        load = _Load(http, [cluster.http_addr(leader)], LARGEST)
        async with load.running(WRITERS):
            rate_before = await _healthy_rate(load)
            cluster.pause(follower)
            try:
                began, at_first, written = time.monotonic(), process.memory_info().rss, load.bytes
                most = at_first
                while (took_s := time.monotonic() - began) < STOPPED_S or load.bytes - written < BYTES_WRITTEN_MIN:
                    assert took_s < STOPPED_S_MAX, f"{load.bytes - written} bytes were taken in {took_s:.0f} s"
                    await asyncio.sleep(0.2)
                    most = max(most, process.memory_info().rss)
                rate = (load.bytes - written) / took_s
            finally:
                cluster.resume(follower)
        goal = _status(cluster, leader)
        deadline = time.monotonic() + PATIENCE_S
        while (now := _status(cluster, follower)).applied < goal.applied:
            assert time.monotonic() < deadline, f"the follower has applied {now.applied} of {goal.applied}"
            await asyncio.sleep(0.1)
        assert (goal.raft, goal.term) == ("leader", before.term)
        # What else the machine does may slow one of the measurements: the pace is no less than that of a healthy
        # cluster just before, or just after.
        async with load.running(WRITERS):
            rate_after = await _healthy_rate(load)
    rates = ", ".join(f"{one / 1e6:.1f}" for one in (rate_before, rate, rate_after))
    print(f"{rates} MB/s before, while it was stopped, after; memory {at_first >> 20} to {most >> 20} MiB")
    assert set(load.answers) == {200}
    assert most - at_first < MEMORY_GROWTH_MAX
    assert rate > min(rate_before, rate_after) / 2


async def _healthy_rate(load: _Load) -> float:
    """Return how many bytes are taken in a second, all servers being well."""
    began, written = time.monotonic(), load.bytes
    await asyncio.sleep(HEALTHY_S)
    return (load.bytes - written) / (time.monotonic() - began)


@pytest.mark.timeout(240)
async def test_writes_of_the_largest_size_depose_no_leader_and_larger_ones_are_refused(cluster: Supervisor) -> None:
    leader = leader_of(cluster)
    before = _status(cluster, leader)
    addresses = [cluster.http_addr(name) for name in cluster.names]
    async with _session() as http:
        load = _Load(http, addresses, LARGEST)
        async with load.running(2 * WRITERS):
            began = time.monotonic()
            while time.monotonic() < began + 4.0 or load.answers[200] < 50:
                assert time.monotonic() < began + 120, load.answers
                async with http.put(f"http://{addresses[0]}/v1/kv/slow/large", data="v" * (LARGEST + 1)) as answer:
                    assert answer.status == 413
                    assert f"max allowed is {LARGEST} bytes" in await answer.text()
                await asyncio.sleep(0.1)
    # When there is no room in a queue, the answer is to try again; nothing else may be said.
    assert set(load.answers) <= {200, 429}, load.answers
    after = _status(cluster, leader)
    assert (after.raft, after.term) == ("leader", before.term)
