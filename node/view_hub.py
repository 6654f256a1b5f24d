"""Views shared by their subscribers: however many follow one query, it is run, compared and encoded once a change.

A subscriber that was connected elsewhere names the index it holds; the state machine gives equal rows at equal
indexes on every server, so it gets only what came after, and the whole view only when that is not known here.

A change that thousands follow, or a restored state that changes thousands of views, is worked off in slices of a few
milliseconds: in between the loop serves raft, heartbeats and requests.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from itertools import islice
from typing import TYPE_CHECKING, Any, Protocol

from node.backend import ViewEvent
from node.errors import Unreachable
from node.rpc.server import Feed
from node.views import Rows, canonical, difference, rows_of

if TYPE_CHECKING:
    from raftstate.state.changes import WatchKey

log = logging.getLogger("lictor.views")

HISTORY_EVENTS = 64
BACKLOG_EVENTS_MAX = 64
"""A subscriber that is this far behind gets the whole view instead."""
LAG_WAIT_S = 2.0
"""How long a server that knows less than the subscriber may take to catch up before it sends it elsewhere."""
REFRESH_PAUSE_MAX_S = 0.05
SLICE_S = 0.004
SERVED_BETWEEN = 16
"""Subscribers served between two refreshes of views, so that neither waits for all of the other."""


class Answered(Protocol):
    """What a query gives: its index, value and the keys whose change may change it."""

    @property
    def index(self) -> int: ...
    @property
    def value(self) -> Any: ...
    @property
    def watch(self) -> tuple[WatchKey, ...]: ...


Ask = Callable[[str, Mapping[str, Any]], Answered]
Stop = Callable[[], None]
Listen = Callable[[Iterable["WatchKey"], Callable[[], None]], Stop]
"""(keys, callback) -> how to stop: the callback is called whenever any of the keys is touched."""


class _Subscriber:
    """A subscriber in this process."""

    def __init__(self) -> None:
        self.events: deque[ViewEvent] = deque()
        self.ready = asyncio.Event()
        self.failure: BaseException | None = None

    def put(self, event: ViewEvent, whole: Callable[[], ViewEvent]) -> None:
        if len(self.events) >= BACKLOG_EVENTS_MAX:
            self.events.clear()
            event = whole()
        self.events.append(event)
        self.ready.set()

    def fail(self, error: BaseException) -> None:
        self.failure = error
        self.ready.set()

    async def next(self) -> ViewEvent:
        while not self.events:
            if self.failure is not None:
                raise _failed(self.failure)
            self.ready.clear()
            await self.ready.wait()
        return self.events.popleft()


class _FedSubscriber:
    """A subscriber over RPC. It keeps no backlog: in its turn it gets what came since `step`."""

    __slots__ = ("_feed", "behind", "step", "view")

    def __init__(self, view: _View, feed: Feed) -> None:
        self.view, self._feed = view, feed
        self.step = 0
        self.behind = False
        """Its peer does not read; when it does again, it is served out of turn."""
        feed.on_writable = self._writable

    def _writable(self) -> None:
        if self.behind:
            self.behind = False
            self.serve()

    def begin(self, index: int) -> None:
        self._send(self.view.since(index) if index else None)

    def serve(self) -> None:
        """Send what it has not seen, if its peer reads."""
        if self.step == self.view.step or self.behind:
            return
        if self._feed.writable:
            self._send(self.view.after(self.step))
        else:
            self.behind = True

    def _send(self, events: Iterable[ViewEvent] | None) -> None:
        self.step = self.view.step
        for event in (self.view.whole(),) if events is None else events:
            self._feed.send(event.packed)

    def fail(self, error: BaseException) -> None:
        self._feed.fail(_failed(error))


def _failed(error: BaseException) -> Unreachable:
    return Unreachable(f"this server cannot follow the query any more ({error!r}): see its log")


class _View:
    """One followed query. `rows`, `index`, `step` and `history` are changed only by `refresh`."""

    def __init__(self, key: str, name: str, params: Mapping[str, Any], ask: Ask) -> None:
        self.key, self.name, self.params = key, name, params
        self._ask = ask
        answer = ask(name, params)
        self.watch = answer.watch
        self.rows: Rows = rows_of(name, answer.value)
        self.index = answer.index
        self.step = 1
        """Counts the changes seen here. Unlike the index it never goes back, not even when the state does."""
        self.history: deque[ViewEvent] = deque(maxlen=HISTORY_EVENTS)
        self.known_from = self.index
        """The deltas in `history` lead from this index to `index`."""
        self.subscribers: set[_Subscriber] = set()
        self.fed: set[_FedSubscriber] = set()
        self.stop_listening: Stop = _nothing
        self.touched = False
        """A refresh is due, or will be when the pause is over and those served now have the change before."""
        self.owed = 0
        """Fed subscribers that wait for their turn."""
        self.rested_at = 0.0
        self._whole: ViewEvent | None = None

    def end(self) -> None:
        """Follow nothing any more; the one who called is let go of as well, since it knows this view."""
        stop, self.stop_listening = self.stop_listening, _nothing
        stop()

    def whole(self) -> ViewEvent:
        if self._whole is None:
            self._whole = ViewEvent(self.index, True, self.rows)
        return self._whole

    def since(self, index: int) -> Iterable[ViewEvent] | None:
        """Return the deltas after an index, or None when they are not all known."""
        if not self.known_from <= index <= self.index:
            return None
        return [event for event in self.history if event.index > index]

    def after(self, step: int) -> Iterable[ViewEvent] | None:
        """Return the deltas after a step, or None when they are not all known."""
        missed, known = self.step - step, len(self.history)
        return None if missed > known else islice(self.history, known - missed, None)

    def refresh(self) -> bool:
        """Ask anew; return whether there is a new step."""
        answer = self._ask(self.name, self.params)
        after = rows_of(self.name, answer.value)
        upserts, deletes = difference(self.rows, after)
        before = self.index
        self.rows, self.index, self.watch, self._whole = after, answer.index, answer.watch, None
        if answer.index < before:
            # Indexes up to `before` were also those of another past: who holds one of them gets the whole view.
            self.history.clear()
            self.known_from = before + 1
            event = self.whole()
        elif upserts or deletes:
            if len(self.history) == HISTORY_EVENTS:
                self.known_from = self.history[0].index
            event = ViewEvent(self.index, False, upserts, deletes)
            self.history.append(event)
        else:
            return False
        self.step += 1
        for subscriber in self.subscribers:
            subscriber.put(event, self.whole)
        return True


def _nothing() -> None:
    pass


class ViewHub:
    """All views of one node, and the work that their changes make, in slices."""

    def __init__(self, ask: Ask, listen: Listen, applied_index: Callable[[], int]) -> None:
        self._ask, self._listen, self._applied_index = ask, listen, applied_index
        self._views: dict[str, _View] = {}
        self._stale: deque[_View] = deque()
        self._owed: deque[_FedSubscriber] = deque()
        self._turning = False
        self._closed = False

    def __len__(self) -> int:
        return len(self._views)

    async def subscribe(
        self, name: str, params: Mapping[str, Any] | None = None, *, from_index: int = 0
    ) -> AsyncIterator[ViewEvent]:
        """Yield the view's events. With `from_index`, begin behind it when that is known here, else with a reset."""
        view = self._open(name, dict(params or {}))
        subscriber = _Subscriber()
        view.subscribers.add(subscriber)
        try:
            for event in await self._first(view, subscriber, from_index):
                yield event
            while True:
                yield await subscriber.next()
        finally:
            view.subscribers.discard(subscriber)
            self._drop_if_idle(view)

    def feed(self, name: str, params: Mapping[str, Any], from_index: int, feed: Feed) -> bool:
        """Feed a view to an RPC stream. False when this server first has to catch up with what the peer has seen."""
        if from_index > self._applied_index():
            return False
        view = self._open(name, params)
        subscriber = _FedSubscriber(view, feed)
        view.fed.add(subscriber)
        feed.on_close = lambda: self._leave(subscriber)
        subscriber.begin(from_index)
        return True

    def _leave(self, subscriber: _FedSubscriber) -> None:
        subscriber.view.fed.discard(subscriber)
        self._drop_if_idle(subscriber.view)

    def _drop_if_idle(self, view: _View) -> None:
        if not view.subscribers and not view.fed and self._views.get(view.key) is view:
            del self._views[view.key]
            view.end()

    def _open(self, name: str, params: Mapping[str, Any]) -> _View:
        key = canonical(name, params)
        view = self._views.get(key)
        if view is None:
            view = self._views[key] = _View(key, name, params, self._ask)
            self._listen_for(view)
        return view

    def _listen_for(self, view: _View) -> None:
        view.stop_listening()
        view.stop_listening = self._listen(view.watch, lambda: self._touched(view))

    async def _first(self, view: _View, subscriber: _Subscriber, from_index: int) -> Iterable[ViewEvent]:
        if from_index > self._applied_index():
            # The subscriber knows what this server has yet to hear; older rows would take it back in time.
            try:
                async with asyncio.timeout(LAG_WAIT_S):
                    while view.index < from_index:
                        await subscriber.next()
            except TimeoutError:
                raise Unreachable("this server is behind what you have seen: follow the query elsewhere") from None
        subscriber.events.clear()
        events = view.since(from_index) if from_index else None
        return [view.whole()] if events is None else events

    # -- the work of a change --------------------------------------------------------------------------------------

    def _touched(self, view: _View) -> None:
        """What a view rests on has changed. Called from within the change: it only takes note."""
        if not view.touched:
            view.touched = True
            self._plan(view)

    def _plan(self, view: _View) -> None:
        """Have a touched view refreshed, once those who wait have got what they wait for.

        A view under constant change takes at most a third of its own cost in CPU time, and coalesces the rest.
        """
        if view.owed:
            return  # planned again when the last of them is served
        loop = asyncio.get_running_loop()
        if view.rested_at > loop.time():
            loop.call_at(view.rested_at, self._due, view)
        else:
            self._due(view)

    def _due(self, view: _View) -> None:
        self._stale.append(view)
        self._go_on()

    def _go_on(self) -> None:
        if not self._turning and not self._closed and (self._stale or self._owed):
            self._turning = True
            asyncio.get_running_loop().call_soon(self._turn)

    def _turn(self) -> None:
        self._turning = False
        ends = time.perf_counter() + SLICE_S
        while self._stale or self._owed:
            if self._stale:
                self._refresh(self._stale.popleft())
            for _ in range(min(SERVED_BETWEEN, len(self._owed))):
                self._serve(self._owed.popleft())
            if time.perf_counter() >= ends:
                break
        self._go_on()

    def _refresh(self, view: _View) -> None:
        if self._views.get(view.key) is not view:
            return
        view.touched = False
        began = time.perf_counter()
        watch = view.watch
        try:
            changed = view.refresh()
        except Exception as error:
            # Whatever went wrong in one query ends that view alone, and its followers are told.
            log.exception("views: %s %s cannot be followed any more", view.name, view.params)
            self._fail(view, error)
            return
        if view.watch != watch:
            self._listen_for(view)
        if changed:
            self._owed.extend(view.fed)
            view.owed = len(view.fed)
        pause_s = min(REFRESH_PAUSE_MAX_S, 2 * (time.perf_counter() - began))
        view.rested_at = asyncio.get_running_loop().time() + pause_s

    def _serve(self, subscriber: _FedSubscriber) -> None:
        view = subscriber.view
        if subscriber in view.fed:
            subscriber.serve()
        view.owed -= 1
        if not view.owed and view.touched:
            self._plan(view)

    def _fail(self, view: _View, error: BaseException) -> None:
        del self._views[view.key]
        view.end()
        for subscriber in view.subscribers:
            subscriber.fail(error)
        for fed in tuple(view.fed):
            fed.fail(error)

    async def close(self) -> None:
        """Stop following; parked subscribers stay parked, their owners cancel them."""
        self._closed = True
        for view in self._views.values():
            view.end()
        self._views.clear()
        self._stale.clear()
        self._owed.clear()
