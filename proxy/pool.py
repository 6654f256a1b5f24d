"""Connections to other sidecars: few long-lived mux sessions to Lictor ones, one TLS connection per app connection to
foreign ones. Which of the two a peer is, its answer to our ALPN tells.

A session belongs to the pair (our identity now, the endpoint's identity). When our leaf is renewed, sessions made
with the old one take no new streams and end with their last one.

Connections to a foreign peer resume its TLS sessions (:mod:`proxy.resumption`): not to be confused with our mux
sessions, which are called sessions everywhere else here.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
import time

from proxy.balancer import Key
from proxy.descriptors import OUR_OWN_WANT
from proxy.errors import BadCertificate, ConnectFailed, StreamClosed
from proxy.foreign import ForeignChannel
from proxy.identity import Revoked, TrustBundle, Window, check_expected, check_peer, check_trusted
from proxy.metrics import Metrics
from proxy.mux import ALPN, frames
from proxy.mux.core import MAX_STREAMS
from proxy.mux.flow import MemoryBudget
from proxy.mux.session import MuxSession
from proxy.plain import numeric, resolve
from proxy.poller import Poller
from proxy.resumption import Kept, Place, SessionCache
from proxy.secure import SecureTransport
from proxy.tasks import Tasks
from proxy.tls import PeerProof, TlsMaterial, explain_handshake_failure, proof_of
from raftstate.model.caller_name import caller_name

log = logging.getLogger("lictor.proxy.outbound")

CONNECT_TIMEOUT_S = 5.0
IDLE_SESSION_S = 300.0
MAX_PENDING_DIALS = 1024
HOT_S = 60.0
"""A session that carried something so recently is replaced before it is needed, when it takes no more streams."""
FOREIGN_MEMORY_S = 60.0
"""How long a peer that did not speak mux is dialed as foreign before mux is offered again."""


class _Peer:
    """What the pool holds for one endpoint."""

    __slots__ = ("dialing", "foreign_until", "sessions")

    def __init__(self) -> None:
        self.sessions: list[MuxSession] = []
        """Those that may take new streams, the newest last."""
        self.dialing: asyncio.Task[MuxSession | ForeignChannel | ConnectFailed] | None = None
        self.foreign_until = 0.0


class SessionPool:
    """All sessions that this sidecar dialed."""

    def __init__(
        self,
        metrics: Metrics,
        tasks: Tasks,
        *,
        max_streams: int = MAX_STREAMS,
        memory: MemoryBudget | None = None,
        poller: Poller | None = None,
    ) -> None:
        self.poller = poller or Poller()
        self._metrics = metrics
        self._tasks = tasks
        self._max_streams = max_streams
        self.memory = memory or MemoryBudget()
        self._material: TlsMaterial | None = None
        self._trust_domain = ""
        self._revoked = Revoked()
        self._peers: dict[Key, _Peer] = {}
        self._live: dict[MuxSession, tuple[Key, PeerProof]] = {}
        """All sessions, those that take no more streams too."""
        self._foreign: dict[ForeignChannel, tuple[Key, PeerProof]] = {}
        self._resumable = SessionCache()
        self._pending = 0

    # Configuration

    def use(self, material: TlsMaterial | None, trust_domain: str, revoked: Revoked) -> None:
        """Take new TLS material, trust domain or revocations; end the sessions that these no longer allow, and resume
        none that was made before."""
        self._resumable.clear()
        renew: list[Key] = []
        if material is not self._material:
            if material is not None:
                renew = [key for key, peer in self._peers.items() if any(one.idle_s < HOT_S for one in peer.sessions)]
            self._retire_all("the certificate was renewed")
        self._material, self._trust_domain, self._revoked = material, trust_domain, revoked
        bundle = material.bundle if material else TrustBundle()
        for session, (_, proof) in list(self._live.items()):
            if problem := self.problem(proof, bundle):
                log.warning("session with %s ended: %s", session.name, problem)
                session.kill(StreamClosed(problem), frames.REVOKED)
        for channel, (_, proof) in list(self._foreign.items()):
            if problem := self.problem(proof, bundle):
                channel.cut(problem)
        if renew and material is not None and not revoked.reason(material.identity):
            self._tasks.spawn(self._open_ahead(renew, material))

    async def _open_ahead(self, keys: list[Key], material: TlsMaterial) -> None:
        """Open sessions to where calls went lately, so that the next one need not wait for a handshake. One after the
        other: calls go first."""
        for key in keys:
            if material is not self._material:
                return
            if key not in self._peers:
                continue  # gone from the catalog meanwhile
            try:
                result = await self.connect(key)
            except ConnectFailed:
                continue  # the next call will dial, and be told
            if isinstance(result, ForeignChannel):
                result.abort()

    def problem(self, proof: PeerProof, bundle: TrustBundle) -> str:
        """Return why a connection made with this proof may not go on, or ``""``."""
        if self._material and (reason := self._revoked.reason(self._material.identity)):
            return f"our own {reason}"
        try:
            check_peer(proof.identity, self._trust_domain, self._revoked)
        except BadCertificate as error:
            return str(error)
        return "" if bundle.leads_here(proof.chain_der) else "peer's root has left the trust bundle"

    def drop(self, key: Key, reason: str) -> None:
        """The endpoint is gone from the catalog: end its sessions, with their streams, and foreign connections."""
        self._peers.pop(key, None)
        self._resumable.drop(key)
        for session, (at, _) in list(self._live.items()):
            if at == key:
                session.kill(StreamClosed(reason))
        for channel, (at, _) in list(self._foreign.items()):
            if at == key:
                channel.cut(reason)

    # Use

    def ready(self, key: Key) -> MuxSession | None:
        """Return a session to the endpoint that takes a stream now, or None: then :meth:`connect`."""
        peer = self._peers.get(key)
        if peer is not None:
            for session in reversed(peer.sessions):
                if session.core.can_open and not session.closed:
                    return session
        return None

    async def connect(
        self, key: Key, timeout_s: float = CONNECT_TIMEOUT_S, *, http2: bool = False
    ) -> MuxSession | ForeignChannel:
        """Return a session that takes a stream, or a fresh connection if the peer is foreign.

        ``http2``: offer HTTP/2 to a foreign peer. Raises :class:`ConnectFailed`.
        """
        loop = asyncio.get_running_loop()
        peer = self._peers.setdefault(key, _Peer())
        while True:
            if (session := self.ready(key)) is not None:
                return session
            if peer.foreign_until > loop.time():
                return await self._dial(key, timeout_s, offer_mux=False, http2=http2)
            if peer.dialing is None:
                task = peer.dialing = self._tasks.spawn(self._try_dial(key, timeout_s, http2=http2))
                task.add_done_callback(lambda _: setattr(peer, "dialing", None))
                mine = True
            else:
                task, mine = peer.dialing, False
            # Others wait for it too, so it is not cancelled with us.
            await asyncio.wait([task])
            if task.cancelled():
                raise ConnectFailed("closed", "the sidecar is closing")
            result = task.result()
            if isinstance(result, ConnectFailed):
                try:
                    raise result
                finally:
                    del result, task  # it refers to them, by its traceback
            if isinstance(result, MuxSession):
                if result.closed:
                    # In TLS 1.3 a server says last what it thinks of our certificate. Dialing on would never end.
                    text = f"{key.address}:{key.port} ended the session as soon as it was made"
                    raise ConnectFailed("lost", text)
                if result.core.can_open:
                    return result
            if isinstance(result, ForeignChannel) and mine:
                return result

    async def _try_dial(
        self, key: Key, timeout_s: float, *, http2: bool
    ) -> MuxSession | ForeignChannel | ConnectFailed:
        """As :meth:`_dial`, for several who wait: the failure is a value, which each of them raises."""
        try:
            return await self._dial(key, timeout_s, offer_mux=True, http2=http2)
        except ConnectFailed as error:
            return error

    async def _dial(self, key: Key, timeout_s: float, *, offer_mux: bool, http2: bool) -> MuxSession | ForeignChannel:
        if self._pending >= MAX_PENDING_DIALS:
            raise ConnectFailed("too-many-pending", f"{self._pending} connections are being made already")
        self._pending += 1
        try:
            async with asyncio.timeout(timeout_s):
                return await self._handshake(key, offer_mux=offer_mux, http2=http2)
        except TimeoutError as error:
            self._count_failure(key, "timeout")
            raise ConnectFailed("timeout", f"{key.address}:{key.port} did not answer in {timeout_s:g} s") from error
        except (ssl.SSLError, BadCertificate) as error:
            cause, text = explain_handshake_failure(error)
            self._count_failure(key, cause)
            raise ConnectFailed(cause, f"handshake with {key.address}:{key.port} failed: {text}") from error
        except OSError as error:
            if isinstance(error, ConnectionAbortedError | ConnectionResetError | BrokenPipeError):
                self._count_failure(key, "closed")
            text = error.strerror or str(error) or type(error).__name__
            cause = "no-descriptors" if error.errno in OUR_OWN_WANT else "refused"
            raise ConnectFailed(cause, f"{key.address}:{key.port} cannot be reached: {text}") from error
        finally:
            self._pending -= 1

    def _count_failure(self, key: Key, cause: str) -> None:
        pair = {"source": self._material.identity.service if self._material else "", "destination": key.service}
        self._metrics.count("lictor_handshake_failures_total", direction="outbound", **pair, cause=cause)

    async def _handshake(self, key: Key, *, offer_mux: bool, http2: bool) -> MuxSession | ForeignChannel:
        # With mux offered the peer may be a Lictor sidecar, which is dialed too seldom to gain by it.
        place = None if offer_mux else (key, http2)
        kept = self._resumable.take(place) if place is not None else None
        if kept is not None:
            try:
                return await self._handshake_with(key, place, kept, http2=http2)
            except (ssl.SSLError, ConnectionAbortedError, ConnectionResetError, BrokenPipeError) as error:
                # It may be the session that the peer, or something before it, can't deal with.
                self._count_failure(key, explain_handshake_failure(error)[0])
                self._resumable.failed((key, http2))
        return await self._handshake_with(key, place, None, http2=http2)

    async def _handshake_with(
        self, key: Key, place: Place | None, kept: Kept | None, *, http2: bool
    ) -> MuxSession | ForeignChannel:
        material = self._material
        if material is None:
            raise ConnectFailed("not-ready", "certificate or revocations are not known yet")
        channel = ForeignChannel()
        context = material.client_for(mux=place is None, http2=http2)
        address = numeric(key.address, key.port)
        addresses = await resolve(key.address, key.port) if address is None else [address]
        transport = SecureTransport(
            self.poller,
            channel,
            context,
            server=False,
            server_name=caller_name(material.identity.service, material.identity.instance),
            session=kept.session if kept is not None else None,
        )
        transport.connect(addresses)
        await transport.handshake()
        try:
            ssl_object = transport.get_extra_info("ssl_object")
            proof = proof_of(ssl_object, kept.origin.chain_der if kept is not None else ())
            window = self._check(proof, key)
            if key not in self._peers:
                raise ConnectFailed("gone", f"{key.instance} left the catalog during the handshake")
        except (BadCertificate, ConnectFailed):
            transport.abort()
            raise
        if proof.alpn == ALPN and material is not self._material:
            # A session made with the old leaf would be retired at once: it was renewed during the handshake.
            transport.close()
            return await self._handshake_with(key, place, None, http2=http2)
        self._metrics.count("lictor_handshakes_total", direction="outbound", resumed="yes" if proof.resumed else "no")
        peer = self._peers[key]
        if proof.alpn != ALPN:
            peer.foreign_until = asyncio.get_running_loop().time() + FOREIGN_MEMORY_S
            self._foreign[channel] = key, proof
            channel.pool = self._foreign
            if place is not None and material is self._material:
                before = kept if proof.resumed else None
                self._resumable.watch(place, channel, proof.chain_der, window.until_s, before)
                channel.at, channel.resumable = place, self._resumable
            return channel
        session = MuxSession(
            identity=proof.identity,
            name=f"{key.service} ({key.instance}) at {key.address}:{key.port}",
            acceptor=None,
            on_lost=self._lost,
            max_streams=self._max_streams,
            memory=self.memory,
            poller=self.poller,
        )
        self._live[session] = (key, proof)
        transport.set_protocol(session)
        session.connection_made(transport)
        for data in channel.early:
            session.data_received(data)
        peer.sessions.append(session)
        if channel.lost:
            session.connection_lost(None)
        elif channel.early_eof:
            session.kill(StreamClosed("the peer ended it as soon as it was made"), frames.NORMAL)
        self._metrics.count("lictor_sessions_opened_total", direction="outbound")
        return session

    def _check(self, proof: PeerProof, key: Key) -> Window:
        """Return how long what was proved is valid. Raise :class:`BadCertificate` unless the peer is the instance
        that was dialed, in force and trusted as things are now: they may have changed since the handshake began, and
        a resumed one has verified nothing."""
        check_peer(proof.identity, self._trust_domain, self._revoked)
        check_expected(proof.identity, key.service, key.instance)
        if self._material is None:
            raise BadCertificate("not-ready", "our own certificate was withdrawn during the handshake")
        return check_trusted(proof.chain_der, self._material.bundle, time.time())

    def _lost(self, session: MuxSession, error: Exception | None) -> None:
        key, _ = self._live.pop(session)
        peer = self._peers.get(key)
        if peer is not None and session in peer.sessions:
            peer.sessions.remove(session)

    # End

    def _retire_all(self, reason: str) -> None:
        for peer in self._peers.values():
            for session in peer.sessions:
                session.close(frames.NORMAL, reason)
            peer.sessions.clear()

    def sweep(self) -> None:
        """End sessions that carried nothing for a while. Called now and then."""
        for peer in self._peers.values():
            for session in list(peer.sessions):
                if session.idle_s > IDLE_SESSION_S:
                    peer.sessions.remove(session)
                    session.close(frames.NORMAL, "idle")

    def drain(self, reason: str) -> None:
        """Take no more streams; sessions end with their last one."""
        self._retire_all(reason)

    def close(self) -> None:
        """End everything at once."""
        self._peers.clear()
        self._resumable.clear()
        for session in list(self._live):
            session.kill(StreamClosed("the sidecar is stopping"))
        for channel in list(self._foreign):
            channel.abort()

    def describe(self) -> list[dict[str, object]]:
        """Return the sessions in plain values, for the admin endpoint."""
        return [
            {
                "address": f"{key.address}:{key.port}",
                "service": key.service,
                "instance": key.instance,
                "streams": len(session.core.streams),
                "takes_streams": session.core.can_open,
            }
            for session, (key, _) in self._live.items()
        ]
