"""Node processes: started in a session of their own, found again by pid file, never mistaken for another process.

A pid may be used again by the system; so the file keeps the kernel's start time beside it, and a process of another
start time is not ours.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

RUNNING, PAUSED, DEAD = "running", "paused", "dead"
_POLL_S = 0.02
_children: dict[int, subprocess.Popen[bytes]] = {}
"""Processes that this process started; kept so that they can be reaped."""


def _stat(pid: int) -> tuple[str, int] | None:
    """Return (state letter, start time in clock ticks since boot), or None when there is no such process."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()  # the name before may hold spaces and brackets
    return fields[0], int(fields[19])


def _threads(pid: int) -> int:
    try:
        return len(os.listdir(f"/proc/{pid}/task"))
    except OSError:
        return 0


@dataclass(frozen=True)
class Process:
    """One process, told apart by pid and start time."""

    pid: int
    started: int

    @classmethod
    def read(cls, path: Path) -> Process | None:
        """Read a pid file; None when there is none or it is not one of ours."""
        try:
            value = json.loads(path.read_text())
            return cls(int(value["pid"]), int(value["started"]))
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def write(self, path: Path) -> None:
        """Write the pid file."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"pid": self.pid, "started": self.started}) + "\n")

    def state(self) -> str:
        """Return ``running``, ``paused`` or ``dead``."""
        child = _children.get(self.pid)
        if child is not None and child.poll() is not None:
            return DEAD
        stat = _stat(self.pid)
        if stat is None or stat[1] != self.started:
            return DEAD
        if stat[0] in "ZX":
            # The first thread ends before the others, which still hold the files: its ports are not free yet.
            return RUNNING if child is not None or _threads(self.pid) > 1 else DEAD
        return PAUSED if stat[0] in "Tt" else RUNNING

    def send(self, number: signal.Signals) -> bool:
        """Send a signal if the process is still the one we mean; tell whether it was."""
        if self.state() == DEAD:
            return False
        try:
            os.kill(self.pid, number)
        except ProcessLookupError:
            return False
        return True

    def wait_for(self, state: str, timeout_s: float) -> bool:
        """Wait until the process is in that state; tell whether it came to be."""
        deadline = time.monotonic() + timeout_s
        while self.state() != state:
            if time.monotonic() > deadline:
                return False
            time.sleep(_POLL_S)
        return True


# -P: a directory called "cli" where the user stands must not be taken for ours.
LICTOR = (sys.executable, "-P", "-m", "cli")


def spawn(arguments: Sequence[str], log: Path, pid_file: Path, program: Sequence[str] = LICTOR) -> Process:
    """Start ``PROGRAM ARGUMENTS`` in the background; its output goes to the end of ``log``.

    A program that only prepares must end in an exec, as ``env`` does: the process that was started is the node.
    """
    reap()
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [*program, *arguments]
    with log.open("ab") as output:
        child = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    _children[child.pid] = child
    stat = _stat(child.pid)
    process = Process(child.pid, stat[1] if stat else 0)
    process.write(pid_file)
    return process


def reap() -> None:
    """Take note of the ends of processes that we started: others kill them too, and few are looked at again."""
    for pid, child in list(_children.items()):
        if child.poll() is not None:
            del _children[pid]


def forget_children() -> None:
    """Let go of the processes we started: they outlive us on purpose, and Python need not warn of it."""
    for child in _children.values():
        child.returncode = child.returncode if child.returncode is not None else 0
    _children.clear()
