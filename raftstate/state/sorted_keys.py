"""Text keys in order, for prefix scans: a list of short sorted lists, so that a change moves few of them."""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterable, Iterator

_LOAD = 512


class SortedKeys:
    """A set of strings that can be walked in order from anywhere while it changes between steps."""

    __slots__ = ("_last", "_parts")

    def __init__(self, keys: Iterable[str] = ()) -> None:
        ordered = sorted(keys)
        self._parts = [ordered[start : start + _LOAD] for start in range(0, len(ordered), _LOAD)]
        self._last = [part[-1] for part in self._parts]

    def add(self, key: str) -> None:
        """Add a key that is not there yet."""
        if not self._parts:
            self._parts.append([key])
            self._last.append(key)
            return
        at = min(bisect_left(self._last, key), len(self._last) - 1)
        part = self._parts[at]
        insort(part, key)
        self._last[at] = part[-1]
        if len(part) > 2 * _LOAD:
            self._parts.insert(at + 1, part[_LOAD:])
            del part[_LOAD:]
            self._last[at : at + 1] = [part[-1], self._parts[at + 1][-1]]

    def remove(self, key: str) -> None:
        """Remove a key that is there."""
        at = bisect_left(self._last, key)
        part = self._parts[at]
        del part[bisect_left(part, key)]
        if part:
            self._last[at] = part[-1]
        else:
            del self._parts[at], self._last[at]

    def after(self, key: str | None, count: int) -> list[str]:
        """Return up to ``count`` keys, all from one inner list, that come after ``key`` (None: from the start)."""
        if key is None:
            return self._parts[0][:count] if self._parts else []
        at = bisect_right(self._last, key)
        if at == len(self._last):
            return []
        part = self._parts[at]
        start = bisect_right(part, key)
        return part[start : start + count]

    def with_prefix(self, prefix: str) -> Iterator[str]:
        """Yield the keys that begin with ``prefix``, in order. The set must not change meanwhile."""
        at = bisect_left(self._last, prefix)
        if at == len(self._last):
            return
        start = bisect_left(self._parts[at], prefix)
        for part in self._parts[at:] if start == 0 else self._tail(at, start):
            if part[-1].startswith(prefix):
                yield from part
                continue
            for key in part:
                if not key.startswith(prefix):
                    return
                yield key
            return

    def _tail(self, at: int, start: int) -> Iterator[list[str]]:
        yield self._parts[at][start:]
        yield from self._parts[at + 1 :]
