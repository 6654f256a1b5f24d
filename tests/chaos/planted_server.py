"""A server with a bug on purpose: ``python -P planted_server.py BUG agent -config FILE -node NAME``.

Its disk, with or without the bug, is one that a power cut finds unready: what was written but not synced is held in
this process, so that ``kill -9`` loses it, as a power cut would what the kernel held.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Callable
from typing import Any

import raftstate.disk
from raftstate.disk_aio import DiskAio, SyncDone
from raftstate.raft import RaftCore
from raftstate.state.machine import Applied, StateMachine

NONE = "none"


class PowerCutFiles:
    """Stands where `raftstate.disk` expects ``os``: writes stay here until their file is synced or closed."""

    def __init__(self) -> None:
        self._cached: dict[int, list[tuple[int, bytes]]] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def pwrite(self, fd: int, data: memoryview, offset: int) -> int:
        """Remember; nothing reaches the file yet."""
        self._cached.setdefault(fd, []).append((offset, bytes(data)))
        return len(data)

    def write_back(self, fd: int) -> None:
        """Have the file hold what was written to it."""
        for offset, data in self._cached.pop(fd, ()):
            while data:
                written = os.pwrite(fd, data, offset)
                data, offset = data[written:], offset + written

    def fdatasync(self, fd: int) -> None:
        """Write what is remembered; a kill does not take it back."""
        self.write_back(fd)
        os.fdatasync(fd)

    def ftruncate(self, fd: int, length: int) -> None:
        """As the system's, on all that was written."""
        self.write_back(fd)
        os.ftruncate(fd, length)

    def close(self, fd: int) -> None:
        """Write back, which the kernel may do at any time."""
        self.write_back(fd)
        os.close(fd)


def skip_the_fsync() -> None:
    """The journal does not wait for the disk."""

    def pretend(self: DiskAio, fd: int, done: SyncDone) -> None:
        asyncio.get_running_loop().call_soon(done, None)

    raftstate.disk.sync_data = lambda fd: None
    DiskAio.sync = pretend  # type: ignore[method-assign]


def ack_before_quorum() -> None:
    """The leader commits what it alone holds."""

    def advance_commit(self: RaftCore) -> None:
        if self.last_term == self.term:
            self._set_commit(self.last_index)

    RaftCore._advance_commit = advance_commit  # type: ignore[method-assign]


def stale_leader_reads() -> None:
    """Whoever believes that it leads answers default reads, and nothing makes it doubt that."""
    RaftCore.lease_valid = lambda self: self.is_leader  # type: ignore[method-assign]
    RaftCore._quorum_heard = lambda self, now: now  # type: ignore[method-assign]


def apply_a_retry_twice() -> None:
    """The state machine forgets which requests it has applied."""
    apply = StateMachine.apply

    def forgetful(self: StateMachine, index: int, data: bytes) -> Applied:
        for request_id in list(self.store.requests.rows):
            self.store.requests.remove(request_id)
        return apply(self, index, data)

    StateMachine.apply = forgetful  # type: ignore[method-assign]


BUGS: dict[str, Callable[[], None]] = {
    NONE: lambda: None,
    "skip the fsync": skip_the_fsync,
    "acknowledge before a quorum": ack_before_quorum,
    "default read from a stale leader": stale_leader_reads,
    "apply a retry twice": apply_a_retry_twice,
}


def program(bug: str = NONE) -> tuple[str, ...]:
    """Return the command of such a server, for a :class:`cli.cluster.supervisor.Supervisor`."""
    return (sys.executable, "-P", __file__, bug)


def main(arguments: list[str]) -> int:
    """Plant the bug named first, then be `lictor` with the rest."""
    from cli.main import main as lictor

    files = PowerCutFiles()
    raftstate.disk.os = files  # type: ignore[assignment, attr-defined]
    sync_beside = DiskAio.sync

    def written_and_synced(self: DiskAio, fd: int, done: SyncDone) -> None:
        files.write_back(fd)
        sync_beside(self, fd, done)

    DiskAio.sync = written_and_synced  # type: ignore[method-assign]
    BUGS[arguments[0]]()
    return lictor(arguments[1:])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
