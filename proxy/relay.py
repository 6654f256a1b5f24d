"""Bytes between a socket and whatever it is joined with.

A :class:`SocketChannel` is an asyncio protocol on a plain or TLS connection. Two of them, or one and a mux stream,
joined by :func:`proxy.stream.join`, are a relay: each call of the event loop goes straight to the other side.
"""

from __future__ import annotations

import asyncio
import socket
from typing import Any, cast

from proxy.mux.core import MuxStream
from proxy.native import mypyc_attr
from proxy.plain import LINGER_RESET, PlainTransport
from proxy.receiver import Connection, Face
from proxy.secure import SecureTransport
from proxy.stream import NOBODY, Channel, Data


@mypyc_attr(allow_interpreted_subclasses=True)
class SocketChannel(Face):
    """A connection as a channel. Counts its bytes; ``on_closed`` is called once, when the connection is gone."""

    __slots__ = ("_closing", "_eof_in", "_eof_out", "peer", "received", "sent", "transport")

    def __init__(self) -> None:
        self.transport: Connection
        self.peer: Channel = NOBODY
        self.received = 0
        self.sent = 0
        self._eof_in = False
        self._eof_out = False
        self._closing = False

    # Receiver: from outside to the peer

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.received += len(data)
        # Known classes are told by name: to compiled code that is a call, and not a search for a method. Told of a
        # Channel, which Face alone is not, it would be one.
        peer: Any = self.peer
        if isinstance(peer, MuxStream):  # noqa: SIM114 - one test for two classes is no call by name
            peer.write(data)
        elif isinstance(peer, Face):
            peer.write(data)
        else:
            peer.write(data)

    def eof_received(self) -> bool:
        self._eof_in = True
        if not self._closing:
            self.peer.write_eof()
            if self._eof_out:
                self._closing = True
                self.transport.close()
        return not self._closing  # it stays half open

    def pause_writing(self) -> None:
        self.peer.pause_reading()

    def resume_writing(self) -> None:
        self.peer.resume_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self._closing:
            self._closing = True
            self.peer.abort(exc)
        self.peer = NOBODY
        self.on_closed()

    def on_closed(self) -> None:
        """The connection is gone; for subclasses."""

    # Channel: from the peer to outside

    def write(self, data: Data) -> None:
        if not self._eof_out and not self._closing:
            self.sent += len(data)
            transport = self.transport
            if isinstance(transport, PlainTransport):  # noqa: SIM114 - as above
                transport.write(data)
            elif isinstance(transport, SecureTransport):
                transport.write(data)
            else:
                transport.write(data)

    def write_eof(self) -> None:
        if self._eof_out or self._closing:
            return
        self._eof_out = True
        if self._eof_in:
            self._closing = True
            self.transport.close()
        else:
            self.transport.write_eof()

    def abort(self, error: Exception | None = None) -> None:
        if self._closing:
            return
        self._closing = True
        if isinstance(self.transport, PlainTransport):
            self.transport.reset()  # so that the app does not take what it has for the whole of the data
            return
        if (sock := self.transport.get_extra_info("socket")) is not None:
            try:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_RESET)
            except OSError:
                pass  # already gone
        self.transport.abort()

    def pause_reading(self) -> None:
        if not self._closing and not self.transport.is_closing():
            self.transport.pause_reading()

    def resume_reading(self) -> None:
        if not self._closing and not self.transport.is_closing():
            self.transport.resume_reading()


def as_protocol(channel: SocketChannel) -> asyncio.Protocol:
    """Return ``channel`` itself, for an event loop's own connections: it has all that a loop calls."""
    return cast(asyncio.Protocol, channel)


async def dial(channel: SocketChannel, host: str, port: int) -> None:
    """Connect ``channel`` by the event loop's own means. Raises OSError."""
    await asyncio.get_running_loop().create_connection(lambda: as_protocol(channel), host, port)
