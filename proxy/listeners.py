"""Listening sockets: bound before anything is registered, accepting once the sidecar runs.

The public listener accepts by itself and runs each handshake with the TLS material in force at that moment; so a
renewed certificate serves the very next handshake and no connection is dropped for it.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import socket
import ssl
import time
from typing import Any

from proxy.acceptor import Acceptor
from proxy.call import Call
from proxy.config import Configuration
from proxy.errors import BadCertificate, PortUnavailable, StreamClosed
from proxy.identity import check_peer, check_trusted
from proxy.inbound import HTTP2_PROTOCOLS, Desk
from proxy.logs import BurstLog
from proxy.metrics import Metrics
from proxy.mux import ALPN, frames
from proxy.mux.core import MAX_STREAMS
from proxy.mux.flow import MemoryBudget
from proxy.mux.session import MuxSession
from proxy.plain import KEEPALIVE
from proxy.relay import SocketChannel
from proxy.secure import SecureTransport
from proxy.tasks import Tasks
from proxy.tls import PeerProof, explain_handshake_failure, proof_of

log = logging.getLogger("lictor.proxy.public")

BACKLOG = 1024
HANDSHAKE_TIMEOUT_S = 10.0
MAX_HANDSHAKES = 512
"""Handshakes at a time; beyond it connections wait in the kernel's backlog."""
MAX_CONNECTIONS = 20_000
SOURCES_MAX = 256
"""Services whose failed handshakes are counted by name; the rest are ``other``."""


def bind(host: str, port: int, first_free_from: int = 0, *, shared: bool = False) -> socket.socket:
    """Bind and listen; with port 0, on the first free one from ``first_free_from``.

    ``shared``: others of this user may listen on the port too (SO_REUSEPORT). Raises :class:`PortUnavailable`.
    """
    if port or not first_free_from:
        try:
            return _listen(host, port, shared=shared)
        except OSError as error:
            raise PortUnavailable(f"cannot listen on {host}:{port}: {error.strerror}; choose another port") from error
    for candidate in range(first_free_from, min(first_free_from + 1000, 65536)):
        try:
            return _listen(host, candidate)
        except OSError as error:
            if error.errno not in (errno.EADDRINUSE, errno.EACCES):
                raise PortUnavailable(f"cannot listen on {host}:{candidate}: {error.strerror}") from error
    raise PortUnavailable(f"no free port from {first_free_from} to {candidate} on {host}")


def bind_shared(host: str, port: int, first_free_from: int, count: int) -> list[socket.socket]:
    """As :func:`bind`, ``count`` sockets on one port, among which the kernel spreads the connections.

    The first is bound alone, so that the port is ours and not shared with a stranger, and only then opened to the
    others. Raises :class:`PortUnavailable`.
    """
    first = bind(host, port, first_free_from)
    sockets = [first]
    try:
        first.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        for _ in range(count - 1):
            sockets.append(bind(host, first.getsockname()[1], shared=True))
    except (OSError, PortUnavailable) as error:
        for sock in sockets:
            sock.close()
        raise PortUnavailable(f"{host}:{first.getsockname()[1]} cannot be shared by workers: {error}") from error
    return sockets


def _listen(host: str, port: int, *, shared: bool = False) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if shared:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sock.bind((host, port))
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # handed down to what is accepted
        # So is this: who has gone while its answer is awaited is not told from one that merely sends no more.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in KEEPALIVE:
            sock.setsockopt(socket.IPPROTO_TCP, option, value)
        sock.listen(BACKLOG)  # from now on nobody else can have the port
        sock.setblocking(False)
    except OSError:
        sock.close()
        raise
    return sock


class ForeignCaller(SocketChannel):
    """A TLS connection to the public listener; becomes a mux session, or one call when the peer is foreign."""

    __slots__ = ("call", "early", "early_eof", "listener", "lost")

    def __init__(self, listener: PublicListener) -> None:
        super().__init__()
        self.listener = listener
        self.call: Call | None = None
        self.early: list[bytes] = []
        self.early_eof = False
        self.lost = False

    def data_received(self, data: bytes) -> None:
        if self.call is not None:
            super().data_received(data)
        else:
            self.early.append(data)

    def eof_received(self) -> bool:
        if self.call is not None:
            return super().eof_received()
        self.early_eof = True
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost = True
        super().connection_lost(exc)

    def on_closed(self) -> None:
        self.listener.callers.pop(self, None)
        if self.call is not None:
            self.call.end()

    def begin(self, call: Call) -> None:
        """The call is admitted: hand over what arrived with the handshake."""
        self.call = call
        if isinstance(self.transport, SecureTransport):
            self.transport.keep_alive()
        early, self.early = self.early, []
        for data in early:
            super().data_received(data)
        if self.early_eof:
            super().eof_received()


class PublicListener:
    """Takes connections of other sidecars: handshake, checks, then a mux session or a foreign call."""

    def __init__(
        self,
        sock: socket.socket,
        config: Configuration,
        desk: Desk,
        metrics: Metrics,
        tasks: Tasks,
        memory: MemoryBudget | None = None,
    ) -> None:
        self.sessions: dict[MuxSession, PeerProof] = {}
        self.callers: dict[ForeignCaller, PeerProof] = {}
        self._config = config
        self._desk = desk
        self._metrics = metrics
        self._tasks = tasks
        self._memory = memory or MemoryBudget()
        self._log = BurstLog(log)
        self._poller = desk.poller
        self._acceptor = Acceptor(self._poller, sock, self._taken)
        self._handshakes = 0
        self._failed_sources: set[str] = set()
        self._closed = False

    def start(self) -> None:
        """Begin to accept."""
        if not self._closed:
            self._acceptor.start()

    def _taken(self, fd: int, address: tuple[Any, ...]) -> None:
        if len(self.sessions) + len(self.callers) >= MAX_CONNECTIONS:
            self._metrics.count("lictor_refused_total", direction="inbound", reason="too-many-connections")
            os.close(fd)
            return
        self._handshakes += 1
        if self._handshakes >= MAX_HANDSHAKES:
            self._acceptor.stop()  # the end of a handshake starts it again
        self._tasks.spawn(self._take(fd, address))

    async def _take(self, fd: int, address: tuple[Any, ...]) -> None:
        try:
            await self._handshake(fd, address)
        finally:
            self._handshakes -= 1
            self.start()

    async def _handshake(self, fd: int, peername: tuple[Any, ...]) -> None:
        address = f"{peername[0]}:{peername[1]}"
        material = self._config.material
        if material is None:
            os.close(fd)
            self._failed(address, "not-ready", "no certificate yet")
            return
        caller = ForeignCaller(self)
        me = self._config.self
        speaks_http2 = me is not None and me.protocol in HTTP2_PROTOCOLS
        try:
            context = (material.server_http2 if speaks_http2 else material.server).current()
        except OSError as error:
            os.close(fd)
            self._failed(address, "no-context", f"no TLS context could be made: {error}")
            return
        transport = SecureTransport(self._poller, caller, context, server=True)
        try:
            transport.accepted(fd, peername)
            async with asyncio.timeout(HANDSHAKE_TIMEOUT_S):
                await transport.handshake()
        except (ssl.SSLError, OSError) as error:
            self._failed(address, *explain_handshake_failure(error))
            return
        source = ""
        try:
            proof = proof_of(transport.get_extra_info("ssl_object"))
            source = proof.identity.service
            self._check(proof)
        except BadCertificate as error:
            transport.abort()
            self._failed(address, error.cause, str(error), source)
            return
        self._metrics.count("lictor_handshakes_total", direction="inbound", resumed="yes" if proof.resumed else "no")
        if proof.alpn == ALPN:
            self._begin_session(transport, caller, proof, address)
        elif not caller.lost:
            self.callers[caller] = proof
            call = self._desk.admit_connection(caller, proof.identity, proof.sha256)
            if call is not None:
                caller.begin(call)

    def _begin_session(
        self, transport: SecureTransport, caller: ForeignCaller, proof: PeerProof, address: str
    ) -> None:
        session = MuxSession(
            identity=proof.identity,
            name=f"{proof.identity.service} ({proof.identity.instance}) from {address}",
            acceptor=self._desk.admit_stream,
            on_lost=lambda session, _: self.sessions.pop(session, None) and None,
            max_streams=MAX_STREAMS,
            memory=self._memory,
            poller=self._poller,
            certificate_sha256=proof.sha256,
        )
        self.sessions[session] = proof
        transport.set_protocol(session)
        session.connection_made(transport)
        for data in caller.early:
            session.data_received(data)
        if caller.lost:
            session.connection_lost(None)
        elif caller.early_eof:
            session.kill(StreamClosed("the peer ended it as soon as it was made"), frames.NORMAL)
        elif self._closed:
            session.close(frames.DRAINING, "sidecar is draining")  # it began meanwhile: let the peer leave at once
        self._metrics.count("lictor_sessions_opened_total", direction="inbound")

    def _failed(self, address: str, cause: str, text: str, source: str = "") -> None:
        """``source``: the service that the peer's certificate names, which TLS has verified; empty if none was."""
        me = self._config.self
        if source and source not in self._failed_sources:
            if len(self._failed_sources) >= SOURCES_MAX:
                source = "other"
            else:
                self._failed_sources.add(source)
        pair = {"source": source, "destination": me.service if me is not None else ""}
        self._metrics.count("lictor_handshake_failures_total", direction="inbound", **pair, cause=cause)
        self._log.warning(f"public listener closed a connection from {address}: {text}")

    def _check(self, proof: PeerProof) -> None:
        """Raise :class:`BadCertificate` unless a call may begin with this proof. One that was resumed proves no more
        than what was so when it was first made; so all of it is asked again."""
        if problem := self._problem(proof):
            raise BadCertificate(problem[0], problem[1])
        material = self._config.material
        if material is not None:
            check_trusted(proof.chain_der, material.bundle, time.time())

    def _problem(self, proof: PeerProof) -> tuple[str, str] | None:
        """Why a connection made with this proof may not go on."""
        config = self._config
        me, material = config.self, config.material
        if me is None or material is None or config.revocations is None:
            return "not-ready", "sidecar has no configuration yet"
        if reason := config.revoked.reason(material.identity):
            return "revoked", f"our own {reason}"
        try:
            check_peer(proof.identity, me.trust_domain, config.revoked)
        except BadCertificate as error:
            return error.cause, str(error)
        if not material.bundle.leads_here(proof.chain_der):
            return "untrusted-certificate", "peer's root has left the trust bundle"
        return None

    # Withdrawal and end

    def recheck(self) -> None:
        """Trust or revocations changed: end at once the sessions and foreign calls that may not go on, and let nobody
        resume one."""
        if self._config.material is not None:
            self._config.material.forget_sessions()
        for session, proof in list(self.sessions.items()):
            if problem := self._problem(proof):
                self._metrics.count("lictor_cut_total", direction="inbound", reason=problem[0])
                self._log.warning(f"session with {session.name} ended: {problem[1]}")
                session.kill(StreamClosed(problem[1]), frames.REVOKED)
        for caller, proof in list(self.callers.items()):
            if problem := self._problem(proof):
                self._metrics.count("lictor_cut_total", direction="inbound", reason=problem[0])
                if caller.call is not None:
                    caller.call.cut(frames.REVOKED, problem[1])
                else:
                    caller.abort()

    def drain(self, reason: str) -> None:
        """Accept no more connections, sessions take no more streams; what lives goes on."""
        self._closed = True
        self._acceptor.close()
        for session in list(self.sessions):
            session.close(frames.DRAINING, reason)

    def close(self) -> None:
        """End everything at once."""
        self._closed = True
        self._acceptor.close()
        for session in list(self.sessions):
            session.kill(StreamClosed("the sidecar is stopping"))
        for caller in list(self.callers):
            caller.abort()
