"""Consistent hashing: a key keeps its instance while instances come and go. Pure.

Ring: each instance has points on a circle, and a key goes to the next point (Karger et al., 1997). An instance's
points depend on itself alone, so that a newcomer takes its share and moves nothing else; only where the ring would
become larger than it may, all instances have half as many. Maglev: a table in which each instance takes its turn to
claim the next free place of its own permutation (Eisenbud et al., 2016, section 3.4); it is more even, and moves a
few keys more. In a table of another size nearly all keys move, so one size has to do for almost everybody.
"""

from __future__ import annotations

import struct
from bisect import bisect_left
from collections.abc import Callable, Sequence
from functools import lru_cache
from hashlib import blake2b
from typing import Generic, TypeVar

T = TypeVar("T")
RING_POINTS_MAX = 65_536
"""Bound of a ring's size, whatever the configuration asks for: it is built on the event loop."""
_MEMBER_BITS = 16
"""Of a point, the lowest: whose it is."""
_MEMBER_MASK = (1 << _MEMBER_BITS) - 1
_TABLE_SIZES = (16_381, 65_537)
"""Primes. The smallest with ten places for each instance is taken; with equal weights shares differ by one place."""


def hash_of(text: bytes) -> int:
    """Return 64 bits that look random and are the same everywhere."""
    return int.from_bytes(blake2b(text, digest_size=8).digest(), "little")


class Ring(Generic[T]):
    """A hash ring of (instance, name, weight)."""

    def __init__(self, members: Sequence[tuple[T, str, int]], points_min: int, points_max: int) -> None:
        """``points_min`` holds from two instances on, as far as ``points_max`` and :data:`RING_POINTS_MAX` let."""
        total = sum(max(weight, 1) for _, _, weight in members) or 1
        most = max(len(members), min(points_max, RING_POINTS_MAX))
        each = 1
        while 2 * each < points_min:
            each *= 2
        while each > 1 and each * total > most:
            each //= 2
        points: list[int] = []
        for at, (_, name, weight) in enumerate(members):
            points += [point | at for point in _points(name, min(each * max(weight, 1), most))]
        points.sort()
        self._points = points
        self._members = [member for member, _, _ in members]

    def find(self, hashed: int, usable: Callable[[T], bool]) -> T | None:
        """Return the first usable one at or after the hash, around the circle; None when there is none."""
        points, members = self._points, self._members
        start = bisect_left(points, hashed & ~_MEMBER_MASK)
        refused: set[int] = set()
        for at in range(start, start + len(points)):
            number = points[at % len(points)] & _MEMBER_MASK
            if number in refused:
                continue
            if usable(members[number]):
                return members[number]
            refused.add(number)
            if len(refused) == len(members):
                break
        return None


@lru_cache(maxsize=1024)
def _points(name: str, count: int) -> tuple[int, ...]:
    """Return an instance's points on the ring, in order, their lowest bits zero. The fewer are among the more."""
    found: list[int] = []
    for number in range(0, count, 8):
        found += struct.unpack("<8Q", blake2b(f"{name}_{number}".encode()).digest())
    return tuple(sorted(point & ~_MEMBER_MASK for point in found[:count]))


class Maglev(Generic[T]):
    """A Maglev table of (instance, name, weight)."""

    def __init__(self, members: Sequence[tuple[T, str, int]]) -> None:
        size = self._size = next((size for size in _TABLE_SIZES if size >= 10 * len(members)), _TABLE_SIZES[-1])
        self._members = [member for member, _, _ in members]
        table = self._table = [-1] * (size if members else 0)
        if not members:
            return
        offsets, skips, heaviest = [], [], max(weight for _, _, weight in members) or 1
        for _, name, _ in members:
            hashed = hash_of(name.encode())
            offsets.append((hashed >> 32) % size)
            skips.append((hashed & 0xFFFFFFFF) % (size - 1) + 1)
        shares = [max(weight, 1) / heaviest for _, _, weight in members]
        due = [0.0] * len(members)
        filled = 0
        while filled < size:
            for at, share in enumerate(shares):
                due[at] += share
                if due[at] < 1:
                    continue
                due[at] -= 1
                place = offsets[at]
                while table[place] >= 0:
                    place = (place + skips[at]) % size
                table[place] = at
                offsets[at] = (place + skips[at]) % size
                filled += 1
                if filled == size:
                    break

    def find(self, hashed: int, usable: Callable[[T], bool]) -> T | None:
        """Return the one at the hash's place; where that is not usable, the key is hashed on."""
        if not self._table:
            return None
        tried = hashed
        for _ in range(8):
            member = self._members[self._table[tried % self._size]]
            if usable(member):
                return member
            tried = hash_of(tried.to_bytes(8, "little"))
        start = hashed % len(self._members)
        for member in self._members[start:] + self._members[:start]:
            if usable(member):
                return member
        return None
