"""One command's way through the state: the store, the command's index and time, and what it touched."""

from __future__ import annotations

from typing import Any, TypeVar

import msgspec

from raftstate.state.changes import WatchKey
from raftstate.state.store import Store

R = TypeVar("R", bound=msgspec.Struct)


class Step:
    """Handed to the function that applies a command."""

    __slots__ = ("at", "index", "store", "touched")

    def __init__(self, store: Store, index: int, at: str) -> None:
        self.store, self.index = store, index
        self.at = at
        """The proposal time as it stands in the envelope, for rows that show it."""
        self.touched: set[WatchKey] = set()

    def touch(self, *key: str) -> None:
        """Note that what a watch key stands for changes with this command."""
        self.touched.add(key)
        changes = self.store.changes
        if changes.rows.get(key) != self.index:
            changes.put(key, self.index)

    def bury(self, *key: str) -> None:
        """As `touch`, when nothing is left under the key."""
        self.touched.add(key)
        self.store.changes.put(key, -self.index)

    def stamp(self, row: R, old: R | None) -> R | None:
        """Return the row with its indexes, to be stored; None when it says what the stored one says already."""
        if old is None:
            return msgspec.structs.replace(row, create_index=self.index, modify_index=self.index)
        create = old.create_index  # type: ignore[attr-defined]
        if msgspec.structs.replace(row, create_index=create, modify_index=old.modify_index) == old:  # type: ignore[attr-defined]
            return None
        return msgspec.structs.replace(row, create_index=create, modify_index=self.index)


def plain(row: msgspec.Struct) -> Any:
    """Return a row as builtins in Consul's shape, as it looks after a trip over RPC or through a snapshot."""
    return msgspec.msgpack.decode(msgspec.msgpack.encode(row))
