"""Views: query results kept current by a stream from the servers, shared by whoever reads them on this node.

A view lives as long as somebody holds it and :data:`IDLE_S` longer. When the servers are away it keeps what it last
knew. A listener is called on the loop for each change, never while another listener runs; it must not block.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import aclosing, asynccontextmanager, suppress
from typing import Any, TypeVar, cast

import msgspec

from node.backend import Backend, ViewEvent
from node.errors import NodeError
from node.tasks import Tasks
from node.views import Rows, canonical, merge

log = logging.getLogger("lictor.agent.views")

IDLE_S = 60.0
"""How long a view that nobody holds is kept for the next reader."""
RETRY_PAUSE_S = 0.5
T = TypeVar("T")
Listener = Callable[[], None]


class View:
    """One followed query. ``rows`` and ``index`` are changed only by the view's own task."""

    def __init__(self, name: str, params: Mapping[str, Any]) -> None:
        self.name, self.params = name, dict(params)
        self.rows: Rows = {}
        self.index = 0
        self.connected = False
        self.holders = 0
        self._known = asyncio.Event()
        self._waiters: set[asyncio.Future[None]] = set()
        self._listeners: list[Listener] = []
        self._typed: dict[Any, tuple[int, Any]] = {}
        self._converted: dict[Any, dict[str, tuple[Any, Any]]] = {}
        self._revision = 0

    @property
    def known(self) -> bool:
        """Whether anything has been received yet."""
        return self._known.is_set()

    async def ready(self, timeout_s: float) -> bool:
        """Wait until the view is known; return whether it is."""
        if not self._known.is_set():
            with suppress(TimeoutError):
                async with asyncio.timeout(timeout_s):
                    await self._known.wait()
        return self._known.is_set()

    async def wait(self, min_index: int, timeout_s: float) -> None:
        """Return once the index exceeds ``min_index`` or the time has passed."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_s
        while self.index <= min_index:
            left = deadline - loop.time()
            if left <= 0:
                return
            waiter: asyncio.Future[None] = loop.create_future()
            self._waiters.add(waiter)
            try:
                async with asyncio.timeout(left):
                    await waiter
            except TimeoutError:
                return
            finally:
                self._waiters.discard(waiter)

    def listen(self, listener: Listener) -> Callable[[], None]:
        """Call ``listener`` after each change; return how to stop."""
        self._listeners.append(listener)
        return lambda: self._listeners.remove(listener) if listener in self._listeners else None

    def typed(self, kind: type[T]) -> tuple[T, ...]:
        """Return the rows as model values in the query's order; converted once a change."""
        return self.memo(
            ("typed", kind), lambda: tuple(self.mapped(kind, lambda key, row: _typed(row, kind)).values())
        )

    def mapped(self, name: Any, make: Callable[[str, Any], T]) -> dict[str, T]:
        """Return what ``make`` gives for each row's key and value, by key in the query's order.

        ``name`` stands for ``make``, which is asked only for the rows that a change brought.
        """
        held = self._typed.get(name)
        if held is None or held[0] != self._revision:
            before = self._converted.get(name, {})
            now: dict[str, tuple[Any, T]] = {}
            for key, row in self.rows.items():
                known = before.get(key)
                # An unchanged row is the same object as before.
                now[key] = known if known is not None and known[0] is row else (row, make(key, row))
            self._converted[name] = now
            held = (self._revision, {key: value for key, (_, value) in now.items()})
            self._typed[name] = held
        return cast("dict[str, T]", held[1])

    def memo(self, key: Any, make: Callable[[], T]) -> T:
        """Return what ``make`` gave for this state of the view; computed once a change."""
        held = self._typed.get(key)
        if held is None or held[0] != self._revision:
            held = (self._revision, make())
            self._typed[key] = held
        return cast(T, held[1])

    def take(self, event: ViewEvent) -> None:
        """Apply one event of the stream and tell everyone."""
        first = not self._known.is_set()
        rows = merge(self.rows, event)
        changed = first or not event.reset or rows != self.rows
        self.rows = rows
        # A view that moved to a server which knows less keeps its index: readers were promised it only grows.
        self.index = max(self.index, event.index, 1)
        if changed:
            self._revision += 1
            self._typed.clear()
        self._known.set()
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)
        if changed:
            for listener in tuple(self._listeners):
                listener()


def _typed(row: Any, kind: type[T]) -> T:
    return row if type(row) is kind else msgspec.convert(row, kind, from_attributes=False)


class Views:
    """All views of this node."""

    def __init__(self, backend: Backend, *, idle_s: float = IDLE_S) -> None:
        self._backend, self._idle_s = backend, idle_s
        self._views: dict[str, tuple[View, asyncio.Task[Any]]] = {}
        self._expiry: dict[str, asyncio.TimerHandle] = {}
        self._tasks = Tasks("agent views")

    def __len__(self) -> int:
        return len(self._views)

    def acquire(self, name: str, params: Mapping[str, Any] | None = None) -> View:
        """Return the view, held until :meth:`release`."""
        key = canonical(name, params)
        if (timer := self._expiry.pop(key, None)) is not None:
            timer.cancel()
        held = self._views.get(key)
        if held is None:
            view = View(name, params or {})
            held = (view, self._tasks.spawn(self._follow(view)))
            self._views[key] = held
        held[0].holders += 1
        return held[0]

    def release(self, view: View) -> None:
        """Let go of a view from :meth:`acquire`."""
        view.holders -= 1
        key = canonical(view.name, view.params)
        held = self._views.get(key)
        if view.holders == 0 and held is not None and held[0] is view:
            self._expiry[key] = asyncio.get_running_loop().call_later(self._idle_s, self._expire, key)

    @asynccontextmanager
    async def holding(
        self, name: str, params: Mapping[str, Any] | None = None, *, timeout_s: float = 5.0
    ) -> AsyncIterator[View]:
        """Hold a view that is known; raises :class:`node.errors.NodeError` when it does not become so in time."""
        view = self.acquire(name, params)
        try:
            if not await view.ready(timeout_s):
                raise NodeError(f"No cluster leader: nothing is known yet of {name}; retry in a moment")
            yield view
        finally:
            self.release(view)

    async def close(self) -> None:
        """Stop following everything."""
        for timer in self._expiry.values():
            timer.cancel()
        self._expiry.clear()
        self._views.clear()
        await self._tasks.close()

    def _expire(self, key: str) -> None:
        self._expiry.pop(key, None)
        held = self._views.get(key)
        if held is not None and held[0].holders == 0:
            del self._views[key]
            held[1].cancel()

    async def _follow(self, view: View) -> None:
        while True:
            try:
                # Backends yield from async generators; closing one at once frees its place on the server.
                stream = cast("Any", self._backend.subscribe(view.name, view.params))
                async with aclosing(stream):
                    async for event in stream:
                        view.connected = True
                        view.take(event)
            except NodeError as error:
                log.warning("view %s %s: %s; keeping what is known and trying again", view.name, view.params, error)
            view.connected = False
            await asyncio.sleep(RETRY_PAUSE_S)
