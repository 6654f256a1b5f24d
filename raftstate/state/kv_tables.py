"""Key/value entries, their tombstones, sessions and lock delays."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from raftstate.model.kv import KVEntry, Session
from raftstate.state.changes import Floors
from raftstate.state.sorted_keys import SortedKeys
from raftstate.state.table import Journal, Table, TableCursor, group_put, group_remove

TOMBSTONES_MAX = 65_536
_WALK_KEYS = 256


class Entries(Table[str, KVEntry]):
    """Entries by key, in key order."""

    def __init__(self, journal: Journal) -> None:
        super().__init__("kv", KVEntry, journal)
        self.order = SortedKeys()
        self.by_session: dict[str, dict[str, KVEntry]] = {}

    def key_of(self, row: KVEntry) -> str:
        return row.key

    def reindex(self, key: str, old: KVEntry | None, new: KVEntry | None) -> None:
        if old is None:
            self.order.add(key)
        elif old.session is not msgspec.UNSET:
            group_remove(self.by_session, old.session, key)
        if new is None:
            self.order.remove(key)
        elif new.session is not msgspec.UNSET:
            group_put(self.by_session, new.session, key, new)

    def cursor(self) -> TableCursor[str, KVEntry]:
        cursor = _OrderedCursor(self)
        self._cursors.append(cursor)
        return cursor


class _OrderedCursor(TableCursor[str, KVEntry]):
    """Walks in key order from where it is, because listing a million keys at once would stall the loop.

    What lies behind the position needs no note; what lies before it and was removed is yielded at the end.
    """

    def __init__(self, table: Entries) -> None:
        super().__init__(table)
        self._order = table.order
        self._position: str | None = None

    def note(self, key: str, old: KVEntry | None) -> None:
        if self._position is None or key > self._position:
            self.notes.setdefault(key, old)

    def __iter__(self) -> Iterator[tuple[str, KVEntry]]:
        rows, notes = self.table.rows, self.notes
        while keys := self._order.after(self._position, _WALK_KEYS):
            # Rows are taken before anything is yielded: the walk's position then covers all of them.
            self._position = keys[-1]
            found = [(key, notes.pop(key) if key in notes else rows[key]) for key in keys]
            for key, row in found:
                if row is not None:
                    yield key, row
        for key in sorted(notes):
            row = notes[key]
            if row is not None:
                yield key, row


class Tombstones(Table[str, int]):
    """The index at which a key was deleted, until the key is set again or the tombstone is reaped."""

    def __init__(self, journal: Journal) -> None:
        super().__init__("kv-tombstones", tuple[str, int], journal)
        self.order = SortedKeys()

    def pack(self, key: str, row: int) -> tuple[str, int]:
        return key, row

    def unpack(self, data: bytes) -> tuple[str, int]:
        key, row = self._decoder.decode(data)
        return key, row

    def reindex(self, key: str, old: int | None, new: int | None) -> None:
        if old is None:
            self.order.add(key)
        if new is None:
            self.order.remove(key)

    def reap(self, floors: Floors) -> None:
        """Drop the older half when there are too many; lists are then as new as the newest that was dropped."""
        if len(self.rows) <= TOMBSTONES_MAX:
            return
        for key in sorted(self.rows, key=lambda key: (self.rows[key], key))[: len(self.rows) - TOMBSTONES_MAX // 2]:
            floors.raise_to("kv", self.remove(key) or 0)


class Sessions(Table[str, Session]):
    """Sessions by id."""

    def __init__(self, journal: Journal) -> None:
        super().__init__("sessions", Session, journal)
        self.by_node: dict[str, dict[str, Session]] = {}
        self.by_check: dict[tuple[str, str], dict[str, Session]] = {}
        """Sessions that end when the check (node, check id) fails."""

    def key_of(self, row: Session) -> str:
        return row.id

    def reindex(self, key: str, old: Session | None, new: Session | None) -> None:
        if old is not None:
            group_remove(self.by_node, old.node, key)
            for check_id in check_ids(old):
                group_remove(self.by_check, (old.node, check_id), key)
        if new is not None:
            group_put(self.by_node, new.node, key, new)
            for check_id in check_ids(new):
                group_put(self.by_check, (new.node, check_id), key, new)


def check_ids(session: Session) -> list[str]:
    """Return the ids of the checks that a session depends on, each once."""
    return list(dict.fromkeys((*session.node_checks, *(check.id for check in session.service_checks))))


class LockDelays(Table[str, int]):
    """Until when (microseconds of log time) a key may not be locked, after its session ended."""

    def __init__(self, journal: Journal) -> None:
        super().__init__("lock-delays", tuple[str, int], journal)

    def pack(self, key: str, row: int) -> tuple[str, int]:
        return key, row

    def unpack(self, data: bytes) -> tuple[str, int]:
        key, row = self._decoder.decode(data)
        return key, row
