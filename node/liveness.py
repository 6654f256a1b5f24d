"""Node failure detection: which agents have missed their deadline. `Deadlines` is pure: times are handed in.

An agent sends a heartbeat to any server, which passes it to the leader; only the leader keeps deadlines. A new
leader gives every agent a full deadline once, so that an election fails no one.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterable

ALIVE_OUTPUT = "Agent alive and reachable"
DEAD_OUTPUT = "Agent not live or unreachable"

BEATS_PER_S = 1000.0
"""As many signs of life as one server need take in; with more agents each gives them seldomer."""
BEATS_IN_TTL = 2.5
"""But so often that one may be lost."""


def beat_every_s(agents: int, servers: int, ttl_s: float) -> float:
    """Return how often an agent need give a sign of life, seconds, by how many agents and servers there are."""
    return min(agents / max(1, servers) / BEATS_PER_S, ttl_s / BEATS_IN_TTL)


EXCUSE_S_MAX = 60.0


class Excuse:
    """Whether silence says nothing now, because servers are crowded: who is not heard of may wait at their door.

    Strangers can crowd a server, so an excuse is bounded: after `EXCUSE_S_MAX` silence counts again for as long.
    Pure: times are handed in.
    """

    def __init__(self, ttl_s: float) -> None:
        self._ttl_s = ttl_s
        self._since = self._until = float("-inf")

    def note(self, now: float) -> None:
        """A server is crowded; those it put off may come later still."""
        if now >= self._until + EXCUSE_S_MAX:
            self._since = now
        if now - self._since <= EXCUSE_S_MAX:
            self._until = now + self._ttl_s

    def holds(self, now: float) -> bool:
        """Whether an agent that missed its deadline has to be given another."""
        return now < self._until


LOSSES_S, LOSSES_MIN, LOSSES_SHARE = 5.0, 16, 0.1


class Losses:
    """Whether so many connections broke of late that it was the network or a server, and not their agents.

    Pure: times are handed in.
    """

    def __init__(self) -> None:
        self._at: deque[float] = deque()

    def note(self, now: float) -> None:
        """One connection broke."""
        self._at.append(now)

    def many(self, now: float, left: int) -> bool:
        """Whether within `LOSSES_S` at least `LOSSES_MIN` broke, and a tenth of all; `left` are there still."""
        while self._at and now - self._at[0] > LOSSES_S:
            self._at.popleft()
        lost = len(self._at)
        return lost >= LOSSES_MIN and lost >= LOSSES_SHARE * (lost + left)


class Deadlines:
    """Deadlines by name. `ttl_s` is how long a beat lasts."""

    def __init__(self, ttl_s: float) -> None:
        self._ttl_s = ttl_s
        self._due: dict[str, float] = {}
        self._heap: list[tuple[float, str]] = []
        """May hold older deadlines of a name; only the one that equals `_due` counts."""

    def __len__(self) -> int:
        return len(self._due)

    def __contains__(self, name: str) -> bool:
        return name in self._due

    def beat(self, name: str, now: float, ttl_s: float | None = None) -> None:
        """A sign of life: the deadline is `ttl_s` (or this object's) from now."""
        due = now + (self._ttl_s if ttl_s is None else ttl_s)
        self._due[name] = due
        heapq.heappush(self._heap, (due, name))
        if len(self._heap) > 64 + 4 * len(self._due):
            self._heap = [(due, name) for name, due in self._due.items()]
            heapq.heapify(self._heap)

    def begin(self, names: Iterable[str], now: float) -> None:
        """Take office: forget what was, and give each of these a full deadline."""
        self._due.clear()
        self._heap.clear()
        for name in names:
            self.beat(name, now)

    def keep_only(self, names: set[str], now: float) -> None:
        """Follow the catalog: forget who is gone, give who is new a full deadline."""
        for name in [known for known in self._due if known not in names]:
            del self._due[name]
        for name in names:
            if name not in self._due:
                self.beat(name, now)

    def forget(self, name: str) -> None:
        """Track this one no more."""
        self._due.pop(name, None)

    def expired(self, now: float) -> list[str]:
        """Return those whose deadline has passed, each once; a later beat tracks it again."""
        gone = []
        while self._heap and self._heap[0][0] <= now:
            due, name = heapq.heappop(self._heap)
            if self._due.get(name) == due:
                del self._due[name]
                gone.append(name)
        return gone

    def next_due(self) -> float | None:
        """Return when the earliest deadline passes; None when there is none."""
        while self._heap and self._due.get(self._heap[0][1]) != self._heap[0][0]:
            heapq.heappop(self._heap)
        return self._heap[0][0] if self._heap else None
