"""GroupSync: the kernel's way and the thread's make the same promise, and a slow disk gets the thread."""

from __future__ import annotations

import asyncio
import errno
import os
import threading
from pathlib import Path

import pytest

from raftstate import disk, journal_sync
from raftstate.disk import RealDisk
from raftstate.disk_aio import DiskAio
from raftstate.errors import JournalFailed
from raftstate.journal import Journal
from raftstate.journal_sync import Group, GroupSync
from raftstate.loop_load import LoopLoad


class Spy:
    """A group that notes how it was made durable."""

    def __init__(self, group: Group | None = None, file: int = -1) -> None:
        self.group, self.file = group, file
        self.steps: list[str] = []
        self.error: OSError | None = None

    def sync(self) -> None:
        self.steps.append("sync" if threading.current_thread() is not threading.main_thread() else "sync on the loop")
        if self.group is not None:
            self.group.sync()

    def write(self) -> int:
        self.steps.append("write")
        return self.file if self.group is None else self.group.write()

    def synced(self, error: OSError | None) -> None:
        self.steps.append("synced")
        self.error = error
        if self.group is not None:
            self.group.synced(error)


async def run(syncs: GroupSync, group: Group) -> BaseException | None:
    done: asyncio.Future[BaseException | None] = asyncio.get_running_loop().create_future()
    syncs.run(group, done.set_result)
    assert not done.done(), "the outcome comes in a later turn of the loop"
    return await asyncio.wait_for(done, 10)


def take(journal: Journal, *payloads: bytes) -> Group:
    for payload in payloads:
        journal.add(payload, journal.last_index + 1, 1)
    pending = journal.take_pending()
    assert pending is not None
    return pending


async def test_small_groups_need_no_thread_and_are_durable(tmp_path: Path) -> None:
    try:
        DiskAio().close()
    except OSError as error:
        pytest.skip(f"this system has no asynchronous fdatasync: {error}")
    journal, syncs = Journal(RealDisk(), str(tmp_path / "raft")), GroupSync(LoopLoad())
    syncs.open()
    first = Spy(take(journal, b"makes the segment"))
    assert await run(syncs, first) is None
    assert first.steps == ["write", "sync"]
    for number in range(20):
        syncs._quick_from = 0.0  # whatever this machine's disk is like
        group = Spy(take(journal, b"a%d" % number, b"b"))
        assert journal.durable_index == journal.last_index - 2
        assert await run(syncs, group) is None
        assert group.steps == ["write", "synced"]
        assert journal.durable_index == journal.last_index
    syncs._quick_from = 0.0
    large = Spy(take(journal, b"x" * 200_000))
    assert await run(syncs, large) is None
    assert large.steps == ["write", "sync"]
    # As after kill -9: nobody closed the file.
    again = Journal(RealDisk(), str(tmp_path / "raft"))
    assert again[:] == journal[:]
    assert again.torn_bytes == 0
    again.close()
    await syncs.close()


async def test_without_the_kernels_way_a_thread_syncs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> DiskAio:
        raise OSError(errno.ENOSYS, "no such call")

    monkeypatch.setattr(journal_sync, "DiskAio", missing)
    journal, syncs = Journal(RealDisk(), str(tmp_path / "raft")), GroupSync(LoopLoad())
    syncs.open()
    for number in range(3):
        group = Spy(take(journal, b"%d" % number))
        assert await run(syncs, group) is None
        assert group.steps == ["sync"]
    assert journal.durable_index == 3
    await syncs.close(journal.close)


async def test_a_file_that_the_kernel_cannot_sync_so_is_synced_by_a_thread() -> None:
    """A pipe has no fdatasync at all: the error comes by either way, and nothing is called durable."""
    syncs = GroupSync(LoopLoad())
    syncs.open()
    ours, theirs = os.pipe()
    group = Spy(file=theirs)
    assert await run(syncs, group) is None
    assert group.error is not None
    assert group.error.errno == errno.EINVAL
    assert syncs._aio is None
    await syncs.close()
    os.close(ours)
    os.close(theirs)


async def test_a_sync_that_ends_in_whatever_way_but_its_own_promises_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_file: int) -> None:
        raise RuntimeError("not the disk's word")

    monkeypatch.setattr(disk, "sync_data", broken)
    syncs = GroupSync(LoopLoad())
    syncs.open()
    ours, theirs = os.pipe()  # which the kernel's way refuses, so a thread calls `sync_data`
    group = Spy(file=theirs)
    await run(syncs, group)
    assert group.error is not None
    assert group.error.errno == errno.EIO
    await syncs.close()
    os.close(ours)
    os.close(theirs)


@pytest.mark.parametrize("way", ["sync", "write"])
async def test_a_failed_group_is_reported_and_the_journal_takes_no_more(tmp_path: Path, way: str) -> None:
    journal, syncs = Journal(RealDisk(), str(tmp_path / "raft")), GroupSync(LoopLoad())
    if way == "write":
        syncs.open()
    else:
        syncs._loop = asyncio.get_running_loop()
    assert await run(syncs, take(journal, b"makes the segment")) is None
    syncs._quick_from = 0.0
    group = take(journal, b"lost")
    assert journal._writer._file is not None
    os.close(journal._writer._file._fd)  # type: ignore[attr-defined]
    error = await run(syncs, group)
    journal._writer._file._fd = -1  # type: ignore[attr-defined]
    assert isinstance(error, JournalFailed)
    assert journal.durable_index == 1
    with pytest.raises(JournalFailed):
        journal.take_pending()
    await syncs.close(journal.close)


def known(syncs: GroupSync) -> None:
    """Whatever this machine's disk is like: it is known to be quick, and has not stalled."""
    syncs._usual_s = syncs._calm_from = syncs._quick_from = 0.0


async def test_a_quick_disk_is_waited_for_by_who_has_nothing_else_to_do(tmp_path: Path) -> None:
    journal, syncs = Journal(RealDisk(), str(tmp_path / "raft")), GroupSync(LoopLoad())
    syncs.open()
    assert await run(syncs, take(journal, b"makes the segment")) is None
    for number in range(20):
        known(syncs)
        group = Spy(take(journal, b"a%d" % number, b"b"))
        assert syncs.run(group, _never, here=True)
        assert group.steps == ["write", "synced"]
        assert journal.durable_index == journal.last_index
    known(syncs)
    other = Spy(take(journal, b"of one who has"))
    assert await run(syncs, other) is None
    known(syncs)
    large = Spy(take(journal, b"x" * 200_000))
    done: asyncio.Future[BaseException | None] = asyncio.get_running_loop().create_future()
    assert not syncs.run(large, done.set_result, here=True)
    assert await asyncio.wait_for(done, 10) is None
    assert large.steps == ["write", "sync"]
    again = Journal(RealDisk(), str(tmp_path / "raft"))
    assert again[:] == journal[:]
    assert again.torn_bytes == 0
    again.close()
    await syncs.close()


async def test_only_a_disk_that_is_mostly_quick_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    takes_s = [0.0002]
    now = [1000.0]

    class Clock:
        @staticmethod
        def monotonic() -> float:
            return now[0]

    def slow(fd: int) -> None:
        now[0] += takes_s[0]

    monkeypatch.setattr(journal_sync, "time", Clock)
    monkeypatch.setattr(disk, "sync_data", slow)
    syncs = GroupSync(LoopLoad())
    syncs._loop = asyncio.get_running_loop()

    async def waits() -> bool:
        done: asyncio.Future[BaseException | None] = asyncio.get_running_loop().create_future()
        group = Spy(file=7)
        if syncs.run(group, done.set_result, here=True):
            return True
        now[0] += takes_s[0]
        assert await asyncio.wait_for(done, 10) is None
        return False

    def share(of: int) -> float:
        return sum(waited[-of:]) / of

    waited: list[bool] = []
    assert await waits(), "nothing bad is known of it"
    takes_s[0] = 0.005
    for _ in range(128):
        waited.append(await waits())
    assert share(128) <= 1 / 8
    takes_s[0] = 0.0002
    while share(50) < 1:
        waited.append(await waits())
        assert len(waited) < 600, "a disk that has become quick is waited for in the end"
    assert sum(waited[128:228]) <= 10, "two or three quick syncs say little"
    takes_s[0] = 0.3
    assert await waits(), "nobody could know"
    takes_s[0] = 0.0002
    began = now[0]
    while not await waits():
        now[0] += 0.001
    assert now[0] - began >= journal_sync.CALM_S
    takes_s[0] = 0.005  # never a stall, but each of them would stop the loop
    for _ in range(100):
        waited.append(await waits())
    assert share(64) <= 1 / 16, "only as often as it takes to learn whether it is still so"
    takes_s[0] = 0.0002
    for number in range(600):
        takes_s[0] = 0.006 if number % 8 == 0 else 0.0002  # as where the processors are busy
        waited.append(await waits())
    assert share(100) == 1
    await syncs.close()


async def test_a_loop_that_others_have_asked_for_something_does_not_wait(tmp_path: Path) -> None:
    load = LoopLoad()
    journal, syncs = Journal(RealDisk(), str(tmp_path / "raft")), GroupSync(load)
    syncs.open()
    assert await run(syncs, take(journal, b"makes the segment")) is None
    for requests, waits in ((0, True), (0, True), (1, False), (0, True), (7, False), (1, False), (0, True)):
        load.requests += requests
        known(syncs)
        done: asyncio.Future[BaseException | None] = asyncio.get_running_loop().create_future()
        assert syncs.run(take(journal, b"entry"), done.set_result, here=True) is waits
        if not waits:
            assert await asyncio.wait_for(done, 10) is None
    await syncs.close(journal.close)


async def test_a_disk_that_fails_while_it_is_waited_for_takes_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal, syncs = Journal(RealDisk(), str(tmp_path / "raft")), GroupSync(LoopLoad())
    syncs.open()
    assert await run(syncs, take(journal, b"makes the segment")) is None

    def fail(fd: int) -> None:
        raise OSError(errno.EIO, "input/output error")

    monkeypatch.setattr(disk, "sync_data", fail)
    known(syncs)
    group = take(journal, b"lost")
    with pytest.raises(JournalFailed):
        syncs.run(group, _never, here=True)
    assert journal.durable_index == 1
    await syncs.close(journal.close)


def _never(error: BaseException | None) -> None:
    raise AssertionError("who has waited is not called back")


async def test_a_slow_disk_gets_the_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal_sync, "SLOW_SYNC_S", 0.0)
    journal, syncs = Journal(RealDisk(), str(tmp_path / "raft")), GroupSync(LoopLoad())
    syncs.open()
    assert await run(syncs, take(journal, b"makes the segment")) is None
    group = Spy(take(journal, b"after a slow one"))
    assert await run(syncs, group) is None
    assert group.steps == ["sync"]
    await syncs.close(journal.close)
