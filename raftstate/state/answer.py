"""What a query gives."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgspec

from raftstate.state.changes import WatchKey
from raftstate.state.store import Store


class Answer(msgspec.Struct, frozen=True):
    """A query's value as of ``index``; it cannot change unless one of the ``watch`` keys is touched."""

    index: int
    """At least 1; only grows for the same query."""
    value: Any
    watch: tuple[WatchKey, ...]


def answer(store: Store, value: Any, *watch: WatchKey) -> Answer:
    """Return the answer whose index is the last change under the watch keys (not for the ``kv`` families)."""
    return Answer(index_of(store, watch), value, watch)


def index_of(store: Store, watch: Iterable[WatchKey]) -> int:
    """Return the last change under watch keys, at least 1."""
    index = 1
    rows = store.changes.rows
    for key in watch:
        changed = rows.get(key)
        changed = store.floors.rows.get(key[0], 0) if changed is None else abs(changed)
        if changed > index:
            index = changed
    return index
