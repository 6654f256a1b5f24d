"""Restoring a backup: the whole state is replaced through the log, so that every server does it at the same index.

A restore is a run of RESTORE entries of one term: begin, parts, end. A server builds the new state beside the old one
as it applies the parts, and puts it in place when it applies the end: no step is long, and reads see the old state
until then. No snapshot is made meanwhile, since it would not hold the parts; so what is given up on the way is made
void by an entry that says so, or by a new leader's term. Parts do not name their restore: a leader lets one at a time
into its log (`raftstate.backup.OneRestore`).

Indexes only grow (law 2), and the restored rows carry indexes of the backup, whose log may have been further than
this one. The state machine then counts ahead of the log from there on: `StateMachine.offset`, part of its state.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

BEGIN, PART, END, VOID = b"b", b"p", b"e", b"v"
PART_BYTES = 128 * 1024
"""State in one log entry."""


class Restoring(Protocol):
    """A new state that is being read; see `raftstate.state.snapshot.Restorer`."""

    def feed(self, chunk: bytes) -> None: ...
    def check(self) -> None: ...
    def finish(self, at: int | None = None) -> Any: ...


class RestoreInLog:
    """A server's view of a restore that is on its way through the log."""

    def __init__(self, begin: Callable[[], Restoring], replaced: Callable[[Any], None]) -> None:
        """`begin` starts a new state; `replaced` is called with what was in place before it."""
        self._begin, self._replaced = begin, replaced
        self._term = 0
        self._fresh: Restoring | None = None
        self._chunk = bytearray()

    def under_way(self, term: int) -> bool:
        """Whether a snapshot now would lose parts that still count; `term` is that of the last applied entry."""
        if term != self._term:
            self.forget()
        return self._fresh is not None

    def apply(self, index: int, term: int, payload: bytes) -> bool:
        """Take the payload of a RESTORE entry; return whether the state was replaced now.

        Raises SnapshotDamaged for what this server cannot read: it must stop rather than differ from the others.
        """
        kind = payload[:1]
        if kind == BEGIN:
            self.forget()
            self._term, self._fresh = term, self._begin()
        elif self._fresh is None or term != self._term:
            return False  # its beginning was another leader's, or before a snapshot: void everywhere alike
        elif kind == VOID:
            self.forget()
        elif kind == PART:
            self._chunk += payload[2:]
            if payload[1]:
                self._fresh.feed(bytes(self._chunk))
                self._chunk.clear()
        elif kind == END:
            fresh, self._fresh = self._fresh, None
            self._replaced(fresh.finish(at=index))
            return True
        return False

    def forget(self) -> None:
        """What was collected is void."""
        self._fresh = None
        self._chunk.clear()


def parts_of(chunk: bytes) -> list[bytes]:
    """Cut one snapshot chunk into payloads: the first byte says whether the chunk ends with it."""
    cuts = [chunk[at : at + PART_BYTES] for at in range(0, len(chunk), PART_BYTES)] or [b""]
    return [PART + (b"\x01" if number == len(cuts) - 1 else b"\x00") + cut for number, cut in enumerate(cuts)]
