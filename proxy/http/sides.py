"""HTTP/1.1 as the rest of the sidecar sees it: in front of our app, and behind an upstream's listener.

These are not compiled, as :class:`~proxy.http.side.HttpSide` is not, from which HTTP/2's are derived too.
"""

from __future__ import annotations

from collections.abc import Callable, Container

from proxy.http.inbound import Decide, Dial, InboundConnection
from proxy.http.options import HttpStats
from proxy.http.outbound import Fleet, OutboundConnection
from proxy.http.side import HttpSide, OutboundSide
from proxy.stream import Channel
from raftstate.model.identity import Identity


class InboundHttp(HttpSide):
    """The HTTP filter in front of one app."""

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
    ) -> InboundConnection:
        """Serve a connection from ``peer``; its bytes come to the returned object as the channel's peer.

        ``dial`` connects to the app when there is a request for it (:meth:`InboundConnection.adopt` gives a
        connection that is there already); ``decide`` is asked about each request when its turn has come;
        ``identity`` is the value of ``x-forwarded-client-cert``; ``on_done`` is called once, at the end.
        """
        return InboundConnection(self, downstream, peer, dial, decide, stats, identity, on_done)

    def recheck(self, sources: Container[tuple[str, str]]) -> int:
        """Decide again what is under way from ``sources``, (service, instance); return how many requests ended."""
        return sum(
            each.recheck()
            for each in list(self.connections)
            if isinstance(each, InboundConnection) and each.source in sources
        )


class OutboundHttp(OutboundSide[Fleet]):
    """The HTTP side of one upstream's listener."""

    def serve(self, downstream: Channel, on_done: Callable[[], None] | None = None) -> OutboundConnection:
        """Serve a connection of the app. ``on_done`` is called once, at the end."""
        return OutboundConnection(self, downstream, on_done)
