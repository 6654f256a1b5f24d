"""Replica on a real loop with a real journal: what the rest of the program relies on."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from raftstate.disk_aio import DiskAio, SyncDone
from raftstate.errors import (
    CommandTooLarge,
    MembershipRefused,
    NoQuorum,
    NotLeader,
    RaftError,
    SnapshotDamaged,
    TooBusy,
    TransferFailed,
    UnknownOutcome,
)
from raftstate.raft import Members, RaftConfig
from raftstate.raft_election import CANDIDATE
from raftstate.replica import Replica
from tests.support.promises import PATIENCE_S, Since
from tests.support.raft_cluster import FAST, ReplicaCluster
from tests.support.raft_machine import RegisterMachine, command


def registers(replica: Replica) -> dict[str, str]:
    machine = replica.machine
    assert isinstance(machine, RegisterMachine)
    return machine.registers


async def turns_until(true: Callable[[], bool]) -> None:
    """Look in every turn of the loop, where what is looked for may be over in the next."""
    async with asyncio.timeout(PATIENCE_S):
        while True:
            if true():
                return
            await asyncio.sleep(0)


async def test_a_write_is_applied_on_every_server(tmp_path: Path) -> None:
    async with ReplicaCluster(tmp_path, 3) as cluster:
        applied = await cluster.apply(command("r1", "k", "v"))
        assert applied.value == "v"
        for replica in cluster.replicas.values():
            await replica.wait_applied(applied.index)
            assert registers(replica) == {"k": "v"}


async def test_writes_outlast_a_moment_in_which_the_machine_runs_nothing(tmp_path: Path) -> None:
    async with ReplicaCluster(tmp_path, 3) as cluster:
        for number in range(30):
            if number in (10, 20):
                time.sleep(1.0)  # noqa: ASYNC251 - no server of this loop runs meanwhile, and the leader steps down
            applied = await cluster.apply(command(f"r{number}", f"k{number % 3}", str(number)))
        for replica in cluster.replicas.values():
            await replica.wait_applied(applied.index)
            assert registers(replica) == {"k0": "27", "k1": "28", "k2": "29"}


async def test_a_single_server_serves(tmp_path: Path) -> None:
    async with ReplicaCluster(tmp_path, 1) as cluster:
        leader = await cluster.leader(timeout_s=1)
        await leader.apply(command("r1", "k", "v"))
        for mode in ("stale", "default", "consistent"):
            stamp = await leader.read_barrier(mode)  # type: ignore[arg-type]
            assert stamp.known_leader


async def test_a_follower_names_the_leader(tmp_path: Path) -> None:
    async with ReplicaCluster(tmp_path, 3) as cluster:
        leader = await cluster.leader()
        follower = next(replica for replica in cluster.replicas.values() if replica is not leader)
        await follower.wait_leader(2)
        with pytest.raises(NotLeader, match=leader.id):
            await follower.apply(command("r1", "k", "v"))
        with pytest.raises(NotLeader, match=leader.id):
            await follower.read_barrier("consistent")
        assert (await follower.read_barrier("stale")).known_leader


async def test_reads_share_rounds(tmp_path: Path) -> None:
    async with ReplicaCluster(tmp_path, 3) as cluster:
        leader = await cluster.leader()
        await leader.apply(command("r1", "k", "v"))
        before = leader._running_core()._reads.round  # type: ignore[union-attr]
        stamps = await asyncio.gather(*(leader.read_barrier("consistent") for _ in range(100)))
        after = leader._running_core()._reads.round  # type: ignore[union-attr]
        assert all(stamp.index >= 2 for stamp in stamps)
        assert after - before < 10


async def test_an_isolated_leader_answers_no_read_and_steps_down(tmp_path: Path) -> None:
    async with ReplicaCluster(tmp_path, 3) as cluster:
        leader = await cluster.leader()
        await leader.apply(command("r1", "k", "v"))
        cluster.wire.isolate(leader.id)
        with pytest.raises((NoQuorum, NotLeader)):
            await leader.read_barrier("consistent", timeout_s=2)
        with pytest.raises((UnknownOutcome, NotLeader)):
            await leader.apply(command("r2", "k", "w"), timeout_s=1)
        assert not leader.is_leader
        others = {name: replica for name, replica in cluster.replicas.items() if replica is not leader}
        cluster.wire.replicas = others
        new = await cluster.leader()
        await new.apply(command("r3", "k", "x"))
        cluster.wire.replicas = {**others, leader.id: leader}
        cluster.wire.cut.clear()
        await leader.wait_leader(2)
        index = (await new.apply(command("r4", "k", "y"))).index
        await leader.wait_applied(index)
        assert registers(leader) == {"k": "y"}


async def test_bounds_are_kept(tmp_path: Path) -> None:
    config = RaftConfig(
        heartbeat_s=0.03,
        election_timeout_min_s=0.15,
        election_timeout_max_s=0.3,
        proposals_max=2,
        command_bytes_max=100,
    )
    async with ReplicaCluster(tmp_path, 3, config=config) as cluster:
        leader = await cluster.leader()
        with pytest.raises(CommandTooLarge, match="bound is 100"):
            await leader.apply(b"x" * 101)
        cluster.wire.isolate(leader.id)
        stuck = [asyncio.ensure_future(leader.apply(command(f"r{n}", "k", "v"), 1)) for n in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(TooBusy):
            await leader.apply(command("r9", "k", "v"))
        for outcome in await asyncio.gather(*stuck, return_exceptions=True):
            assert isinstance(outcome, UnknownOutcome)
        cluster.wire.cut.clear()


async def test_everything_acknowledged_survives_a_crash_of_all(tmp_path: Path) -> None:
    async with ReplicaCluster(tmp_path, 3) as cluster:
        for round_ in range(3):
            for number in range(20):
                await cluster.apply(command(f"{round_}.{number}", f"k{number}", str(round_)))
            for name in cluster.names:
                await cluster.crash(name)
            for name in cluster.names:
                await cluster.start(name)
        leader = await cluster.leader()
        await leader.read_barrier("consistent")
        assert registers(leader) == {f"k{number}": "2" for number in range(20)}


async def test_a_stale_read_shows_nothing_older_than_before_a_restart_of_all(tmp_path: Path) -> None:
    async with ReplicaCluster(tmp_path, 3) as cluster:
        leader = await cluster.leader()
        for number in range(20):
            applied = await leader.apply(command(f"{number}", "k", str(number)))
        for replica in cluster.replicas.values():
            await replica.wait_applied(applied.index)
        for name in cluster.names:
            await cluster.crash(name)
        for name in cluster.names:
            await cluster.start(name)
        for replica in cluster.replicas.values():
            stamp = await replica.read_barrier("stale")
            assert (stamp.known_leader, registers(replica)) == (True, {"k": "19"})
            assert stamp.index >= applied.index


async def test_without_a_leader_a_started_server_shows_what_its_journal_knows_to_be_committed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("raftstate.replica.START_WAIT_S", 0.2)
    async with ReplicaCluster(tmp_path, 3) as cluster:
        leader = await cluster.leader()
        for number in range(20):
            await leader.apply(command(f"{number}", "k", str(number)))
        for name in cluster.names:
            await cluster.crash(name)
        alone = await cluster.start(leader.id)
        stamp = await alone.read_barrier("stale")
        assert not stamp.known_leader
        # What was committed last is told to the disk with the next group.
        assert registers(alone) in ({"k": "18"}, {"k": "19"})
        async with asyncio.timeout(0.05):  # and the waiting is over
            await alone.read_barrier("stale")


async def test_a_far_behind_server_gets_a_snapshot(tmp_path: Path) -> None:
    config = RaftConfig(heartbeat_s=0.03, election_timeout_min_s=0.15, election_timeout_max_s=0.3, trailing_entries=5)
    async with ReplicaCluster(tmp_path, 3, config=config, snapshot_entries=50) as cluster:
        leader = await cluster.leader()
        behind = next(name for name in cluster.names if name != leader.id)
        await cluster.crash(behind)
        for number in range(300):
            applied = await cluster.apply(command(f"r{number}", f"k{number}", "v"))
        leader = await cluster.leader()
        assert leader.status().first_index > 100
        replica = await cluster.start(behind)
        await replica.wait_applied(applied.index)
        assert registers(replica) == registers(leader)
        assert replica.status().snapshot_index > 100
        # A restart begins at that snapshot.
        await cluster.crash(behind)
        replica = await cluster.start(behind)
        await replica.wait_applied(applied.index)
        assert registers(replica) == registers(leader)


@pytest.mark.parametrize("damaged", ["newest", "all"])
async def test_a_leader_whose_snapshot_has_rotted_makes_another_and_goes_on(tmp_path: Path, damaged: str) -> None:
    """What it holds in memory is well: it must neither stop nor wait for a restart that the damage would prevent."""
    config = RaftConfig(heartbeat_s=0.03, election_timeout_min_s=1.0, election_timeout_max_s=2.0, trailing_entries=5)
    async with ReplicaCluster(tmp_path, 3, config=config, snapshot_entries=50) as cluster:
        leader = await cluster.leader()
        behind = next(name for name in cluster.names if name != leader.id)
        await cluster.crash(behind)
        for number in range(300):
            applied = await leader.apply(command(f"r{number}", f"k{number}", "v" * 100))
        await leader._until(lambda: leader.status().first_index > 100 and not leader._snapshot_work._making, 5)
        files = sorted((tmp_path / leader.id / "snapshots").glob("*.snapshot"), reverse=True)
        for file in files[:1] if damaged == "newest" else files:
            data = bytearray(file.read_bytes())
            data[len(data) // 2] ^= 1
            file.write_bytes(data)
        replica = await cluster.start(behind)
        await replica.wait_applied(applied.index)
        assert registers(replica) == registers(leader)
        assert cluster.failures.empty()
        assert leader.is_leader


async def test_a_server_that_knows_no_members_keeps_the_peers_it_was_given(tmp_path: Path) -> None:
    cluster = ReplicaCluster(tmp_path, 1)
    given = {"server-2": "server-2:8300"}
    joining = cluster.make("server-1", bootstrap=Members())
    joining._peers.set_peers(given)
    await joining.start()
    joining._after_pump()  # only a log that names the members would name its peers
    assert joining._peers.addresses == given  # type: ignore[attr-defined]
    await joining.stop()


async def test_servers_are_added_and_removed(tmp_path: Path) -> None:
    from raftstate.raft import Members

    async with ReplicaCluster(tmp_path, 3) as cluster:
        leader = await cluster.leader()
        for number in range(100):
            await leader.apply(command(f"r{number}", f"k{number}", "v"))
        joined = await cluster.start("server-4", bootstrap=Members())
        await leader.add_server("server-4", "server-4:8300", timeout_s=5)
        assert [member.id for member in leader.members() if member.voter] == [*cluster.names, "server-4"]
        index = (await leader.apply(command("after", "k", "v"))).index
        await joined.wait_applied(index)
        assert registers(joined) == registers(leader)
        await leader.remove_server("server-4")
        assert [member.id for member in leader.members()] == cluster.names
        await leader.remove_server(leader.id)
        rest = {name: replica for name, replica in cluster.replicas.items() if replica not in (leader, joined)}
        everyone, cluster.wire.replicas = cluster.wire.replicas, rest
        successor = await cluster.leader()
        await successor.apply(command("last", "k", "w"))
        assert [member.id for member in successor.members()] == sorted(rest)
        cluster.wire.replicas = everyone


@pytest.mark.parametrize("address", ["", "host", ":1", "host:", "host:x", "host:0", "host:65536"])
async def test_a_server_without_an_address_is_not_added(tmp_path: Path, address: str) -> None:
    async with ReplicaCluster(tmp_path, 1) as cluster:
        leader = await cluster.leader()
        with pytest.raises(MembershipRefused, match="host:port"):
            await leader.add_server("server-2", address, timeout_s=1)
        assert [member.id for member in leader.members()] == ["server-1"]


async def test_an_address_belongs_to_one_server(tmp_path: Path) -> None:
    async with ReplicaCluster(tmp_path, 3) as cluster:
        leader = await cluster.leader()
        with pytest.raises(MembershipRefused, match=r"server-1:8300 is the address of server-1.*remove-peer"):
            await leader.add_server("server-4", "server-1:8300", timeout_s=1)
        # A server that has moved keeps its name and its vote.
        await leader.add_server("server-1", "server-1:8301", timeout_s=5)
        assert leader.members()[0].address == "server-1:8301"
        assert leader.members()[0].voter


async def test_a_server_that_does_not_come_is_named_with_what_to_do(tmp_path: Path) -> None:
    async with ReplicaCluster(tmp_path, 1) as cluster:
        leader = await cluster.leader()
        with pytest.raises(
            NoQuorum, match=r"'server-9' is in the membership without a vote.*remove-peer -id server-9"
        ):
            await leader.add_server("server-9", "server-9:8300", timeout_s=0.2)
        await leader.apply(command("r1", "k", "v"))  # it has no vote, so nobody waits for it
        await leader.remove_server("server-9")


async def test_leadership_moves_without_a_gap(tmp_path: Path) -> None:
    async with ReplicaCluster(tmp_path, 3) as cluster:
        leader = await cluster.leader()
        target = next(name for name in cluster.names if name != leader.id)
        since = Since()
        await leader.transfer_leadership(target)
        assert not leader.is_leader
        assert leader.leader == target, "it is done when another leads, not when this one leads no more"
        new = cluster.replicas[target]
        await new.wait_leader(1)
        await new.apply(command("r1", "k", "v"))
        since.took(FAST.election_timeout_min_s, "a transfer, which waits for no election timeout,")


async def test_a_transfer_whose_target_loses_is_not_called_done(tmp_path: Path) -> None:
    async with ReplicaCluster(tmp_path, 3) as cluster:
        leader = await cluster.leader()
        target, other = (name for name in cluster.names if name != leader.id)
        core = cluster.replicas[target]._running_core()
        moving = asyncio.ensure_future(leader.transfer_leadership(target))
        await turns_until(lambda: core.role == CANDIDATE)
        # It asks for votes and hears none; the other can be elected by nobody, so it is the old leader that returns.
        cluster.wire.cut |= {(leader.id, target), (other, target), (target, other), (other, leader.id)}
        await turns_until(lambda: not leader.is_leader)
        cluster.wire.cut -= {(other, leader.id)}
        cluster.replicas[other]._running_core()._deadline += 60
        with pytest.raises(TransferFailed, match="leads again"):
            await moving
        cluster.wire.cut.clear()


@pytest.mark.parametrize("by_thread", [True, False])
async def test_a_failed_sync_stops_the_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, by_thread: bool
) -> None:
    async with ReplicaCluster(tmp_path, 3) as cluster:
        leader = await cluster.leader()

        def full(_fd: int) -> None:
            raise OSError(28, "No space left on device")

        def full_later(_self: DiskAio, _fd: int, done: SyncDone) -> None:
            asyncio.get_running_loop().call_soon(done, OSError(28, "No space left on device"))

        with monkeypatch.context() as patch:
            patch.setattr("raftstate.disk.SYNC_BESIDE", not by_thread)
            patch.setattr("os.fdatasync", full)
            patch.setattr(DiskAio, "sync", full_later)
            with pytest.raises(RaftError):
                await leader.apply(command("r1", "k", "v"))
            async with asyncio.timeout(PATIENCE_S):
                failure = await cluster.failures.get()
        assert "disk" in str(failure)
        with pytest.raises(RaftError, match="takes no part"):
            await cluster.replicas[leader.id].apply(command("r2", "k", "v"))
        for replica in cluster.replicas.values():
            replica._journal.close()


async def test_a_backup_replaces_the_state_on_every_server(tmp_path: Path) -> None:
    async with ReplicaCluster(tmp_path / "old", 3) as cluster:
        leader = await cluster.leader()
        for number in range(50):
            await leader.apply(command(f"r{number}", f"k{number}", "old" * 100))
        kept = dict(registers(leader))
        backup = [piece async for piece in leader.save_snapshot()]

    async def pieces(data: list[bytes]) -> AsyncIterator[bytes]:
        for piece in data:
            yield piece

    async with ReplicaCluster(tmp_path / "new", 3) as cluster:
        leader = await cluster.leader()
        await leader.apply(command("x", "k", "new"))
        with pytest.raises(SnapshotDamaged):
            await leader.restore_snapshot(pieces(backup[:-1]))
        assert registers(leader) == {"k": "new"}
        await leader.restore_snapshot(pieces(backup))
        applied = await leader.apply(command("y", "k", "after"))
        assert applied.index > 50
        for replica in cluster.replicas.values():
            await replica.wait_applied(applied.index)
            assert registers(replica) == {**kept, "k": "after"}
        for name in cluster.names:
            await cluster.crash(name)
        for name in cluster.names:
            await cluster.start(name)
        leader = await cluster.leader()
        assert registers(leader) == {**kept, "k": "after"}
