"""What the core needs from outside: a log and a snapshot store. `journal.py` and `snapshots.py` are the real ones."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, overload

from raftstate.raft_config import RaftConfig
from raftstate.raft_members import Members

Entry = tuple[bytes, int, int]
"""(command, index, term): pysyncobj's order."""


class Log(Protocol):
    """pysyncobj's journal interface, with positions counted from the first record, and durability."""

    @property
    def durable_index(self) -> int:
        """Greatest index up to which every entry is synced."""

    def getRaftCommitIndex(self) -> int:
        """Greatest index told of that is known to be committed, and whose entry was synced with what is in the log
        now; at least 1, as pysyncobj expects."""

    def setRaftCommitIndex(self, raftCommitIndex: int) -> None:
        """A hint for the next start; it makes nothing dirty."""

    @property
    def first_index(self) -> int:
        """Index of the first record; 0 if there is none."""

    @property
    def last_index(self) -> int:
        """Index of the last record; 0 if there is none."""

    def term_at(self, index: int) -> int | None:
        """Term of the record at `index`; None if it is not there any more, or not yet."""

    def add(self, command: bytes, idx: int, term: int) -> None: ...
    def clear(self) -> None: ...
    def deleteEntriesFrom(self, entryFrom: int) -> None: ...
    def compact_to(self, index: int) -> None:
        """Forget the entries below `index`; its own record stays as the first."""

    def reset_to(self, index: int, term: int) -> None:
        """Begin anew behind an installed snapshot: one record that names (index, term)."""

    @overload
    def __getitem__(self, item: int) -> Entry: ...
    @overload
    def __getitem__(self, item: slice) -> list[Entry]: ...
    def __len__(self) -> int: ...


class Position(Protocol):
    """A place in the log."""

    @property
    def index(self) -> int: ...
    @property
    def term(self) -> int: ...


Apply = Callable[[int, bytes], Any]
"""The state machine: (index, data) -> value. Called once per index, in order."""


class Snapshots(Protocol):
    """The snapshot store: writes a snapshot in chunks, finds the newest good one, reads it back in chunks.

    A meta has `index`, `term` and `members` (a dict); a writer has `write(chunk)`, `commit()` and `abort()`.
    """

    def begin(self, index: int, term: int, members: dict[str, Any]) -> Any: ...
    def latest(self, min_index: int = 0) -> Any: ...
    def open(self, meta: Any) -> Iterator[bytes]: ...


@dataclass(frozen=True)
class Outside:
    """What a core is given: who it is, and all that it may touch. `base`: the newest snapshot's index and members."""

    server: str
    log: Log
    snapshots: Snapshots
    apply: Apply
    config: RaftConfig
    clock: Callable[[], float]
    rng: random.Random
    base: tuple[int, Members]
    silent_since: float | None = None
    """Since when, by `clock`, no earlier process of this server can have promised anything; None: since now."""
