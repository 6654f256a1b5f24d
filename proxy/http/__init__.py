"""The HTTP/1.1 filter of a sidecar.

*Downstream*: the connection requests come from. *Upstream*: the connection they are sent on. *Head*: a message's
start line and headers. Parsing is httptools'; what is sent on is written anew from what was parsed.
"""

from proxy.http.inbound import Decide, Dial, InboundConnection, InboundHttp
from proxy.http.options import HttpCounters, HttpOptions, HttpStats
from proxy.http.outbound import OutboundConnection, OutboundHttp, OutboundOptions
from proxy.http.replies import client_cert_header

__all__ = [
    "Decide",
    "Dial",
    "HttpCounters",
    "HttpOptions",
    "HttpStats",
    "InboundConnection",
    "InboundHttp",
    "OutboundConnection",
    "OutboundHttp",
    "OutboundOptions",
    "client_cert_header",
]
