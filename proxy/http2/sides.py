"""HTTP/2 as the rest of the sidecar sees it, as :mod:`proxy.http.sides` is HTTP/1.1."""

from __future__ import annotations

from collections.abc import Callable

from proxy.http.options import HttpOptions
from proxy.http.side import OutboundSide
from proxy.http.sides import InboundSide
from proxy.http2.fleet import Fleet
from proxy.http2.inbound import InboundHttp2Connection
from proxy.http2.outbound import OutboundHttp2Connection
from proxy.stream import Channel


class InboundHttp2(InboundSide[InboundHttp2Connection]):
    """HTTP/2 in front of one app."""

    def __init__(self, options: HttpOptions) -> None:
        super().__init__(options, InboundHttp2Connection)


class OutboundHttp2(OutboundSide[Fleet]):
    """HTTP/2 behind one upstream's listener."""

    def serve(self, downstream: Channel, on_done: Callable[[], None] | None = None) -> OutboundHttp2Connection:
        """Serve a connection of the app. ``on_done`` is called once, at the end."""
        return OutboundHttp2Connection(self, downstream, on_done)
