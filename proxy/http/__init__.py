"""The HTTP/1.1 filter of a sidecar.

*Downstream*: the connection requests come from. *Upstream*: the connection they are sent on. *Head*: a message's
start line and headers. The plainest heads are read here, all others by httptools; what is sent on is written anew.
"""

from proxy.http.inbound import Decide, Dial, InboundConnection
from proxy.http.options import HttpCounters, HttpOptions, HttpStats, OutboundOptions
from proxy.http.outbound import OutboundConnection
from proxy.http.replies import client_cert_header
from proxy.http.sides import InboundHttp, OutboundHttp

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
