"""The journal's interface and its behaviour on disks that fail."""

from __future__ import annotations

import os
import random
import stat
import threading
from pathlib import Path

import pytest

from raftstate.disk import RealDisk
from raftstate.errors import JournalDamaged, JournalFailed
from raftstate.journal import Journal
from raftstate.journal_format import segment_name
from tests.support.journal_model import OPERATIONS, JournalRun, state_of
from tests.support.simdisk import SimCrash, SimDisk


def journal(disk: SimDisk, **options: int) -> Journal:
    return Journal(disk, "/raft", entropy=bytes, **options)


def filled(disk: SimDisk, entries: int = 10, **options: int) -> Journal:
    log = journal(disk, **options)
    for index in range(1, entries + 1):
        log.add(b"command %d" % index, index, 1)
        sync(log)
    return log


def sync(log: Journal) -> None:
    pending = log.take_pending()
    assert pending is not None
    pending.sync()


def test_new_journal_is_empty_and_clean() -> None:
    log = journal(SimDisk())
    assert (len(log), log.first_index, log.last_index, log.durable_index) == (0, 0, 0, 0)
    assert (log.getCurrentTerm(), log.getVotedForNodeId(), log.getRaftCommitIndex()) == (0, None, 1)
    assert not log.dirty
    assert log.take_pending() is None


def test_positions_are_those_of_a_list() -> None:
    log = filled(SimDisk(), 5)
    assert log[0] == (b"command 1", 1, 1)
    assert log[-1] == (b"command 5", 5, 1)
    assert [entry[1] for entry in log[2:4]] == [3, 4]
    log.deleteEntriesTo(2)
    assert [entry[1] for entry in log[:]] == [3, 4, 5]
    log.deleteEntriesFrom(1)
    assert [entry[1] for entry in log[:]] == [3]
    log.deleteEntriesFrom(7)
    assert len(log) == 1


def test_a_gap_is_refused() -> None:
    log = filled(SimDisk(), 2)
    with pytest.raises(ValueError, match="entry 4 does not follow entry 2"):
        log.add(b"", 4, 1)
    assert log.last_index == 2
    assert not log.dirty


def test_durable_index_moves_only_with_the_sync() -> None:
    log = filled(SimDisk(), 3)
    log.add(b"", 4, 1)
    assert (log.durable_index, log.dirty) == (3, True)
    pending = log.take_pending()
    assert pending is not None
    log.add(b"", 5, 1)
    assert (log.durable_index, log.dirty) == (3, True)
    pending.sync()
    assert (log.durable_index, log.dirty) == (4, True)
    sync(log)
    assert (log.durable_index, log.dirty) == (5, False)


def test_conflict_found_during_a_sync_takes_the_claim_back() -> None:
    log = filled(SimDisk(), 3)
    log.add(b"old", 4, 1)
    pending = log.take_pending()
    assert pending is not None
    log.deleteEntriesFrom(2)
    log.add(b"new", 3, 2)
    pending.sync()
    assert log.durable_index == 2
    sync(log)
    assert log.durable_index == 3


def test_term_and_vote_are_durable_with_the_sync() -> None:
    disk = SimDisk()
    log = journal(disk)
    log.setCurrentTerm(7, "server-2")
    assert (log.durable_term, log.durable_voted_for) == (0, None)
    sync(log)
    assert (log.durable_term, log.durable_voted_for) == (7, "server-2")
    disk.crash()
    again = journal(disk)
    assert (again.getCurrentTerm(), again.getVotedForNodeId()) == (7, "server-2")
    again.setCurrentTerm(7, "server-2")
    assert not again.dirty


def test_commit_index_is_a_hint_that_never_asks_for_a_sync() -> None:
    disk = SimDisk()
    log = filled(disk, 3)
    log.setRaftCommitIndex(3)
    assert not log.dirty
    log.add(b"", 4, 1)
    sync(log)
    log.close()
    assert journal(disk).getRaftCommitIndex() == 3


def test_groups_are_synced_in_order_and_once() -> None:
    log = filled(SimDisk(), 1)
    log.add(b"", 2, 1)
    first = log.take_pending()
    log.add(b"", 3, 1)
    second = log.take_pending()
    assert first is not None
    assert second is not None
    with pytest.raises(RuntimeError, match="in the order"):
        second.sync()
    first.sync()
    with pytest.raises(RuntimeError, match="once each"):
        first.sync()
    second.sync()


def test_one_group_is_one_sync() -> None:
    disk = SimDisk()
    log = filled(disk, 1)
    before = disk.syncs
    for index in range(2, 102):
        log.add(b"x" * 100, index, 1)
    log.setCurrentTerm(2, "a")
    sync(log)
    assert disk.syncs == before + 1


def test_compaction_drops_whole_segments_and_keeps_the_base() -> None:
    disk = SimDisk()
    log = filled(disk, 60, segment_bytes=1000)
    before = disk.listdir("/raft")
    log.compact_to(50)
    sync(log)
    assert (log.first_index, log[0]) == (50, (b"command 50", 50, 1))
    after = disk.listdir("/raft")
    assert 1 <= len(after) < len(before)
    assert set(after) < set(before)
    log.close()
    assert state_of(journal(disk)) == state_of(log)


def test_compaction_above_the_log_is_an_error_and_below_the_base_nothing() -> None:
    log = filled(SimDisk(), 3)
    with pytest.raises(ValueError, match="the log ends at 3"):
        log.compact_to(4)
    log.compact_to(1)
    log.compact_to(0)
    assert not log.dirty


def test_reset_restarts_the_log_behind_a_snapshot() -> None:
    disk = SimDisk()
    log = filled(disk, 30, segment_bytes=400)
    log.setCurrentTerm(9, None)
    log.reset_to(1000, 8)
    log.add(b"next", 1001, 9)
    sync(log)
    assert log[:] == [(b"", 1000, 8), (b"next", 1001, 9)]
    assert len(disk.listdir("/raft")) == 1
    disk.crash()
    assert state_of(journal(disk)) == state_of(log)


def test_failed_sync_ends_the_journal_for_good() -> None:
    disk = SimDisk()
    log = filled(disk, 3)
    log.add(b"lost", 4, 1)
    pending = log.take_pending()
    assert pending is not None
    disk.fail_next_sync()
    syncs = disk.syncs
    with pytest.raises(JournalFailed, match="this server stops"):
        pending.sync()
    assert log.durable_index == 3
    with pytest.raises(JournalFailed):
        pending.sync()
    with pytest.raises(JournalFailed):
        log.take_pending()
    log.close()
    assert disk.syncs == syncs  # it is never tried again


def test_what_a_failed_sync_left_in_the_cache_is_not_believed() -> None:
    """After a failed fsync the kernel calls the pages clean: a restart reads them, and a power cut loses them."""
    disk = SimDisk()
    log = filled(disk, 3)
    log.add(b"in the cache only", 4, 1)
    disk.fail_next_sync()
    with pytest.raises(JournalFailed):
        sync(log)
    restarted = journal(disk)  # the process restarts; the machine stays up
    assert restarted.last_index == restarted.durable_index == 4
    restarted.close()
    disk.crash()
    assert journal(disk).last_index == 4


def test_full_disk_stops_the_journal_and_a_restart_finds_what_was_synced() -> None:
    disk = SimDisk()
    log = filled(disk, 3)
    disk.capacity = sum(map(len, disk.snapshot().values())) + 30
    log.add(b"x" * 100, 4, 1)
    with pytest.raises(JournalFailed, match="No space left"):
        sync(log)
    log.close()
    disk.capacity = None
    assert journal(disk).last_index == 3


def test_missing_segment_is_refused() -> None:
    disk = SimDisk()
    filled(disk, 30, segment_bytes=400).close()
    disk.remove("/raft/" + segment_name(3))
    with pytest.raises(JournalDamaged, match="is missing in /raft/0000000000000003"):
        journal(disk)


def test_newest_segment_that_is_missing_is_refused() -> None:
    """Without it the log would only seem shorter: what was acknowledged last, perhaps a vote, would be forgotten."""
    disk = SimDisk()
    filled(disk, 30, segment_bytes=400).close()
    newest = disk.listdir("/raft")[-1]
    disk.remove("/raft/" + newest)
    before = disk.snapshot()
    with pytest.raises(JournalDamaged, match=f"is missing in /raft/{newest}.*lictor operator raft recover"):
        journal(disk)
    assert disk.snapshot() == before


def test_newest_segment_whose_header_is_damaged_is_refused_even_before_it_holds_a_certificate() -> None:
    disk = SimDisk()
    log = filled(disk, 30, segment_bytes=400)
    names = disk.listdir("/raft")
    while disk.listdir("/raft") == names:
        log.add(b"x" * 50, log.last_index + 1, 1)
        sync(log)
    newest = "/raft/" + disk.listdir("/raft")[-1]
    disk.cut(newest, disk.read(newest).index(b"\x9dCRT"))
    disk.flip(newest, 20)
    with pytest.raises(JournalDamaged, match="the header fails its checksum"):
        journal(disk)


@pytest.mark.parametrize("steps", range(8))
def test_segment_that_was_never_durable_is_not_missed(steps: int) -> None:
    for seed in range(20):
        disk = SimDisk(seed)
        log = filled(disk, 30, segment_bytes=400)
        disk.crash_after(steps)
        synced = 30
        try:
            while True:
                log.add(b"x" * 50, synced + 1, 1)
                sync(log)
                synced += 1
        except SimCrash:
            pass
        disk.crash()
        assert journal(disk).last_index >= synced


def test_segment_of_a_later_format_is_refused() -> None:
    disk = SimDisk()
    filled(disk, 3).close()
    disk.flip("/raft/" + segment_name(1), 8, 0x02)
    with pytest.raises(JournalDamaged, match="format version 3"):
        journal(disk)


def test_damage_changes_nothing_on_disk() -> None:
    disk = SimDisk()
    filled(disk, 30, segment_bytes=400).close()
    disk.flip("/raft/" + segment_name(2), 200)
    before = disk.snapshot()
    with pytest.raises(JournalDamaged, match="lictor operator raft recover"):
        journal(disk)
    assert disk.snapshot() == before


def test_torn_segment_that_was_being_made_is_set_aside(caplog: pytest.LogCaptureFixture) -> None:
    disk = SimDisk()
    filled(disk, 30, segment_bytes=400).close()
    number = len(disk.listdir("/raft")) + 1
    file = disk.create("/raft/" + segment_name(number))
    file.append(b"LICTORJ\n\x01")
    assert journal(disk).last_index == 30
    assert "cut 9 bytes" in caplog.text


def test_certificate_in_a_payload_certifies_nothing() -> None:
    """Whoever may write a value must not be able to make a torn tail look like damage."""
    disk = SimDisk(capacity=1 << 20)  # without room ahead, so that the file ends with the journal
    log = filled(disk, 3)
    forged = disk.read("/raft/" + segment_name(1))[-56:]
    log.add(forged * 3, 4, 1)
    log.add(b"", 5, 1)
    sync(log)
    path = "/raft/" + segment_name(1)
    before = disk.size(path)
    disk.cut(path, before - 60)
    assert journal(disk).last_index == 4


def sync_beside(disk: SimDisk, log: Journal) -> None:
    """As the event loop does it."""
    pending = log.take_pending()
    assert pending is not None
    file = pending.write()
    assert file >= 0
    disk.fdatasync(file)
    pending.synced()


def damaged_last_entry(disk: SimDisk, last: bytes) -> SimDisk:
    """A copy of the disk, as a kill leaves it, with one byte of that entry flipped."""
    path = "/raft/" + segment_name(1)
    copy = SimDisk.of(disk.snapshot())
    copy.flip(path, disk.read(path).rindex(last), 1)
    return copy


def test_a_group_that_the_loop_wrote_is_certified_by_the_group_behind_it() -> None:
    disk = SimDisk()
    log = filled(disk, 1)
    for number, index in ((b"second", 2), (b"third", 3), (b"fourth", 4)):
        log.add(number, index, 1)
        sync_beside(disk, log)
    with pytest.raises(JournalDamaged):
        journal(damaged_last_entry(disk, b"third"))
    # Of the last group nothing says yet that it was ever whole on the disk.
    assert journal(damaged_last_entry(disk, b"fourth")).last_index == 3


@pytest.mark.parametrize("end", ["rest", "close"])
def test_a_group_with_none_behind_it_is_certified_when_there_is_time(end: str) -> None:
    disk = SimDisk()
    log = filled(disk, 1)
    log.add(b"second", 2, 1)
    sync_beside(disk, log)
    getattr(log, end)()
    with pytest.raises(JournalDamaged):
        journal(damaged_last_entry(disk, b"second"))


def test_a_rest_writes_once_and_never_into_a_group_under_way() -> None:
    disk = SimDisk()
    log = filled(disk, 1)
    log.add(b"second", 2, 1)
    sync_beside(disk, log)
    log.rest()
    before = disk.snapshot()
    log.rest()
    assert disk.snapshot() == before
    log.add(b"third", 3, 1)
    pending = log.take_pending()
    assert pending is not None
    file = pending.write()
    before = disk.snapshot()
    log.rest()
    assert disk.snapshot() == before
    disk.fdatasync(file)
    pending.synced()


def test_a_disk_without_room_for_a_certificate_stops_the_journal() -> None:
    disk = SimDisk()
    log = filled(disk, 1)
    log.add(b"second", 2, 1)
    sync_beside(disk, log)
    disk.capacity = 0
    with pytest.raises(JournalFailed):
        log.rest()
    assert log.failed is not None


def test_room_ahead_is_no_torn_write_and_goes_when_closed(tmp_path: Path) -> None:
    directory = str(tmp_path / "raft")
    path = tmp_path / "raft" / segment_name(1)
    log = Journal(RealDisk(), directory)
    log.add(b"first", 1, 1)
    sync(log)
    assert path.stat().st_size > 1 << 20
    killed = Journal(RealDisk(), directory)  # as after a kill: nobody closed the file
    assert (killed.torn_bytes, killed.last_index) == (0, 1)
    killed.add(b"second", 2, 1)
    sync(killed)
    killed.close()
    assert path.stat().st_size < 1 << 10
    again = Journal(RealDisk(), directory)
    assert [entry[0] for entry in again[:]] == [b"first", b"second"]
    again.close()
    log._writer._file.close()  # type: ignore[union-attr]


def test_crash_during_opening_loses_nothing() -> None:
    disk = SimDisk(3)
    filled(disk, 20, segment_bytes=400)
    for steps in range(12):
        disk.crash_after(steps)
        try:
            journal(disk)
        except SimCrash:
            pass
        disk.crash()
        assert journal(disk).last_index == 20


def test_real_disk_behaves_as_the_simulated_one(tmp_path: Path) -> None:
    rng = random.Random(5)
    disk = RealDisk()
    run = JournalRun(disk, rng=rng, directory=str(tmp_path / "deep" / "raft"))  # type: ignore[arg-type]
    steps = [name for name in OPERATIONS if name != "crash"]
    for _ in range(300):
        operation, number = rng.choice(steps), rng.randrange(10_000)
        run.step(operation, number * 5 + 1 if operation == "sync" else number)
    while run.taken:
        run.taken.pop(0)[0].sync()
    run.journal.close()
    assert state_of(Journal(disk, run.directory)) == state_of(run.journal)
    modes = {stat.S_IMODE(os.stat(os.path.join(run.directory, name)).st_mode) for name in os.listdir(run.directory)}
    assert modes == {0o600}
    assert stat.S_IMODE(os.stat(run.directory).st_mode) == 0o700


def test_the_loop_goes_on_while_a_group_is_synced(tmp_path: Path) -> None:
    log = Journal(RealDisk(), str(tmp_path / "raft"), segment_bytes=4000)
    failures: list[BaseException] = []

    def sync_all(pendings: list[object]) -> None:
        try:
            for pending in pendings:
                pending.sync()  # type: ignore[attr-defined]
        except BaseException as error:  # noqa: BLE001 - shown by the assertion below
            failures.append(error)

    index = 0
    thread: threading.Thread | None = None
    for _ in range(40):
        for _ in range(20):
            index += 1
            log.add(b"x" * 50, index, 1)
        if index % 100 == 0:
            log.compact_to(index - 50)
        pending = log.take_pending()
        if thread is not None:
            thread.join()
        thread = threading.Thread(target=sync_all, args=([pending],))
        thread.start()
    assert thread is not None
    thread.join()
    assert not failures
    assert log.durable_index == index
    log.close()
    assert state_of(Journal(RealDisk(), str(tmp_path / "raft"))) == state_of(log)
