"""The driver: moves messages, time and disk syncs for a RaftCore on an asyncio loop.

Every input pokes the driver; one pump per loop iteration then handles all of them together, so that many proposals
travel in one append and share one disk sync. Here is where a message waits for the disk: `held` messages leave when
the sync that covers them has returned (law 3).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

from raftstate.messages import Message
from raftstate.raft import RaftCore


class Group(Protocol):
    """Journal writes to be synced together."""

    def sync(self) -> None: ...


class Syncing(Protocol):
    """The part of the journal that the driver needs."""

    def take_pending(self) -> Group | None: ...


class Driver:
    """`send` must not block; `after` runs after each pump; `on_failure` is told once why the driver stopped."""

    def __init__(
        self,
        core: RaftCore,
        journal: Syncing,
        *,
        clock: Callable[[], float],
        send: Callable[[str, Message], None],
        after: Callable[[], None],
        on_failure: Callable[[BaseException], None],
    ) -> None:
        self._core, self._journal, self._clock = core, journal, clock
        self._send, self._after, self._on_failure = send, after, on_failure
        self._loop = asyncio.get_running_loop()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="raft-sync")
        self._timer: asyncio.TimerHandle | None = None
        self._poked = False
        self._running = True
        self._held: list[tuple[str, Message]] = []
        self._syncing = False
        self._idle = asyncio.Event()
        """Set while no sync is under way."""
        self._idle.set()

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
            more = core.apply_some()
            self._after()
            out = core.take_outbox()
            for peer, message in out.free:
                self._send(peer, message)
            self._held += out.held
            self._sync(out.term)
        except BaseException as error:  # noqa: BLE001 - whatever it is, a core in an unknown state must not go on
            self.fail(error)
            return
        if more:
            self.poke()
        self._set_timer()

    def _set_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        delay_s = max(0.0, self._core.next_deadline() - self._clock())
        self._timer = self._loop.call_later(delay_s, self._pump)

    def _sync(self, term: int) -> None:
        if self._syncing:
            return  # what is held now waits for the next group
        group = self._journal.take_pending()
        held, self._held = self._held, []
        if group is None:
            self._release(held)
            return
        self._syncing = True
        self._idle.clear()
        work = self._thread.submit(group.sync)
        work.add_done_callback(lambda done: self._loop.call_soon_threadsafe(self._synced, done, held, term))

    def _synced(self, work: Future[None], held: list[tuple[str, Message]], term: int) -> None:
        self._syncing = False
        self._idle.set()
        error = work.exception()
        if error is not None:
            self.fail(error)
            return
        if not self._running:
            return
        self._release(held)
        try:
            self._core.synced(term)
        except BaseException as failure:  # noqa: BLE001 - as above
            self.fail(failure)
            return
        self._pump()

    def _release(self, held: list[tuple[str, Message]]) -> None:
        for peer, message in held:
            self._send(peer, message)

    def fail(self, error: BaseException) -> None:
        """Stop for good because of `error`."""
        if self._running:
            self._halt()
            self._on_failure(error)

    def _halt(self) -> None:
        self._running = False
        if self._timer is not None:
            self._timer.cancel()

    async def stop(self) -> None:
        """Stop moving; waits for a sync under way. The journal may be closed afterwards."""
        self._halt()
        await self._idle.wait()
        self._thread.shutdown(wait=False)
