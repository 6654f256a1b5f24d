"""Spans on their way to a collector: OTLP over HTTP, in JSON.

Nothing here may delay a request, or hold more than so much: spans wait in a bounded queue and leave in batches; what
does not fit, or is not taken in time, is dropped and counted by its reason.

Source: OpenTelemetry protocol 1.x, "OTLP/HTTP": which answers are worth another attempt, ``Retry-After``, partial
success.
"""

from __future__ import annotations

import asyncio
import email.utils
import logging
import random
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping

import aiohttp
import msgspec

from proxy.access import Entry
from proxy.logs import LimitedLog
from proxy.otlp_headers import Headers
from proxy.spans import Attribute, attribute, encode_span
from proxy.tasks import Tasks

log = logging.getLogger("lictor.proxy.spans")

SPANS_MAX = 4096
SPANS_MAX_BYTES = 8 * 1024 * 1024
"""What waits at most, the batch under way not counted."""
SPANS_PER_BATCH = 512
EXPORT_S = 1.0
"""How long spans gather, unless a batch is full."""
EXPORT_TIMEOUT_S = 5.0
BACKOFF_S = 0.5
"""After a failure; doubles with each further one, up to:"""
BACKOFF_S_MAX = 30.0
GIVE_UP_S = 60.0
"""How long a batch is tried again."""
RETRY_AFTER_S_MAX = 300.0
"""However long a collector asks to be left alone."""
ANSWER_BYTES_MAX = 64 * 1024
EXIT_S = 2.0
"""What the end of a sidecar waits for spans to be taken."""
RETRYABLE = frozenset({429, 502, 503, 504})

FULL, REFUSED, UNREACHABLE, STOPPING = "full", "refused", "unreachable", "stopping"
REASONS = (FULL, REFUSED, UNREACHABLE, STOPPING)


class _Partial(msgspec.Struct, rename="camel"):
    rejected_spans: int | str = 0
    error_message: str = ""


class _Answer(msgspec.Struct, rename="camel"):
    partial_success: _Partial | None = None


class SpanExporter:
    """Sends the spans of recorded requests to a collector."""

    def __init__(
        self, endpoint: str, resource: Callable[[], Mapping[str, str]], tasks: Tasks, *, headers: Headers = ()
    ) -> None:
        """``endpoint`` is the collector's base address, such as ``http://127.0.0.1:4318``; ``resource`` returns the
        attributes of whose spans they are; ``headers`` go with each request, and are shown nowhere."""
        self.exported = 0
        self.dropped_by: Counter[str] = Counter()
        """Spans by the reason why no collector has them."""
        self._url = endpoint.rstrip("/") + ("" if endpoint.rstrip("/").endswith("/v1/traces") else "/v1/traces")
        self._resource = resource
        self._headers = {**dict(headers), "Content-Type": "application/json", "User-Agent": "lictor"}
        self._tasks = tasks
        self._waiting: deque[bytes] = deque()
        self._held = 0
        self._export_task: asyncio.Task[None] | None = None
        self._session: aiohttp.ClientSession | None = None
        self._closing = asyncio.Event()
        self._hurry = asyncio.Event()
        """A batch is full, or the end has come."""
        self._failures = 0
        """In a row."""
        self._not_before = 0.0
        """When the collector may be asked again, by the loop's clock."""
        self._told_to_wait = False
        """That is the collector's own word."""
        self._log = LimitedLog(log, interval_s=60.0)

    @property
    def dropped(self) -> int:
        """Spans that no collector has, whatever the reason."""
        return self.dropped_by.total()

    def take(self, entry: Entry) -> None:
        """Queue a request's span, if there is to be one."""
        trace = entry.trace
        if trace is None or not trace.recorded:
            return
        if self._closing.is_set():
            self.dropped_by[STOPPING] += 1
            return
        if len(self._waiting) >= SPANS_MAX or self._held >= SPANS_MAX_BYTES:
            self.dropped_by[FULL] += 1
            return
        span = encode_span(entry, trace, time.time_ns())
        self._waiting.append(span)
        self._held += len(span)
        if self._export_task is None:
            self._export_task = self._tasks.spawn(self._export())
        elif len(self._waiting) >= SPANS_PER_BATCH:
            self._hurry.set()

    async def close(self, timeout_s: float = EXIT_S) -> None:
        """Send what waits, for at most ``timeout_s``; what is left then is dropped and counted. Idempotent."""
        self._closing.set()
        self._hurry.set()
        task = self._export_task
        if task is not None:
            await asyncio.wait([task], timeout=timeout_s)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        self.dropped_by[STOPPING] += len(self._waiting)
        self._waiting.clear()
        self._held = 0
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    async def _export(self) -> None:
        try:
            # Nothing is awaited between the last answer to this and the end: a span that came then would be left.
            while self._waiting:
                if len(self._waiting) < SPANS_PER_BATCH:
                    self._hurry.clear()
                    await _until(self._closing if self._closing.is_set() else self._hurry, EXPORT_S)
                batch = [self._waiting.popleft() for _ in range(min(SPANS_PER_BATCH, len(self._waiting)))]
                self._held -= sum(map(len, batch))
                await self._deliver(batch)
        finally:
            self._export_task = None

    def _client(self) -> aiohttp.ClientSession:
        """Return what keeps the connection to the collector from one batch to the next."""
        if self._session is None:
            timeout = aiohttp.ClientTimeout(total=EXPORT_TIMEOUT_S)
            self._session = aiohttp.ClientSession(timeout=timeout, cookie_jar=aiohttp.DummyCookieJar())
        return self._session

    async def _deliver(self, batch: list[bytes]) -> None:
        """Send a batch until it is taken or refused, or too old."""
        clock = asyncio.get_running_loop().time
        give_up_at = clock() + GIVE_UP_S
        left = True
        try:
            while left:
                await _until(self._closing, self._not_before - clock())
                if self._closing.is_set() and self._told_to_wait and clock() < self._not_before:
                    break
                if not await self._send(batch):
                    left = False
                elif self._closing.is_set() or self._not_before > give_up_at:
                    break
        finally:
            if left:  # cancelled, too
                self.dropped_by[STOPPING if self._closing.is_set() else UNREACHABLE] += len(batch)

    async def _send(self, batch: list[bytes]) -> bool:
        """Send a batch once; return whether it is worth another attempt, not before the time that is set then."""
        attributes: list[Attribute] = [attribute(key, value) for key, value in self._resource().items()]
        scope = {"scope": {"name": "lictor"}, "spans": [msgspec.Raw(span) for span in batch]}
        body = msgspec.json.encode(
            {"resourceSpans": [{"resource": {"attributes": attributes}, "scopeSpans": [scope]}]}
        )
        wait_s: float | None = None
        try:
            send = self._client().post(self._url, data=body, headers=self._headers, allow_redirects=False)
            async with send as answer:
                status = answer.status
                if status < 300:
                    self._taken(len(batch), await _read_some(answer.content))
                    return False
                if status not in RETRYABLE:
                    self.dropped_by[REFUSED] += len(batch)
                    self._failures = 0
                    self._log.warning("refused", f"the collector at {self._url} refuses spans: HTTP status {status}")
                    return False
                wait_s = read_retry_after(answer.headers.get("Retry-After", ""), time.time())
                problem = f"HTTP status {status}"
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            problem = str(error) or type(error).__name__
        self._failures += 1
        self._told_to_wait = wait_s is not None
        if wait_s is None:
            wait_s = min(BACKOFF_S_MAX, BACKOFF_S * 2 ** min(self._failures - 1, 16)) * random.uniform(0.5, 1.0)
        self._not_before = asyncio.get_running_loop().time() + wait_s
        self._log.warning("away", f"the collector at {self._url} takes no spans: {problem}")
        return True

    def _taken(self, count: int, answer: bytes) -> None:
        self._failures = 0
        self._told_to_wait = False
        rejected, why = read_rejected(answer)
        rejected = min(rejected, count)
        self.exported += count - rejected
        if rejected:
            self.dropped_by[REFUSED] += rejected
            text = f"the collector at {self._url} refused {rejected} of {count} spans: {why[:200]!r}"
            self._log.warning("rejected", text)


async def _until(event: asyncio.Event, timeout_s: float) -> None:
    """Wait so long, or until the event."""
    if timeout_s <= 0:
        return
    try:
        async with asyncio.timeout(timeout_s):
            await event.wait()
    except TimeoutError:
        return


async def _read_some(content: aiohttp.StreamReader) -> bytes:
    """Return the answer's body, as far as anybody needs it."""
    pieces: list[bytes] = []
    size = 0
    async for piece in content.iter_any():
        pieces.append(piece)
        size += len(piece)
        if size > ANSWER_BYTES_MAX:
            break
    return b"".join(pieces)


def read_rejected(answer: bytes) -> tuple[int, str]:
    """Return how many spans a collector that answered well has not taken all the same, and its reason."""
    try:
        partial = msgspec.json.decode(answer, type=_Answer).partial_success if answer else None
        return (max(0, int(partial.rejected_spans)), partial.error_message) if partial is not None else (0, "")
    except (msgspec.DecodeError, ValueError):
        return 0, ""  # not what the protocol says; the status is what counts


def read_retry_after(value: str, now_s: float) -> float | None:
    """Return how many seconds to wait by a ``Retry-After`` (RFC 9110, section 10.2.3), within
    :data:`RETRY_AFTER_S_MAX`; None when there is none or it can't be read. ``now_s``: Unix time."""
    if value.isascii() and value.isdigit():
        return min(float(value[:12]), RETRY_AFTER_S_MAX)
    try:
        at = email.utils.parsedate_to_datetime(value)
        return min(max(0.0, at.timestamp() - now_s), RETRY_AFTER_S_MAX)
    except (ValueError, TypeError, OverflowError):
        return None
