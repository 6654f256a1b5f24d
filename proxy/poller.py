"""Readiness of the data plane's own sockets, in batches.

Sockets are watched edge-triggered: one ``epoll_ctl`` for the life of a connection, none for pausing, resuming or
closing it. What a batch of events has made (frames for a session, connections that ended) is dealt with once, at the
batch's end, so that no callback of the loop is spent on it. Linux only, as is all of the sidecar. See
``docs/decisions/0022-*``.

On a sidecar's own event loop (:mod:`proxy.event_loop`) a poller *leads*: it waits in the loop's place, on the one
epoll instance that both use, and comes back to the loop only when that has something to do (see
``docs/decisions/0024-*``). On any other loop, and beside a poller that leads already, it has an epoll instance of its
own, nested in the loop's.

Handlers must take an event for a hint: it may come late, or twice.
"""

from __future__ import annotations

import asyncio
import select
from collections.abc import Callable
from contextlib import suppress
from time import monotonic
from typing import Any, Final

from proxy.native import mypyc_attr
from proxy.receiver import Receiver

READ: Final = select.EPOLLIN | select.EPOLLRDHUP | select.EPOLLPRI | select.EPOLLET
"""What every connection is watched for; errors and hang-ups are reported unasked."""
READ_WRITE: Final = READ | select.EPOLLOUT
ACCEPT: Final = select.EPOLLIN
"""For listening sockets, level-triggered: what is not accepted now is reported again."""
BATCH: Final = 42
"""Events taken at a time. For each wait CPython allocates room for so many, which takes longer from the heap: its own
allocator gives up to 512 bytes, and an event takes 12."""
BATCHES: Final = 256
"""So many in a row, and the loop gets a turn although it has nothing to do: it forgets cancelled timers in it."""
WAIT_MAX_S: Final = 3600.0
_IN: Final = select.EPOLLIN
_monotonic: Final = monotonic

Ready = tuple[int, int]
"""A descriptor, and a mask of EPOLL bits."""


@mypyc_attr(allow_interpreted_subclasses=True)
class Handler:
    """What is told of events on a descriptor. A class to inherit from, by which compiled code calls it directly."""

    __slots__ = ()

    def on_ready(self, events: int) -> None:
        """``events``: a mask of EPOLL bits."""

    def on_failure(self, error: Exception) -> None:
        """:meth:`on_ready` raised: a bug. The connection must end, others go on."""


class Host:
    """What a sidecar's event loop and the poller that waits in its place tell one another."""

    __slots__ = ("called", "due", "epoll", "leader", "poll")

    def __init__(self) -> None:
        self.epoll = select.epoll()
        self.poll: Callable[[float, int], list[Ready]] = self.epoll.poll
        """Bound once."""
        self.called = False
        """Something was scheduled since the loop began to wait: it wants its turn."""
        self.due = 0.0
        """When its next timer is due, on the clock of ``time.monotonic``. Who sets a timer may only lower it."""
        self.leader: Poller | None = None

    def wait(self, timeout_s: float | None) -> list[Ready]:
        """Wait until the loop has something to do, at most so long. Returns events on its own descriptors."""
        self.called = False
        self.due = monotonic() + (WAIT_MAX_S if timeout_s is None else min(timeout_s, WAIT_MAX_S))
        leader = self.leader
        if leader is not None:
            return leader.lead(self)
        return self.epoll.poll(max(0.0, self.due - monotonic()), BATCH)

    def close(self) -> None:
        """The loop is closed."""
        self.epoll.close()
        self.leader = None


class Poller:
    """Watches the sockets of one sidecar; comes to life on the loop that first adds a descriptor."""

    __slots__ = ("_again", "_due", "_ends", "_epoll", "_handlers", "_host", "_loop", "flushes", "inside")

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._host: Host | None = None
        """Set while this poller leads."""
        self._epoll: select.epoll | None = None
        self._handlers: list[Handler | None] = []
        """By descriptor."""
        self._again: dict[Handler, None] = {}
        """Those that have more to read than one turn allows."""
        self.flushes: list[Receiver] = []
        """Flushed at the end of the batch; while ``inside``, appending here is all that :meth:`flush_later` does."""
        self._ends: list[Callable[[], None]] = []
        self.inside = False
        """Whether a batch is being handled, whose end will deal with flushes and ends."""
        self._due = False
        """The loop will call us for what was left outside of a batch."""

    def add(self, fd: int, handler: Handler, events: int) -> None:
        """Watch a descriptor. Raises OSError."""
        epoll = self._epoll
        if epoll is None:
            epoll = self._start()
        epoll.register(fd, events)
        handlers = self._handlers
        while len(handlers) <= fd:
            handlers.append(None)
        handlers[fd] = handler

    def change(self, fd: int, events: int) -> None:
        """Watch it for something else; what is the case now is reported anew. Raises OSError."""
        if self._epoll is not None:
            self._epoll.modify(fd, events)

    def forget(self, fd: int) -> None:
        """The descriptor is about to be closed, which is what makes the kernel forget it."""
        if 0 <= fd < len(self._handlers):
            self._handlers[fd] = None

    def remove(self, fd: int) -> None:
        """Watch it no longer; it stays open."""
        if 0 <= fd < len(self._handlers) and self._handlers[fd] is not None:
            self._handlers[fd] = None
            if self._epoll is not None:
                self._epoll.unregister(fd)

    def now(self) -> float:
        """Return the loop's time, without asking which loop it is: that is a system call in CPython 3.11."""
        if self._host is not None:
            return monotonic()
        loop = self._loop
        if loop is None:
            loop = self._loop = asyncio.get_running_loop()
        return loop.time()

    def again(self, handler: Handler) -> None:
        """Report ``handler`` as readable in the next turn, without an event."""
        self._again[handler] = None
        self._call_later()

    def flush_later(self, receiver: Receiver) -> None:
        """Flush ``receiver`` once the events at hand are handled: it sends what they made."""
        self.flushes.append(receiver)
        self._call_later()

    def end_later(self, end: Callable[[], None]) -> None:
        """Call ``end`` after all flushes: it closes a descriptor, whose number may be another's afterwards."""
        self._ends.append(end)
        self._call_later()

    def close(self) -> None:
        """Deal with what is left, and watch nothing any more. Idempotent."""
        self._settle()
        epoll, self._epoll = self._epoll, None
        if self._host is not None:
            self._host.leader, self._host = None, None
            if epoll is not None and not epoll.closed:
                for fd, handler in enumerate(self._handlers):
                    if handler is not None:
                        with suppress(OSError):  # closed, most likely
                            epoll.unregister(fd)
        elif epoll is not None and self._loop is not None:
            if not self._loop.is_closed():
                remove_reader: Any = self._loop.remove_reader  # uvloop's returns no bool: compiled, that is an error
                remove_reader(epoll.fileno())
            epoll.close()
        self._handlers.clear()
        self._again.clear()

    def _start(self) -> select.epoll:
        loop = self._loop = asyncio.get_running_loop()
        host = getattr(loop, "host", None)
        if isinstance(host, Host) and host.leader is None:
            host.leader, self._host = self, host
            self._epoll = host.epoll
            return host.epoll
        epoll = self._epoll = select.epoll()
        loop.add_reader(epoll.fileno(), self._turn)
        if self._again or self.flushes or self._ends:
            self._due = False
            self._call_later()
        return epoll

    def _call_later(self) -> None:
        # One that leads looks at what is left before each wait.
        if not self.inside and not self._due and self._host is None:
            self._due = True
            loop = self._loop
            if loop is None:
                loop = self._loop = asyncio.get_running_loop()
            loop.call_soon(self._turn)

    # Leading

    def lead(self, host: Host) -> list[Ready]:
        """Wait and handle events in the loop's place, until it has something to do. Returns events of its own."""
        poll, handlers = host.poll, self._handlers
        others: list[Ready] = []
        if self.flushes or self._ends:
            self._settle()
        gathers = False
        now = _monotonic()
        for _ in range(BATCHES):
            wait_s = host.due - now
            if wait_s < 0.0 or self._again or host.called:
                wait_s = 0.0
            ready = poll(wait_s, BATCH)
            if gathers and wait_s > 0.0 and ready:
                # More has come since, as a rule: what is handled together leaves together.
                ready += poll(0.0, BATCH)
            self.inside = True
            try:
                if self._again:
                    self._handle_again()
                for fd, events in ready:
                    handler = handlers[fd] if fd < len(handlers) else None
                    if handler is None:
                        others.append((fd, events))
                        continue
                    try:
                        handler.on_ready(events)
                    except Exception as error:  # noqa: BLE001 - a bug in one must not end the others
                        self._failed(handler, error)
                # Where nobody has anything to flush, nothing leaves together, and to look twice is for nothing.
                gathers = len(ready) > 1 and len(self.flushes) > 0
                if self.flushes or self._ends:
                    self._settle()
            finally:
                self.inside = False
            now = _monotonic()
            if others or host.called or self._host is None or now >= host.due:
                break
        return others

    # Nested

    def _turn(self) -> None:
        self._due = False
        if self._host is not None:
            return  # asked for before it led
        self.inside = True
        handlers = self._handlers
        try:
            if self._again:
                self._handle_again()
            if self._epoll is not None:
                for fd, events in self._epoll.poll(0, BATCH):
                    found = handlers[fd] if fd < len(handlers) else None
                    if found is not None:
                        try:
                            found.on_ready(events)
                        except Exception as error:  # noqa: BLE001 - as above
                            self._failed(found, error)
            if self.flushes or self._ends:
                self._settle()
        finally:
            self.inside = False
        if self._again:
            self._call_later()

    def _handle_again(self) -> None:
        again, self._again = self._again, {}
        for handler in again:
            try:
                handler.on_ready(_IN)
            except Exception as error:  # noqa: BLE001 - as above
                self._failed(handler, error)

    def _failed(self, handler: Handler, error: Exception) -> None:
        self._report("handling of a connection failed", error)
        handler.on_failure(error)

    def _report(self, message: str, error: Exception) -> None:
        if self._loop is not None:
            self._loop.call_exception_handler({"message": message, "exception": error})

    def _settle(self) -> None:
        inside, self.inside = self.inside, True
        try:
            while self.flushes or self._ends:
                # Flushes first: what ends may make frames that are to go out with the others.
                flushes = self.flushes
                if flushes:
                    self.flushes = []
                    for receiver in flushes:
                        try:
                            receiver.flush()
                        except Exception as error:  # noqa: BLE001 - as above
                            self._report("the end of a connection's turn failed", error)
                    continue
                ends, self._ends = self._ends, []
                for end in ends:
                    try:
                        end()
                    except Exception as error:  # noqa: BLE001 - as above
                        self._report("the end of a connection's turn failed", error)
        finally:
            self.inside = inside
