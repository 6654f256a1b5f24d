"""Letting go of a large state that was replaced.

Freeing a million rows at once holds the interpreter, and so the event loop, for a good part of a second, in whatever
thread it happens.
"""

from __future__ import annotations

from raftstate.state.store import Store

SLICE_ROWS = 2_000


def retire(store: Store) -> None:
    """Free a replaced state bit by bit; call it in a thread. Whoever still reads it may go on."""
    tables = store.tables()
    rows = [list(table.rows.values()) for table in tables]
    del store, tables  # with them go the tables, unless a backup still walks them; the rows are held here
    for held in rows:
        while held:
            del held[-SLICE_ROWS:]
