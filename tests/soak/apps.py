"""The apps of a soak: they run beside the load, so one clock sees each request leave and arrive."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from typing import Any

import grpc
import grpc.aio
from aiohttp import WSMsgType, web

from tests.soak.referee import Referee

METHOD, STREAM, BOTH, SECRET = (f"/soak.Echo/{name}" for name in ("Unary", "Down", "Both", "Secret"))
MAX_LINE = 1 << 20


def pattern(ident: str, size: int) -> bytes:
    """Return ``size`` bytes that belong to ``ident`` alone."""
    block = b"".join(hashlib.sha256(f"{ident} {n}".encode()).digest() for n in range(128))
    return (block * (size // len(block) + 1))[:size]


class L4App:
    """Answers ``source ident payload`` with ``instance ident payload``, and ``source ident !N`` with N bytes."""

    def __init__(self, referee: Referee, service: str, instance: str) -> None:
        self._referee = referee
        self._service = service
        self._instance = instance
        self._server: asyncio.Server | None = None
        self.live: dict[asyncio.StreamWriter, str] = {}
        """Open connections and the source that speaks on them."""
        self.port = 0

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0, limit=MAX_LINE)
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        assert self._server is not None
        self._server.close()
        for writer in list(self.live):
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.live[writer] = ""
        try:
            while line := await reader.readline():
                source, ident, payload = line.decode().rstrip("\n").split(" ", 2)
                self.live[writer] = source
                self._referee.arrived(self._service, self._instance, source, ident)
                if payload.startswith("!"):
                    writer.write(pattern(ident, int(payload[1:])))
                else:
                    writer.write(f"{self._instance} {ident} {payload}\n".encode())
                await writer.drain()
        except (ConnectionError, ValueError):
            pass  # cut in the middle: the load tells whether that was in order
        finally:
            self.live.pop(writer, None)
            writer.close()


class HttpApp:
    """Echoes bodies and WebSocket messages; ``/secret`` is never to be reached."""

    def __init__(self, referee: Referee, service: str, instance: str) -> None:
        self._referee = referee
        self._service = service
        self._instance = instance
        self._runner: web.AppRunner | None = None
        self.live: dict[web.WebSocketResponse, str] = {}
        self.port = 0

    async def start(self) -> None:
        app = web.Application(client_max_size=8 << 20)
        app.router.add_route("*", "/echo/{ident}", self._echo)
        app.router.add_get("/ws/{ident}", self._socket)
        app.router.add_route("*", "/secret/{ident}", self._secret)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.5)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        self.port = self._runner.addresses[0][1]

    async def stop(self) -> None:
        assert self._runner is not None
        await self._runner.cleanup()

    def _arrived(self, request: web.Request) -> tuple[str, str]:
        ident, source = request.match_info["ident"], request.headers.get("x-source", "")
        self._referee.arrived(self._service, self._instance, source, ident)
        identity = request.headers.get("x-forwarded-client-cert", "")
        if f"/svc/soak-{source}" not in identity:
            self._referee.fault(f"request of {source} arrived as {identity!r}")
        return ident, source

    async def _echo(self, request: web.Request) -> web.Response:
        ident, _ = self._arrived(request)
        body = await request.read()
        headers = {"x-ident": ident, "x-instance": self._instance}
        return web.Response(body=body or pattern(ident, 2000), headers=headers)

    async def _secret(self, request: web.Request) -> web.Response:
        self._referee.fault(f"a forbidden request was served: {request.method} {request.path}")
        return web.Response(text="secret")

    async def _socket(self, request: web.Request) -> web.WebSocketResponse:
        _, source = self._arrived(request)
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        self.live[socket] = source
        try:
            async for message in socket:
                if message.type is WSMsgType.TEXT:
                    ident = message.data.split(" ", 1)[0]
                    self._referee.arrived(self._service, self._instance, source, ident)
                    await socket.send_str(message.data)
        except ConnectionError:
            pass
        finally:
            self.live.pop(socket, None)
        return socket


class GrpcApp(grpc.GenericRpcHandler):
    """Unary echo, a stream down, and one both ways; ``Secret`` is never to be reached."""

    def __init__(self, referee: Referee, service: str, instance: str) -> None:
        self._referee = referee
        self._service = service
        self._instance = instance
        self._server: Any = None
        self.live: dict[object, str] = {}
        """Streams that go both ways, and the source that speaks on them."""
        self.port = 0

    async def start(self) -> None:
        self._server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        self._server.add_generic_rpc_handlers((self,))
        self.port = self._server.add_insecure_port("127.0.0.1:0")
        await self._server.start()

    async def stop(self) -> None:
        with contextlib.suppress(Exception):  # gRPC's own ways of ending are not under test
            await self._server.stop(0)

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
        if details.method == SECRET:
            self._referee.fault("a forbidden gRPC method was served")
        return {
            METHOD: grpc.unary_unary_rpc_method_handler(self._unary),
            STREAM: grpc.unary_stream_rpc_method_handler(self._down),
            BOTH: grpc.stream_stream_rpc_method_handler(self._both),
            SECRET: grpc.unary_unary_rpc_method_handler(self._unary),
        }.get(details.method)

    def _arrived(self, request: bytes) -> str:
        source, ident = request.decode().split(" ", 2)[:2]
        self._referee.arrived(self._service, self._instance, source, ident)
        return ident

    async def _unary(self, request: bytes, context: Any) -> bytes:
        self._arrived(request)
        return request

    async def _down(self, request: bytes, context: Any) -> Any:
        ident = self._arrived(request)
        for n in range(20):
            yield f"{ident} {n}".encode()

    async def _both(self, requests: Any, context: Any) -> Any:
        try:
            async for request in requests:
                self.live[context] = request.decode().split(" ", 1)[0]
                self._arrived(request)
                yield request
        finally:
            self.live.pop(context, None)
