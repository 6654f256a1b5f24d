"""Who waits for what to change. A parked watcher is one future in a table: it costs nothing until it is woken.

Single-threaded: everything here runs on the event loop, so nothing is missed between a look at the state and
parking, as long as no ``await`` stands between them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from raftstate.state.queries import run_query

if TYPE_CHECKING:
    from raftstate.state.answer import Answer
    from raftstate.state.changes import WatchKey
    from raftstate.state.machine import StateMachine

Waiter = asyncio.Future[bool]


class Watches:
    """Parked watchers by watch key. ``("kv", key)`` wakes those on the key and on every prefix of it."""

    def __init__(self) -> None:
        self._parked: dict[WatchKey, set[Waiter]] = {}
        self._listeners: dict[WatchKey, set[Callable[[], None]]] = {}
        self._prefix_lengths: dict[int, int] = {}
        """How many distinct prefixes of each length are watched."""

    def __len__(self) -> int:
        """How many keys someone waits on."""
        return len(self._parked.keys() | self._listeners.keys())

    def notify(self, touched: Iterable[WatchKey]) -> None:
        """Wake the watchers of what a command touched."""
        parked, listeners = self._parked, self._listeners
        if not parked and not listeners:
            return
        for key in touched:
            if key in parked or key in listeners:
                self._wake(key)
            if key[0] == "kv" and self._prefix_lengths:
                name = key[1]
                for length in list(self._prefix_lengths):
                    if length <= len(name):
                        self._wake(("kv-prefix", name[:length]))

    def notify_all(self) -> None:
        """Wake everyone; call it after the state was replaced by a snapshot."""
        for key in self._parked.keys() | self._listeners.keys():
            self._wake(key)

    def _wake(self, key: WatchKey) -> None:
        for waiter in self._parked.get(key, ()):
            _settle(waiter, True)
        for callback in self._listeners.get(key, ()):
            callback()

    def listen(self, keys: Iterable[WatchKey], callback: Callable[[], None]) -> Callable[[], None]:
        """Call `callback` whenever any of ``keys`` is touched, from within the change; return how to stop.

        For who would only park again: it takes no task and no future. The callback must only take note, and must not
        call back here.
        """
        keys = tuple(keys)
        for key in keys:
            if key not in self._listeners:
                self._listeners[key] = set()
                self._count_prefix(key, 1)
            self._listeners[key].add(callback)
        return partial(self._stop, keys, callback)

    def _stop(self, keys: tuple[WatchKey, ...], callback: Callable[[], None]) -> None:
        for key in keys:
            if (callbacks := self._listeners.get(key)) is not None:
                callbacks.discard(callback)
                if not callbacks:
                    del self._listeners[key]
                    self._count_prefix(key, -1)

    async def changed(self, keys: Iterable[WatchKey], timeout_s: float | None = None) -> bool:
        """Wait until any of ``keys`` is touched; False when ``timeout_s`` passed first. Safe to cancel."""
        if timeout_s is not None and timeout_s <= 0:
            return False
        loop = asyncio.get_running_loop()
        waiter: Waiter = loop.create_future()
        keys = tuple(keys)
        for key in keys:
            self._park(key, waiter)
        timer = None if timeout_s is None else loop.call_later(timeout_s, _settle, waiter, False)
        try:
            return await waiter
        finally:
            if timer is not None:
                timer.cancel()
            for key in keys:
                self._unpark(key, waiter)

    async def wait(
        self,
        keys: Iterable[WatchKey],
        index_of: Callable[[], int],
        min_index: int,
        timeout_s: float | None = None,
    ) -> bool:
        """Wait until ``index_of()`` exceeds ``min_index``; it is asked at once, and when any of ``keys`` is touched.

        Return False when ``timeout_s`` (None: no bound) passed first. An index that went back, because the state
        was replaced by a snapshot, ends the wait too.
        """
        loop = asyncio.get_running_loop()
        deadline = None if timeout_s is None else loop.time() + timeout_s
        keys = tuple(keys)
        index = index_of()
        while index <= min_index:
            before = index
            if not await self.changed(keys, None if deadline is None else deadline - loop.time()):
                return False
            index = index_of()
            if index < before:
                return True
        return True

    def _park(self, key: WatchKey, waiter: Waiter) -> None:
        waiters = self._parked.get(key)
        if waiters is not None:
            waiters.add(waiter)
            return
        self._parked[key] = {waiter}
        self._count_prefix(key, 1)

    def _unpark(self, key: WatchKey, waiter: Waiter) -> None:
        waiters = self._parked.get(key)
        if waiters is None:
            return
        waiters.discard(waiter)
        if waiters:
            return
        del self._parked[key]
        self._count_prefix(key, -1)

    def _count_prefix(self, key: WatchKey, change: int) -> None:
        if key[0] != "kv-prefix":
            return
        length = len(key[1])
        self._prefix_lengths[length] = self._prefix_lengths.get(length, 0) + change
        if not self._prefix_lengths[length]:
            del self._prefix_lengths[length]


def _settle(waiter: Waiter, woken: bool) -> None:
    if not waiter.done():
        waiter.set_result(woken)


async def blocking_query(
    machine: StateMachine,
    watches: Watches,
    name: str,
    params: Mapping[str, Any] | None = None,
    min_index: int = 0,
    wait_s: float = 0.0,
) -> Answer:
    """Answer a query once its index exceeds ``min_index``, or with what there is after ``wait_s`` seconds.

    Source: Consul's blocking queries. With a ``min_index`` of 0 it never waits; with one above the query's index
    (the state was replaced, or the client knows another cluster) it answers at once, and the client starts over.
    Raises BadQuery.
    """
    answer = run_query(machine.store, name, params)
    if min_index <= 0 or answer.index != min_index:
        return answer
    loop = asyncio.get_running_loop()
    deadline = loop.time() + wait_s
    while answer.index == min_index and await watches.changed(answer.watch, deadline - loop.time()):
        answer = run_query(machine.store, name, params)
    return answer
