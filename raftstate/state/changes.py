"""When what anyone may watch last changed: one index per watch key, which only grows.

A key whose rows are all gone is *buried*: its index stays as a tombstone. The oldest tombstones are reaped; what
their indexes can no longer tell is then told by their family's floor, so an index may be greater than needed but
never goes back.
"""

from __future__ import annotations

from collections.abc import Mapping

from raftstate.state.table import Journal, Table

WatchKey = tuple[str, ...]
"""A family and what in it: ``("service", "web")``. ``("kv", key)`` also stands for every prefix of the key."""

BURIED_MAX = 8192


class Changes(Table[WatchKey, int]):
    """The index of each watch key's last change; negative once buried."""

    def __init__(self, journal: Journal) -> None:
        super().__init__("changes", tuple[WatchKey, int], journal)
        self.buried: dict[WatchKey, None] = {}

    def pack(self, key: WatchKey, row: int) -> tuple[WatchKey, int]:
        return key, row

    def unpack(self, data: bytes) -> tuple[WatchKey, int]:
        key, row = self._decoder.decode(data)
        return key, row

    def record(self, marks: Mapping[WatchKey, int]) -> None:
        """Put what a command that is done has touched. Most is not buried, nor was: that needs no more than a row."""
        rows, buried = self.rows, self.buried
        for key, index in marks.items():
            if index < 0 or key in buried or self._cursors:
                self.put(key, index)
            else:
                rows[key] = index

    def reindex(self, key: WatchKey, old: int | None, new: int | None) -> None:
        if new is not None and new < 0:
            self.buried[key] = None
        elif old is not None and old < 0:
            del self.buried[key]


class Floors(Table[str, int]):
    """Per family: the greatest index of a reaped tombstone."""

    def __init__(self, journal: Journal) -> None:
        super().__init__("floors", tuple[str, int], journal)

    def pack(self, key: str, row: int) -> tuple[str, int]:
        return key, row

    def unpack(self, data: bytes) -> tuple[str, int]:
        key, row = self._decoder.decode(data)
        return key, row

    def raise_to(self, family: str, index: int) -> None:
        """Raise a family's floor."""
        if index > self.rows.get(family, 0):
            self.put(family, index)


def reap(changes: Changes, floors: Floors) -> None:
    """Drop the older half of the tombstones when there are too many. By content only: replicas must agree."""
    if len(changes.buried) <= BURIED_MAX:
        return
    oldest = sorted(changes.buried, key=lambda key: (-changes.rows[key], key))[: BURIED_MAX // 2]
    for key in oldest:
        floors.raise_to(key[0], -(changes.remove(key) or 0))
