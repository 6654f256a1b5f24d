"""The xDS port: what is behind it is made by its first visitor, and bytes go through whole, both ways."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator

import pytest

from node.errors import NodeError
from node.xds.door import XdsDoor
from tests.support.both_loops import both_loops
from tests.support.sidecars import hang_up


class Echo:
    """Greets, then sends back what comes until it ends."""

    def __init__(self, made: list[Echo]) -> None:
        made.append(self)
        self.stopped = False
        self._server: asyncio.Server | None = None

    async def start(self, address: str, port: int) -> int:
        self._server = await asyncio.start_server(self._serve, address, port)
        bound: int = self._server.sockets[0].getsockname()[1]
        return bound

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            writer.write(b"hello ")
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        await hang_up(writer)

    async def stop(self) -> None:
        self.stopped = True
        assert self._server is not None
        self._server.close()


@contextlib.asynccontextmanager
async def door(made: list[Echo]) -> AsyncIterator[tuple[XdsDoor, int]]:
    async def make() -> Echo:
        await asyncio.sleep(0.01)
        return Echo(made)

    opened = XdsDoor(make)
    port = await opened.start("127.0.0.1", 0)
    try:
        yield opened, port
    finally:
        await opened.stop()


@both_loops
async def test_the_first_visitors_start_one_server_and_are_served_whole() -> None:
    made: list[Echo] = []
    async with door(made) as (_, port), asyncio.timeout(20):
        assert made == []

        async def visit(data: bytes) -> bytes:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(data)
            writer.write_eof()
            said = await reader.read(-1)
            await hang_up(writer)
            return said

        large = bytes(range(256)) * 4096
        assert await asyncio.gather(*(visit(b"%d" % n) for n in range(8)), visit(large)) == [
            *(b"hello %d" % n for n in range(8)),
            b"hello " + large,
        ]
        assert len(made) == 1
    assert made[0].stopped


@both_loops
async def test_stopping_ends_the_visits() -> None:
    async with door([]) as (opened, port), asyncio.timeout(20):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"PRI ")
        assert await reader.readexactly(6) == b"hello "
        await opened.stop()
        with contextlib.suppress(ConnectionError):
            assert await reader.read() == b""
        await hang_up(writer)
        assert not opened.channels


async def test_a_visitor_is_dropped_where_the_server_does_not_start_and_the_next_tries_again() -> None:
    tries: list[int] = []

    async def make() -> Echo:
        tries.append(len(tries))
        raise NodeError("no such luck")

    opened = XdsDoor(make)
    port = await opened.start("127.0.0.1", 0)
    async with asyncio.timeout(20):
        for _ in range(2):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"PRI ")
            with contextlib.suppress(ConnectionError):
                assert await reader.read() == b""
            await hang_up(writer)
    await opened.stop()
    assert tries == [0, 1]


async def test_a_node_loads_no_grpc_before_an_envoy_comes() -> None:
    code = "import sys, node.main, node.agent_side; sys.exit('grpc' in sys.modules)"
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", code)
    assert await process.wait() == 0


@both_loops
async def test_visitors_beyond_those_that_are_taken_do_not_fill_the_log(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("node.xds.door.VISITORS_MAX", 0)
    async with door([]) as (_, port), asyncio.timeout(20):
        for _ in range(5):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            with contextlib.suppress(ConnectionError):
                assert await reader.read() == b""
            await hang_up(writer)
    assert caplog.text.count("one is dropped") == 1
