"""A change of permissions ends what they allow no more, within a second, and nothing else of the same caller."""

from __future__ import annotations

import asyncio
import contextlib

import grpc
import grpc.aio
import pytest

from raftstate.model.intention import HTTPMatch, Intention, Permission
from tests.e2e.test_http2_grpc import setting
from tests.support.http_filter import App, Seen
from tests.support.loops import with_mesh
from tests.support.promises import promptly
from tests.support.sidecars import Member, Mesh, hang_up, until


def only(*permissions: Permission) -> Intention:
    return Intention(source_name="web", destination_name="backend", permissions=permissions)


def paths(*exact: str) -> Intention:
    return only(*(Permission("allow", HTTPMatch(path_exact=path)) for path in exact))


class Streams(App):
    """An app whose answers go on until they are told to end; ``/silent…`` says nothing at all."""

    def __init__(self) -> None:
        super().__init__()
        self.answer = self.stream
        self.gone: set[str] = set()
        self.go_on: dict[str, asyncio.Event] = {}

    async def stream(self, app: App, seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        event = self.go_on.setdefault(seen.target, asyncio.Event())
        watching = asyncio.create_task(reader.read(1))
        going = asyncio.create_task(event.wait())
        try:
            if seen.header("upgrade"):
                writer.write(b"HTTP/1.1 101 Switching\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n<")
            elif not seen.target.startswith("/silent"):
                writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\n<\r\n")
            await asyncio.wait((watching, going), return_when=asyncio.FIRST_COMPLETED)
            if not event.is_set():
                return
            if seen.header("upgrade"):
                writer.write(b">")
            elif not seen.target.startswith("/silent"):
                writer.write(b"1\r\n>\r\n0\r\n\r\n")
            else:
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\n>")
            await writer.drain()
        finally:
            self.gone.add(seen.target)
            for task in (watching, going):
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError, ConnectionError):
                    await task
            writer.close()


Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def begin(client: Member, target: str, *, websocket: bool = False) -> Connection:
    """Send a request and, unless it is a silent one, read up to the first byte of what the app says."""
    reader, writer = await client.dial()
    upgrade = "Connection: Upgrade\r\nUpgrade: websocket\r\n" if websocket else ""
    writer.write(f"GET {target} HTTP/1.1\r\nHost: backend\r\n{upgrade}\r\n".encode())
    if not target.startswith("/silent"):
        async with asyncio.timeout(10):
            await reader.readuntil(b"<")
    return reader, writer


async def ends(reader: asyncio.StreamReader) -> bytes:
    """Return what still comes until the end, or reset, which must come within a second."""
    came = b""
    async with promptly():
        with contextlib.suppress(ConnectionError):
            while piece := await reader.read(65536):
                came += piece
    return came


@with_mesh
async def test_http1_requests_under_way_are_decided_anew_each(mesh: Mesh) -> None:
    app = Streams()
    client, server, _ = await mesh.pair(app.handle)
    await server.push(
        intentions=(paths("/kept", "/dropped", "/silent-kept", "/silent-dropped", "/ws", "/ws-dropped"),)
    )
    kept, dropped = await begin(client, "/kept"), await begin(client, "/dropped")
    ws, ws_dropped = await begin(client, "/ws", websocket=True), await begin(client, "/ws-dropped", websocket=True)
    silent_kept, silent_dropped = await begin(client, "/silent-kept"), await begin(client, "/silent-dropped")
    idle = await client.dial()
    idle[1].write(b"GET /other HTTP/1.1\r\nHost: backend\r\n\r\n")
    async with asyncio.timeout(10):
        assert b" 403 " in await idle[0].readuntil(b"\n")
    await until(lambda: len(app.seen) == 6)

    await server.push(intentions=(paths("/kept", "/silent-kept", "/ws"),))

    assert b">" not in await ends(dropped[0])
    assert b">" not in await ends(ws_dropped[0])
    async with promptly():
        assert (await silent_dropped[0].readline()) == b"HTTP/1.1 403 Forbidden\r\n", "nothing was answered yet"
        await until(lambda: app.gone == {"/dropped", "/ws-dropped", "/silent-dropped"})
    for target in ("/kept", "/ws", "/silent-kept"):
        app.go_on[target].set()
    async with asyncio.timeout(10):
        for reader, _ in (kept, ws, silent_kept):
            assert await reader.readuntil(b">")
    idle[1].write(b"GET /kept HTTP/1.1\r\nHost: backend\r\n\r\n")
    async with asyncio.timeout(10):
        await idle[0].readuntil(b"HTTP/1.1 200 OK")
    assert 'lictor_cut_total{direction="inbound",reason="denied"} 3' in server.sidecar.metrics.render()
    for _, writer in (kept, dropped, ws, ws_dropped, silent_kept, silent_dropped, idle):
        await hang_up(writer)
    await until(lambda: server.sidecar.live_calls() == 0)


@with_mesh
async def test_a_relayed_call_ends_when_its_requests_are_to_be_decided(mesh: Mesh) -> None:
    client, server, _ = await mesh.pair()
    reader, writer = await client.dial()
    writer.write(b"x")
    async with asyncio.timeout(10):
        assert await reader.read(1) == b"x"
    await server.push(intentions=(paths("/x"),))
    assert await ends(reader) == b""
    await hang_up(writer)


@with_mesh
async def test_permissions_that_go_end_nothing(mesh: Mesh) -> None:
    app = Streams()
    client, server, _ = await mesh.pair(app.handle)
    await server.push(intentions=(paths("/kept"),))
    reader, writer = await begin(client, "/kept")
    await server.allow("web")
    app.go_on["/kept"].set()
    async with asyncio.timeout(10):
        assert await reader.readuntil(b">")
    await hang_up(writer)


async def test_each_grpc_stream_is_decided_anew() -> None:
    method = "/test.Echo/{}".format
    async with setting() as (_, server, service, channel), asyncio.timeout(30):
        both = channel.stream_stream(method("Both"))()
        up = channel.stream_unary(method("Up"))()
        hang = channel.unary_unary(method("Hang"))(b"x")
        await both.write(b"one")
        assert await both.read() == b"ONE"
        await up.write(b"two")
        await until(lambda: len(service.calls) == 3)

        await server.push(intentions=(paths(method("Up"), method("Unary")),))

        async with promptly():
            with pytest.raises(grpc.aio.AioRpcError) as ended:
                await hang
            assert ended.value.code() == grpc.StatusCode.PERMISSION_DENIED
            assert await both.code() == grpc.StatusCode.PERMISSION_DENIED, "its answer had begun"
            await service.cancelled.wait()
        await up.write(b"three")
        await up.done_writing()
        assert await up == b"8", "on the same connection, and allowed"
        assert await channel.unary_unary(method("Unary"))(b"x") == b"x"
        metrics = server.sidecar.metrics.render()
        assert 'lictor_cut_total{direction="inbound",reason="denied"} 2' in metrics
        assert metrics.count('grpc_status="7",origin="denied"') == 2
        (connection,) = server.sidecar._desk.http.http2.connections
        assert not connection._exchanges  # type: ignore[attr-defined]
