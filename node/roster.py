"""Which nodes the leader judges, read from the catalog no oftener than it has to be."""

from __future__ import annotations

import time

from raftstate.model.catalog import CRITICAL, SERF_HEALTH
from raftstate.state.store import Store

PAUSE_FACTOR, PAUSE_S_MAX = 200, 1.0
"""A pause of so many times what the last reading took: half a percent of a core, even if it is always due."""


class Roster:
    """Which nodes are judged by their signs of life, and how they stand: read from the catalog when it has changed.

    To read thousands of nodes takes milliseconds: while the catalog changes all the time it is done the less often
    the longer it takes.
    """

    def __init__(self) -> None:
        self.living: set[str] = set()
        self.critical: set[str] = set()
        self._read: tuple[Store, int, int] | None = None
        self._again_at = 0.0

    def forget(self) -> None:
        """Read anew at the next look."""
        self._read, self._again_at = None, 0.0

    def look(self, store: Store, now: float) -> bool:
        """Return whether the catalog was read anew."""
        read = (store, store.changed_at(("nodes",)), store.changed_at(("checks",)))
        if now < self._again_at or (self._read is not None and self._read[0] is store and self._read == read):
            return False
        began = time.perf_counter()
        self._read = read
        checks = store.checks.rows
        self.living, self.critical = set(), set()
        for node in store.nodes.rows:
            if (check := checks.get((node, SERF_HEALTH))) is not None:
                (self.critical if check.status == CRITICAL else self.living).add(node)
        self._again_at = now + min(PAUSE_S_MAX, PAUSE_FACTOR * (time.perf_counter() - began))
        return True
