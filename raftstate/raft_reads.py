"""Linearizable reads: ReadIndex by quorum rounds, and the lease (Raft thesis 6.4).

A *round* is a number the leader puts in what it sends and followers echo. It begins at a moment of the leader's
clock; a quorum that echoes round r has seen this leader after r began. Many readers share one round.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from raftstate.raft_members import Members

ReadDone = Callable[[int | None], None]
"""Called with the index to have applied before answering, or None when leadership was lost."""


class Reads:
    """The rounds of one leadership."""

    def __init__(self, now: float) -> None:
        self.round = 0
        self._began: deque[tuple[int, float]] = deque([(0, now)])
        """(round, when it began), oldest first; the head is the newest round a quorum has echoed."""
        self._confirmed = False
        self._waiting: deque[tuple[int, int, ReadDone]] = deque()
        """(round needed, read index, done), in order of both."""
        self._next: list[tuple[int, ReadDone]] = []
        """Reads that wait for the next round to begin."""

    def add(self, commit: int, done: ReadDone) -> None:
        """Queue a read at `commit` for the next round."""
        self._next.append((commit, done))

    @property
    def wants_round(self) -> bool:
        """Whether a round should begin now: reads are queued, and none waits for a round under way."""
        return bool(self._next) and not self._waiting

    def begin_round(self, now: float) -> int:
        """Start a round; all reads queued so far are answered by it."""
        self.round += 1
        self._began.append((self.round, now))
        for commit, done in self._next:
            self._waiting.append((self.round, commit, done))
        self._next.clear()
        return self.round

    def confirm(self, members: Members, echoed: Callable[[str], int]) -> list[tuple[int, ReadDone]]:
        """Take note of new echoes. Returns the reads whose round a quorum has echoed."""
        quorum_round = int(members.quorum_value(echoed))
        while len(self._began) > 1 and self._began[1][0] <= quorum_round:
            self._began.popleft()
        self._confirmed = self._confirmed or quorum_round > 0
        ready = []
        while self._waiting and self._waiting[0][0] <= quorum_round:
            _, commit, done = self._waiting.popleft()
            ready.append((commit, done))
        return ready

    def lease_start(self) -> float | None:
        """A moment after which a quorum has followed this leader; None before the first confirmed round."""
        return self._began[0][1] if self._confirmed else None

    def fail(self) -> list[ReadDone]:
        """Leadership is over: hand back all reads."""
        lost = [done for _, _, done in self._waiting] + [done for _, done in self._next]
        self._waiting.clear()
        self._next.clear()
        return lost
