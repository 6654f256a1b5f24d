"""Backups through the log: of a log that was further, of the real state machine, and what is refused."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from raftstate.errors import JournalDamaged, SnapshotDamaged
from raftstate.snapshot_format import SnapshotEncoder, SnapshotHeader
from raftstate.state import commands as c
from raftstate.state.machine import StateMachine
from tests.support.raft_cluster import ReplicaCluster

AT = "2026-01-01T00:00:00Z"


def set_key(key: str, value: bytes) -> bytes:
    return c.encode_envelope(c.Envelope("", AT, c.KVSet(key, value)))


async def pieces(data: list[bytes]) -> AsyncIterator[bytes]:
    for piece in data:
        yield piece


def as_backup(machine: StateMachine, index: int) -> list[bytes]:
    encoder = SnapshotEncoder(SnapshotHeader(index, 1, {}, 0.0))
    return [encoder.start(), *(encoder.chunk(chunk) for chunk in machine.snapshot()), encoder.finish()]


def far_machine(rows: int = 3_000, start: int = 5_000_000) -> StateMachine:
    machine = StateMachine()
    for number in range(rows):
        machine.apply(start + number, set_key(f"app/{number:05}", b"x" * 100))
    return machine


def kv(replica: Any) -> Any:
    return replica.machine.store.kv.rows


async def test_a_backup_of_a_log_far_ahead_keeps_its_indexes_and_later_ones_exceed_them(tmp_path: Path) -> None:
    machine = far_machine()
    async with ReplicaCluster(tmp_path, 3, machine=StateMachine) as cluster:
        leader = await cluster.leader()
        await leader.apply(set_key("mine", b"1"))
        await leader.restore_snapshot(pieces(as_backup(machine, machine.store.index)))
        assert leader.status().last_index < 1_000, "the log must not be filled up to the backup's index"
        assert kv(leader) == machine.store.kv.rows
        applied = await leader.apply(set_key("mine", b"2"))
        assert applied.index > machine.store.index
        for replica in cluster.replicas.values():
            await replica.wait_applied(applied.index)
            assert kv(replica)["mine"].modify_index == applied.index
            assert kv(replica)["app/00007"].modify_index == 5_000_007
        assert (await leader.read_barrier("consistent")).index >= applied.index

        # The older state is what this cluster then has further from: indexes still only grow.
        await leader.restore_snapshot(pieces(as_backup(far_machine(10, 50), 60)))
        again = await leader.apply(set_key("mine", b"3"))
        assert again.index > applied.index

        for name in cluster.names:
            await cluster.crash(name)
        for name in cluster.names:
            await cluster.start(name)
        leader = await cluster.leader()
        last = await leader.apply(set_key("mine", b"4"))
        assert last.index > again.index
        await asyncio.gather(*(replica.wait_applied(last.index) for replica in cluster.replicas.values()))
        assert len({replica.machine.digest() for replica in cluster.replicas.values()}) == 1  # type: ignore[attr-defined]


async def test_the_state_of_a_restored_cluster_survives_in_its_snapshots(tmp_path: Path) -> None:
    machine = far_machine(200)
    async with ReplicaCluster(tmp_path, 1, machine=StateMachine, snapshot_entries=5) as cluster:
        leader = await cluster.leader()
        await leader.restore_snapshot(pieces(as_backup(machine, machine.store.index)))
        for number in range(20):
            applied = await leader.apply(set_key("mine", str(number).encode()))
        await leader._until(lambda: leader._snapshot_work.index > 0, 5)
        await cluster.crash("server-1")
        again = await cluster.start("server-1")
        await again.wait_leader(5)
        assert (await again.apply(set_key("mine", b"more"))).index > applied.index


async def test_a_backup_that_the_servers_could_not_read_changes_nothing(tmp_path: Path) -> None:
    encoder = SnapshotEncoder(SnapshotHeader(9, 1, {}, 0.0))
    whole_but_strange = [encoder.start(), encoder.chunk(b"\x92\xa5other\x80"), encoder.finish()]
    async with ReplicaCluster(tmp_path, 3, machine=StateMachine) as cluster:
        leader = await cluster.leader()
        await leader.apply(set_key("mine", b"1"))
        with pytest.raises(SnapshotDamaged):
            await leader.restore_snapshot(pieces(whole_but_strange))
        await leader.apply(set_key("mine", b"2"))
        assert list(kv(leader)) == ["mine"]
        assert cluster.failures.empty()


async def test_a_journal_whose_snapshot_is_lost_is_refused(tmp_path: Path) -> None:
    async with ReplicaCluster(tmp_path, 1, machine=StateMachine, snapshot_entries=2_100) as cluster:
        leader = await cluster.leader()
        await asyncio.gather(*(leader.apply(set_key(f"k{number}", b"v")) for number in range(2_500)))
        await leader._until(lambda: leader.status().first_index > 0 and not leader._journal.dirty, 10)
        await cluster.crash("server-1")
        for file in (tmp_path / "server-1" / "snapshots").iterdir():
            file.unlink()
        replica = cluster.make("server-1")
        with pytest.raises(JournalDamaged, match="no snapshot reaches"):
            await replica.start()
        replica._journal.close()
        await replica._syncs.close()
