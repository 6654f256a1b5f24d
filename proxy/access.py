"""What is told of each call when it has ended: a line of JSON in the access log, a span to a collector of traces.

Both are off by default. Neither may delay a call: lines and spans wait in bounded queues, and what does not fit is
counted and dropped.

A traced request brings W3C trace context (``traceparent``), which is passed on untouched; the span exported for it is
a child of the caller's, beside the app's own.
"""

from __future__ import annotations

import asyncio
import os
import re
import secrets
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from typing import NamedTuple

import aiohttp
import msgspec

from proxy.tasks import Tasks

INBOUND, OUTBOUND = "inbound", "outbound"
LINES_MAX_BYTES = 4 * 1024 * 1024
"""What waits to be written at most."""
FLUSH_S = 0.2
SPANS_MAX = 4096
SPANS_PER_BATCH = 512
EXPORT_S = 1.0
EXPORT_TIMEOUT_S = 5.0
EXIT_S = 2.0
"""What the end of a sidecar waits for spans to be taken."""
_TRACEPARENT = re.compile(rb"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(?:-.*)?")


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
    traceparent: bytes = b""


def trace_of(fields: Iterable[tuple[bytes, bytes]]) -> bytes:
    """Return the ``traceparent`` among header fields, or nothing."""
    for name, value in fields:
        if name == b"traceparent":
            return value
    return b""


def path_of(target: bytes) -> str:
    """Return a request target without its query."""
    return target.partition(b"?")[0].decode("latin-1")


class Traced(NamedTuple):
    """A ``traceparent`` that was understood."""

    trace_id: str
    parent_id: str
    sampled: bool


def read_traceparent(value: bytes) -> Traced | None:
    """Parse a ``traceparent`` (W3C Trace Context, section 3.2); None when it is not one."""
    found = _TRACEPARENT.fullmatch(value) if value else None
    if found is None:
        return None
    version, trace_id, parent_id, flags = (part.decode() for part in found.groups())
    if version == "ff" or not int(trace_id, 16) or not int(parent_id, 16):
        return None
    return Traced(trace_id, parent_id, bool(int(flags, 16) & 1))


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
        traced = read_traceparent(entry.traceparent) if entry.traceparent else None
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
                traced.trace_id if traced is not None else "",
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


class SpanExporter:
    """Sends spans of sampled requests to a collector by OTLP over HTTP, in JSON.

    Source: OpenTelemetry protocol 1.x, ``/v1/traces``.
    """

    def __init__(self, endpoint: str, service: Callable[[], str], tasks: Tasks) -> None:
        """``endpoint`` is the collector's base address, such as ``http://127.0.0.1:4318``."""
        self.dropped = 0
        self.exported = 0
        self._url = endpoint.rstrip("/") + ("" if endpoint.rstrip("/").endswith("/v1/traces") else "/v1/traces")
        self._service = service
        self._tasks = tasks
        self._waiting: deque[dict[str, object]] = deque()
        self._export_task: asyncio.Task[None] | None = None
        self._closing = asyncio.Event()

    def take(self, entry: Entry) -> None:
        """Queue a span, if the request is traced and sampled."""
        traced = read_traceparent(entry.traceparent)
        if traced is None or not traced.sampled:
            return
        if len(self._waiting) >= SPANS_MAX or self._closing.is_set():
            self.dropped += 1
            return
        self._waiting.append(_span(entry, traced))
        if self._export_task is None:
            self._export_task = self._tasks.spawn(self._export())

    async def close(self, timeout_s: float = EXIT_S) -> None:
        """Send what waits, for at most ``timeout_s``; what is left then is dropped and counted. Idempotent."""
        self._closing.set()
        if self._export_task is not None:
            await asyncio.wait([self._export_task], timeout=timeout_s)
        self.dropped += len(self._waiting)
        self._waiting.clear()

    async def _export(self) -> None:
        timeout = aiohttp.ClientTimeout(total=EXPORT_TIMEOUT_S)
        try:
            async with aiohttp.ClientSession(timeout=timeout) as session:
                while self._waiting:
                    await self._pause()
                    batch = [self._waiting.popleft() for _ in range(min(SPANS_PER_BATCH, len(self._waiting)))]
                    await self._send(session, batch)
        finally:
            self._export_task = None

    async def _pause(self) -> None:
        """Let spans gather, but not when the sidecar ends."""
        try:
            async with asyncio.timeout(EXPORT_S):
                await self._closing.wait()
        except TimeoutError:
            return

    async def _send(self, session: aiohttp.ClientSession, batch: list[dict[str, object]]) -> None:
        resource = {"attributes": [_attribute("service.name", self._service())]}
        scope = {"scope": {"name": "lictor"}, "spans": batch}
        body = msgspec.json.encode({"resourceSpans": [{"resource": resource, "scopeSpans": [scope]}]})
        try:
            async with session.post(self._url, data=body, headers={"Content-Type": "application/json"}) as answer:
                if answer.status < 300:
                    self.exported += len(batch)
                    return
        except (aiohttp.ClientError, TimeoutError, OSError):
            pass  # counted below; a collector that is away is nothing a call should suffer from
        except asyncio.CancelledError:
            self.dropped += len(batch)
            raise
        self.dropped += len(batch)


def _attribute(key: str, value: str | int) -> dict[str, object]:
    typed: dict[str, object] = {"intValue": str(value)} if isinstance(value, int) else {"stringValue": value}
    return {"key": key, "value": typed}


def _span(entry: Entry, traced: Traced) -> dict[str, object]:
    end_ns = time.time_ns()
    attributes = [
        _attribute("http.request.method", entry.method),
        _attribute("url.path", entry.path),
        _attribute("http.response.status_code", entry.code),
        _attribute("network.protocol.name", entry.protocol),
        _attribute("lictor.source", entry.source),
        _attribute("lictor.destination", entry.destination),
        _attribute("lictor.instance", entry.instance),
        _attribute("lictor.origin", entry.origin),
    ]
    return {
        "traceId": traced.trace_id,
        "spanId": secrets.token_hex(8),
        "parentSpanId": traced.parent_id,
        "name": f"{entry.method} {entry.destination}",
        "kind": 2 if entry.direction == INBOUND else 3,
        "startTimeUnixNano": str(end_ns - int(entry.seconds * 1e9)),
        "endTimeUnixNano": str(end_ns),
        "attributes": attributes,
        "status": {"code": 2 if entry.code >= 500 or not entry.code else 0},
    }


def all_of(observers: Sequence[Observer]) -> Observer | None:
    """Return all of these as one; None when there is none."""
    if len(observers) < 2:
        return observers[0] if observers else None

    def tell(entry: Entry) -> None:
        for observer in observers:
            observer(entry)

    return tell
