"""The few file operations that durability needs, and their real form.

Everything in `raftstate` that must survive a crash goes through `Disk`, so that the simulation can put a
disk beneath the journal that forgets and tears whatever was not synced.
"""

from __future__ import annotations

import errno
import os
from typing import Protocol


class DiskFile(Protocol):
    """A file open for appending."""

    def append(self, data: bytes) -> None:
        """Write all of `data` at the end. Raises OSError; then any prefix, or none, may have been written."""

    def sync(self) -> None:
        """fdatasync: what was appended survives a power cut once this returns. Raises OSError."""

    def descriptor(self, size: int) -> int:
        """The file's number, for an fdatasync by another way than `sync`; -1 if it has none.

        Also -1 when `size` more bytes cannot be appended to the page cache alone: new room must be allocated.
        """

    def close(self) -> None:
        """Release the handle; syncs nothing."""


class Disk(Protocol):
    """A file system, reduced. Paths are plain strings; errors are OSError.

    Durability is POSIX's: file contents need `DiskFile.sync`, and names (after create, rename, remove) need
    `sync_dir` of their directory. Without these a crash may keep, lose or tear any of it, in any order.
    """

    def make_dir(self, path: str) -> None:
        """Create the directory with its parents, durably; fine if it exists."""

    def create(self, path: str, room: int = 0) -> DiskFile:
        """A new, empty file; an old one of that name is replaced.

        `room`: allocate so many bytes ahead at a time, so that most syncs need not change the file's size, which
        costs a commit of the file system's own journal. Until it is closed, zeros may be read behind the end.
        """

    def open_append(self, path: str, room: int = 0) -> DiskFile:
        """An existing file, to append to behind its last byte; `room` as for `create`."""

    def read(self, path: str, offset: int = 0, size: int | None = None) -> bytes:
        """Up to `size` bytes (None: to the end) from `offset`; short at the end of the file."""

    def size(self, path: str) -> int:
        """Length of the file in bytes."""

    def rename(self, source: str, target: str) -> None:
        """Atomically give `source` the name `target`, replacing a file of that name."""

    def listdir(self, path: str) -> list[str]:
        """Names of the files in a directory, sorted."""

    def remove(self, path: str) -> None:
        """Remove a file's name."""

    def sync_dir(self, path: str) -> None:
        """Make the names in this directory durable."""


SYNC_BESIDE = True
"""Whether files may be synced by the kernel's asynchronous I/O; a test whose disk is not the kernel's says no."""


def sync_data(fd: int) -> None:
    """fdatasync of the file that `DiskFile.descriptor` named; blocks. Raises OSError."""
    os.fdatasync(fd)


_NO_ROOM_AHEAD = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


class _RealFile:
    def __init__(self, fd: int, end: int = 0, room: int = 0) -> None:
        self._fd, self._end, self._room = fd, end, room
        self._allocated = end

    def append(self, data: bytes) -> None:
        if self._room and self._end + len(data) > self._allocated:
            self._allocate(len(data))
        view = memoryview(data)
        while view:
            written = os.pwrite(self._fd, view, self._end)
            self._end += written
            view = view[written:]

    def _allocate(self, size: int) -> None:
        room = max(self._room, size)
        try:
            os.posix_fallocate(self._fd, self._end, room)
        except OSError as error:
            if error.errno not in _NO_ROOM_AHEAD:
                raise
            self._room = 0  # then it grows with each append; the last bytes of a full disk may still be enough
        else:
            self._allocated = self._end + room

    def sync(self) -> None:
        sync_data(self._fd)

    def descriptor(self, size: int) -> int:
        return self._fd if SYNC_BESIDE and self._end + size <= self._allocated else -1

    def close(self) -> None:
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            try:
                if self._allocated > self._end:
                    os.ftruncate(fd, self._end)
            finally:
                os.close(fd)


class RealDisk:
    """The operating system's files: mode 0600 in directories of mode 0700, closed on exec."""

    def make_dir(self, path: str) -> None:
        if os.path.isdir(path):
            return
        parent = os.path.dirname(os.path.abspath(path))
        self.make_dir(parent)
        try:
            os.mkdir(path, 0o700)
        except FileExistsError:
            return
        self.sync_dir(parent)

    def create(self, path: str, room: int = 0) -> DiskFile:
        try:
            os.unlink(path)  # never write into an inode that someone may still be reading
        except FileNotFoundError:
            pass
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        return _RealFile(os.open(path, flags, 0o600), 0, room)

    def open_append(self, path: str, room: int = 0) -> DiskFile:
        fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
        return _RealFile(fd, os.fstat(fd).st_size, room)

    def read(self, path: str, offset: int = 0, size: int | None = None) -> bytes:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            want = os.fstat(fd).st_size - offset if size is None else size
            parts: list[bytes] = []
            while want > 0:
                part = os.pread(fd, want, offset)
                if not part:
                    break
                parts.append(part)
                offset += len(part)
                want -= len(part)
            return b"".join(parts)
        finally:
            os.close(fd)

    def size(self, path: str) -> int:
        return os.stat(path).st_size

    def rename(self, source: str, target: str) -> None:
        os.rename(source, target)

    def listdir(self, path: str) -> list[str]:
        return sorted(os.listdir(path))

    def remove(self, path: str) -> None:
        os.unlink(path)

    def sync_dir(self, path: str) -> None:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
