"""The network between simulated servers: drops, delays, reorders, duplicates, partitions, one way or both."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tests.simulation.world import World


@dataclass
class NetworkMood:
    """How bad the network is at present; chances per message."""

    drop: float = 0.0
    duplicate: float = 0.0
    late: float = 0.0
    """Chance of a delay of up to `late_s`: long enough to outlive a term."""
    late_s: float = 1.5
    delay_s: float = 0.002
    ordered: bool = False
    """Whether each link delivers in order, as a TCP connection does."""


class Network:
    """Carries bytes between named servers."""

    def __init__(self, world: World, deliver: Callable[[str, str, bytes], None]) -> None:
        self._world, self._deliver = world, deliver
        self.mood = NetworkMood()
        self.blocked: set[tuple[str, str]] = set()
        self._last: dict[tuple[str, str], float] = {}

    def send(self, source: str, target: str, data: bytes) -> None:
        mood, rng = self.mood, self._world.rng
        if (source, target) in self.blocked or rng.random() < mood.drop:
            return
        copies = 2 if rng.random() < mood.duplicate else 1
        for _ in range(copies):
            delay = mood.delay_s * (0.2 + rng.random())
            if rng.random() < mood.late:
                delay += mood.late_s * rng.random()
            if mood.ordered:
                at = max(self._world.now + delay, self._last.get((source, target), 0.0))
                self._last[source, target] = at
                delay = at - self._world.now
            self._world.after(delay, lambda: self._arrive(source, target, data))

    def _arrive(self, source: str, target: str, data: bytes) -> None:
        if (source, target) not in self.blocked:
            self._deliver(source, target, data)

    def partition(self, one: list[str], other: list[str], *, one_way: bool) -> None:
        """Cut `one` off from `other`; one way: only what `one` sends is lost."""
        for a in one:
            for b in other:
                self.blocked.add((a, b))
                if not one_way:
                    self.blocked.add((b, a))

    def heal(self) -> None:
        self.blocked.clear()
