"""The marker of a server that lost its raft data: whatever crashes when, it neither founds nor votes again."""

from __future__ import annotations

from pathlib import Path

import pytest

from node.rejoin import JOIN, LEAVE, Marker, MarkerDamaged, RejoinMarker
from raftstate.errors import JournalFailed, RaftError, Stopped
from tests.support.raft_cluster import ReplicaCluster
from tests.support.raft_machine import command
from tests.support.rpc import eventually
from tests.support.simdisk import SimCrash, SimDisk

DATA = Path("/data")


def a_disk(seed: int) -> SimDisk:
    """One that holds raft data: to a disk of names a directory is a name as any other."""
    return SimDisk.of({"/data/raft": b"votes and entries"}, seed)


def run_until_crash(disk: SimDisk, steps: int, *, power_stays: bool) -> bool:
    """Run the command, and end its process after so many changes, or the power; whether that came in its midst."""
    disk.crash_after(steps)
    end = disk.kill if power_stays else disk.crash
    try:
        RejoinMarker(disk, DATA).begin()
    except SimCrash:
        end()
        return True
    end()
    return False


@pytest.mark.parametrize("power_stays", [False, True])
@pytest.mark.parametrize("seed", range(25))
def test_no_crash_leaves_a_directory_that_looks_like_a_founders(seed: int, *, power_stays: bool) -> None:
    steps = 0
    crashed = True
    while crashed:
        disk = a_disk(seed)
        crashed = run_until_crash(disk, steps, power_stays=power_stays)
        marker = RejoinMarker(disk, DATA)
        for later in range(30):  # the start that follows crashes as well, ever later, until it gets through
            disk.crash_after(later)
            try:
                found = marker.resume()
            except SimCrash:
                disk.crash()
                continue
            disk.crash()
            break
        else:
            raise AssertionError("it never got through")
        names = disk.listdir("/data")
        if found is None:
            assert crashed
            assert disk.read("/data/raft") == b"votes and entries", "nothing happened yet"
        else:
            assert found.stage == LEAVE
            assert RejoinMarker(disk, DATA).read() == found, "it is durable before raft may start"
            assert "raft" not in names
            assert disk.read(f"/data/{found.aside}") == b"votes and entries"
        steps += 1
    assert steps > 5


def test_the_last_step_is_durable_and_stays() -> None:
    for steps in range(6):
        disk = a_disk(steps)
        marker = RejoinMarker(disk, DATA)
        assert marker.begin() == DATA / "raft.damaged-1"
        disk.crash_after(steps)
        try:
            marker.left()
        except SimCrash:
            disk.crash()
            found = marker.resume()
            assert found is not None
            assert found.stage in (LEAVE, JOIN)
            marker.left()
        disk.crash()
        assert marker.resume() == Marker(JOIN, "raft.damaged-1")
        # Damaged once more, later: what was kept the first time is not overwritten.
        disk.create("/data/raft").close()
        assert marker.begin() == DATA / "raft.damaged-2"
        assert marker.resume() == Marker(LEAVE, "raft.damaged-2")


def test_data_that_is_lost_altogether_is_no_hindrance() -> None:
    disk = SimDisk.of({"/data/lock": b""})
    marker = RejoinMarker(disk, DATA)
    assert marker.begin() is None
    assert marker.resume() == Marker(LEAVE)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"null", b'{"Stage": "vote"}', b'{"Stage": "leave", "Aside": "../x"}', b"\xff"]
)
def test_a_marker_that_cannot_be_read_stops_the_start(content: bytes) -> None:
    marker = RejoinMarker(SimDisk.of({"/data/raft-rejoin": content}), DATA)
    with pytest.raises(MarkerDamaged, match="lictor operator raft recover"):
        marker.resume()
    marker.begin()
    assert marker.resume() == Marker(LEAVE)


async def test_a_replica_that_never_started_closes_its_journal(tmp_path: Path) -> None:
    cluster = ReplicaCluster(tmp_path, 3)
    replica = cluster.make("server-1")
    await replica.stop()
    with pytest.raises(Stopped):
        replica.status()
    with pytest.raises(JournalFailed, match="closed"):
        _append(replica)


def _append(replica: object) -> None:
    journal = replica._journal  # type: ignore[attr-defined]
    journal.add(b"\x01", 0, 0)
    group = journal.take_pending()
    assert group is not None
    group.sync()


async def test_a_removal_counts_once_it_is_committed(tmp_path: Path) -> None:
    """Asked again while the first removal is in the leader's log only: 'it is gone' would be a promise too many."""
    async with ReplicaCluster(tmp_path, 3) as cluster:
        leader = await cluster.leader()
        await leader.apply(command("r1", "k", "v"))
        gone, other = [name for name in cluster.names if name != leader.id]
        cluster.wire.cut |= {(leader.id, gone), (leader.id, other)}
        core = leader._running_core()
        core.change_members(lambda members: members.without(gone), lambda value, error: None)
        leader._poke()
        assert leader._running_core().members.get(gone) is None
        with pytest.raises(RaftError, match=r"not the raft leader|did not get there"):
            await leader.remove_server(gone, timeout_s=0.1)
        cluster.wire.cut.clear()
        new = await cluster.leader()
        await new.remove_server(gone, timeout_s=5)
        assert new._running_core().membership_index <= new._running_core().commit
        await eventually(lambda: len(new.members()) == 2)
