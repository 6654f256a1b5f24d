"""A connection that our app made to an HTTP upstream's listener."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from proxy.errors import StreamClosed
from proxy.http import OutboundConnection
from proxy.http2.outbound import OutboundHttp2Connection
from proxy.relay import SocketChannel

if TYPE_CHECKING:
    from proxy.outbound import Upstream as Service

CONNECTIONS_MAX = 20_000
"""Connections of the app to one upstream. The configuration limits connections to instances, and requests."""


class HttpAppConnection(SocketChannel):
    """A connection that our app made to an HTTP upstream's listener."""

    __slots__ = ("_connection", "_service", "_stats")

    instance = None
    """Requests choose their instances; the connection has none of its own."""

    def __init__(self, service: Service) -> None:
        super().__init__()
        self._service = service
        self._stats = service.stats
        self._connection: OutboundConnection | OutboundHttp2Connection | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._stats.total += 1
        self._stats.active += 1
        self._service.connections.add(self)
        self.begin()
        if len(self._service.connections) > CONNECTIONS_MAX:
            text = f"more than {CONNECTIONS_MAX} connections"
            self._service.failed("unavailable", text)
            # A turn later: the app, whose connect() is hardly over, sees its connection made, and then reset.
            asyncio.get_running_loop().call_soon(self.cut, text)

    def begin(self) -> None:
        """The connection is there: serve it."""
        self._connection = self._service.http.serve(self)

    def on_closed(self) -> None:
        self._stats.active -= 1
        self._stats.bytes_in += self.received
        self._stats.bytes_out += self.sent
        self._service.connections.discard(self)
        self._connection = None  # the two refer to each other

    @property
    def undecided(self) -> bool:
        """Whether it is not known yet what the app speaks."""
        return self._connection is None

    def cut(self, reason: str) -> None:
        """End the connection now, whatever is under way."""
        if self._connection is not None:
            self._connection.cut(StreamClosed(reason))
        else:
            self.abort(StreamClosed(reason))
