"""Writes of callers that have no task: each is told its outcome once, after the core is done with it."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import Any

import pytest

from raftstate.errors import NotLeader, RaftError, Stopped, TooBusy, UnknownOutcome
from raftstate.raft import RaftConfig
from tests.support.promises import PATIENCE_S
from tests.support.raft_cluster import ReplicaCluster
from tests.support.raft_machine import command


class Caller:
    """Keeps what it was told."""

    def __init__(self) -> None:
        self.told: list[tuple[Any, RaftError | None]] = []
        self._news = asyncio.Event()

    def __call__(self, applied: Any, error: RaftError | None) -> None:
        self.told.append((applied, error))
        self._news.set()

    async def heard(self) -> None:
        async with asyncio.timeout(PATIENCE_S):
            await self._news.wait()


async def test_a_submitted_write_is_applied_and_told_once(tmp_path: Path) -> None:
    async with ReplicaCluster(tmp_path, 3) as cluster:
        leader = await cluster.leader()
        callers = [Caller() for _ in range(50)]
        for number, caller in enumerate(callers):
            leader.submit(command(f"r{number}", f"k{number}", str(number)), caller)
        assert not any(caller.told for caller in callers)
        for number, caller in enumerate(callers):
            await caller.heard()
            ((applied, error),) = caller.told
            assert (applied.value, error) == (str(number), None)
        assert not leader._proposals


async def test_a_caller_may_submit_again_when_it_is_told(tmp_path: Path) -> None:
    async with ReplicaCluster(tmp_path, 1) as cluster:
        leader = await cluster.leader()
        caller = Caller()

        def next_one(applied: Any, error: RaftError | None) -> None:
            assert error is None
            if applied.value == "9":
                caller(applied, error)
            else:
                number = int(applied.value) + 1
                leader.submit(command(f"r{number}", "k", str(number)), next_one)

        leader.submit(command("r0", "k", "0"), next_one)
        await caller.heard()


async def test_what_is_not_proposed_is_refused_at_once(tmp_path: Path) -> None:
    async with ReplicaCluster(tmp_path, 3) as cluster:
        leader = await cluster.leader()
        caller = Caller()
        follower = next(replica for replica in cluster.replicas.values() if replica is not leader)
        with pytest.raises(NotLeader):
            follower.submit(command("r1", "k", "v"), caller)
        leaving = asyncio.ensure_future(leader.transfer_leadership())
        await asyncio.sleep(0)
        assert leader._running_core().transferring
        with pytest.raises(TooBusy):
            leader.submit(command("r1", "k", "v"), caller)
        await leaving
        await leader.stop()
        with pytest.raises(Stopped):
            leader.submit(command("r1", "k", "v"), caller)
        assert not caller.told


async def test_an_outcome_that_does_not_come_is_told_as_unknown(tmp_path: Path) -> None:
    config = RaftConfig(heartbeat_s=0.03, election_timeout_min_s=5, election_timeout_max_s=6)
    async with ReplicaCluster(tmp_path, 2, config=config) as cluster:
        leader = await cluster.leader(timeout_s=10)
        for replica in cluster.replicas.values():
            cluster.wire.isolate(replica.id)
        late, stopped = Caller(), Caller()
        leader.submit(command("r1", "k", "v"), late, timeout_s=0.1)
        leader.submit(command("r2", "k", "v"), stopped, timeout_s=60)
        await late.heard()
        ((applied, error),) = late.told
        assert applied is None
        assert isinstance(error, UnknownOutcome)
        assert not stopped.told
        assert leader._driver is not None
        leader._driver.fail(OSError("the disk is gone"))
        await stopped.heard()
        assert isinstance(stopped.told[0][1], UnknownOutcome)
        await asyncio.sleep(0)
        assert len(late.told) == len(stopped.told) == 1


async def test_a_caller_that_fails_leaves_the_others_their_outcome(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with ReplicaCluster(tmp_path, 1) as cluster:
        leader = await cluster.leader()
        caller = Caller()

        def fails(applied: Any, error: RaftError | None) -> None:
            raise RuntimeError("a caller's own fault")

        with caplog.at_level(logging.ERROR):
            leader.submit(command("r1", "k", "1"), fails)
            leader.submit(command("r2", "k", "2"), caller)
            await caller.heard()
        assert caller.told[0][0].value == "2"
        assert "a caller's own fault" in caplog.text
        assert (await leader.apply(command("r3", "k", "3"))).value == "3"
