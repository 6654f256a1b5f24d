"""The driver: moves messages, time and disk syncs for a RaftCore.

Every input pokes the driver; one pump per turn of the loop then handles all of them together, so that many proposals
travel in one append and share one disk sync. Here is where a message waits for the disk: `held` messages leave when
the sync that covers them has returned (law 3).

It knows no asyncio: the loop is whatever can call back (`Loop`), so that the simulation drives the same code.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from raftstate.journal_sync import Group, SyncDone
from raftstate.messages import Message
from raftstate.raft import RaftCore


class Syncing(Protocol):
    """The part of the journal that the driver needs."""

    def take_pending(self) -> Group | None: ...


class Handle(Protocol):
    def cancel(self) -> None: ...


class Loop(Protocol):
    """An asyncio loop, or the simulation's."""

    def call_soon(self, callback: Callable[[], None], /) -> Any: ...
    def call_later(self, delay: float, callback: Callable[[], None], /) -> Handle: ...


class Driver:
    """`send` must not block; `after` runs in each pump; `on_failure` is told once why the driver stopped.

    `run_sync(group, done)` runs `group.sync()` off the loop and then has the loop call `done(error or None)`.
    """

    def __init__(
        self,
        core: RaftCore,
        journal: Syncing,
        loop: Loop,
        *,
        clock: Callable[[], float],
        run_sync: Callable[[Group, SyncDone], None],
        send: Callable[[str, Message], None],
        after: Callable[[], None],
        on_failure: Callable[[BaseException], None],
    ) -> None:
        self._core, self._journal, self._loop, self._clock = core, journal, loop, clock
        self._run_sync, self._send, self._after, self._on_failure = run_sync, send, after, on_failure
        self._timer: Handle | None = None
        self._timer_at = 0.0
        self._poked = False
        self._running = True
        self._held: list[tuple[str, Message]] = []
        self.syncing = False
        """Whether a sync is under way; the journal must not be closed then."""

    def poke(self) -> None:
        """Something was handed to the core: see to it in this iteration of the loop."""
        if not self._poked and self._running:
            self._poked = True
            self._loop.call_soon(self._pump)

    def _pump(self) -> None:
        self._poked = False
        if not self._running:
            return
        try:
            core = self._core
            if core.next_deadline() <= self._clock():
                core.tick()
            # First what others wait for: while the disks work, there is time to apply.
            self._move()
            more = core.apply_some()
            self._after()
            self._move()
        except BaseException as error:  # noqa: BLE001 - whatever it is, a core in an unknown state must not go on
            self.fail(error)
            return
        if more:
            self.poke()
        self._set_timer()

    def _move(self) -> None:
        out = self._core.take_outbox()
        for peer, message in out.free:
            self._send(peer, message)
        self._held += out.held
        self._sync(out.term)

    def _set_timer(self) -> None:
        """Have `_pump` called when the core has something to do. A timer that comes too early is left as it is.

        Each message moves a follower's deadline away, and a timer costs as much as the message.
        """
        deadline = self._core.next_deadline()
        if self._timer is not None:
            if self._timer_at <= deadline:
                return
            self._timer.cancel()
        self._timer_at = deadline
        self._timer = self._loop.call_later(max(0.0, deadline - self._clock()), self._due)

    def _due(self) -> None:
        self._timer = None
        self._pump()

    def _sync(self, term: int) -> None:
        if self.syncing:
            return  # what is held now waits for the next group
        group = self._journal.take_pending()
        held, self._held = self._held, []
        if group is None:
            self._release(held)
            return
        self.syncing = True
        self._run_sync(group, lambda error: self._synced(error, held, term))

    def _synced(self, error: BaseException | None, held: list[tuple[str, Message]], term: int) -> None:
        self.syncing = False
        if not self._running:
            return
        if error is not None:
            self.fail(error)
            return
        self._release(held)
        try:
            self._core.synced(term)
        except BaseException as failure:  # noqa: BLE001 - as above
            self.fail(failure)
            return
        self._pump()

    def _release(self, held: list[tuple[str, Message]]) -> None:
        term = self._core.term
        for peer, message in held:
            # An answer that waited while a new term began may name entries that were replaced meanwhile.
            if message.term == term:
                self._send(peer, message)

    def fail(self, error: BaseException) -> None:
        """Stop for good because of `error`."""
        if self._running:
            self.stop()
            self._on_failure(error)

    def stop(self) -> None:
        """Move nothing any more. A sync under way goes on; its end is not acted upon."""
        self._running = False
        if self._timer is not None:
            self._timer.cancel()
