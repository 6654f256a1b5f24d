"""HTTP/2 (and so gRPC), stream for stream: in front of an app each request is decided, behind one each gets an
instance of its own choosing.

The *core* is one end of a connection, from bytes to events and back (RFC 9113, ``docs/decisions/0027-*``); a *half*
is a core on a channel. The *client* is where requests come from, be it the mesh or our own app; a *link* is a
connection on which they are asked; an *exchange* is one request with its response. Prior knowledge only: ``h2c`` by
upgrade is not asked for.
"""

from proxy.http2.inbound import InboundHttp2Connection
from proxy.http2.sides import InboundHttp2, OutboundHttp2

__all__ = ["InboundHttp2", "InboundHttp2Connection", "OutboundHttp2"]
