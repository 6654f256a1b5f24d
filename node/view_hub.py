"""Views shared by their subscribers: however many follow one query, it is run, compared and encoded once a change.

A subscriber that was connected elsewhere names the index it holds; the state machine gives equal rows at equal
indexes on every server, so it gets only what came after, and the whole view only when that is not known here.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any, Protocol

from node.backend import ViewEvent
from node.errors import Unreachable
from node.rpc.server import Feed
from node.tasks import Tasks
from node.views import Rows, canonical, difference, rows_of

HISTORY_EVENTS = 64
BACKLOG_EVENTS_MAX = 64
"""A subscriber that is this far behind gets the whole view instead."""
LAG_WAIT_S = 2.0
"""How long a server that knows less than the subscriber may take to catch up before it sends it elsewhere."""
REFRESH_PAUSE_MAX_S = 0.05


class Answered(Protocol):
    """What a query gives: its index, value and the keys whose change may change it."""

    @property
    def index(self) -> int: ...
    @property
    def value(self) -> Any: ...


Ask = Callable[[str, Mapping[str, Any]], Answered]
Changed = Callable[[str, Mapping[str, Any], Answered], Awaitable[None]]
"""Return once the query's index may exceed the answer's."""


class _Subscriber:
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
    """A subscriber over RPC. It keeps no backlog: when its peer reads again, it gets what came since `index`."""

    __slots__ = ("_feed", "_view", "behind", "index")

    def __init__(self, view: _View, feed: Feed) -> None:
        self._view, self._feed = view, feed
        self.index = 0
        self.behind = False
        feed.on_writable = self.catch_up

    def put(self, event: ViewEvent, whole: Callable[[], ViewEvent]) -> None:
        if event.reset:
            self.index = 0
        if self.behind or not self._feed.writable:
            self.behind = True
            return
        self._feed.send(event.packed)
        self.index = event.index

    def catch_up(self) -> None:
        if self.behind:
            self.behind = False
            self.begin(self.index)

    def begin(self, index: int) -> None:
        events = self._view.since(index) if index else None
        for event in [self._view.whole()] if events is None else events:
            self._feed.send(event.packed)
        self.index = self._view.index

    def fail(self, error: BaseException) -> None:
        self._feed.fail(_failed(error))


def _failed(error: BaseException) -> Unreachable:
    return Unreachable(f"this server cannot follow the query any more ({error!r}): see its log")


class _View:
    """One followed query. `rows`, `index` and `history` are changed only by `run`."""

    def __init__(self, name: str, params: Mapping[str, Any], ask: Ask, changed: Changed) -> None:
        self.name, self.params = name, params
        self._ask, self._changed = ask, changed
        self.answer = ask(name, params)
        self.rows: Rows = rows_of(name, self.answer.value)
        self.index = self.answer.index
        self.history: deque[ViewEvent] = deque(maxlen=HISTORY_EVENTS)
        self.known_from = self.index
        """The deltas in `history` lead from this index to `index`."""
        self.subscribers: set[_Subscriber | _FedSubscriber] = set()
        self._whole: ViewEvent | None = None

    def whole(self) -> ViewEvent:
        if self._whole is None:
            self._whole = ViewEvent(self.index, True, self.rows)
        return self._whole

    def since(self, index: int) -> list[ViewEvent] | None:
        """Return the deltas after `index`, or None when they are not all known."""
        if not self.known_from <= index <= self.index:
            return None
        return [event for event in self.history if event.index > index]

    async def run(self) -> None:
        while True:
            await self._changed(self.name, self.params, self.answer)
            began = time.perf_counter()
            self.refresh()
            # A view under constant change takes at most a third of its own cost in CPU time, and coalesces the rest.
            await asyncio.sleep(min(REFRESH_PAUSE_MAX_S, 2 * (time.perf_counter() - began)))

    def refresh(self) -> None:
        self.answer = self._ask(self.name, self.params)
        after = rows_of(self.name, self.answer.value)
        upserts, deletes = difference(self.rows, after)
        before = self.index
        restored = self.answer.index < before
        self.rows, self.index, self._whole = after, self.answer.index, None
        if restored:
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
            return
        for subscriber in self.subscribers:
            subscriber.put(event, self.whole)


class ViewHub:
    """All views of one node."""

    def __init__(self, ask: Ask, changed: Changed, applied_index: Callable[[], int]) -> None:
        self._ask, self._changed, self._applied_index = ask, changed, applied_index
        self._views: dict[str, tuple[_View, asyncio.Task[Any]]] = {}
        self._tasks = Tasks("views")

    def __len__(self) -> int:
        return len(self._views)

    async def subscribe(
        self, name: str, params: Mapping[str, Any] | None = None, *, from_index: int = 0
    ) -> AsyncIterator[ViewEvent]:
        """Yield the view's events. With `from_index`, begin behind it when that is known here, else with a reset."""
        params = dict(params or {})
        key = canonical(name, params)
        view = self._open(key, name, params)
        subscriber = _Subscriber()
        view.subscribers.add(subscriber)
        try:
            for event in await self._first(view, subscriber, from_index):
                yield event
            while True:
                yield await subscriber.next()
        finally:
            self._leave(key, view, subscriber)

    def feed(self, name: str, params: Mapping[str, Any], from_index: int, feed: Feed) -> bool:
        """Feed a view to an RPC stream. False when this server first has to catch up with what the peer has seen."""
        if from_index > self._applied_index():
            return False
        key = canonical(name, params)
        view = self._open(key, name, params)
        subscriber = _FedSubscriber(view, feed)
        view.subscribers.add(subscriber)
        feed.on_close = lambda: self._leave(key, view, subscriber)
        subscriber.begin(from_index)
        return True

    def _leave(self, key: str, view: _View, subscriber: _Subscriber | _FedSubscriber) -> None:
        view.subscribers.discard(subscriber)
        if not view.subscribers and self._views.get(key, (None,))[0] is view:
            self._views.pop(key)[1].cancel()

    def _open(self, key: str, name: str, params: Mapping[str, Any]) -> _View:
        if (held := self._views.get(key)) is not None:
            return held[0]
        view = _View(name, params, self._ask, self._changed)
        task = self._tasks.spawn(view.run())
        task.add_done_callback(lambda ended: self._failed(key, view, ended))
        self._views[key] = (view, task)
        return view

    def _failed(self, key: str, view: _View, task: asyncio.Task[Any]) -> None:
        error = None if task.cancelled() else task.exception()
        if error is None:
            return
        if self._views.get(key, (None,))[0] is view:
            del self._views[key]
        for subscriber in tuple(view.subscribers):
            subscriber.fail(error)

    async def _first(self, view: _View, subscriber: _Subscriber, from_index: int) -> list[ViewEvent]:
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

    async def close(self) -> None:
        """Stop following; parked subscribers stay parked, their owners cancel them."""
        self._views.clear()
        await self._tasks.close()
