"""A node's data directory: for its owner alone, and for one process at a time."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from node.errors import NodeError


class DataDirBusy(NodeError):
    """Another process has the directory open, or it cannot be used."""

    code = "data-dir"


class DataDir:
    """Holds the lock from `open` to `close`. Two processes on one journal would destroy it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = -1

    def open(self) -> None:
        """Make the directory if need be, lock it, write the pid file. Raises DataDirBusy."""
        try:
            self.path.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._lock = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise DataDirBusy(
                f"data directory {self.path} cannot be used: {error.strerror}; choose another"
            ) from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self.close()
            raise DataDirBusy(
                f"another process{self._holder()} uses data directory {self.path}: stop it first, or choose another"
            ) from None
        try:
            self.pid_file.write_text(f"{os.getpid()}\n")
        except OSError as error:
            self.close()
            raise DataDirBusy(
                f"data directory {self.path} cannot be written: {error.strerror}; make room, or choose another"
            ) from None

    @property
    def pid_file(self) -> Path:
        """Names the process that has the directory."""
        return self.path / "agent.pid"

    def _holder(self) -> str:
        try:
            return f" (pid {int(self.pid_file.read_text())})"
        except (OSError, ValueError):
            return ""

    def close(self) -> None:
        """Give the lock back."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1
