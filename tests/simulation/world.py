"""Virtual time, one source of chance, and the transcript. Everything in a run happens as an event here."""

from __future__ import annotations

import hashlib
import heapq
import random
from collections import deque
from collections.abc import Callable


class Violation(AssertionError):
    """An invariant does not hold."""


class World:
    """A run's clock, queue and dice. The same seed gives the same transcript, byte for byte."""

    def __init__(self, seed: int, *, tail: int = 400, verbose: bool = False) -> None:
        self.verbose = verbose
        self.rng = random.Random(seed)
        self.now = 0.0
        self._queue: list[tuple[float, int, Timer]] = []
        self._number = 0
        self._hash = hashlib.blake2b(digest_size=16)
        self.tail: deque[str] = deque(maxlen=tail)
        self.events = 0

    def after(self, delay: float, action: Callable[[], None]) -> Timer:
        """Have `action` happen `delay` seconds from now."""
        timer = Timer(action)
        self._number += 1
        heapq.heappush(self._queue, (self.now + delay if delay > 0.0 else self.now, self._number, timer))
        return timer

    def run(self, until: float) -> None:
        """Let everything happen that is due before `until`."""
        queue, pop = self._queue, heapq.heappop
        while queue and queue[0][0] <= until:
            self.now, _, timer = pop(queue)
            self.events += 1
            if timer.action is not None:
                timer.action()
        self.now = until

    def note(self, who: str, what: str, in_words: Callable[[], str] | None = None) -> None:
        """Write a line of the transcript; `in_words` says it for a reader, when `verbose`."""
        line = f"{self.now:10.5f} {who:4} {what}"
        self._hash.update(line.encode())
        if self.verbose and in_words is not None:
            line = f"{self.now:10.5f} {who:4} {in_words()}"
        self.tail.append(line)

    def transcript_hash(self) -> str:
        return self._hash.hexdigest()


class Timer:
    """Something that will happen, unless cancelled."""

    __slots__ = ("action",)

    def __init__(self, action: Callable[[], None]) -> None:
        self.action: Callable[[], None] | None = action

    def fire(self) -> None:
        if self.action is not None:
            self.action()

    def cancel(self) -> None:
        self.action = None
