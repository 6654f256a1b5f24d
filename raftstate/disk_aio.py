"""fdatasync without a thread: Linux's asynchronous I/O (io_submit(2), IOCB_CMD_FDSYNC), its end told to the loop.

A thread that syncs must take Python's interpreter lock twice, from a loop that is busy: that costs more than the sync
of a small group, in CPU and in time. The kernel's own workers need no lock. Where there is no such call (another
system, an old kernel, a sandbox), `DiskAio` cannot be made, and the caller syncs in a thread.
"""

from __future__ import annotations

import asyncio
import ctypes
import errno
import os
import platform
import sys
from collections.abc import Callable

_SETUP, _DESTROY, _SUBMIT, _GETEVENTS = {
    "x86_64": (206, 207, 209, 208),
    "aarch64": (0, 1, 2, 4),
}.get(platform.machine(), (-1, -1, -1, -1))
_FDSYNC = 3
_FLAG_RESFD = 1
_DEPTH = 8

SyncDone = Callable[[OSError | None], None]


class _Request(ctypes.Structure):
    """struct iocb of linux/aio_abi.h, little-endian."""

    _fields_ = (
        ("data", ctypes.c_uint64),
        ("key", ctypes.c_uint32),
        ("rw_flags", ctypes.c_uint32),
        ("opcode", ctypes.c_uint16),
        ("priority", ctypes.c_int16),
        ("fd", ctypes.c_uint32),
        ("buffer", ctypes.c_uint64),
        ("bytes", ctypes.c_uint64),
        ("offset", ctypes.c_int64),
        ("reserved", ctypes.c_uint64),
        ("flags", ctypes.c_uint32),
        ("resfd", ctypes.c_uint32),
    )


class _Event(ctypes.Structure):
    """struct io_event."""

    _fields_ = (
        ("data", ctypes.c_uint64),
        ("request", ctypes.c_uint64),
        ("result", ctypes.c_int64),
        ("result2", ctypes.c_int64),
    )


class DiskAio:
    """One fdatasync at a time. Belongs to the loop it was made on; close it when no sync is under way.

    Raises OSError when the system has no such call.
    """

    def __init__(self) -> None:
        if _SETUP < 0 or sys.platform != "linux" or sys.byteorder != "little":
            raise OSError(errno.ENOSYS, "no asynchronous fdatasync on this system")
        self._syscall = ctypes.CDLL(None, use_errno=True).syscall
        self._context = ctypes.c_ulong(0)
        self._call(_SETUP, _DEPTH, ctypes.byref(self._context))
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._request = _Request(opcode=_FDSYNC, flags=_FLAG_RESFD, resfd=self._wake)
        self._requests = (ctypes.c_void_p * 1)(ctypes.addressof(self._request))
        self._events = (_Event * 1)()
        self._done: SyncDone | None = None
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._wake, self._ended)

    @property
    def busy(self) -> bool:
        """Whether a sync is under way."""
        return self._done is not None

    def sync(self, fd: int, done: SyncDone) -> None:
        """Begin to sync the file; `done` is called by the loop with the outcome.

        Raises OSError, and then nothing was begun: EINVAL and ENOSYS say that this file's system cannot.
        """
        assert self._done is None, "one sync at a time"
        self._request.fd = fd
        self._call(_SUBMIT, self._context, 1, self._requests)
        self._done = done

    def close(self) -> None:
        """Release everything; waits for a sync under way."""
        if self._wake < 0:
            return
        if not self._loop.is_closed():
            self._loop.remove_reader(self._wake)
        self._call(_DESTROY, self._context)
        os.close(self._wake)
        self._wake = -1

    def _ended(self) -> None:
        try:
            os.eventfd_read(self._wake)
        except BlockingIOError:
            return
        if self._call(_GETEVENTS, self._context, 0, 1, self._events, None) != 1:
            return
        done, self._done = self._done, None
        result = self._events[0].result
        assert done is not None
        done(OSError(-result, os.strerror(-result)) if result < 0 else None)

    def _call(self, number: int, *arguments: object) -> int:
        result: int = self._syscall(number, *arguments)
        if result < 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))
        return result
