"""Making a local snapshot in slices between other work, the same way in a server and in the simulation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

from raftstate.raft import RaftCore
from raftstate.raft_install import members_dict
from raftstate.raft_ports import Snapshots


class OpenSnapshot(Protocol):
    """A state frozen by copy on write while it is open."""

    def __iter__(self) -> Iterator[bytes]: ...
    def close(self) -> None: ...


class Snapshotting(Protocol):
    """The part of the state machine that snapshots need."""

    def snapshot(self) -> Any: ...


class SnapshotMaker:
    """One snapshot, from the state as applied now.

    Call `step` until it returns False, then `commit` (blocks on the disk; any thread), then `finish` (loop's thread).
    After an error, or to give up, call `abort`.
    """

    def __init__(self, core: RaftCore, machine: Snapshotting, store: Snapshots) -> None:
        self.index = core.applied
        self.bytes = 0
        """State written so far."""
        term = core.term_at(self.index)
        assert term is not None, "the log keeps what is applied and not in a snapshot yet"
        self._core = core
        self._open: OpenSnapshot = machine.snapshot()
        self._chunks = iter(self._open)
        self._writer = store.begin(self.index, term, members_dict(core.members_at(self.index)))

    def step(self) -> bool:
        """Write one chunk; return whether there may be more."""
        chunk = next(self._chunks, None)
        if chunk is None:
            self._open.close()
            return False
        self._writer.write(chunk)
        self.bytes += len(chunk)
        return True

    def commit(self) -> None:
        """Make the snapshot durable. Raises OSError or RaftError."""
        self._writer.commit()

    def finish(self) -> None:
        """Forget the log behind the snapshot."""
        self._core.compact(self.index)

    def abort(self) -> None:
        """Drop what was written."""
        self._open.close()
        self._writer.abort()
