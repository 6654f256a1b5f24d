"""A closed-loop HTTP/1.1 load generator that costs little beside what it measures.

Each of C connections sends its next request when the answer to the last has come. Only answers with a
Content-Length or chunked body and status 200 count; anything else is an error and ends the run loudly.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import httptools


@dataclass
class Result:
    """What C connections saw in one run."""

    seconds: float = 0.0
    latencies_s: list[float] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    @property
    def rate(self) -> float:
        """Answers per second."""
        return len(self.latencies_s) / self.seconds if self.seconds else 0.0

    def percentile_ms(self, share: float) -> float:
        """Latency below which ``share`` (0..1) of the answers came, in milliseconds."""
        ordered = sorted(self.latencies_s)
        return ordered[min(len(ordered) - 1, int(len(ordered) * share))] * 1000 if ordered else float("nan")


class _Connection(asyncio.Protocol):
    def __init__(self, load: _Load) -> None:
        self.load = load
        self.parser = httptools.HttpResponseParser(self)
        self.body = b""
        self.sent_at = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
        self._next()

    def _next(self) -> None:
        request = self.load.next_request()
        if request is None:
            self.transport.close()
            return
        self.body = b""
        self.sent_at = time.perf_counter()
        self.transport.write(request)

    def data_received(self, data: bytes) -> None:
        self.parser.feed_data(data)

    def on_body(self, data: bytes) -> None:
        self.body += data

    def on_message_complete(self) -> None:
        status = self.parser.get_status_code()
        if status != 200:
            self.load.result.errors.append(f"{status} {self.body[:100]!r}")
        else:
            self.load.result.latencies_s.append(time.perf_counter() - self.sent_at)
        self._next()

    def connection_lost(self, error: Exception | None) -> None:
        if error is not None:
            self.load.result.errors.append(repr(error))
        self.load.closed()


class _Load:
    def __init__(self, make: Callable[[int], bytes], connections: int, seconds: float, requests: int | None) -> None:
        self.make = make
        self.open = connections
        self.left = requests
        self.ends_at = time.perf_counter() + seconds
        self.count = 0
        self.result = Result()
        self.done = asyncio.Event()

    def next_request(self) -> bytes | None:
        if self.left is not None and self.count >= self.left:
            return None
        if time.perf_counter() >= self.ends_at or self.result.errors:
            return None
        self.count += 1
        return self.make(self.count)

    def closed(self) -> None:
        self.open -= 1
        if self.open == 0:
            self.done.set()


async def run_load(
    addresses: list[tuple[str, int]],
    make: Callable[[int], bytes],
    *,
    connections: int,
    seconds: float,
    requests: int | None = None,
) -> Result:
    """Run ``connections`` clients, spread over ``addresses``, for ``seconds`` or until ``requests`` were sent.

    ``make(n)`` gives the bytes of the n-th request.
    """
    load = _Load(make, connections, seconds, requests)
    loop = asyncio.get_running_loop()
    began = time.perf_counter()
    for number in range(connections):
        host, port = addresses[number % len(addresses)]
        await loop.create_connection(lambda: _Connection(load), host, port)
    await load.done.wait()
    load.result.seconds = time.perf_counter() - began
    return load.result


def put_request(host: str, path: str, body: bytes, *, method: str = "PUT") -> bytes:
    """Return the bytes of one keep-alive request with a body."""
    head = f"{method} {path} HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body
