"""A file system in memory that forgets and tears whatever was not synced.

`crash()` leaves what a power cut may leave: of each un-synced stretch of a file any set of 512-byte sectors
(the others hold what was there before, zeros, or rubbish), a length anywhere between the durable and the
written one, and of the un-synced changes to names any subset. `kill()` leaves all of it, as the kernel does when
only the process dies: it is read back, and may still be lost at a power cut later. Deterministic for a seed.
"""

from __future__ import annotations

import errno
import os.path
import random
from collections.abc import Callable
from typing import TypeVar

SECTOR = 512
ROOM_MAX = 4096
"""More room than this is not modelled; it would only cost time."""

_T = TypeVar("_T")


class SimCrash(Exception):
    """The power went in the middle of an operation; see `SimDisk.crash_after`."""


class _Inode:
    def __init__(self) -> None:
        self.data = bytearray()  # what a read sees
        self.durable = bytearray()  # what is surely on the platter
        self.dirty_from: int | None = None  # appended since the last sync, from this offset on


class _SimFile:
    def __init__(self, disk: SimDisk, inode: _Inode, room: int = 0) -> None:
        self._disk, self._inode, self._life, self._open = disk, inode, disk.life, True
        self._end = len(inode.data)
        self._room = (
            min(room, ROOM_MAX) if disk.capacity is None else 0
        )  # room ahead is not taken from the last bytes

    def append(self, data: bytes) -> None:
        self._check()
        room = self._disk.room()
        part = data if room is None or len(data) <= room else data[:room]
        self._disk.step(lambda keep: self._write(part[: int(len(part) * keep)]))
        self._write(part)
        if len(part) < len(data):
            raise OSError(errno.ENOSPC, "No space left on device")

    def _write(self, data: bytes) -> None:
        inode = self._inode
        if not data:
            return
        inode.dirty_from = self._end if inode.dirty_from is None else min(inode.dirty_from, self._end)
        end = self._end + len(data)
        if self._room and end > len(inode.data):
            inode.data += bytes(self._end + max(self._room, len(data)) - len(inode.data))
        inode.data[self._end : end] = data
        self._end = end

    def sync(self) -> None:
        self._check()
        self._disk.step(lambda keep: self._flush() if keep > 0.5 else None)
        if self._disk.syncs_to_fail > 0:
            self._disk.syncs_to_fail -= 1
            # As Linux has it: the pages are marked clean all the same, so they are read back until the power
            # goes and no later sync writes them.
            inode = self._inode
            inode.durable += bytes(len(inode.data) - len(inode.durable))
            inode.dirty_from = None
            raise OSError(errno.EIO, "Input/output error")
        self._flush()
        self._disk.syncs += 1

    def descriptor(self, size: int) -> int:
        return self._disk.number_of(self) if self._end + size <= len(self._inode.data) else -1

    def _flush(self) -> None:
        inode = self._inode
        if inode.dirty_from is not None:
            inode.durable[inode.dirty_from :] = inode.data[inode.dirty_from :]
            inode.dirty_from = None

    def close(self) -> None:
        if self._open and self._life == self._disk.life and self._end < len(self._inode.data):
            del self._inode.data[self._end :]
            dirty_from = self._inode.dirty_from
            self._inode.dirty_from = self._end if dirty_from is None else min(self._end, dirty_from)
        self._open = False

    def _check(self) -> None:
        if self._life != self._disk.life or not self._open:
            raise OSError(errno.EBADF, "the file was closed, or opened before the crash")


class SimDisk:
    """`raftstate.disk.Disk` in memory. `capacity`: bytes of all files together, None for no bound."""

    def __init__(self, seed: int | random.Random = 0, *, capacity: int | None = None) -> None:
        self.rng = seed if isinstance(seed, random.Random) else random.Random(seed)
        self.capacity = capacity
        self.syncs_to_fail = 0
        self.syncs = 0
        self.life = 0
        self._steps_left: int | None = None
        self._dirs: set[str] = set()
        self._open_files: list[_SimFile] = []
        self._names: dict[str, _Inode] = {}
        self._durable_names: dict[str, _Inode] = {}
        self._name_ops: list[tuple[str, Callable[[dict[str, _Inode]], None]]] = []  # (directory, change), not synced

    @classmethod
    def of(cls, files: dict[str, bytes], seed: int = 0) -> SimDisk:
        """A disk that durably holds these files, such as `snapshot` gives them."""
        disk = cls(seed)
        for path, data in files.items():
            disk.make_dir(os.path.dirname(path))
            inode = _Inode()
            inode.data, inode.durable = bytearray(data), bytearray(data)
            disk._names[path] = disk._durable_names[path] = inode
        return disk

    # --- Disk ---

    def make_dir(self, path: str) -> None:
        while path and path not in self._dirs:
            self._dirs.add(path)
            path = os.path.dirname(path)

    def create(self, path: str, room: int = 0) -> _SimFile:
        inode = _Inode()
        self._change_names(path, lambda names: names.update({path: inode}))
        return _SimFile(self, inode, room)

    def open_append(self, path: str, room: int = 0) -> _SimFile:
        return _SimFile(self, self._inode(path), room)

    def read(self, path: str, offset: int = 0, size: int | None = None) -> bytes:
        data = self._inode(path).data
        return bytes(data[offset : len(data) if size is None else offset + size])

    def size(self, path: str) -> int:
        return len(self._inode(path).data)

    def rename(self, source: str, target: str) -> None:
        self._inode(source)

        def move(names: dict[str, _Inode]) -> None:
            if source in names:
                names[target] = names.pop(source)

        self._change_names(source, move)

    def listdir(self, path: str) -> list[str]:
        if path not in self._dirs:
            raise FileNotFoundError(errno.ENOENT, "No such directory", path)
        return sorted(os.path.basename(name) for name in self._names if os.path.dirname(name) == path)

    def remove(self, path: str) -> None:
        self._inode(path)

        def drop(names: dict[str, _Inode]) -> None:
            names.pop(path, None)

        self._change_names(path, drop)

    def sync_dir(self, path: str) -> None:
        self.step(lambda keep: self._flush_names(path) if keep > 0.5 else None)
        self._flush_names(path)
        self.syncs += 1

    # --- the kernel's own way to sync ---

    def number_of(self, file: _SimFile) -> int:
        """A number for an open file, good until the next crash."""
        self._open_files.append(file)
        return len(self._open_files) - 1

    def fdatasync(self, number: int) -> None:
        """Sync the file of this number, as `_SimFile.sync` does."""
        self._open_files[number].sync()

    # --- faults ---

    def crash_after(self, steps: int) -> None:
        """Raise SimCrash within the operation that follows `steps` more changes; call `crash()` then."""
        self._steps_left = steps

    def fail_next_sync(self, count: int = 1) -> None:
        """The next `count` file syncs raise EIO, and what they should have written is lost at the next crash."""
        self.syncs_to_fail = count

    def flip(self, path: str, offset: int, mask: int = 0x01) -> None:
        """Damage a byte, durably."""
        inode = self._inode(path)
        inode.data[offset] ^= mask
        if offset < len(inode.durable):
            inode.durable[offset] ^= mask

    def cut(self, path: str, size: int) -> None:
        """Shorten a file, durably: the state after a write that got no further."""
        inode = self._inode(path)
        del inode.data[size:], inode.durable[size:]
        inode.dirty_from = None if inode.dirty_from is None or inode.dirty_from >= size else inode.dirty_from

    def crash(self) -> None:
        """The power goes, and comes back. Open files are dead; un-synced work is kept, lost or torn."""
        self.life += 1
        self._open_files.clear()
        self._steps_left = None
        names = dict(self._durable_names)
        for change in self._subset([change for _, change in self._name_ops]):
            change(names)
        self._name_ops.clear()
        self._names, self._durable_names = names, dict(names)
        for inode in {id(inode): inode for inode in names.values()}.values():
            self._tear(inode)

    def kill(self) -> None:
        """The process dies, the kernel does not: open files are dead, nothing is lost yet, nothing more durable."""
        self.life += 1
        self._open_files.clear()
        self._steps_left = None

    def snapshot(self) -> dict[str, bytes]:
        """Every file's bytes, as a read sees them."""
        return {name: bytes(inode.data) for name, inode in sorted(self._names.items())}

    # --- inside ---

    def step(self, partly: Callable[[float], object]) -> None:
        """Count one change; if the power goes here, first do some part of it."""
        if self._steps_left is None:
            return
        if self._steps_left <= 0:
            self._steps_left = None
            partly(self.rng.random())
            raise SimCrash
        self._steps_left -= 1

    def room(self) -> int | None:
        if self.capacity is None:
            return None
        inodes = {id(inode): inode for inode in self._names.values()}.values()
        return max(0, self.capacity - sum(len(inode.data) for inode in inodes))

    def _inode(self, path: str) -> _Inode:
        try:
            return self._names[path]
        except KeyError:
            raise FileNotFoundError(errno.ENOENT, "No such file", path) from None

    def _change_names(self, path: str, change: Callable[[dict[str, _Inode]], None]) -> None:
        self.step(lambda keep: None)
        change(self._names)
        self._name_ops.append((os.path.dirname(path), change))

    def _flush_names(self, path: str) -> None:
        rest = []
        for directory, change in self._name_ops:
            if directory == path:
                change(self._durable_names)
            else:
                rest.append((directory, change))
        self._name_ops = rest

    def _subset(self, items: list[_T]) -> list[_T]:
        mode = self.rng.randrange(4)
        if mode == 0:
            return []
        if mode == 1:
            return items
        if mode == 2:
            return items[: self.rng.randint(0, len(items))]
        return [item for item in items if self.rng.random() < 0.5]

    def _tear(self, inode: _Inode) -> None:
        start = inode.dirty_from
        if start is None:
            inode.data = bytearray(inode.durable)
            return
        written = inode.data
        end = self.rng.choice([start, len(written), self.rng.randint(start, len(written))])
        after = inode.durable[:start] + bytes(end - len(inode.durable[:start]))
        spans = []
        at = start
        while at < end:
            following = min(end, (at // SECTOR + 1) * SECTOR)
            spans.append((at, following))
            at = following
        for low, high in self._subset(spans):
            after[low:high] = written[low:high]
        if spans and self.rng.random() < 0.2:
            low, high = self.rng.choice(spans)
            after[low:high] = self.rng.randbytes(high - low)
        inode.data, inode.durable, inode.dirty_from = after, bytearray(after), None
