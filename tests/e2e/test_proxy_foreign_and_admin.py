"""Peers that do not speak mux, and the admin endpoint."""

from __future__ import annotations

import asyncio
import json

import aiohttp
import msgspec
import pytest

from proxy import pool
from tests.support.loops import with_mesh
from tests.support.sidecars import Mesh, digest, hang_up, until
from tests.support.tls_peers import context


async def foreign_server(mesh: Mesh) -> tuple[asyncio.Server, int]:
    """A TLS echo server with a backend's certificate and no mux, as Envoy in front of an app would look."""
    tasks = set()

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tasks.add(asyncio.current_task())
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
        writer.close()

    tls = context(mesh.ca.leaf("backend", "backend-1"), mesh.ca.root_pem, server=True)
    server = await asyncio.start_server(echo, "127.0.0.1", 0, ssl=tls)
    return server, server.sockets[0].getsockname()[1]


@with_mesh
async def test_foreign_upstream_is_dialed_once_for_each_connection(
    mesh: Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "HALF_CLOSED_SILENCE_S", 0.1)
    client, server, _ = await mesh.pair()
    listener, port = await foreign_server(mesh)
    await client.route("backend", msgspec.structs.replace(server.endpoint, port=port))
    for _ in range(3):
        assert await client.ask(b"hello\n") == b"hello\n"
    lines = await asyncio.gather(*[client.ask(b"%d\n" % i) for i in range(10)])
    assert lines == [b"%d\n" % i for i in range(10)]
    data = bytes(range(256)) * 16384
    reader, writer = await client.dial()
    writer.write(data)
    assert digest(await asyncio.wait_for(reader.readexactly(len(data)), 10)) == digest(data)
    await hang_up(writer)
    pair = client.sidecar.metrics.pair("outbound", "web", "backend")
    await until(lambda: pair.active == 0)
    assert pair.bytes_in >= len(data)
    await until(lambda: not client.sidecar._pool._foreign)
    listener.close()


@with_mesh
async def test_foreign_upstream_is_cut_when_it_is_deregistered(mesh: Mesh) -> None:
    client, server, _ = await mesh.pair()
    listener, port = await foreign_server(mesh)
    await client.route("backend", msgspec.structs.replace(server.endpoint, port=port))
    reader, writer = await client.dial()
    writer.write(b"one\n")
    assert await reader.readline() == b"one\n"
    await client.route("backend")
    with pytest.raises(ConnectionError):
        await asyncio.wait_for(reader.read(), 1)
    await hang_up(writer)
    listener.close()


@with_mesh
async def test_admin_endpoint_shows_all_but_keys(mesh: Mesh) -> None:
    client, server, _ = await mesh.pair()
    assert await client.ask() == b"hi\n"
    base = f"http://127.0.0.1:{client.ports.admin_port}"
    async with aiohttp.ClientSession() as http:

        async def get(path: str, **headers: str) -> tuple[int, str]:
            async with http.get(base + path, headers=headers) as answer:
                return answer.status, await answer.text()

        assert await get("/ready") == (200, "ready\n")
        status, metrics = await get("/metrics")
        assert status == 200
        assert 'lictor_connections_total{direction="outbound",source="web",destination="backend"} 1' in metrics
        assert "lictor_certificate_expiry_seconds 1" in metrics
        stats = json.loads((await get("/stats"))[1])
        assert stats["sessions"]["outbound"][0]["instance"] == "backend-1"
        clusters = json.loads((await get("/clusters"))[1])
        assert clusters[0]["instances"][0]["instance"] == "backend-1"
        status, dump = await get("/config_dump")
        assert status == 200
        assert json.loads(dump)["self"]["ServiceID"] == "web-1"
        assert "PRIVATE KEY" not in dump
        assert (await get("/ready", Host="evil.example"))[0] == 403
        assert (await get("/ready", Origin="http://evil.example"))[0] == 403
        base = f"http://127.0.0.1:{server.ports.admin_port}"
        assert (await get("/ready"))[0] == 200
        async with http.post(f"{base}/drain?timeout_s=nonsense") as answer:
            assert answer.status == 400
        async with http.post(f"{base}/drain?timeout_s=1") as answer:
            assert answer.status == 200
    await until(lambda: server.sidecar.draining)
    assert await client.ask() == b""


@with_mesh
async def test_not_ready_without_intentions(mesh: Mesh) -> None:
    member = await mesh.member("web", "web-1")
    member.sidecar.config.intentions = None
    member.sidecar.config._recompile()
    async with aiohttp.ClientSession() as http:
        async with http.get(f"http://127.0.0.1:{member.ports.admin_port}/ready") as answer:
            assert answer.status == 503
            assert "intentions" in await answer.text()
