"""Peers that do not speak mux, and the admin endpoint."""

from __future__ import annotations

import asyncio
import json
import socket

import aiohttp
import msgspec
import pytest

from proxy.poller import Poller
from proxy.relay import SocketChannel
from proxy.secure import SecureTransport
from proxy.tls import make_material
from raftstate.model.connect import Revocation
from tests.support.loops import with_mesh
from tests.support.promises import promptly
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
async def test_foreign_upstream_is_dialed_once_for_each_connection(mesh: Mesh) -> None:
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


class Foreign(SocketChannel):
    """A foreign peer's TLS connection, which can be half closed. What comes is kept."""

    def __init__(self) -> None:
        super().__init__()
        self.data = b""
        self.ended = self.lost = False

    def data_received(self, data: bytes) -> None:
        self.data += data

    def eof_received(self) -> bool:
        self.ended = True
        return super().eof_received()

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost = True
        super().connection_lost(exc)


@with_mesh
async def test_each_direction_of_a_call_to_a_foreign_peer_ends_by_itself(mesh: Mesh) -> None:
    client, server, _ = await mesh.pair()
    poller = Poller()
    loop = asyncio.get_running_loop()
    tls = context(mesh.ca.leaf("backend", "backend-1"), mesh.ca.root_pem, server=True)
    listener = socket.create_server(("127.0.0.1", 0))
    listener.setblocking(False)
    await client.route("backend", msgspec.structs.replace(server.endpoint, port=listener.getsockname()[1]))

    async def accept() -> Foreign:
        sock, address = await loop.sock_accept(listener)
        foreign = Foreign()
        transport = SecureTransport(poller, foreign, tls, server=True)
        transport.accepted(sock.detach(), address)
        await transport.handshake()
        return foreign

    async with asyncio.timeout(30):
        # Our app ends first, and hears the answer all the same.
        accepting = asyncio.create_task(accept())
        reader, writer = await client.dial()
        writer.write(b"question")
        writer.write_eof()
        foreign = await accepting
        await until(lambda: foreign.ended)
        assert foreign.data == b"question"
        foreign.write(b"ans")
        assert await reader.readexactly(3) == b"ans"
        foreign.write(b"wer")
        foreign.write_eof()
        assert await reader.read() == b"wer"
        await until(lambda: foreign.lost)
        await hang_up(writer)
        # The foreign app ends first, and is told the rest.
        accepting = asyncio.create_task(accept())
        reader, writer = await client.dial()
        writer.write(b"one")
        foreign = await accepting
        foreign.write(b"bye")
        foreign.write_eof()
        assert await reader.read() == b"bye"
        writer.write(b", two")
        await until(lambda: foreign.data == b"one, two")
        assert not foreign.ended
        writer.write_eof()
        await until(lambda: foreign.ended and foreign.lost)
        await hang_up(writer)
    await until(lambda: not client.sidecar._pool._foreign)
    await until(lambda: client.sidecar.live_calls() == 0)
    listener.close()
    poller.close()


@with_mesh
async def test_each_direction_of_a_foreign_peers_call_ends_by_itself(mesh: Mesh) -> None:
    heard: list[bytes] = []

    async def app(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        first = await reader.readline()
        if first == b"app first\n":
            writer.write(b"bye")
            writer.write_eof()
            heard.append(await reader.read())
        else:
            heard.append(await reader.read())
            writer.write(b"ans")
            await writer.drain()
            writer.write(b"wer")
            writer.write_eof()

    _, server, _ = await mesh.pair(app)
    poller = Poller()
    tls = make_material(mesh.ca.leaf("web", "web-9"), (mesh.ca.root_pem,)).client_plain

    async def call(line: bytes) -> Foreign:
        foreign = Foreign()
        transport = SecureTransport(poller, foreign, tls, server=False)
        transport.connect([(socket.AF_INET, ("127.0.0.1", server.ports.public_port))])
        await transport.handshake()
        foreign.write(line)
        return foreign

    async with asyncio.timeout(30):
        for early in (False, True):  # the end may come with the handshake's last bytes
            foreign = await call(b"caller first\n")
            if not early:
                await until(lambda: bool(server.sidecar.live_calls()))
            foreign.write_eof()
            await until(lambda: foreign.lost)  # noqa: B023 - awaited here
            assert foreign.data == b"answer"
        foreign = await call(b"app first\n")
        await until(lambda: foreign.ended)
        assert foreign.data == b"bye"
        foreign.write(b"the rest")
        foreign.write_eof()
        await until(lambda: foreign.lost)
    await until(lambda: heard == [b"", b"", b"the rest"])
    await until(lambda: server.sidecar.live_calls() == 0)
    poller.close()


@with_mesh
async def test_foreign_upstream_is_cut_when_it_is_deregistered(mesh: Mesh) -> None:
    client, server, _ = await mesh.pair()
    listener, port = await foreign_server(mesh)
    await client.route("backend", msgspec.structs.replace(server.endpoint, port=port))
    reader, writer = await client.talk()
    await client.route("backend")
    with pytest.raises(ConnectionError):
        async with promptly():
            await reader.read()
    await hang_up(writer)
    listener.close()


@pytest.mark.parametrize("gone", [True, False])
@with_mesh
async def test_a_request_under_way_to_a_foreign_instance_ends_when_it_is_deregistered(mesh: Mesh, gone: bool) -> None:
    """And goes on when another one is."""
    client, server, _ = await mesh.pair()
    ended = asyncio.Event()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 12\r\n\r\nhalf, ")
        await ended.wait()
        writer.write(b"whole.")
        await reader.read()
        writer.close()

    tls = context(mesh.ca.leaf("backend", "backend-1"), mesh.ca.root_pem, server=True)
    listener = await asyncio.start_server(answer, "127.0.0.1", 0, ssl=tls)
    foreign = msgspec.structs.replace(server.endpoint, port=listener.sockets[0].getsockname()[1])
    other = msgspec.structs.replace(server.endpoint, port=1, service_id="backend-9", healthy=False)
    await client.route("backend", foreign, other, protocol="http")
    reader, writer = await client.dial()
    writer.write(b"GET / HTTP/1.1\r\nhost: backend\r\n\r\n")
    async with asyncio.timeout(10):
        await reader.readuntil(b"half, ")
    await client.route("backend", *([other] if gone else [foreign]), protocol="http")
    if gone:
        with pytest.raises(ConnectionError):
            async with promptly():
                await reader.read()
        ended.set()
    else:
        ended.set()
        assert await asyncio.wait_for(reader.readexactly(6), 10) == b"whole."
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
        assert json.loads(dump)["revocations"] == []
        await client.revoke(Revocation("instance", "other-1", service="other"))
        assert json.loads((await get("/config_dump"))[1])["revocations"][0]["Value"] == "other-1"
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


@with_mesh
async def test_nobody_is_let_in_or_called_before_it_is_known_who_is_revoked(mesh: Mesh) -> None:
    """An agent that can't find out about one thing in time says the rest."""
    client, server, _ = await mesh.pair()
    for member, direction in ((client, "outbound"), (server, "inbound")):
        config = member.sidecar.config
        revocations, config.revocations = config.revocations, None
        await member.push(leaf=mesh.ca.leaf(member.service, member.instance))  # as if it had begun so
        assert await client.ask() == b"", direction
        assert not member.sidecar.ready
        assert config.missing() == ["revocations"]
        if direction == "outbound":
            assert not server.sidecar.metrics.pair("inbound", "web", "backend").total
        await member.push(revocations=revocations)
        assert await client.ask() == b"hi\n"
