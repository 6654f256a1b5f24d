"""One command's way through the state: the store, the command's index and time, and what it touched."""

from __future__ import annotations

from typing import Any, TypeVar

import msgspec
from msgspec.structs import replace

from raftstate.state.changes import WatchKey
from raftstate.state.store import Store

R = TypeVar("R", bound=msgspec.Struct)


class Step:
    """Handed to the function that applies a command."""

    __slots__ = ("at", "index", "marks", "store", "touched")

    def __init__(self, store: Store, index: int, at: str) -> None:
        self.store, self.index = store, index
        self.at = at
        """The proposal time as it stands in the envelope, for rows that show it."""
        self.touched: set[WatchKey] = set()
        """What to wake beside `marks`: keys whose index is told by their row."""
        self.marks: dict[WatchKey, int] = {}
        """What to wake, and to store as changed once the command is done; until then it sees the older indexes."""

    def touch(self, *key: str) -> None:
        """Note that what a watch key stands for changes with this command."""
        self.marks[key] = self.index

    def bury(self, *key: str) -> None:
        """As `touch`, when nothing is left under the key."""
        self.marks[key] = -self.index

    def forget(self) -> None:
        """Take back what was noted: the command has no effect."""
        self.touched.clear()
        self.marks.clear()

    def settle(self) -> frozenset[WatchKey]:
        """Store what was noted; return all keys to wake."""
        marks = self.marks
        if not marks:
            return frozenset(self.touched)
        self.store.changes.record(marks)
        return frozenset(self.touched.union(marks)) if self.touched else frozenset(marks)

    def stamp(self, row: R, old: R | None) -> R | None:
        """Return the row with its indexes, to be stored; None when it says what the stored one says already."""
        if old is None:
            return replace(row, create_index=self.index, modify_index=self.index)
        if says_the_same(row, old):
            return None
        return replace(row, create_index=old.create_index, modify_index=self.index)  # type: ignore[attr-defined]


def says_the_same(row: R, old: R) -> bool:
    """Whether a row that is to be written says what the stored one says: all but its indexes is equal."""
    return replace(row, create_index=old.create_index, modify_index=old.modify_index) == old  # type: ignore[attr-defined]


def plain(row: msgspec.Struct) -> Any:
    """Return a row as builtins in Consul's shape, as it looks after a trip over RPC or through a snapshot."""
    return msgspec.msgpack.decode(msgspec.msgpack.encode(row))
