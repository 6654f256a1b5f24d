"""HTTP as the rest of the sidecar sees it: in front of our app, and behind an upstream's listener.

These are not compiled, as :class:`~proxy.http.side.HttpSide` is not, from which they and HTTP/2's are derived.
"""

from __future__ import annotations

from collections.abc import Callable, Container
from typing import Generic, Protocol, TypeVar

from proxy.http.inbound import Decide, Dial, InboundConnection
from proxy.http.options import HttpOptions, HttpStats
from proxy.http.outbound import Fleet, OutboundConnection
from proxy.http.side import HttpSide, Kept, OutboundSide
from proxy.stream import Channel
from raftstate.model.identity import Identity


class Decided(Kept, Protocol):
    """A connection from the mesh, each of whose requests is decided."""

    def __init__(
        self,
        side: HttpSide,
        channel: Channel,
        source: Identity,
        dial: Dial,
        decide: Decide,
        stats: HttpStats,
        identity: bytes,
        on_done: Callable[[], None] | None,
    ) -> None: ...

    @property
    def source(self) -> tuple[str, str]:
        """Service and instance of the caller."""

    def recheck(self) -> int:
        """Decide again what is under way; return how many requests ended."""


AnyConnection = TypeVar("AnyConnection", bound=Decided)


class InboundSide(HttpSide, Generic[AnyConnection]):
    """The filter in front of one app, of one version of HTTP."""

    def __init__(self, options: HttpOptions, kind: type[AnyConnection]) -> None:
        super().__init__(options)
        self._kind = kind

    def serve(
        self,
        downstream: Channel,
        *,
        peer: Identity,
        dial: Dial,
        decide: Decide,
        stats: HttpStats,
        identity: bytes = b"",
        on_done: Callable[[], None] | None = None,
    ) -> AnyConnection:
        """Serve a connection from ``peer``; its bytes come to the returned object as the channel's peer.

        ``dial`` connects to the app when there is a request for it (the connection's ``adopt`` gives one that is
        there already); ``decide`` is asked about each request when its turn has come; ``identity`` is the value of
        ``x-forwarded-client-cert``; ``on_done`` is called once, at the end.
        """
        return self._kind(self, downstream, peer, dial, decide, stats, identity, on_done)

    def recheck(self, sources: Container[tuple[str, str]]) -> int:
        """Decide again what is under way from ``sources``, (service, instance); return how many requests ended."""
        return sum(
            each.recheck()
            for each in list(self.connections)
            if isinstance(each, self._kind) and each.source in sources
        )


class InboundHttp(InboundSide[InboundConnection]):
    """HTTP/1.1 in front of one app."""

    def __init__(self, options: HttpOptions) -> None:
        super().__init__(options, InboundConnection)


class OutboundHttp(OutboundSide[Fleet]):
    """HTTP/1.1 behind one upstream's listener."""

    def serve(self, downstream: Channel, on_done: Callable[[], None] | None = None) -> OutboundConnection:
        """Serve a connection of the app. ``on_done`` is called once, at the end."""
        return OutboundConnection(self, downstream, on_done)
