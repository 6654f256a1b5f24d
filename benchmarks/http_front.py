"""What the HTTP listener costs a request, without sockets: its fast lane and aiohttp's own protocol, in one process.

    .venv/bin/python -m benchmarks.http_front

The best of a few batches, in µs of this thread's CPU. `status` has a handler that does next to nothing.
"""

from __future__ import annotations

import asyncio
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import uvloop

from tests.support.http_api import Node, serving

BATCHES, REQUESTS = 12, 200
HEADERS = "Host: 127.0.0.1:8500\r\nUser-Agent: Go-http-client/1.1\r\nAccept-Encoding: gzip\r\n"


class Sink(asyncio.Transport):
    """Counts what is written."""

    def __init__(self) -> None:
        super().__init__()
        self.writes = 0

    def write(self, data: Any) -> None:
        self.writes += 1

    def writelines(self, parts: Any) -> None:
        self.writes += 1

    def is_closing(self) -> bool:
        return False

    def close(self) -> None:
        pass

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return ("127.0.0.1", 1) if name in ("peername", "sockname") else default


async def cost_us(factory: Any, request: bytes) -> float:
    """Return the CPU of one request on a connection made by ``factory``."""
    sink, protocol = Sink(), factory()
    protocol.connection_made(sink)
    best_s = float("inf")
    for _ in range(BATCHES):
        began = time.thread_time()
        for _ in range(REQUESTS):
            before = sink.writes
            protocol.data_received(request)
            while sink.writes == before:  # noqa: ASYNC110 (one turn of the loop at a time is what is measured)
                await asyncio.sleep(0)
            await asyncio.sleep(0)
        best_s = min(best_s, (time.thread_time() - began) / REQUESTS)
    protocol.connection_lost(None)
    return best_s * 1e6


def _get(path: str) -> bytes:
    return f"GET {path} HTTP/1.1\r\n{HEADERS}\r\n".encode()


async def measure(node: Node) -> None:
    """Print the table."""
    for number in range(10):
        check = {"CheckID": "web", "Name": "web", "ServiceID": "web", "Status": "passing"}
        service = {"ID": "web", "Service": "web", "Port": 80}
        body = {"Node": f"n{number}", "Address": "10.0.0.1", "Service": service, "Check": check}
        await node.put("/v1/catalog/register", body)
    put = f"PUT /v1/kv/bench HTTP/1.1\r\n{HEADERS}Content-Length: 256\r\n\r\n".encode() + b"x" * 256
    registration = {"Node": "n0", "Address": "10.0.0.1", "Service": {"ID": "web", "Service": "web", "Port": 80}}
    data = json.dumps(registration).encode()
    register = f"PUT /v1/catalog/register HTTP/1.1\r\n{HEADERS}Content-Length: {len(data)}\r\n\r\n".encode() + data
    requests = {
        "PUT /v1/catalog/register": register,
        "PUT /v1/kv/KEY": put,
        "GET /v1/kv/KEY": _get("/v1/kv/bench"),
        "GET /v1/status/peers": _get("/v1/status/peers"),
        "GET /v1/health/service/NAME?passing&stale": _get("/v1/health/service/web?passing&stale"),
        "GET /v1/health/service/NAME?passing": _get("/v1/health/service/web?passing"),
    }
    front = node.runner.front
    for name, request in requests.items():
        plain, fast = await cost_us(front.make_slow, request), await cost_us(front, request)
        print(f"{name:44} aiohttp {plain:6.1f} µs   fast lane {fast:6.1f} µs")


async def main() -> None:
    """Measure on a node of its own."""
    with tempfile.TemporaryDirectory() as directory:
        async with serving(Path(directory)) as node:
            await measure(node)


if __name__ == "__main__":
    uvloop.run(main())
