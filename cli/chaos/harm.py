"""Harm that takes help of the system: disks without room, clocks that are wrong.

A server's disk is a small tmpfs where mounting is allowed, so that a full one is a full one (ENOSPC). Where it is
not, the process gets a bound on the size of its files (RLIMIT_FSIZE), which fails its writes in the same places.
"""

from __future__ import annotations

import os
import resource
import subprocess
from collections.abc import Iterable
from glob import glob
from pathlib import Path

from cli.cluster.processes import DEAD
from cli.cluster.supervisor import Supervisor
from cli.errors import CliError

DISK_BYTES = 256 << 20
_FILL = "fills-the-disk"
_LOG_ROOM_BYTES = 64 << 10
"""What a bounded process may still write to its log, to say why it stops."""
_LIBRARIES = "/usr/lib/*/faketime/libfaketime.so.1"


def skewed(skew_s: float) -> tuple[str, ...]:
    """Return what to put before a command so that its wall clock is wrong by that much. Its other clocks are right:
    those that measure intervals can't be set on a real machine either. Raises :class:`CliError` without libfaketime.
    """
    found = glob(_LIBRARIES)
    if not found:
        raise CliError("the skew fault needs libfaketime: apt-get install faketime, or leave skew out of -faults")
    return (
        "env", f"LD_PRELOAD={found[0]}", f"FAKETIME={skew_s:+.3f}s", "FAKETIME_DONT_FAKE_MONOTONIC=1",
        "FAKETIME_DISABLE_SHM=1",
        # Else it also shifts what threads wait by for each other, Python's interpreter lock among it: they spin.
        "FAKETIME_FORCE_MONOTONIC_FIX=0",
    )  # fmt: skip


class SmallDisks:
    """The servers' data directories as disks that can be filled."""

    def __init__(self, supervisor: Supervisor, disk_bytes: int = DISK_BYTES) -> None:
        self._supervisor, self._disk_bytes = supervisor, disk_bytes

    def _directory(self, node: str) -> Path:
        return self._supervisor.config.nodes[node].data_dir

    def make(self, nodes: Iterable[str]) -> None:
        """Give each node a disk of its own, before it is started for the first time, where we may mount one."""
        for node in nodes:
            directory = self._directory(node)
            directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            command = [
                "mount",
                "-t",
                "tmpfs",
                "-o",
                f"size={self._disk_bytes},mode=0700",
                "lictor-chaos",
                str(directory),
            ]
            if os.geteuid() != 0 or subprocess.run(command, check=False, capture_output=True).returncode != 0:
                return  # then RLIMIT_FSIZE has to do

    def unmake(self) -> None:
        """Unmount what :meth:`make` mounted; the nodes must have ended."""
        for node in self._supervisor.names:
            if self._directory(node).is_mount():
                subprocess.run(["umount", str(self._directory(node))], check=True, capture_output=True)

    def fill(self, node: str) -> None:
        """Leave no room on a node's disk."""
        directory = self._directory(node)
        if directory.is_mount():
            _write_until_full(directory / _FILL)
            return
        process = self._supervisor.process(node)
        if process is None or process.state() == DEAD:
            raise CliError(f"{node} does not run, so its files cannot be bounded")
        log = self._supervisor.layout.log(node)
        _, hard = resource.prlimit(process.pid, resource.RLIMIT_FSIZE)
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (log.stat().st_size + _LOG_ROOM_BYTES, hard))

    def free(self, node: str) -> None:
        """Undo :meth:`fill`."""
        (self._directory(node) / _FILL).unlink(missing_ok=True)
        process = self._supervisor.process(node)
        if process is not None and process.state() != DEAD:
            _, hard = resource.prlimit(process.pid, resource.RLIMIT_FSIZE)
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (hard, hard))


def _write_until_full(path: Path) -> None:
    """Write a file until the disk holds no byte more."""
    with path.open("ab", buffering=0) as file:
        for size in (1 << 20, 4096, 1):
            block = bytes(size)
            try:
                while True:
                    if file.write(block) < size:
                        break
            except OSError:
                continue
