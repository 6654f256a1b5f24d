"""A table of immutable rows: undo for a command that is refused, copy-on-write for snapshots that are open.

Rows change only through `put` and `remove`. Both tell the subclass's `reindex`, so that a row that is put back by
an undo or read from a snapshot keeps the secondary indexes right by the same code.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from typing import Any, Generic, TypeVar

import msgspec

K = TypeVar("K", bound=Hashable)
R = TypeVar("R")
G = TypeVar("G", bound=Hashable)

Journal = list[tuple["Table[Any, Any]", Any, Any]]
"""What the running command replaced: (table, key, row before or None), oldest first."""


class Table(Generic[K, R]):
    """Rows by key. ``rows`` is read freely and changed by `put` and `remove` alone."""

    def __init__(self, name: str, packed_type: Any, journal: Journal) -> None:
        """``packed_type`` is the form of a row in a snapshot; ``journal`` is shared by the tables of a store."""
        self.name = name
        self.rows: dict[K, R] = {}
        self._journal = journal
        self._cursors: list[TableCursor[K, R]] = []
        self._decoder = msgspec.msgpack.Decoder(packed_type)

    def put(self, key: K, row: R) -> None:
        """Insert or replace."""
        old = self.rows.get(key)
        if self._cursors:
            self._note(key, old)
        self._journal.append((self, key, old))
        self.rows[key] = row
        self.reindex(key, old, row)

    def remove(self, key: K) -> R | None:
        """Remove; return the row that was there."""
        old = self.rows.get(key)
        if old is None:
            return None
        if self._cursors:
            self._note(key, old)
        self._journal.append((self, key, old))
        del self.rows[key]
        self.reindex(key, old, None)
        return old

    def reindex(self, key: K, old: R | None, new: R | None) -> None:
        """Keep the secondary indexes; called after each change."""

    def pack(self, key: K, row: R) -> Any:
        """Return the form of a row in a snapshot."""
        return row

    def unpack(self, data: bytes) -> tuple[K, R]:
        """Parse one packed row. Raises msgspec.ValidationError."""
        row = self._decoder.decode(data)
        return self.key_of(row), row

    def key_of(self, row: R) -> K:
        """Return the key under which a row belongs."""
        raise NotImplementedError

    def cursor(self) -> TableCursor[K, R]:
        """Begin to read the rows as they are now; `TableCursor.close` ends it."""
        cursor = TableCursor(self)
        self._cursors.append(cursor)
        return cursor

    def drop_cursor(self, cursor: TableCursor[K, R]) -> None:
        """Stop noting changes for a cursor."""
        if cursor in self._cursors:
            self._cursors.remove(cursor)

    def _note(self, key: K, old: R | None) -> None:
        for cursor in self._cursors:
            cursor.note(key, old)


class TableCursor(Generic[K, R]):
    """The rows of a table as they were when the cursor was made, however the table changes while it is read."""

    def __init__(self, table: Table[K, R]) -> None:
        self.table = table
        self.notes: dict[K, R | None] = {}

    def note(self, key: K, old: R | None) -> None:
        """Remember the row that a change is about to replace; the first note of a key counts."""
        self.notes.setdefault(key, old)

    def __iter__(self) -> Iterator[tuple[K, R]]:
        # The keys are listed when the walk begins, not when the cursor is made: beginning must cost nothing.
        rows, notes = self.table.rows, self.notes
        for key in [*rows, *(key for key in notes if key not in rows)]:
            row = notes[key] if key in notes else rows[key]
            if row is not None:
                yield key, row

    def close(self) -> None:
        """Forget what was noted, and note no more."""
        self.table.drop_cursor(self)
        self.notes.clear()


def undo(journal: Journal) -> None:
    """Put back everything that the journal's command changed."""
    for table, key, old in reversed(journal[:]):
        if old is None:
            table.remove(key)
        else:
            table.put(key, old)
    journal.clear()


def group_put(index: dict[G, dict[K, R]], group: G, key: K, row: R) -> None:
    """Add a row to a group of a secondary index."""
    rows = index.get(group)
    if rows is None:
        index[group] = {key: row}
    else:
        rows[key] = row


def group_remove(index: dict[G, dict[K, R]], group: G, key: K) -> None:
    """Take a row out of a group; an empty group goes."""
    rows = index[group]
    del rows[key]
    if not rows:
        del index[group]
