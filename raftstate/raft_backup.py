"""Restoring a backup: the whole state is replaced through the log, so that every server does it at the same index.

A restore is a run of RESTORE entries of one term: begin, parts, end. A server collects the parts and replaces its
state when it applies the end. A new leader's term makes an unfinished one void. No snapshot is made meanwhile, since
it would not hold the parts.

Indexes only grow (law 2), and the restored rows carry indexes of the backup; so the log is first filled with no-ops
up to the backup's index.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

BEGIN, PART, END = b"b", b"p", b"e"
PART_BYTES = 128 * 1024
"""State in one log entry."""
PAD_ENTRIES = 256
"""No-ops that are proposed at a time."""


class RestoreInLog:
    """A server's view of a restore that is on its way through the log."""

    def __init__(self, replace_state: Callable[[Iterable[bytes]], None]) -> None:
        self._replace_state = replace_state
        self._term = 0
        self._parts: list[bytes] | None = None

    def under_way(self, term: int) -> bool:
        """Whether a snapshot now would lose parts that still count; `term` is that of the last applied entry."""
        return self._parts is not None and term == self._term

    def apply(self, term: int, payload: bytes) -> bool:
        """Take the payload of a RESTORE entry; return whether the state was replaced now."""
        kind, data = payload[:1], payload[1:]
        if kind == BEGIN:
            self._term, self._parts = term, []
        elif self._parts is None or term != self._term:
            return False  # its beginning was another leader's, or before a snapshot: void everywhere alike
        elif kind == PART:
            self._parts.append(data)
        elif kind == END:
            parts, self._parts = self._parts, None
            self._replace_state(_chunks(parts))
            return True
        return False

    def forget(self) -> None:
        """A snapshot took the place of the state."""
        self._parts = None


def parts_of(chunk: bytes) -> list[bytes]:
    """Cut one snapshot chunk into payloads: the first byte says whether the chunk ends with it."""
    cuts = [chunk[at : at + PART_BYTES] for at in range(0, len(chunk), PART_BYTES)] or [b""]
    return [PART + (b"\x01" if number == len(cuts) - 1 else b"\x00") + cut for number, cut in enumerate(cuts)]


def _chunks(parts: list[bytes]) -> Iterable[bytes]:
    chunk = bytearray()
    for part in parts:
        chunk += part[1:]
        if part[0]:
            yield bytes(chunk)
            chunk.clear()
