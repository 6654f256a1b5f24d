"""What happens in the moments between: an attempt that is given up, a peer that stops, a change in mid-handshake."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from typing import Any, cast

import msgspec
import pytest

from proxy import listeners, pool
from proxy.errors import ConnectFailed, StreamClosed
from proxy.mux import ALPN, frames
from proxy.mux.core import MuxStream
from proxy.mux.session import MuxSession
from proxy.outgoing import Outgoing
from proxy.plain import PlainTransport, with_socket
from proxy.poller import Poller
from proxy.pool import ForeignChannel
from proxy.secure import SecureTransport
from proxy.tls import PeerProof, make_material, proof_of
from raftstate.model.identity import Identity
from raftstate.model.sidecar import key_of
from tests.support.http_filter import App as HttpApp
from tests.support.http_filter import simple
from tests.support.loops import with_mesh
from tests.support.promises import PATIENCE_S
from tests.support.sidecars import Member, Mesh, hang_up, until
from tests.support.tls_peers import context

WAIT_S = PATIENCE_S


def outgoing_of(member: Member, name: str = "backend") -> Outgoing:
    """Return the one call that the member's app is making."""
    (call,) = member.sidecar._upstreams[name].connections
    assert isinstance(call, Outgoing)
    return call


@pytest.mark.parametrize("second", ["lictor", "foreign"])
@with_mesh
async def test_a_call_that_moves_on_from_an_instance_that_took_nothing_is_read_on(mesh: Mesh, second: str) -> None:
    """The app was told to pause for the first instance's sake; the second one is not slow."""
    client, first, app = await mesh.pair()
    other = await mesh.member("backend", "backend-2", port=app.port)
    await other.allow("web")
    spare = other.endpoint
    listener: asyncio.Server | None = None
    if second == "foreign":
        tls = context(mesh.ca.leaf("backend", "backend-2"), mesh.ca.root_pem, server=True)
        listener = await asyncio.start_server(echo_once, "127.0.0.1", 0, ssl=tls)
        spare = msgspec.structs.replace(spare, port=listener.sockets[0].getsockname()[1])
    assert await client.ask() == b"hi\n"
    (session,) = client.sidecar._pool._live
    await client.route("backend", first.endpoint)
    session.core.blocked = True  # as when the peer reads nothing and its socket is full
    reader, writer = await client.dial()
    writer.write(b"one ")
    await until(lambda: outgoing_is_full(client))
    await client.route("backend", first.endpoint, spare)
    session.kill(StreamClosed("it was lost"))
    writer.write(b"two\n")
    async with asyncio.timeout(WAIT_S):
        assert await reader.readline() == b"one two\n"
    await hang_up(writer)
    if listener is not None:
        listener.close()


async def echo_once(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await echo_all(reader, writer)
    writer.close()


async def echo_all(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(65536):
        writer.write(data)
        await writer.drain()


def outgoing_is_full(member: Member) -> bool:
    """Whether the member's one call has something that its instance does not take."""
    connections = member.sidecar._upstreams["backend"].connections
    return any(isinstance(each, Outgoing) and each._stream_full for each in connections)


@pytest.mark.parametrize("sent", [False, True])
@with_mesh
async def test_a_request_of_which_nothing_was_sent_is_made_elsewhere_whatever_its_method(
    mesh: Mesh, sent: bool
) -> None:
    """As a connection is. One that was sent may have been served."""
    apps = [HttpApp(answer=simple(b"b%d" % number)) for number in (1, 2)]
    client, first, _ = await mesh.pair(apps[0].handle)
    other = await mesh.member("backend", "backend-2", port=(await mesh.app(apps[1].handle)).port)
    await other.allow("web")
    await client.route("backend", first.endpoint, protocol="http")
    session = await client.sidecar._pool.connect(key_of(first.endpoint))
    assert isinstance(session, MuxSession)
    session.core.blocked = True
    reader, writer = await client.dial()
    writer.write(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 4\r\n\r\nbody")
    await until(lambda: bool(session.core.waiting))
    (stream,) = session.core.streams.values()
    stream.data_sent = sent
    await client.route("backend", first.endpoint, other.endpoint, protocol="http")
    session.kill(StreamClosed("it was lost"))
    async with asyncio.timeout(WAIT_S):
        head = await reader.readuntil(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 502 " if sent else b"HTTP/1.1 200 ")
    assert [(seen.method, seen.body) for seen in apps[1].seen] == ([] if sent else [("POST", b"body")])
    assert apps[0].seen == []
    await hang_up(writer)


@with_mesh
async def test_a_slow_foreign_peer_makes_us_hold_little_though_much_had_waited_for_it(
    mesh: Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the app sends before the handshake is over goes out in one piece, and may fill the connection."""
    client, server, _ = await mesh.pair()
    leaf = mesh.ca.leaf("backend", "backend-1")
    tls = context(leaf, mesh.ca.root_pem, server=True)
    loop = asyncio.get_running_loop()
    made: list[Narrow] = []

    class Narrow(ForeignChannel):
        """Its kernel takes little."""

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            made.append(self)
            self.room(4096)

        def room(self, size: int) -> None:
            fd = self.transport._plain._fd  # type: ignore[attr-defined]
            with_socket(fd, lambda sock: sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, size))

    monkeypatch.setattr(pool, "ForeignChannel", Narrow)
    listener = socket.create_server(("127.0.0.1", 0))
    listener.setblocking(False)
    await client.route("backend", msgspec.structs.replace(server.endpoint, port=listener.getsockname()[1]))
    sent = bytes(range(256)) * (20 * 4096)  # more than the kernel takes on the way
    with socket.create_connection(("127.0.0.1", client.ports.upstreams["backend"])) as app:
        app.setblocking(False)
        sending = asyncio.create_task(loop.sock_sendall(app, sent))
        await until(lambda: bool(client.sidecar._upstreams["backend"].connections))
        call = outgoing_of(client)
        await until(lambda: call._held)
        sock, _ = await loop.sock_accept(listener)
        reading = asyncio.Event()
        received = bytearray()

        async def take(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            cast(asyncio.Transport, writer.transport).pause_reading()
            await reading.wait()
            cast(asyncio.Transport, writer.transport).resume_reading()
            while data := await reader.read(1 << 20):
                received.extend(data)
            writer.close()

        serving: list[asyncio.Task[None]] = []
        await loop.connect_accepted_socket(
            lambda: asyncio.StreamReaderProtocol(
                asyncio.StreamReader(), lambda r, w: serving.append(asyncio.create_task(take(r, w)))
            ),
            sock,
            ssl=tls,
        )
        transport = cast(PlainTransport, call.app.transport)
        await until(lambda: sending.done() or (bool(made) and made[0].joined and not transport.is_reading()))
        assert not sending.done()
        assert made[0].transport.get_write_buffer_size() < 1 << 20  # type: ignore[attr-defined]
        made[0].room(1 << 20)
        reading.set()
        await asyncio.wait_for(sending, 30)
        app.shutdown(socket.SHUT_WR)
        await until(lambda: len(received) == len(sent), 30)
        assert received == sent
        await asyncio.gather(*serving)
    listener.close()


@pytest.mark.parametrize("protocol", ["http", "grpc", "tcp"])
@with_mesh
async def test_a_caller_sends_no_more_than_a_little_while_our_app_is_being_connected(
    mesh: Mesh, protocol: str
) -> None:
    """An app that does not take connections for now must not make us hold what its callers have to say meanwhile."""
    loop = asyncio.get_running_loop()
    with socket.create_server(("127.0.0.1", 0), backlog=0) as full:
        address = full.getsockname()
        held = [await filled(address) for _ in range(2)]
        server = await mesh.member("backend", "backend-1", port=address[1])
        await server.allow("web")
        me = server.sidecar.config.self
        assert me is not None
        config = {"local_connect_timeout_ms": 60_000}
        await server.push(self=msgspec.structs.replace(me, protocol=protocol, config=config))
        tls = context(mesh.ca.leaf("web", "web-1"), mesh.ca.root_pem)
        _, writer = await asyncio.open_connection("127.0.0.1", server.ports.public_port, ssl=tls)
        size = 32 << 20
        writer.write(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % size + bytes(size))
        public = server.sidecar._public
        assert public is not None
        await until(lambda: bool(server.sidecar._desk.calls))
        (caller,) = public.callers
        transport = cast(SecureTransport, caller.transport)
        await until(lambda: caller.received > size or not transport.is_reading())
        assert caller.received < 1 << 20
        # It goes on when the app does.
        for each in held:
            each.close()
        full.listen(16)
        full.setblocking(False)
        taken: list[socket.socket] = []
        received = 0
        async with asyncio.timeout(60):
            while received < size:
                sock, _ = await loop.sock_accept(full)
                taken.append(sock)
                while part := await loop.sock_recv(sock, 1 << 20):
                    received += len(part)
                    if received >= size:
                        break
        for each in taken:
            each.close()
        writer.transport.abort()


async def filled(address: tuple[str, int]) -> socket.socket:
    """Begin to connect, and wait no longer than it takes the kernel to queue it, if it does."""
    sock = socket.socket()
    sock.setblocking(False)
    sock.connect_ex(address)
    await asyncio.sleep(0)
    return sock


# Changes while a handshake is under way


def at_the_end_of_the_handshake(monkeypatch: pytest.MonkeyPatch, module: Any, change: Any) -> None:
    """Have ``change`` called once, when TLS is done and what it proved is to be looked at."""
    left = [change]

    def proof(ssl_object: ssl.SSLObject, *shown: Any) -> PeerProof:
        if left:
            left.pop()()
        return proof_of(ssl_object, *shown)

    monkeypatch.setattr(module, "proof_of", proof)


@with_mesh
async def test_a_session_made_while_our_leaf_is_renewed_does_not_stay(
    mesh: Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, _, _ = await mesh.pair()
    sessions, config = client.sidecar._pool, client.sidecar.config

    def renew() -> None:
        material = make_material(mesh.ca.leaf("web", "web-1"), (mesh.ca.root_pem,))
        sessions.use(material, mesh.ca.trust_domain, config.revoked)

    at_the_end_of_the_handshake(monkeypatch, pool, renew)
    assert await client.ask() == b"hi\n"
    await until(lambda: len(sessions._live) == 1)
    (session,) = sessions._live
    assert [session] == [each for peer in sessions._peers.values() for each in peer.sessions]
    assert await client.ask() == b"hi\n"
    assert len(sessions._live) == 1


@with_mesh
async def test_a_session_made_while_its_instance_leaves_the_catalog_is_none(
    mesh: Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, server, _ = await mesh.pair()
    sessions, key = client.sidecar._pool, key_of(server.endpoint)
    at_the_end_of_the_handshake(monkeypatch, pool, lambda: sessions.drop(key, "it is gone"))
    with pytest.raises(ConnectFailed):
        await sessions.connect(key)
    await until(lambda: not sessions._live)
    assert sessions._peers == {}


@with_mesh
async def test_a_session_whose_handshake_ends_after_the_drain_has_begun_does_not_hold_it_up(
    mesh: Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, server, _ = await mesh.pair()
    public = server.sidecar._public
    assert public is not None

    def drain() -> None:
        server.sidecar._desk.drain()
        public.drain("the sidecar is draining")

    at_the_end_of_the_handshake(monkeypatch, listeners, drain)
    assert await client.ask() == b""
    await until(lambda: not public.sessions, listeners.HANDSHAKE_TIMEOUT_S)
    await until(lambda: not client.sidecar._pool._live)


@with_mesh
async def test_a_session_that_its_peer_ends_with_the_handshake_does_not_stay(mesh: Mesh) -> None:
    """Its end comes before there is a session to be told of it."""
    _, server, _ = await mesh.pair()
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = context(mesh.ca.leaf("web", "web-1"), mesh.ca.root_pem, alpn=(ALPN,)).wrap_bio(incoming, outgoing)
    reader, writer = await asyncio.open_connection("127.0.0.1", server.ports.public_port)
    while True:
        try:
            tls.do_handshake()
            break
        except ssl.SSLWantReadError:
            writer.write(outgoing.read())
            incoming.write(await reader.read(65536))
    with contextlib.suppress(ssl.SSLWantReadError):
        tls.unwrap()
    writer.write(outgoing.read())  # the handshake's last flight, and the end
    metrics = server.sidecar.metrics.counters
    await until(lambda: bool(metrics["lictor_sessions_opened_total", (("direction", "inbound"),)]))
    public = server.sidecar._public
    assert public is not None
    await until(lambda: not public.sessions)
    writer.transport.abort()


@with_mesh
async def test_a_session_of_short_calls_is_not_idle(mesh: Mesh) -> None:
    """Though none of them is there when it is looked at."""
    client, _, _ = await mesh.pair()
    assert await client.ask() == b"hi\n"
    (session,) = client.sidecar._pool._live
    for used in (True, True, False, True):
        if used:
            assert await client.ask() == b"hi\n"
        await until(lambda: not session.core.streams)
        session._keepalive()
        if used:
            assert session.idle_s == 0
        else:
            await until(lambda: session.idle_s > 0)


@with_mesh
async def test_the_clock_of_all_timeouts_survives_one_that_fails(
    mesh: Mesh, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    client, _, _ = await mesh.pair()
    ticks: list[float] = []

    def fail(now: float) -> None:
        ticks.append(now)
        raise RuntimeError("a bug")

    monkeypatch.setattr(client.sidecar._desk, "tick", fail)
    await until(lambda: len(ticks) > 1)
    assert "a turn of the clock failed" in caplog.text


# Peers that do not keep to the protocol


@pytest.mark.parametrize("wrong", ["data", "end"])
@with_mesh
async def test_what_comes_before_the_admission_ends_that_stream_and_no_other(mesh: Mesh, wrong: str) -> None:
    """The stream is given up, so it must not stay open, and what comes on it still is not the next attempt's."""
    client, server, _ = await mesh.pair()
    await server.allow("web")
    listener = socket.create_server(("127.0.0.1", 0))
    listener.setblocking(False)
    bad = msgspec.structs.replace(server.endpoint, port=listener.getsockname()[1], service_id="backend-0")
    tls = context(mesh.ca.leaf("backend", "backend-0"), mesh.ca.root_pem, server=True, alpn=(ALPN,))
    poller, streams = Poller(), list[MuxStream]()

    def forget(session: MuxSession, error: Exception | None) -> None:
        pass

    def admit(session: MuxSession, stream: MuxStream) -> None:
        streams.append(stream)

    session = MuxSession(
        identity=Identity("web", "web-1", "", mesh.ca.trust_domain, "dc1"),
        name="web",
        acceptor=admit,
        on_lost=forget,
        poller=poller,
    )
    transport = SecureTransport(poller, session, tls, server=True)
    await client.route("backend", bad)
    reader, writer = await client.dial()
    sock, address = await asyncio.get_running_loop().sock_accept(listener)
    transport.accepted(sock.detach(), address)
    await until(lambda: bool(streams))
    await client.route("backend", bad, server.endpoint)
    (stream,) = streams
    if wrong == "data":
        stream.write(b"nobody asked")
        stream.write(b"and again")
    else:
        stream.write_eof()
    await until(lambda: stream.closed)
    stream.accept()
    writer.write(b"hi\n")
    async with asyncio.timeout(WAIT_S):
        assert await reader.readline() == b"hi\n"
    (ours,) = [each for each in client.sidecar._pool._live if each.identity.instance == "backend-0"]
    assert not ours.core.streams
    await hang_up(writer)
    session.kill(StreamClosed("over"), frames.NORMAL)
    listener.close()
    poller.close()
