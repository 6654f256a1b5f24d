"""The driver: moves messages, time and disk syncs for a RaftCore.

Every input pokes the driver; one pump per turn of the loop then handles all of them together, so that many proposals
travel in one append and share one disk sync. Here is where a message waits for the disk: `held` messages leave when
the sync that covers them has returned (law 3).

What nobody waits for comes last. A follower waits for a quick disk itself, and acknowledges before it applies. If it
has begun a sync instead it lets go of the processor: the kernel's worker that syncs runs on the very processor that
asked it to, once that is free. What was synced is certified on disk when there is nothing better to do
(`Syncing.rest`).

It knows no asyncio: the loop is whatever can call back (`Loop`), so that the simulation drives the same code.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Protocol

from raftstate.journal_sync import Group, SyncDone
from raftstate.messages import Message
from raftstate.raft import RaftCore

TIMER_STEP_S = 0.001
"""Timers of the loop count whole milliseconds: one asked for a part of it fires at once, again and again."""
APPLY_LATER_S = 0.002
"""A follower whose sync takes longer applies meanwhile."""


class RunSync(Protocol):
    """Makes a group durable off the loop and then has the loop call `done(error or None)`.

    With `here` it may also wait for the disk, on the loop: then it returns True, and `done` is not called. Raises
    JournalFailed in that case.
    """

    def __call__(self, group: Group, done: SyncDone, /, *, here: bool) -> bool: ...


class Syncing(Protocol):
    """The part of the journal that the driver needs."""

    @property
    def dirty(self) -> bool:
        """Whether a change is not yet durable."""

    def take_pending(self) -> Group | None: ...
    def rest(self) -> None:
        """Do what the next group would do otherwise. Called now and then while no sync is under way."""


class Handle(Protocol):
    def cancel(self) -> None: ...


class Loop(Protocol):
    """An asyncio loop, or the simulation's."""

    def call_soon(self, callback: Callable[[], None], /) -> Any: ...
    def call_later(self, delay: float, callback: Callable[[], None], /) -> Handle: ...


class Driver:
    """`send` must not block; `after` runs in each pump; `on_failure` is told once why the driver stopped."""

    def __init__(
        self,
        core: RaftCore,
        journal: Syncing,
        loop: Loop,
        *,
        clock: Callable[[], float],
        run_sync: RunSync,
        send: Callable[[str, Message], None],
        after: Callable[[], None],
        on_failure: Callable[[BaseException], None],
    ) -> None:
        self._core, self._journal, self._loop, self._clock = core, journal, loop, clock
        self._run_sync, self._send, self._after, self._on_failure = run_sync, send, after, on_failure
        self._timer: Handle | None = None
        self._timer_at = 0.0
        self._apply_timer: Handle | None = None
        self._poked = self._scheduled = False
        self._quiet = True
        """Whether no sync has begun since the timer fired last."""
        self._running = True
        self._held: list[tuple[str, Message]] = []
        self.syncing = False
        """Whether a sync is under way; the journal must not be closed then."""

    def poke(self) -> None:
        """Something was handed to the core: see to it in this iteration of the loop."""
        if not self._poked and self._running:
            self._poked = True
            if not self._scheduled:
                self._scheduled = True
                self._loop.call_soon(self._turn)

    def heard(self) -> None:
        """The core has taken in a message. Of all those that acknowledge a write, one makes a leader's commit."""
        if self._core.at_rest:
            self._set_timer()
        else:
            self.poke()

    def pump_if_poked(self) -> None:
        """See to it at once: no more will come in this turn of the loop."""
        if self._poked:
            self._pump()

    def _turn(self) -> None:
        self._scheduled = False
        self.pump_if_poked()  # a sync that ended may have pumped meanwhile

    def _pump(self, *, apply_now: bool = False) -> None:
        self._poked = False
        if not self._running:
            return
        try:
            core = self._core
            # First what others wait for: while the disks work, there is time to apply.
            began = self._move()
            more = False
            if began and not apply_now and not core.is_leader:
                self._apply_later()
            else:
                if self._apply_timer is not None:
                    self._apply_timer.cancel()
                    self._apply_timer = None
                applies = core.applied < core.commit
                if applies:
                    more = core.apply_some()
                self._after()
                if applies and not core.silent:
                    self._move()
        except BaseException as error:  # noqa: BLE001 - whatever it is, a core in an unknown state must not go on
            self.fail(error)
            return
        if more:
            self.poke()
        self._set_timer()

    def _apply_later(self) -> None:
        """The end of the sync pumps, or the next message; on a slow disk, with none, this timer."""
        if self._apply_timer is None:
            self._apply_timer = self._loop.call_later(APPLY_LATER_S, self._apply_due)

    def _apply_due(self) -> None:
        self._apply_timer = None
        self._pump(apply_now=True)

    def _move(self) -> bool:
        """Send what may be sent; return whether a sync was begun."""
        core = self._core
        if not core.silent:
            out = core.take_outbox()
            for peer, message in out.free:
                self._send(peer, message)
            self._held += out.held
        return not self.syncing and self._sync()  # what is held during a sync waits for the next group

    def _set_timer(self) -> None:
        """Have `_pump` called when the core has something to do. A timer that comes too early is left as it is.

        Each message moves a follower's deadline away, and a timer costs as much as the message.
        """
        deadline = self._core.next_deadline()
        if self._timer is not None:
            if self._timer_at <= deadline:
                return
            self._timer.cancel()
        delay = TIMER_STEP_S * max(1, math.ceil((deadline - self._clock()) / TIMER_STEP_S))
        self._timer_at = deadline
        self._timer = self._loop.call_later(delay, self._due)

    def _due(self) -> None:
        self._timer = None
        if not self._running:
            return
        try:
            if self._quiet and not self.syncing:
                self._journal.rest()
            self._quiet = True
            due = self._core.next_deadline() <= self._clock()
            if due:
                self._core.tick()
        except BaseException as error:  # noqa: BLE001 - as in `_pump`
            self.fail(error)
            return
        if due:
            self._pump()
        else:
            self._set_timer()

    def _sync(self) -> bool:
        group = self._journal.take_pending()
        held = self._held
        if group is None and not held:
            return False
        self._held = []
        if group is None:
            self._release(held)
            return False
        core = self._core
        term = core.term
        self._quiet = False
        # A leader's heartbeats and its clients' reads must not wait for its disk, of which a quorum has no need.
        if not self._run_sync(group, lambda error: self._synced(error, held, term), here=not core.is_leader):
            self.syncing = True
            return True
        if held:
            self._release(held)
        core.synced(term)
        if not core.silent:
            self.poke()  # our own vote has made us the leader
        return False

    def _synced(self, error: BaseException | None, held: list[tuple[str, Message]], term: int) -> None:
        self.syncing = False
        if not self._running:
            return
        if error is not None:
            self.fail(error)
            return
        if held:
            self._release(held)
        try:
            self._core.synced(term)
            rests = self._core.at_rest and not (self._poked or self._held or self._journal.dirty)
        except BaseException as failure:  # noqa: BLE001 - as above
            self.fail(failure)
            return
        if rests:
            self._set_timer()
        else:
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
        for timer in (self._timer, self._apply_timer):
            if timer is not None:
                timer.cancel()
