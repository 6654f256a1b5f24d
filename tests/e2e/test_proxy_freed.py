"""What has ended is freed at once, and not when the cyclic collector comes by: in a sidecar that is seldom, and until
then what sessions, streams, links and parsers hold adds up to megabytes."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import re
import socket
from collections import Counter
from collections.abc import AsyncIterator, Iterator

import grpc
import grpc.aio
import msgspec
import pytest

from proxy.plain import LINGER_RESET
from tests.e2e.test_http2_grpc import METHODS, Service
from tests.e2e.test_http_outbound import ask, fleet, get
from tests.support.http_filter import App, Seen, simple
from tests.support.loops import with_mesh
from tests.support.sidecars import Member, Mesh, hang_up, until

TIMES = 3
OURS = ("proxy.", "h2.", "hpack.", "httptools.")


def left_to_the_collector() -> Counter[str]:
    """Return what only the collector would have freed, by class; it is freed now."""
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        gc.collect()
    finally:
        gc.set_debug(0)
    names = [f"{type(each).__module__}.{type(each).__qualname__}" for each in gc.garbage]
    gc.garbage.clear()
    return Counter(name for name in names if name.startswith(OURS))


@contextlib.contextmanager
def nothing_left_to_the_collector() -> Iterator[None]:
    """Fail when anything of a sidecar that the body lets go of is part of a cycle."""
    gc.collect()
    gc.disable()
    try:
        yield
        assert left_to_the_collector() == Counter()
    finally:
        gc.enable()


def at_rest(*members: Member) -> bool:
    """Whether nothing is under way in these sidecars."""
    return not any(member.sidecar.live_calls() for member in members)


async def renew(*members: Member) -> None:
    """Give them other leaves, which retires the sessions that they dialed, and wait until those are gone."""
    for member in members:
        await member.push(leaf=member.mesh.ca.leaf(member.service, member.instance))
        for upstream in member.sidecar._upstreams.values():
            upstream.sweep()  # as every half minute
    await until(lambda: not any(session.core.draining for m in members for session in m.sidecar._pool._live))


def test_what_is_told_apart() -> None:
    class Cycle:
        def __init__(self) -> None:
            self.me = self

    Cycle.__module__ = "proxy.made_up"
    Cycle()
    found = left_to_the_collector()
    assert sum(count for name, count in found.items() if name.startswith("proxy.made_up.")) == 1


@with_mesh
async def test_connections_and_their_sessions(mesh: Mesh) -> None:
    client, server, _ = await mesh.pair()
    assert await client.ask() == b"hi\n"
    with nothing_left_to_the_collector():
        for _ in range(TIMES):
            assert await client.ask() == b"hi\n"
            reader, writer = await client.talk()
            await server.push(intentions=())
            with pytest.raises(ConnectionResetError):
                await reader.read()
            await hang_up(writer)
            assert await client.ask() == b""
            await server.allow("web")
            await renew(client)
        await until(lambda: at_rest(client, server))


@with_mesh
async def test_what_could_not_be_reached(mesh: Mesh) -> None:
    client, server, _ = await mesh.pair()
    gone = await mesh.member("backend", "backend-2")
    endpoint = gone.endpoint
    await gone.stop()
    assert await client.ask() == b"hi\n"
    with nothing_left_to_the_collector():
        for _ in range(TIMES):
            await client.route("backend", endpoint)
            assert await client.ask() == b""
            await client.route("backend", server.endpoint)
            assert await client.ask() == b"hi\n"
        await until(lambda: at_rest(client, server))


@with_mesh
async def test_a_connection_that_its_app_resets(mesh: Mesh) -> None:
    client, server, _ = await mesh.pair()
    assert await client.ask() == b"hi\n"
    with nothing_left_to_the_collector():
        for _ in range(TIMES):
            _, writer = await client.talk()
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_RESET)
            writer.transport.abort()
            await until(lambda: at_rest(client, server))


@with_mesh
async def test_http_connections_and_the_streams_that_were_kept(mesh: Mesh) -> None:
    client, (server,) = await fleet(mesh, App(answer=simple(b"0")))
    await server.push(self=_speaking(server, "http"))
    assert await ask(client, get()) == [(200, b"0")]
    with nothing_left_to_the_collector():
        for _ in range(TIMES):
            assert await ask(client, get("/a"), get("/c")) == [(200, b"0")] * 2
            await server.push(intentions=())
            assert [status for status, _ in await ask(client, get())] == [403]
            await server.allow("web")
            assert await ask(client, get()) == [(200, b"0")]
            await renew(client)
        await until(lambda: at_rest(client))
        server.sidecar._desk.http.drain()  # connections to the app are kept by their calls' streams
        await until(lambda: at_rest(server))


@with_mesh
async def test_upgraded_connections(mesh: Mesh) -> None:
    async def upgrade(app: App, seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
        writer.write(await reader.readline())

    client, (server,) = await fleet(mesh, App(answer=upgrade))
    await server.push(self=_speaking(server, "http"))
    with nothing_left_to_the_collector():
        for _ in range(TIMES):
            reader, writer = await client.dial()
            writer.write(b"GET / HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\nearly\n")
            assert re.search(rb"^HTTP/1.1 101 ", await reader.readuntil(b"\r\n\r\n"))
            assert await reader.readline() == b"early\n"
            await hang_up(writer)
            await until(lambda: at_rest(client, server))


@contextlib.asynccontextmanager
async def grpc_app() -> AsyncIterator[int]:
    """An app that speaks gRPC; yields its port."""
    app = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
    app.add_generic_rpc_handlers((Service(),))
    port = app.add_insecure_port("127.0.0.1:0")
    await app.start()
    try:
        yield port
    finally:
        await app.stop(0)


async def test_http2_connections_and_links() -> None:
    async with grpc_app() as port, Mesh() as mesh:
        server = await mesh.member("backend", "backend-1", port=port)
        client = await mesh.member("web", "web-1", upstreams=("backend",))
        await server.push(self=_speaking(server, "grpc"), intentions=(METHODS,))
        await client.route("backend", server.endpoint, protocol="grpc")

        async def call() -> None:
            options = [("grpc.use_local_subchannel_pool", 1)]
            async with grpc.aio.insecure_channel(
                f"127.0.0.1:{client.ports.upstreams['backend']}", options
            ) as channel:
                both = channel.stream_stream("/test.Echo/Both")()
                await both.write(b"one")
                assert await both.read() == b"ONE"
                with pytest.raises(grpc.aio.AioRpcError, match="PERMISSION_DENIED"):
                    await channel.unary_unary("/test.Echo/Other")(b"x")
                await server.push(intentions=())
                assert await both.code() is not grpc.StatusCode.OK
                await server.push(intentions=(METHODS,))

        await call()
        with nothing_left_to_the_collector():
            for _ in range(TIMES):
                await call()
                await renew(client)
            await until(lambda: at_rest(client, server))


def _speaking(member: Member, protocol: str) -> object:
    """Return what a member is, once its app speaks ``protocol``."""
    me = member.sidecar.config.self
    assert me is not None
    return msgspec.structs.replace(me, protocol=protocol)
