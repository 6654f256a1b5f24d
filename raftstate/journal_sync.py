"""Where the journal's groups are synced: by the kernel beside the loop where that is quick, else in a thread.

Either way the loop never waits for the disk. By the kernel's way the loop writes a group to the page cache itself,
which takes microseconds as long as the disk keeps up; so a disk that was slow a moment ago gets the thread.

A follower that serves nobody has nothing to do but wait for its disk, and to be told of the end costs as much as the
sync of a quick one. So where the disk is quick, nobody has asked this loop for anything since the last sync, and the
caller says that it may be, the loop waits.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

from raftstate import disk
from raftstate.disk_aio import DiskAio
from raftstate.errors import RaftError
from raftstate.loop_load import LOOP, LoopLoad

log = logging.getLogger(__name__)

SLOW_WRITE_S, SLOW_SYNC_S = 0.01, 0.1
"""A write to the page cache, or a sync, that takes longer makes the disk a slow one …"""
SLOW_FOR_S = 2.0
"""… for so long: a thread writes then."""
CALM_S = 10.0
"""After it has waited so long for one the loop waits for none for this time …"""
WAIT_S_MAX = 0.002
"""… nor where more than half of the waits take longer than this, but for one in …"""
TRY_EVERY = 16
"""… so many, from which it learns what the disk is like. What a worker or a thread takes tells more of processors."""
_USUAL_S_MIN, _USUAL_S_MAX = WAIT_S_MAX / 8, WAIT_S_MAX * 2
_STEP = 1 / 16

SyncDone = Callable[[BaseException | None], None]


class Group(Protocol):
    """Journal writes to be made durable together: by `sync` alone, or by `write`, an fdatasync, `synced`."""

    def sync(self) -> None:
        """Write and fdatasync; blocks."""

    def write(self) -> int:
        """Write, if that needs no more than the page cache; return the file to be synced, or -1: call `sync`."""

    def synced(self, error: OSError | None) -> None:
        """The fdatasync of what `write` returned has ended. Raises JournalFailed for an `error`."""


class GroupSync:
    """One server's syncs, one at a time. `open` it on the loop that it then belongs to."""

    def __init__(self, load: LoopLoad = LOOP) -> None:
        self._load, self._served = load, load.requests
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="raft-sync")
        self._aio: DiskAio | None = None
        self._quick_from = self._calm_from = self._began = 0.0
        self._usual_s = WAIT_S_MAX
        """About the median of the waits; of a disk that is not known yet nothing bad is thought."""
        self._untried = 0
        self._ended: asyncio.Event = asyncio.Event()
        self._ended.set()

    def open(self) -> None:
        """Take the quick way if there is one."""
        self._loop = asyncio.get_running_loop()
        try:
            self._aio = DiskAio()
        except OSError as error:
            log.info("raft: the journal is synced by a thread: %s", error)

    def run(self, group: Group, done: SyncDone, *, here: bool = False) -> bool:
        """Make the group durable; then the loop calls `done(error or None)`.

        `here`: the caller would do nothing but wait. Then the loop may wait itself; if it did, True is returned, the
        group is durable, and `done` is not called. Raises JournalFailed in that case.
        """
        self._began = began = time.monotonic()
        before, self._served = self._served, self._load.requests
        # Where requests came more may come meanwhile, and those who send them wait for the loop.
        waits = here and before == self._served and began >= self._calm_from and self._may_wait()
        if began < self._quick_from or (self._aio is None and not waits):
            self._in_thread(group.sync, done)
            return False
        try:
            fd = group.write()
        except RaftError as error:
            self._ended.clear()
            self._loop.call_soon(self._finish, done, error)
            return False
        if time.monotonic() > began + SLOW_WRITE_S:
            self._quick_from = time.monotonic() + SLOW_FOR_S
        if fd < 0:
            self._in_thread(group.sync, done)
        elif waits:
            self._wait(group, fd)
            return True
        else:
            self._beside(group, fd, done)
        return False

    def _wait(self, group: Group, fd: int) -> None:
        failed: OSError | None = None
        try:
            disk.sync_data(fd)
        except OSError as error:
            failed = error
        took = self._took()
        if took > SLOW_SYNC_S:
            self._calm_from = time.monotonic() + CALM_S
        if took > self._usual_s:
            self._usual_s = min(_USUAL_S_MAX, self._usual_s * (1 + _STEP))
        else:
            self._usual_s = max(_USUAL_S_MIN, self._usual_s * (1 - _STEP))
        group.synced(failed)

    def _beside(self, group: Group, fd: int, done: SyncDone) -> None:
        aio = self._aio
        assert aio is not None, "without it a thread syncs"
        self._ended.clear()
        try:
            aio.sync(fd, lambda error: self._synced(group, error, done))
        except OSError as error:
            # Nothing was begun: this file's system has no such call.
            log.info("raft: the journal is synced by a thread: %s", error)
            self._aio = None
            aio.close()
            self._in_thread(lambda: disk.sync_data(fd), lambda failed: self._synced(group, failed, done))

    async def idle(self) -> None:
        """Return once no sync is under way."""
        await self._ended.wait()

    async def close(self, last: Callable[[], None] = lambda: None) -> None:
        """Wait for a sync under way, run `last` off the loop, release everything."""
        await self.idle()
        try:
            await asyncio.get_running_loop().run_in_executor(self._thread, last)
        finally:
            self._thread.shutdown(wait=False)
            if self._aio is not None:
                self._aio.close()
                self._aio = None

    def _in_thread(self, work: Callable[[], None], done: SyncDone) -> None:
        self._ended.clear()

        def told(work: Future[None]) -> None:
            self._loop.call_soon_threadsafe(self._finish, done, work.exception())

        self._thread.submit(work).add_done_callback(told)

    def _synced(self, group: Group, failed: BaseException | None, done: SyncDone) -> None:
        error: BaseException | None = None
        if failed is not None and not isinstance(failed, OSError):
            failed = OSError(errno.EIO, f"the sync ended in {failed!r}")  # whatever it was, nothing was promised
        try:
            group.synced(failed)
        except RaftError as refused:
            error = refused
        self._finish(done, error)

    def _finish(self, done: SyncDone, error: BaseException | None) -> None:
        self._took()
        self._ended.set()
        done(error)

    def _may_wait(self) -> bool:
        if self._usual_s <= WAIT_S_MAX:
            return True
        self._untried = (self._untried + 1) % TRY_EVERY
        return not self._untried

    def _took(self) -> float:
        """Return how long the disk took for the group that is durable now."""
        now = time.monotonic()
        took = now - self._began
        if took > SLOW_SYNC_S:
            self._quick_from = now + SLOW_FOR_S
        return took
