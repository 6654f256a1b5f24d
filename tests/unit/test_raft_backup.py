"""Backups through the log: of a log that was further, of the real state machine, and what is refused."""

from __future__ import annotations

import asyncio
import errno
import io
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from raftstate.errors import JournalDamaged, RaftError, SnapshotDamaged, TooBusy, UnknownOutcome
from raftstate.raft import RaftConfig
from raftstate.raft_backup import BEGIN, END, PART, VOID, RestoreInLog
from raftstate.snapshot_format import SnapshotEncoder, SnapshotHeader
from raftstate.state import commands as c
from raftstate.state.machine import StateMachine
from tests.support.raft_cluster import ReplicaCluster

AT = "2026-01-01T00:00:00Z"
PATIENT = RaftConfig(heartbeat_s=0.1, election_timeout_min_s=1.5, election_timeout_max_s=2.5)
"""Where the test keeps the loop so busy that a short timeout would cost leadership."""


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


@pytest.mark.parametrize("what", ["its format is 3", "it holds the table 'moods'"])
async def test_a_backup_of_a_later_version_changes_nothing_and_says_what_it_takes(tmp_path: Path, what: str) -> None:
    chunks = list(far_machine(10).snapshot())
    if "format" in what:
        name, header = msgspec.msgpack.decode(chunks[0])
        chunks[0] = msgspec.msgpack.encode([name, {**header, "format": 3}])
    else:
        chunks.insert(1, msgspec.msgpack.encode(["moods", ["good"]]))
    encoder = SnapshotEncoder(SnapshotHeader(9, 1, {}, 0.0))
    framed = [encoder.start(), *(encoder.chunk(chunk) for chunk in chunks), encoder.finish()]
    async with ReplicaCluster(tmp_path, 1, machine=StateMachine) as cluster:
        leader = await cluster.leader()
        await leader.apply(set_key("mine", b"1"))
        with pytest.raises(SnapshotDamaged, match=f"{what}.*use a newer version"):
            await leader.restore_snapshot(pieces(framed))
        assert list(kv(leader)) == ["mine"]
        await leader.apply(set_key("mine", b"2"))


async def test_of_two_restores_at_once_one_is_refused_and_none_is_mixed(tmp_path: Path) -> None:
    machines = [far_machine(3_000, 5_000_000), far_machine(2_000, 9_000_000)]
    async with ReplicaCluster(tmp_path, 3, config=PATIENT, machine=StateMachine) as cluster:
        leader = await cluster.leader(timeout_s=10)
        outcomes = await asyncio.gather(
            *(leader.restore_snapshot(pieces(as_backup(machine, machine.store.index))) for machine in machines),
            return_exceptions=True,
        )
        assert cluster.failures.empty(), "a mixture of two backups can be read by no server, now or after a restart"
        assert [type(outcome) for outcome in outcomes if outcome is not None] == [TooBusy]
        assert kv(leader) == machines[outcomes.index(None)].store.kv.rows
        await leader.restore_snapshot(pieces(as_backup(machines[0], machines[0].store.index)))
        assert kv(leader) == machines[0].store.kv.rows


async def restore_until_it_is_in_the_log(leader: Any, machine: StateMachine) -> asyncio.Task[None]:
    task = asyncio.create_task(leader.restore_snapshot(pieces(as_backup(machine, machine.store.index))))
    await leader._until(lambda: leader._core.backup._fresh is not None, 5)
    return task


async def test_a_restore_that_is_given_up_stops_no_snapshots_and_no_later_restore(tmp_path: Path) -> None:
    machine = far_machine()
    async with ReplicaCluster(tmp_path, 1, machine=StateMachine, snapshot_entries=50) as cluster:
        leader = await cluster.leader()
        task = await restore_until_it_is_in_the_log(leader, machine)
        task.cancel()  # whoever asked for it has hung up
        await asyncio.wait([task])
        assert task.cancelled()
        for number in range(120):
            await leader.apply(set_key(f"k{number}", b"v"))
        assert len(kv(leader)) == 120
        await leader._until(lambda: leader._snapshot_work.index > 60, 5)
        await leader.restore_snapshot(pieces(as_backup(machine, machine.store.index)))
        assert kv(leader) == machine.store.kv.rows


async def test_a_leader_lost_in_the_midst_of_a_restore_leaves_the_old_state_and_no_trace(tmp_path: Path) -> None:
    machine = far_machine()
    async with ReplicaCluster(tmp_path, 3, machine=StateMachine, snapshot_entries=50) as cluster:
        leader = await cluster.leader()
        await leader.apply(set_key("mine", b"1"))
        task = await restore_until_it_is_in_the_log(leader, machine)
        cluster.wire.isolate(leader.id)
        with pytest.raises(UnknownOutcome):
            await task
        cluster.wire.cut.clear()
        new = await cluster.leader()
        for number in range(120):
            applied = await new.apply(set_key(f"k{number}", b"v"))
        for replica in cluster.replicas.values():
            await replica.wait_applied(applied.index)
            assert len(kv(replica)) == 121
            await replica._until(lambda replica=replica: replica._snapshot_work.index > 60, 5)  # type: ignore[misc]
        assert len({replica.machine.digest() for replica in cluster.replicas.values()}) == 1  # type: ignore[attr-defined]


async def test_under_load_every_server_changes_states_in_one_step_and_one_that_crashed_midway_too(
    tmp_path: Path,
) -> None:
    machine = far_machine(4_000)
    async with ReplicaCluster(tmp_path, 3, config=PATIENT, machine=StateMachine, snapshot_entries=30) as cluster:
        leader = await cluster.leader(timeout_s=10)
        for number in range(60):
            await leader.apply(set_key(f"old/{number}", b"v"))
        stopping = False
        written: list[Any] = []

        async def write(name: str) -> None:
            while not stopping:
                written.append(await leader.apply(set_key(f"new/{name}", str(len(written)).encode())))

        def part_of_both(replica: Any) -> bool:
            rows = kv(replica)
            return ("old/7" in rows) == ("app/00007" in rows) or len(rows) < 60

        mixed: list[str] = []

        async def watch() -> None:
            while not stopping:
                # One that starts anew reads its log first, and is empty until then.
                mixed.extend(name for name in (leader.id, followers[1]) if part_of_both(cluster.replicas[name]))
                await asyncio.sleep(0)

        followers = [name for name in cluster.names if name != leader.id]
        tasks = [asyncio.create_task(write(name)) for name in "abcd"]
        task = await restore_until_it_is_in_the_log(leader, machine)
        await cluster.crash(followers[0])
        watching = asyncio.create_task(watch())
        await task
        restored_at = leader.machine.store.index  # type: ignore[attr-defined]
        await leader._until(lambda: written[-1].index > restored_at + 50, 10)
        await cluster.start(followers[0])
        await cluster.replicas[followers[0]].wait_applied(restored_at, 10)
        stopping = True
        await asyncio.gather(*tasks, watching)
        last = await leader.apply(set_key("last", b"1"))
        for replica in cluster.replicas.values():
            await replica.wait_applied(last.index)
            assert kv(replica)["app/03999"].modify_index == 5_003_999
        assert len({replica.machine.digest() for replica in cluster.replicas.values()}) == 1  # type: ignore[attr-defined]
        assert mixed == []
        assert cluster.failures.empty()


async def test_what_is_no_backup_is_refused_with_its_first_bytes(tmp_path: Path) -> None:
    taken = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal taken
        while True:
            taken += 1
            yield bytes(1 << 20)

    async with ReplicaCluster(tmp_path, 1, machine=StateMachine) as cluster:
        leader = await cluster.leader()
        with pytest.raises(SnapshotDamaged):
            await leader.restore_snapshot(endless())
        assert taken == 1


async def test_a_backup_for_which_there_is_no_room_is_refused_with_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full(io.BytesIO):
        def __init__(self, _bytes_max: int) -> None:
            super().__init__()

        def write(self, _data: Any) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    machine = far_machine(10)
    async with ReplicaCluster(tmp_path, 1, machine=StateMachine) as cluster:
        leader = await cluster.leader()
        with monkeypatch.context() as patch:
            patch.setattr("tempfile.SpooledTemporaryFile", Full)
            with pytest.raises(RaftError, match=r"No space left.*nothing was changed: make room there"):
                await leader.restore_snapshot(pieces(as_backup(machine, machine.store.index)))
        await leader.restore_snapshot(pieces(as_backup(machine, machine.store.index)))
        assert kv(leader) == machine.store.kv.rows


def test_what_was_made_void_ends_in_nothing() -> None:
    machine, target = far_machine(10), StateMachine()
    replaced: list[Any] = []
    inside = RestoreInLog(target.restorer, replaced.append)
    chunks = list(machine.snapshot())
    inside.apply(1, 1, BEGIN)
    for number, chunk in enumerate(chunks):
        inside.apply(2 + number, 1, PART + b"\x01" + chunk)
    assert inside.under_way(1)
    inside.apply(50, 1, VOID)
    assert not inside.under_way(1)
    assert inside.apply(51, 1, END) is False
    assert not replaced
    assert not target.store.kv.rows


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
