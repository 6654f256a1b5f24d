"""HTTP/2 as the rest of the sidecar sees it: in front of our app, and behind an upstream's listener.

These are not compiled, as :class:`~proxy.http.side.HttpSide` is not, from which they are derived.
"""

from __future__ import annotations

from collections.abc import Callable, Container

from proxy.http.inbound import Decide, Dial
from proxy.http.options import HttpStats
from proxy.http.side import HttpSide, OutboundSide
from proxy.http2.fleet import Fleet
from proxy.http2.inbound import InboundHttp2Connection
from proxy.http2.outbound import OutboundHttp2Connection
from proxy.stream import Channel
from raftstate.model.identity import Identity


class InboundHttp2(HttpSide):
    """The HTTP/2 filter in front of one app."""

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
    ) -> InboundHttp2Connection:
        """As :meth:`proxy.http.InboundHttp.serve`."""
        return InboundHttp2Connection(self, downstream, peer, dial, decide, stats, identity, on_done)

    def recheck(self, sources: Container[tuple[str, str]]) -> int:
        """As :meth:`proxy.http.InboundHttp.recheck`."""
        return sum(
            each.recheck()
            for each in list(self.connections)
            if isinstance(each, InboundHttp2Connection) and each.source in sources
        )


class OutboundHttp2(OutboundSide[Fleet]):
    """The HTTP/2 side of one upstream's listener."""

    def serve(self, downstream: Channel, on_done: Callable[[], None] | None = None) -> OutboundHttp2Connection:
        """Serve a connection of the app. ``on_done`` is called once, at the end."""
        return OutboundHttp2Connection(self, downstream, on_done)
