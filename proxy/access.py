"""What is told of each call when it has ended, and the access log: a line of JSON for each.

It is off by default, as spans are (:mod:`proxy.span_export`). Neither may delay a call: lines and spans wait in
bounded queues, and what does not fit is counted and dropped.
"""

from __future__ import annotations

import asyncio
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import NamedTuple

import msgspec

from proxy.tasks import Tasks
from proxy.tracing import RequestTrace

INBOUND, OUTBOUND = "inbound", "outbound"
LINES_MAX_BYTES = 4 * 1024 * 1024
"""What waits to be written at most."""
FLUSH_S = 0.2


class Entry(NamedTuple):
    """One call on a connection (L4), or one request (L7), that has ended."""

    direction: str
    protocol: str
    """``tcp``, ``http/1.1`` or ``h2``."""
    source: str
    source_instance: str
    destination: str
    instance: str
    """The destination's."""
    method: str
    path: str
    """Without the query: that may hold what is not for logs."""
    code: int
    """HTTP status; 0 when there is none."""
    origin: str
    """Who ended it: ``app``, or the sidecar: ``denied``, ``cut``, ``app-down``, ``timeout``, …"""
    bytes_received: int
    """From the app, for a connection; of requests, of the answer's body or message."""
    seconds: float
    trace_id: str = ""
    """Of the trace that the request belongs to; empty: none."""
    trace: RequestTrace | None = None
    """What this sidecar made of the request's trace context, if it did anything about it."""


def path_of(target: bytes) -> str:
    """Return a request target without its query."""
    return target.partition(b"?")[0].decode("latin-1")


Observer = Callable[[Entry], None]
"""Who is told of calls that have ended."""


class _Line(msgspec.Struct, gc=False):
    """A line's fields, in their order."""

    time: str
    direction: str
    protocol: str
    source: str
    source_instance: str
    destination: str
    instance: str
    method: str
    path: str
    code: int
    origin: str
    bytes: int
    duration_ms: float
    trace_id: str
    span_id: str
    """Of the span that was made of this request; empty: none."""


class LineClock:
    """The time as text, UTC to the millisecond. Of many lines in one second only the first has it made anew."""

    __slots__ = ("_second", "_text")

    def __init__(self) -> None:
        self._second = -1
        self._text = ""

    def text(self, now_ns: int) -> str:
        """Return ``now_ns``, nanoseconds of Unix time, by RFC 3339."""
        second, rest = divmod(now_ns, 1_000_000_000)
        if second != self._second:
            self._second = second
            self._text = datetime.fromtimestamp(second, UTC).strftime("%Y-%m-%dT%H:%M:%S")
        return f"{self._text}.{rest // 1_000_000:03d}Z"


class AccessLog:
    """Lines of JSON, appended to a file or to standard output (``-``) by a thread."""

    def __init__(self, path: str, tasks: Tasks) -> None:
        """Open the file. Raises OSError."""
        self.path = path
        self.dropped = 0
        self._tasks = tasks
        self._lines: list[bytes] = []
        self._held = 0
        self._writing = False
        self._encoder = msgspec.json.Encoder()
        self._clock = LineClock()
        self._descriptor = self._open()
        self._lock = threading.Lock()
        """Held while the descriptor is used: lines are written by a thread, and it may be closed meanwhile."""

    def _open(self) -> int:
        if self.path == "-":
            return os.dup(sys.stdout.fileno())
        return os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o640)

    def take(self, entry: Entry) -> None:
        """Queue a line."""
        if self._held > LINES_MAX_BYTES:
            self.dropped += 1
            return
        trace = entry.trace
        line = self._encoder.encode(
            _Line(
                self._clock.text(time.time_ns()),
                entry.direction,
                entry.protocol,
                entry.source,
                entry.source_instance,
                entry.destination,
                entry.instance,
                entry.method,
                entry.path,
                entry.code,
                entry.origin,
                entry.bytes_received,
                round(entry.seconds * 1000, 3),
                entry.trace_id,
                trace.span_id if trace is not None and trace.recorded else "",
            )
        )
        self._lines.append(line + b"\n")
        self._held += len(line) + 1
        if not self._writing:
            self._writing = True
            self._tasks.spawn(self._write_soon())

    async def _write_soon(self) -> None:
        try:
            while self._lines:
                await asyncio.sleep(FLUSH_S)
                await asyncio.to_thread(self._write, self._take())
        finally:
            self._writing = False

    def _take(self) -> bytes:
        lines, self._lines, self._held = self._lines, [], 0
        return b"".join(lines)

    def _write(self, data: bytes) -> None:
        view = memoryview(data)
        with self._lock:
            try:
                while view:
                    view = view[os.write(self._descriptor, view) :]
            except OSError:
                self.dropped += bytes(view).count(b"\n")  # a full disk must not end calls

    def reopen(self) -> None:
        """Open the file anew, after it was moved away. Raises OSError; the old one then stays in use."""
        fresh = self._open()
        self._write(self._take())
        with self._lock:
            os.dup2(fresh, self._descriptor, inheritable=False)
        os.close(fresh)

    def close(self) -> None:
        """Write what waits, and close. Idempotent."""
        if self._descriptor >= 0:
            self._write(self._take())
            with self._lock:
                os.close(self._descriptor)
                self._descriptor = -1


def all_of(observers: Sequence[Observer]) -> Observer | None:
    """Return all of these as one; None when there is none."""
    if len(observers) < 2:
        return observers[0] if observers else None

    def tell(entry: Entry) -> None:
        for observer in observers:
            observer(entry)

    return tell
