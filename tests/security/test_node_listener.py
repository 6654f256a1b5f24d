"""Who does not belong on the RPC port is closed, with exactly one log line that says why and whence."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import socket
import ssl
from pathlib import Path
from typing import Any

import pytest

from node import pki
from node.config import Limits
from node.errors import Overloaded
from node.node_tls import ALPN_PEER
from node.peers import PeerConnections
from node.pki import Peer
from node.rpc.hello import ALERT_BUSY
from node.rpc.listener import Listener
from node.rpc.server import Call, Methods
from tests.support.both_loops import both_loops
from tests.support.promises import PATIENCE_S
from tests.support.rpc import RpcEnds, eventually, make_pki, rpc_ends


def methods() -> Methods:
    async def echo(call: Call) -> bytes:
        return call.body

    made = Methods()
    made.add("echo", echo)
    return made


async def knock(port: int, data: bytes = b"", context: ssl.SSLContext | None = None) -> bytes:
    """Connect, send, read until the other end closes."""
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context)
    except OSError:
        return b""
    try:
        writer.write(data)
        async with asyncio.timeout(PATIENCE_S):
            return await reader.read()
    except OSError:
        return b""
    finally:
        writer.close()
        try:
            await writer.wait_closed()
        except OSError:
            pass


async def one_line(caplog: pytest.LogCaptureFixture, cause: str) -> None:
    def lines() -> list[str]:
        return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]

    await eventually(lambda: bool(lines()))
    for _ in range(5):
        await asyncio.sleep(0)
    (line,) = lines()
    assert cause in line
    assert "from 127.0.0.1:" in line


async def still_serves(ends: RpcEnds) -> None:
    connection = await ends.dial()
    assert await connection.call("echo", b"ok", 5) == b"ok"
    connection.close()


@both_loops
async def test_plain_text(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with rpc_ends(tmp_path, methods()) as ends:
        assert b"HTTP" not in await knock(ends.port, b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        await one_line(caplog, "it does not speak TLS")
        await still_serves(ends)


@both_loops
async def test_a_foreign_ca(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    foreign = pki.create_node_ca(tmp_path / "foreign")
    pki.issue_node_cert(foreign.directory, "server-2", "server", "dc1")
    context = pki.client_context(foreign, "server-2", pki.ALPN_RAFT)
    context.verify_mode = ssl.CERT_NONE
    async with rpc_ends(tmp_path, methods()) as ends:
        assert await knock(ends.port, b"hello", context) == b""
        await one_line(caplog, "its certificate is not of this cluster's CA")
        await still_serves(ends)


@both_loops
async def test_no_certificate(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols([pki.ALPN_RPC])
    async with rpc_ends(tmp_path, methods()) as ends:
        assert await knock(ends.port, b"hello", context) == b""
        await one_line(caplog, "it showed no certificate")


@both_loops
async def test_a_client_that_does_not_trust_us(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    foreign = pki.create_node_ca(tmp_path / "foreign")
    pki.issue_node_cert(foreign.directory, "server-2", "server", "dc1")
    context = pki.client_context(foreign, "server-2", pki.ALPN_RPC)
    async with rpc_ends(tmp_path, methods()) as ends:
        assert await knock(ends.port, b"hello", context) == b""
        await one_line(caplog, "")


@both_loops
@pytest.mark.parametrize("alpn", [["h2"], []])
async def test_an_unknown_protocol(tmp_path: Path, caplog: pytest.LogCaptureFixture, alpn: list[str]) -> None:
    async with rpc_ends(tmp_path, methods()) as ends:
        context = pki.client_context(ends.files, "client-1", pki.ALPN_RPC)
        if alpn:
            context.set_alpn_protocols(alpn)
        else:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            context.check_hostname = False
            context.load_verify_locations(str(ends.files.ca))
            context.load_cert_chain(str(ends.files.cert("client-1")), str(ends.files.key("client-1")))
        assert await knock(ends.port, b"hello", context) == b""
        await one_line(caplog, "it asked for no protocol of this port")


@both_loops
async def test_a_client_may_not_speak_raft(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    accepted: list[Peer] = []

    class Raft(asyncio.Protocol):
        def connection_made(self, transport: Any) -> None:
            transport.write(b"raft")
            transport.close()

    def accept(peer: Peer) -> asyncio.Protocol:
        accepted.append(peer)
        return Raft()

    async with rpc_ends(tmp_path, methods(), accept_raft=accept) as ends:
        context = pki.client_context(ends.files, "client-1", pki.ALPN_RAFT)
        assert await knock(ends.port, b"vote for me", context) == b""
        await one_line(caplog, "client-1 is a client: only a server may speak raft")
        assert accepted == []
        context = pki.client_context(ends.files, "server-2", pki.ALPN_RAFT)
        assert await knock(ends.port, b"", context) == b"raft"
        assert accepted == [Peer("server-2", "server", "dc1")]


@both_loops
async def test_a_certificate_of_another_datacenter(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with rpc_ends(tmp_path, methods()) as ends:
        pki.issue_node_cert(ends.files.directory, "stranger", "server", "dc2")
        context = pki.client_context(ends.files, "stranger", pki.ALPN_RPC)
        assert await knock(ends.port, b"", context) == b""
        await one_line(caplog, "not one node of datacenter 'dc1'")


@both_loops
async def test_silence_is_closed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with rpc_ends(tmp_path, methods(), limits=Limits(rpc_handshake_timeout_s=0.1)) as ends:
        assert await knock(ends.port) == b""
        await one_line(caplog, "no TLS handshake in time")
        await eventually(lambda: len(ends.listener) == 0)


@both_loops
async def test_connections_are_bounded(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with rpc_ends(tmp_path, methods(), limits=Limits(rpc_connections_max=1)) as ends:
        first = await ends.dial()
        assert await knock(ends.port, b"hello") == ALERT_BUSY
        await one_line(caplog, "1 connections are open")
        with pytest.raises(Overloaded):
            await ends.dial("client-2")
        peers = PeerConnections(pki.client_context(ends.files, "server-2", pki.ALPN_RPC), "dc1")
        server = await peers.get("server-1", f"127.0.0.1:{ends.port}")
        assert await server.call("echo", b"ok", 5) == b"ok", "servers find room among agents"
        await peers.close()
        first.close()
        await eventually(lambda: len(ends.listener) == 0)
        caplog.clear()
        await still_serves(ends)


@both_loops
async def test_whoever_says_that_it_is_a_server_gets_no_agents_place(tmp_path: Path) -> None:
    async with rpc_ends(tmp_path, methods(), limits=Limits(rpc_connections_max=1)) as ends:
        first = await ends.dial()
        context = pki.client_context(ends.files, "client-2", pki.ALPN_RPC)
        context.set_alpn_protocols([pki.ALPN_RPC, ALPN_PEER])
        assert await knock(ends.port, b"hello", context) == b""
        assert len(ends.listener.connections) == 1
        first.close()


@both_loops
async def test_those_who_say_nothing_keep_nobody_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("node.rpc.listener.SILENT_MAX", 20)
    async with rpc_ends(tmp_path, methods(), limits=Limits(rpc_connections_max=8)) as ends:
        silent = [await asyncio.open_connection("127.0.0.1", ends.port) for _ in range(60)]
        await still_serves(ends)
        assert [await reader.read() for reader, _ in silent[:30]] == [b""] * 30, "the oldest make room"
        assert len(ends.listener) <= 20
        for _, writer in silent:
            writer.close()


@both_loops
async def test_more_handshakes_than_can_be_seen_to_are_put_off_and_servers_go_first(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("node.rpc.admission.AT_ONCE_MAX", 0)  # the server is busy: nobody's turn comes
    monkeypatch.setattr("node.rpc.listener.WAITING_MAX", 5)
    async with rpc_ends(tmp_path, methods()) as ends:
        waiting = [asyncio.create_task(ends.dial()) for _ in range(5)]
        await eventually(lambda: len(ends.listener) == 5)
        with pytest.raises(Overloaded):
            await ends.dial()
        assert ends.listener.crowded
        await one_line(caplog, "5 connections wait for a handshake")
        peers = PeerConnections(pki.client_context(ends.files, "server-2", pki.ALPN_RPC), "dc1")
        server = await peers.get("server-1", f"127.0.0.1:{ends.port}")
        assert await server.call("echo", b"ok", 5) == b"ok"
        await peers.close()
        for task in waiting[:2]:
            task.cancel()  # it gives up while it waits
        await asyncio.wait(waiting[:2])
        monkeypatch.setattr("node.rpc.admission.AT_ONCE_MAX", 1)
        for connection in await asyncio.gather(*waiting[2:]):
            assert await connection.call("echo", b"ok", 5) == b"ok"
            connection.close()
        await eventually(lambda: len(ends.listener) == 0)


@both_loops
async def test_a_server_is_crowded_only_while_someone_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("node.rpc.admission.AT_ONCE_MAX", 0)
    async with rpc_ends(tmp_path, methods()) as ends:
        assert not ends.listener.crowded
        waiting = asyncio.create_task(ends.dial())
        await eventually(lambda: ends.listener.crowded)
        monkeypatch.setattr("node.rpc.admission.AT_ONCE_MAX", 1)
        connection = await waiting
        assert not ends.listener.crowded
        connection.close()
        await eventually(lambda: len(ends.listener) == 0)


@both_loops
async def test_a_server_that_lost_many_agents_at_once_expects_them_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("node.liveness.LOSSES_MIN", 3)
    async with rpc_ends(tmp_path, methods()) as ends:
        connections = [await ends.dial() for _ in range(3)]
        for connection in connections[:2]:
            connection.close()
        await eventually(lambda: len(ends.listener) == 1)
        assert not ends.listener.crowded
        connections[2].close()
        await eventually(lambda: len(ends.listener) == 0)
        assert ends.listener.crowded


@both_loops
async def test_a_client_that_dawdles_in_its_handshake_holds_up_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("node.rpc.admission.AT_ONCE_MAX", 2)
    monkeypatch.setattr("node.rpc.admission.LEASE_S", 0.2)
    async with rpc_ends(tmp_path, methods()) as ends:
        dawdlers = [await asyncio.open_connection("127.0.0.1", ends.port) for _ in range(4)]
        for _, writer in dawdlers:
            writer.write(b"\x16\x03\x01\x02\x00")  # the head of a record that does not come
        await eventually(lambda: len(ends.listener) == 4)
        await still_serves(ends)
        for _, writer in dawdlers:
            writer.close()


@both_loops
async def test_noise_inside_tls_closes_that_connection_only(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with rpc_ends(tmp_path, methods()) as ends:
        context = pki.client_context(ends.files, "client-1", pki.ALPN_RPC)
        for noise in (b"\xff\xff\xff\xff", b"\x00\x00\x00\x01\xc1", b"\x00\x00\x00\x03\x92\x02\x01"):
            caplog.clear()
            assert await knock(ends.port, noise, context) == b""
            (record,) = (record for record in caplog.records if record.levelno >= logging.WARNING)
            assert "closed connection of client-1" in record.getMessage()
        await still_serves(ends)


@both_loops
async def test_whoever_arrives_while_the_listener_closes_is_closed_too(tmp_path: Path) -> None:
    context = pki.server_context(make_pki(tmp_path / "tls"), "server-1")
    for said in (b"", b"\x16\x03\x01", ssl_hello()):
        for turns in range(8):
            listener = Listener(context, "dc1", methods(), limits=Limits())
            port = await listener.start("127.0.0.1", 0)
            with socket.socket() as caller:
                caller.connect(("127.0.0.1", port))
                caller.sendall(said)
                for _ in range(turns):
                    await asyncio.sleep(0)
                await listener.close()
    # Whatever of them the listener had taken, it has not lost: Python would tell of a socket left unclosed.
    gc.collect()


def ssl_hello() -> bytes:
    """Return the first that a TLS client says."""
    said = ssl.MemoryBIO()
    client = ssl.create_default_context().wrap_bio(ssl.MemoryBIO(), said, server_hostname="server-1")
    with contextlib.suppress(ssl.SSLWantReadError):
        client.do_handshake()
    return said.read()
