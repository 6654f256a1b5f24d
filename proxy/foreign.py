"""A connection to a foreign peer: TLS of its own for one connection of the app."""

from __future__ import annotations

from typing import TYPE_CHECKING

from proxy.errors import StreamClosed
from proxy.native import mypyc_attr
from proxy.relay import SocketChannel
from proxy.secure import SecureTransport
from proxy.stream import Channel

if TYPE_CHECKING:
    from proxy.balancer import Key
    from proxy.resumption import Place, SessionCache
    from proxy.tls import PeerProof


@mypyc_attr(allow_interpreted_subclasses=True)
class ForeignChannel(SocketChannel):
    """One TLS connection to a foreign sidecar, for one app connection. Keeps what arrives before it is joined."""

    __slots__ = ("at", "early", "early_eof", "joined", "lost", "pool", "resumable")

    def __init__(self) -> None:
        super().__init__()
        self.early: list[bytes] = []
        self.early_eof = False
        self.joined = False
        self.lost = False
        self.pool: dict[ForeignChannel, tuple[Key, PeerProof]] = {}
        self.at: Place | None = None
        self.resumable: SessionCache | None = None
        """Takes its TLS session at its end, for the next connection to :attr:`at`."""

    def data_received(self, data: bytes) -> None:
        if self.joined:
            super().data_received(data)
        else:
            self.early.append(data)

    def eof_received(self) -> bool:
        if self.joined:
            return super().eof_received()
        self.early_eof = True
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost = True
        self.pool.pop(self, None)
        if self.resumable is not None and self.at is not None:
            self.resumable.ended(self.at, self)
            self.resumable = None
        super().connection_lost(exc)

    def cut(self, reason: str) -> None:
        """End the connection, and the call that it carries."""
        peer = self.peer
        self.abort()
        peer.abort(StreamClosed(reason))

    def attach(self, peer: Channel) -> None:
        """Join with the app's connection and hand over what arrived early."""
        self.joined = True
        if isinstance(self.transport, SecureTransport):
            self.transport.keep_alive()
        self.peer = peer
        peer.peer = self
        early, self.early = self.early, []
        for data in early:
            super().data_received(data)
        if self.early_eof:
            super().eof_received()
        elif self.lost:
            peer.abort(StreamClosed("foreign sidecar closed the connection"))
