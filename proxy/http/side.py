"""What all HTTP connections of one direction share: options, deadlines, draining, the end."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import Final, Generic, Protocol, TypeVar

from proxy.http.options import HttpOptions, HttpStats, OutboundOptions
from proxy.logs import BurstLog
from proxy.mux.flow import MemoryBudget
from proxy.tasks import Tasks
from proxy.tracing import RequestTrace, Tracer

log = logging.getLogger("lictor.proxy.http")

NEVER: Final = float("inf")
SWEEP_S_MIN: Final = 0.02
"""However many deadlines there are, they are looked at no more often."""
SWEEP_S_EACH: Final = 1e-5
"""And so much less often for each connection: to look at 10,000 takes 2 ms, which is done each 120 ms then."""


class Told(Protocol):
    """Takes a request that has ended."""

    def __call__(
        self,
        party: tuple[str, str],
        protocol: str,
        request: tuple[bytes, bytes, Sequence[tuple[bytes, bytes]]],
        answer: tuple[int, str, int],
        seconds: float,
        trace: RequestTrace | None,
    ) -> None:
        """``party``: service and instance of the far side; ``request``: method, target, fields; ``answer``: status
        (0: none), by whom, bytes; ``trace``: what :attr:`HttpSide.tracer` made of the request."""


class Kept(Protocol):
    """A connection that :class:`HttpSide` looks after."""

    deadline: float
    """When :meth:`expire` is due, by the loop's clock."""

    def expire(self) -> None:
        """The deadline has passed."""

    def drain(self) -> None:
        """Take no more requests; end with those under way."""

    def cut(self, error: Exception | None = None) -> None:
        """Drop the connection at once."""


class HttpSide:
    """The connections of one direction. ``options`` may be replaced; new connections then go by the new ones."""

    def __init__(self, options: HttpOptions) -> None:
        self.options = options
        self.tasks = Tasks("http filter")
        self.connections: set[Kept] = set()
        self.draining = False
        self.burst_log = BurstLog(log)
        self.memory = MemoryBudget()
        """In which is counted what is held for peers that do not take it; one for the whole process, once set."""
        self.told: Told | None = None
        """Who is told of each request that has ended, beside the counters; None when nobody wants to know."""
        self.tracer: Tracer | None = None
        """Who decides on each request's trace context; None: it is passed on as it comes. Set before any connection
        is served."""
        self.loop = asyncio.get_running_loop()
        self._sweeper: asyncio.TimerHandle | None = None
        self._sweep_at = NEVER

    def keep(self, connection: Kept) -> None:
        """Look after a connection's deadlines until it has ended."""
        self.connections.add(connection)
        if self._sweeper is None:
            self._sweep_by(self.loop.time() + self.options.sweep_s)

    def heed(self, deadline: float) -> None:
        """A connection that is looked after has a deadline which may be before the next sweep."""
        if deadline < self._sweep_at:
            self._sweep_by(max(deadline, self.loop.time() + self._pause_s()))

    def drain(self) -> None:
        """Let requests under way end, then close their connections; idle ones at once."""
        self.draining = True
        for connection in list(self.connections):
            connection.drain()

    async def close(self) -> None:
        """Cut everything."""
        for connection in list(self.connections):
            connection.cut()
        if self._sweeper is not None:
            self._sweeper.cancel()
        await self.tasks.close()

    def _sweep_by(self, at: float) -> None:
        if at < self._sweep_at:
            if self._sweeper is not None:
                self._sweeper.cancel()
            self._sweep_at = at
            self._sweeper = self.loop.call_at(at, self._sweep)

    def _sweep(self) -> None:
        self._sweeper = None
        self._sweep_at = NEVER
        now = self.loop.time()
        for connection in [each for each in self.connections if each.deadline <= now]:
            connection.expire()
        if self.connections:
            due = min([each.deadline for each in self.connections])
            self._sweep_by(min(max(due, now + self._pause_s()), now + self.options.sweep_s))

    def _pause_s(self) -> float:
        return SWEEP_S_MIN + SWEEP_S_EACH * len(self.connections)


class Waits(Protocol):
    """A connection whose request awaits its turn for a connection to an instance."""

    def let_in(self) -> None:
        """It is the request's turn."""


AnyFleet = TypeVar("AnyFleet")


class OutboundSide(HttpSide, Generic[AnyFleet]):
    """What both versions of HTTP share on the caller's side of an upstream: options, instances, what is in flight."""

    def __init__(self, options: OutboundOptions, fleet: AnyFleet, stats: HttpStats) -> None:
        super().__init__(options.http)
        self.outbound = options
        self.fleet = fleet
        self.stats = stats
        self.in_flight = 0
        self.pending = 0
        """Requests that await a connection: one that is being made, or their turn."""
        self.in_use = 0
        """Connections to instances that requests of HTTP/1.1 have, or are about to have."""
        self.queue: dict[Waits, None] = {}
        """Who awaits one, the oldest first."""
        self._letting_in = False

    def use(self, options: OutboundOptions) -> None:
        """Take new options, for requests and connections to come."""
        self.outbound = options
        self.options = options.http
        self.let_in()

    def wait(self, who: Waits) -> None:
        """All connections that may be are in use: ``who`` is told when it is let in."""
        self.queue[who] = None
        self.pending += 1

    def give_up(self, who: Waits) -> None:
        """``who`` waits no more."""
        if who in self.queue:
            del self.queue[who]
            self.pending -= 1

    def let_in(self) -> None:
        """Give the connections that are free now to those who wait."""
        if self._letting_in:
            return  # one that is let in and leaves at once does not let in the next: else a thousand would be nested
        self._letting_in = True
        try:
            while self.queue and self.in_use < self.outbound.connections_max:
                who = next(iter(self.queue))
                self.give_up(who)
                self.in_use += 1
                who.let_in()
        finally:
            self._letting_in = False
