"""Our TLS transport against Python's own TLS on blocking sockets, which stands for any peer."""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
from collections.abc import Callable
from typing import Any

import pytest

from proxy.plain import numeric
from proxy.poller import Poller
from proxy.receiver import Receiver
from proxy.secure import SecureTransport
from proxy.tls import make_material, proof_of
from tests.support.both_loops import all_loops
from tests.support.certs import TestCA
from tests.support.promises import PATIENCE_S
from tests.support.sidecars import until
from tests.support.tls_peers import context

CA = TestCA()
PEER = context(CA.leaf("backend", "backend-1"), CA.root_pem, server=True)
OURS = make_material(CA.leaf("web", "web-1"), (CA.root_pem,)).client_plain


class Recorder(Receiver):
    def __init__(self) -> None:
        self.data = bytearray()
        self.told: list[str] = []
        self.error: Exception | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.told.append("made")

    def data_received(self, data: bytes) -> None:
        assert data
        self.data += data

    def eof_received(self) -> bool:
        self.told.append("eof")
        return False

    def pause_writing(self) -> None:
        self.told.append("pause")

    def resume_writing(self) -> None:
        self.told.append("resume")

    def connection_lost(self, exc: Exception | None) -> None:
        self.told.append("lost")
        self.error = exc


def shaken(incoming: ssl.MemoryBIO, outgoing: ssl.MemoryBIO, sock: socket.socket) -> ssl.SSLObject:
    """Be the called end of a handshake, with its bytes in hand."""
    tls = PEER.wrap_bio(incoming, outgoing, server_side=True)
    while True:
        try:
            tls.do_handshake()
        except ssl.SSLWantReadError:
            sock.sendall(outgoing.read())
            incoming.write(sock.recv(65536))
        else:
            return tls


async def with_peer(
    peer: Callable[[socket.socket], Any], recorder: Recorder | None = None
) -> tuple[Recorder, SecureTransport, asyncio.Future[Any]]:
    """Dial ``peer``, which runs in a thread on the connection it is given."""
    server = socket.create_server(("127.0.0.1", 0))

    def serve() -> Any:
        with server:
            sock, _ = server.accept()
        with sock:
            sock.settimeout(10)
            return peer(sock)

    running = asyncio.get_running_loop().run_in_executor(None, serve)
    recorder = recorder or Recorder()
    transport = SecureTransport(Poller(), recorder, OURS, server=False)
    address = numeric(*server.getsockname())
    assert address is not None
    transport.connect([address])
    return recorder, transport, asyncio.ensure_future(running)


@all_loops
async def test_what_comes_with_the_handshake_and_with_the_end_is_read_whole() -> None:
    """Data and close_notify may come in one read, in any number of records."""
    sent = os.urandom(100_000)

    def peer(sock: socket.socket) -> None:
        with PEER.wrap_socket(sock, server_side=True) as tls:
            tls.sendall(b"first")
            tls.sendall(sent)
            tls.unwrap()

    recorder, transport, running = await with_peer(peer)
    await transport.handshake()
    assert proof_of(transport.get_extra_info("ssl_object")).identity.instance == "backend-1"
    await until(lambda: "lost" in recorder.told)
    assert recorder.data == b"first" + sent
    assert recorder.told == ["made", "eof", "lost"]
    assert recorder.error is None
    await running


@all_loops
async def test_close_lets_all_arrive_though_the_peer_still_sends() -> None:
    """Closing a socket at once resets it when the peer sends on, and with it what was on its way."""

    def peer(sock: socket.socket) -> int:
        with PEER.wrap_socket(sock, server_side=True, suppress_ragged_eofs=False) as tls:
            received = 0
            tls.sendall(b"go")
            while data := tls.recv(65536):
                received += len(data)
                tls.sendall(b"still here")
            return received

    recorder, transport, running = await with_peer(peer)
    await transport.handshake()
    await until(lambda: recorder.data == b"go")
    transport.write(bytes(3 << 20))
    transport.close()
    transport.write(b"too late")
    assert await running == 3 << 20
    await until(lambda: "lost" in recorder.told)


@all_loops
async def test_what_comes_after_the_close_is_not_kept() -> None:
    """The peer has two seconds to end its side, and may send as fast as it can until then."""

    def peer(sock: socket.socket) -> None:
        with PEER.wrap_socket(sock, server_side=True, suppress_ragged_eofs=False) as tls:
            tls.sendall(b"go")
            while tls.recv(65536):
                pass
            tls.sendall(bytes(16 << 20))

    recorder, transport, running = await with_peer(peer)
    await transport.handshake()
    await until(lambda: recorder.data == b"go")
    transport.close()
    await running
    await until(lambda: "lost" in recorder.told)
    assert transport._incoming.pending < 1 << 20


@all_loops
async def test_what_comes_after_the_peers_end_is_not_kept_either() -> None:
    """Our direction goes on, as long as it likes; what the peer sends meanwhile is no TLS any more."""

    def peer(sock: socket.socket) -> bytes:
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        tls = shaken(incoming, outgoing, sock)
        tls.write(b"bye")
        with pytest.raises(ssl.SSLWantReadError):
            tls.unwrap()
        sock.sendall(outgoing.read() + bytes(16 << 20))
        while True:
            try:
                return tls.read(100)
            except ssl.SSLWantReadError:
                incoming.write(sock.recv(65536))

    recorder, transport, running = await with_peer(peer, HalfOpen())
    await transport.handshake()
    await until(lambda: "eof" in recorder.told)
    transport.write(b"more")
    assert await running == b"more"
    assert recorder.data == b"bye"
    assert transport._incoming.pending < 1 << 20
    transport.abort()
    await until(lambda: "lost" in recorder.told)


class HalfOpen(Recorder):
    """Goes on after the peer's end."""

    def eof_received(self) -> bool:
        super().eof_received()
        return True


@all_loops
async def test_each_direction_ends_by_itself() -> None:
    def peer(sock: socket.socket) -> bytes:
        with PEER.wrap_socket(sock, server_side=True, suppress_ragged_eofs=False) as tls:
            received = b""
            while data := tls.recv(65536):
                received += data
            tls.sendall(b"answer" * 20_000)  # after our close_notify, which ended our direction alone
            tls.unwrap()
            return received

    recorder, transport, running = await with_peer(peer, HalfOpen())
    await transport.handshake()
    transport.write(b"question" * 20_000)
    transport.write_eof()
    transport.write_eof()
    assert await running == b"question" * 20_000
    await until(lambda: "lost" in recorder.told)
    assert recorder.data == b"answer" * 20_000
    assert (recorder.told, recorder.error) == (["made", "eof", "lost"], None)


@all_loops
async def test_the_peers_end_by_tls_leaves_our_direction_and_its_end_by_tcp_alone_does_not() -> None:
    def by_tls(sock: socket.socket) -> bytes:
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        tls = shaken(incoming, outgoing, sock)

        def read() -> bytes:
            while True:
                try:
                    return tls.read(65536)
                except ssl.SSLZeroReturnError:
                    return b""
                except ssl.SSLWantReadError:
                    sock.sendall(outgoing.read())
                    incoming.write(sock.recv(65536))

        tls.write(b"bye")
        with pytest.raises(ssl.SSLWantReadError):
            tls.unwrap()
        sock.sendall(outgoing.read())
        received = b""
        while data := read():
            received += data
        return received

    def by_tcp(sock: socket.socket) -> None:
        with PEER.wrap_socket(sock, server_side=True) as tls:
            tls.sendall(b"bye")

    recorder, transport, running = await with_peer(by_tls, HalfOpen())
    await transport.handshake()
    await until(lambda: "eof" in recorder.told)
    assert recorder.data == b"bye"
    assert not transport.is_closing()
    transport.write(b"more" * 50_000)
    transport.close()
    assert await running == b"more" * 50_000
    await until(lambda: "lost" in recorder.told)
    recorder, transport, running = await with_peer(by_tcp, HalfOpen())
    await transport.handshake()
    await until(lambda: "lost" in recorder.told)
    assert recorder.told == ["made", "eof", "lost"]
    await running


@all_loops
async def test_a_slow_peer_pauses_the_writer() -> None:
    def peer(sock: socket.socket) -> int:
        with PEER.wrap_socket(sock, server_side=True) as tls:
            assert tls.recv(1) == b"x"
            received = 1
            while data := tls.recv(65536):
                received += len(data)
            return received

    recorder, transport, running = await with_peer(peer)
    await transport.handshake()
    written = 0
    transport.write(b"x")
    while "pause" not in recorder.told:
        transport.write(bytes(1 << 20))
        written += 1 << 20
        assert written < 1 << 30
    await until(lambda: "resume" in recorder.told)
    transport.close()
    assert await running == written + 1


@pytest.mark.parametrize("answer", [b"HTTP/1.1 400 no\r\n\r\n", b""])
@all_loops
async def test_a_handshake_that_fails_is_told_once_and_ends(answer: bytes) -> None:
    recorder, transport, running = await with_peer(lambda sock: sock.sendall(answer))
    with pytest.raises((ssl.SSLError, OSError)):
        await asyncio.wait_for(transport.handshake(), PATIENCE_S)
    with pytest.raises((ssl.SSLError, OSError)):
        await transport.handshake()  # however late it is asked
    assert transport.is_closing()
    await running
    await asyncio.sleep(0)  # the socket is closed on the loop's next turn
    assert recorder.told == []


@all_loops
async def test_bytes_that_were_tampered_with_end_the_connection() -> None:
    def peer(sock: socket.socket) -> bytes:
        tls = PEER.wrap_socket(sock, server_side=True)
        with socket.socket(fileno=os.dup(tls.fileno())) as raw:
            raw.settimeout(10)
            raw.sendall(b"\x17\x03\x03\x00\x20" + bytes(32))  # a record that nobody encrypted
            raw.recv(65536)  # the alert
        tls.close()
        return b""

    recorder, transport, running = await with_peer(peer)
    await transport.handshake()
    await until(lambda: "lost" in recorder.told)
    assert isinstance(recorder.error, ssl.SSLError)
    assert recorder.data == b""
    await running


@all_loops
async def test_a_handshake_that_is_given_up_leaves_nothing() -> None:
    done = asyncio.Event()
    loop = asyncio.get_running_loop()

    def peer(sock: socket.socket) -> bytes:
        data = sock.recv(65536)
        while data and (data := sock.recv(65536)):
            pass
        loop.call_soon_threadsafe(done.set)
        return b""

    recorder, transport, running = await with_peer(peer)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.1):
            await transport.handshake()
    await asyncio.wait_for(done.wait(), PATIENCE_S)
    await running
    assert recorder.told == []
