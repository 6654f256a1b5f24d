"""The admin endpoint on loopback: what the sidecar is doing, for people and for Prometheus. Never shows a key.

GET /ready, /stats, /metrics, /config_dump, /clusters; POST /drain[?timeout_s=N].
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Awaitable, Callable
from typing import Protocol

import msgspec
from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

from proxy.config import Configuration
from raftstate.model.wire import to_json

log = logging.getLogger("lictor.proxy.admin")


def _is_ours(record: logging.LogRecord) -> bool:
    """Whether an error is not merely that of a client who sent something else than a request."""
    error = record.exc_info[1] if record.exc_info else None
    return not isinstance(error, HttpProcessingError)


log.addFilter(_is_ours)
DRAIN_TIMEOUT_S = 30.0
PAGES = {
    "GET /ready": "200 once calls can be taken and made, else 503 and why not",
    "GET /stats": "all figures, as JSON",
    "GET /metrics": "the same for Prometheus",
    "GET /clusters": "the upstreams, with the state of each instance",
    "GET /config_dump": "what the agent has told, without keys",
    "POST /drain?timeout_s=N": f"take no new calls, end with those that live, after {DRAIN_TIMEOUT_S:g} s at most",
}
_LOOPBACK = frozenset({"127.0.0.1", "localhost", "[::1]"})
REDACTED = "<redacted>"


class Subject(Protocol):
    """What the endpoint is about: a sidecar in this process, or one made of worker processes."""

    config: Configuration
    draining: bool

    @property
    def ready(self) -> bool:
        """Whether calls can be taken and made."""
        ...

    async def stats(self) -> dict[str, object]:
        """Return all figures in plain values."""
        ...

    async def metrics_text(self) -> str:
        """Return all figures as Prometheus text."""
        ...

    async def cluster_list(self) -> list[dict[str, object]]:
        """Return the upstreams with their instances."""
        ...

    def start_drain(self, timeout_s: float) -> None:
        """Begin to drain."""
        ...


class AdminServer:
    """Serves one sidecar's admin endpoint on a socket bound before."""

    def __init__(self, sock: socket.socket, sidecar: Subject) -> None:
        self.port: int = sock.getsockname()[1]
        self._sock = sock
        self._sidecar = sidecar
        self._runner: web.AppRunner | None = None

    async def start(self) -> None:
        """Begin to serve."""
        app = web.Application(middlewares=[_only_loopback_names])
        app.add_routes(
            [
                web.get("/", self._index),
                web.get("/ready", self._ready),
                web.get("/stats", self._stats),
                web.get("/metrics", self._metrics),
                web.get("/config_dump", self._config_dump),
                web.get("/clusters", self._clusters),
                web.post("/drain", self._drain),
            ]
        )
        self._runner = web.AppRunner(app, access_log=None, logger=log, shutdown_timeout=1.0)
        await self._runner.setup()
        await web.SockSite(self._runner, self._sock).start()

    async def close(self) -> None:
        """Stop serving. Idempotent."""
        if self._runner is not None:
            runner, self._runner = self._runner, None
            await runner.cleanup()
        self._sock.close()

    async def _index(self, request: web.Request) -> web.Response:
        return web.Response(text="".join(f"{page:<26}{what}\n" for page, what in PAGES.items()))

    async def _ready(self, request: web.Request) -> web.Response:
        sidecar = self._sidecar
        if sidecar.ready:
            return web.Response(text="ready\n")
        why = "draining" if sidecar.draining else "awaiting " + (", ".join(sidecar.config.missing()) or "start")
        return web.Response(status=503, text=why + "\n")

    async def _stats(self, request: web.Request) -> web.Response:
        return _json({**await self._sidecar.stats(), "tasks": len(asyncio.all_tasks())})

    async def _metrics(self, request: web.Request) -> web.Response:
        text = await self._sidecar.metrics_text()
        return web.Response(body=text.encode(), headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"})

    async def _clusters(self, request: web.Request) -> web.Response:
        return _json(await self._sidecar.cluster_list())

    async def _config_dump(self, request: web.Request) -> web.Response:
        config = self._sidecar.config
        leaf = msgspec.structs.replace(config.leaf, private_key_pem=REDACTED) if config.leaf else None
        return _json(
            {
                "version": config.version,
                "self": config.self,
                "leaf": leaf,
                "roots": config.roots,
                "intentions": config.intentions,
                "default_allow": config.default_allow,
                "revocations": config.revocations,
                "upstreams": config.upstreams,
            }
        )

    async def _drain(self, request: web.Request) -> web.Response:
        try:
            timeout_s = float(request.query.get("timeout_s", DRAIN_TIMEOUT_S))
        except ValueError:
            return web.Response(status=400, text="timeout_s must be a number of seconds\n")
        if not 0 <= timeout_s <= 3600:
            return web.Response(status=400, text="timeout_s must be between 0 and 3600\n")
        self._sidecar.start_drain(timeout_s)
        return web.Response(text="draining\n")


@web.middleware
async def _only_loopback_names(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    """A web page must not reach us over a name of its own that resolves to loopback (DNS rebinding)."""
    name = request.host.rpartition(":")[0] if ":" in request.host.rpartition("]")[2] else request.host
    if name not in _LOOPBACK or "Origin" in request.headers:
        return web.Response(status=403, text="the admin endpoint answers on loopback names only\n")
    return await handler(request)


def _json(value: object) -> web.Response:
    return web.Response(body=to_json(value) + b"\n", content_type="application/json")
