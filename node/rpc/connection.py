"""One RPC connection, seen from either end: frames in and out, writes coalesced, back-pressure, liveness.

What a frame means is up to the end that owns the connection (`server.py`, `client.py`).
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable
from typing import Any

from node.node_tls import Peer
from node.rpc.frames import BadFrame, Frame, FrameReader, Ping, Pong, encode_frame

log = logging.getLogger("lictor.rpc")

WRITE_BUFFER_HIGH = 1024 * 1024
WRITE_BUFFER_MAX = 256 * 1024 * 1024
"""A peer that leaves this much unread is not reading: the connection is closed."""


def _notice_loss(sock: Any) -> None:
    """Let the kernel end a connection whose peer vanished without a word."""
    if sock is None or sock.family not in (socket.AF_INET, socket.AF_INET6):
        return
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3), ("TCP_USER_TIMEOUT", 15_000)):
        if hasattr(socket, name):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


class FrameConnection(asyncio.Protocol):
    """Base of both ends. Subclasses implement `frame_received` and `connection_ended`."""

    def __init__(self, peer: Peer, *, bytes_max: int, blocked: Callable[[str], bool] = lambda node: False) -> None:
        self.peer = peer
        self.closed = False
        self._blocked = blocked
        self._reader = FrameReader(bytes_max)
        self._transport: asyncio.Transport | None = None
        self._loop = asyncio.get_running_loop()
        self._out: list[bytes] = []
        self._flushing = False
        self._writable = asyncio.Event()
        self._writable.set()
        self._lossy = False
        self._pings: dict[int, asyncio.Future[None]] = {}
        self._ping_id = 0

    # -- what subclasses do ----------------------------------------------------------------------------------------

    def frame_received(self, frame: Frame) -> None:
        """Take in one frame. Raising BadFrame closes the connection."""
        raise NotImplementedError

    def connection_ended(self, error: BaseException | None) -> None:
        """The connection is gone; called once."""
        raise NotImplementedError

    # -- asyncio.Protocol ------------------------------------------------------------------------------------------

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        transport.set_write_buffer_limits(high=WRITE_BUFFER_HIGH)
        _notice_loss(transport.get_extra_info("socket"))

    def data_received(self, data: bytes) -> None:
        if self.closed or self._cut():
            return
        try:
            for frame in self._reader.feed(data):
                if isinstance(frame, Ping):
                    self.send(Pong(frame.call))
                elif isinstance(frame, Pong):
                    self._pong(frame.call)
                else:
                    self.frame_received(frame)
        except BadFrame as error:
            log.warning("rpc: closed connection of %s: %s", self.peer.node, error)
            self.abort(error)

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    def connection_lost(self, error: Exception | None) -> None:
        self._end(error)
        self._transport = None  # which refers to us: left to the collector, each ended connection holds 30 KiB of TLS

    # -- use -------------------------------------------------------------------------------------------------------

    def send(self, frame: Frame) -> None:
        """Send a frame: the first one of a turn of the loop at once, those after it together."""
        if self.closed or self._cut():
            return
        if self._flushing or self._transport is None:
            self._out.append(encode_frame(frame))
            return
        self._flushing = True
        self._loop.call_soon(self._flush)
        self._write(encode_frame(frame))

    @property
    def can_write(self) -> bool:
        """Whether the peer has read enough for more to be sent."""
        return self._writable.is_set()

    async def writable(self) -> None:
        """Wait until the peer has read enough for more to be sent. Streams and uploads call it for each item."""
        await self._writable.wait()

    async def ping(self) -> None:
        """Return once the peer has answered; wrap it in a timeout."""
        self._ping_id += 1
        number = self._ping_id
        waiting: asyncio.Future[None] = self._loop.create_future()
        self._pings[number] = waiting
        try:
            self.send(Ping(number))
            await waiting
        finally:
            self._pings.pop(number, None)

    def pause_reading(self) -> None:
        """Take nothing more in for now; the peer's sending stops by TCP."""
        if self._transport is not None and not self.closed:
            self._transport.pause_reading()

    def resume_reading(self) -> None:
        """Take in again."""
        if self._transport is not None and not self.closed:
            self._transport.resume_reading()

    def abort(self, error: BaseException | None = None) -> None:
        """Close at once, whatever is unsent."""
        if self._transport is not None:
            self._transport.abort()
        self._end(error)

    def close(self) -> None:
        """Send what is queued, then close."""
        self._flush()
        if self._transport is not None:
            self._transport.close()
        self._end(None)

    def _cut(self) -> bool:
        """Return whether a simulated partition swallows what is about to pass.

        What a partition swallowed leaves a gap in the stream, so a connection that lost something is closed when
        the partition heals, as TCP's own would be after a long one.
        """
        if self._blocked(self.peer.node):
            self._lossy = True
            return True
        if self._lossy:
            self.abort(ConnectionResetError("the connection did not survive a partition"))
        return self._lossy

    def _pong(self, number: int) -> None:
        waiting = self._pings.get(number)
        if waiting is not None and not waiting.done():
            waiting.set_result(None)

    def _flush(self) -> None:
        self._flushing = False
        out, self._out = self._out, []
        if out:
            self._write(out[0] if len(out) == 1 else b"".join(out))

    def _write(self, data: bytes) -> None:
        if self.closed or self._transport is None:
            return
        self._transport.write(data)
        if self._transport.get_write_buffer_size() > WRITE_BUFFER_MAX:
            log.warning("rpc: closed connection of %s: it does not read", self.peer.node)
            self.abort()

    def _end(self, error: BaseException | None) -> None:
        if self.closed:
            return
        self.closed = True
        self._writable.set()
        for waiting in self._pings.values():
            if not waiting.done():
                waiting.set_exception(ConnectionResetError("the connection was closed"))
        self.connection_ended(error)
