"""Whose turn it is to shake hands: a queue by arrival, peers before agents. Pure: times are handed in.

A handshake costs a server about a millisecond of its one thread. When thousands of agents dial at once, to start all
handshakes together would mean that all end together, after everyone has given up; and raft would wait behind them.
So only a few are started in one turn of the loop, those who hung up meanwhile are skipped, and who would wait longer
than it has patience for is told so at once, which costs next to nothing.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from enum import Enum
from typing import Generic, TypeVar

AT_ONCE_MAX = 32
"""Handshakes under way; more are started as these end. Clients that were held up may all go on in one turn of the
loop: with so many it takes some 30 ms, which raft does not notice."""
LEASE_S = 1.0
"""A handshake that takes longer waits for its client, not for us: it does not count as under way any more."""
PEERS_WAITING_MAX = 64
WAIT_S_MAX = 1.0
"""While the first in the queue has waited for longer, no agent joins it: it is half of the time after which an agent
gives a server up."""


class Lane(Enum):
    """Who waits. By what it says itself: a false word brings it before other strangers, not past its certificate."""

    PEER = "peer"
    """A server: raft, or what it forwards."""
    AGENT = "agent"


T = TypeVar("T")


@dataclass(eq=False, slots=True)
class Started:
    """A handshake under way; `lease`: it counts as one."""

    at: float
    lease: bool = True


class Admission(Generic[T]):
    """The queue. `T` is what waits."""

    def __init__(self, *, waiting_max: int) -> None:
        self._waiting_max = waiting_max
        self._queues: dict[Lane, deque[tuple[T, float]]] = {Lane.PEER: deque(), Lane.AGENT: deque()}
        self._started: deque[Started] = deque()
        """In the order in which they were started, so that the oldest lease is the first to end."""
        self._under_way = 0

    def __len__(self) -> int:
        """How many wait."""
        return sum(map(len, self._queues.values()))

    def waited_s(self, now: float) -> float:
        """How long the agent has waited whose turn is next; 0 when there is none."""
        queue = self._queues[Lane.AGENT]
        return now - queue[0][1] if queue else 0.0

    def offer(self, item: T, lane: Lane, now: float) -> str:
        """Let one wait; a text is why it may not."""
        queue = self._queues[lane]
        if lane is Lane.PEER:
            if len(queue) >= PEERS_WAITING_MAX:
                return f"{PEERS_WAITING_MAX} servers wait for a handshake"
        elif len(queue) >= self._waiting_max:
            return f"{self._waiting_max} connections wait for a handshake"
        elif (waited_s := self.waited_s(now)) > WAIT_S_MAX:
            return f"others have waited {waited_s:.1f} s for a handshake"
        queue.append((item, now))
        return ""

    def next(self, now: float) -> tuple[T, Started] | None:
        """Take the next one, and what to give back to `ended`; None when there is none, or enough are under way."""
        while self._started and (not self._started[0].lease or now - self._started[0].at >= LEASE_S):
            self._give_back(self._started.popleft())
        for lane, queue in self._queues.items():
            # A few servers more are no burden, and must not wait for strangers who take their time.
            if queue and (lane is Lane.PEER or self._under_way < AT_ONCE_MAX):
                ticket = Started(now)
                self._started.append(ticket)
                self._under_way += 1
                return queue.popleft()[0], ticket
        return None

    def ended(self, ticket: Started) -> None:
        """A handshake is over, however it ended."""
        self._give_back(ticket)

    def clear(self) -> list[T]:
        """Let nobody wait any more; return who did."""
        waiting = [item for queue in self._queues.values() for item, _ in queue]
        for queue in self._queues.values():
            queue.clear()
        return waiting

    def _give_back(self, ticket: Started) -> None:
        if ticket.lease:
            ticket.lease = False
            self._under_way -= 1
