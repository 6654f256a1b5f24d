"""HTTP/2 (and so gRPC) in front of an app: each request decided, then carried over as a stream of its own.

Framing, HPACK and flow-control arithmetic are the ``h2`` package's. *Downstream* is the mesh's side, *app* the
app's; an *exchange* is one request with its response. Prior knowledge only: ``h2c`` by upgrade is not asked for.
"""

from proxy.http2.inbound import Http2Connection, InboundHttp2

__all__ = ["Http2Connection", "InboundHttp2"]
