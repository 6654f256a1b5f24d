"""Where the journal's groups are synced: by the kernel beside the loop where that is quick, else in a thread.

Either way the loop never waits for the disk. By the kernel's way the loop writes a group to the page cache itself,
which takes microseconds as long as the disk keeps up; so a disk that was slow a moment ago gets the thread.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

from raftstate.disk_aio import DiskAio
from raftstate.errors import RaftError

log = logging.getLogger(__name__)

SLOW_WRITE_S, SLOW_SYNC_S = 0.01, 0.1
"""A write to the page cache, or a sync, that takes longer makes the disk a slow one …"""
SLOW_FOR_S = 2.0
"""… for so long: a thread writes then."""

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

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="raft-sync")
        self._aio: DiskAio | None = None
        self._quick_from = self._began = 0.0
        self._ended: asyncio.Event = asyncio.Event()
        self._ended.set()

    def open(self) -> None:
        """Take the quick way if there is one."""
        self._loop = asyncio.get_running_loop()
        try:
            self._aio = DiskAio()
        except OSError as error:
            log.info("raft: the journal is synced by a thread: %s", error)

    def run(self, group: Group, done: SyncDone) -> None:
        """Make the group durable; then the loop calls `done(error or None)`."""
        self._ended.clear()
        self._began = began = time.monotonic()
        if self._aio is None or began < self._quick_from:
            self._in_thread(group.sync, done)
            return
        try:
            fd = group.write()
        except RaftError as error:
            self._loop.call_soon(self._finish, done, error)
            return
        if time.monotonic() > began + SLOW_WRITE_S:
            self._quick_from = time.monotonic() + SLOW_FOR_S
        if fd < 0:
            self._in_thread(group.sync, done)
            return
        try:
            self._aio.sync(fd, lambda error: self._synced(group, error, done))
        except OSError as error:
            # Nothing was begun: this file's system has no such call.
            log.info("raft: the journal is synced by a thread: %s", error)
            aio, self._aio = self._aio, None
            aio.close()
            self._in_thread(lambda: os.fdatasync(fd), lambda failed: self._synced(group, failed, done))

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
        def told(work: Future[None]) -> None:
            self._loop.call_soon_threadsafe(self._finish, done, work.exception())

        self._thread.submit(work).add_done_callback(told)

    def _synced(self, group: Group, failed: BaseException | None, done: SyncDone) -> None:
        error: BaseException | None = None
        try:
            group.synced(failed if isinstance(failed, OSError) else None)
        except RaftError as refused:
            error = refused
        self._finish(done, error)

    def _finish(self, done: SyncDone, error: BaseException | None) -> None:
        now = time.monotonic()
        if now > self._began + SLOW_SYNC_S:
            self._quick_from = now + SLOW_FOR_S
        self._ended.set()
        done(error)
