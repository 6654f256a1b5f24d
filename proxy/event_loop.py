"""The event loop of a sidecar's processes: asyncio's, waiting where the data plane waits.

asyncio keeps its timers, callbacks, signals and transports; what a :class:`~proxy.poller.Poller` watches is handled
inside the wait, by the poller that leads. So a hop of what is relayed costs one ``epoll_wait`` and no callback, where
a poller nested in another loop takes two and one. See ``docs/decisions/0024-*``.

Only public names of asyncio are overridden. What asyncio schedules without them, it schedules outside of the wait, or
wakes the wait through its self-pipe (signals, other threads).
"""

from __future__ import annotations

import asyncio
import select
import selectors
from collections.abc import Callable, Mapping
from contextlib import suppress
from contextvars import Context
from typing import Any, TypeVarTuple

from proxy.poller import Host

_Args = TypeVarTuple("_Args")


class SidecarLoop(asyncio.SelectorEventLoop):
    """asyncio's loop on a selector that lets a poller lead; its clock is ``time.monotonic``."""

    def __init__(self) -> None:
        self.host = Host()
        """By which a poller finds that it may lead here."""
        self.selector = Selector(self.host)
        super().__init__(self.selector)

    def call_soon(
        self, callback: Callable[[*_Args], object], *args: *_Args, context: Context | None = None
    ) -> asyncio.Handle:
        """As the base class has it; ends the wait that it is called from."""
        self.host.called = True
        return super().call_soon(callback, *args, context=context)

    def call_at(
        self, when: float, callback: Callable[[*_Args], object], *args: *_Args, context: Context | None = None
    ) -> asyncio.TimerHandle:
        """As the base class has it; shortens the wait that it is called from."""
        handle = super().call_at(when, callback, *args, context=context)
        host = self.host
        if when < host.due:
            host.due = when
        return handle

    def stop(self) -> None:
        """As the base class has it; ends the wait that it is called from."""
        self.host.called = True
        super().stop()


class Selector(selectors.BaseSelector):
    """The loop's own descriptors, level-triggered, on the epoll instance which the poller uses too."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._keys: dict[int, selectors.SelectorKey] = {}

    def register(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        fd = _descriptor(fileobj)
        if fd in self._keys:
            raise KeyError(f"{fileobj!r} (descriptor {fd}) is registered already")
        self._host.epoll.register(fd, _bits(events))
        key = self._keys[fd] = selectors.SelectorKey(fileobj, fd, events, data)
        return key

    def unregister(self, fileobj: Any) -> selectors.SelectorKey:
        key = self._keys.pop(self.get_key(fileobj).fd)
        with suppress(OSError):  # closed, and so forgotten by the kernel
            self._host.epoll.unregister(key.fd)
        return key

    def modify(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        key = self.get_key(fileobj)
        if events != key.events:
            self._host.epoll.modify(key.fd, _bits(events))
        key = self._keys[key.fd] = key._replace(events=events, data=data)
        return key

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = []
        for fd, bits in self._host.wait(timeout):
            key = self._keys.get(fd)
            if key is not None:
                # Errors and hang-ups count as both, so that whoever waits learns of them.
                events = selectors.EVENT_READ if bits & ~select.EPOLLOUT else 0
                if bits & ~select.EPOLLIN:
                    events |= selectors.EVENT_WRITE
                ready.append((key, events & key.events))
        return ready

    def get_key(self, fileobj: Any) -> selectors.SelectorKey:
        key = self._keys.get(_descriptor(fileobj))
        if key is None:
            raise KeyError(f"{fileobj!r} is not registered")
        return key

    def get_map(self) -> Mapping[Any, selectors.SelectorKey]:
        return self._keys

    def close(self) -> None:
        self._keys.clear()
        self._host.close()


def _descriptor(fileobj: Any) -> int:
    return fileobj if isinstance(fileobj, int) else int(fileobj.fileno())


def _bits(events: int) -> int:
    return (select.EPOLLIN if events & selectors.EVENT_READ else 0) | (
        select.EPOLLOUT if events & selectors.EVENT_WRITE else 0
    )
