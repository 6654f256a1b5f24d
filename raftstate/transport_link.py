"""One link of the peer transport, as asyncio protocols: a sender with lanes, and a receiver that cuts frames."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections import deque
from collections.abc import Callable
from typing import Any, cast

from raftstate.errors import RaftError
from raftstate.messages import AppendEntries, InstallSnapshot

log = logging.getLogger(__name__)

FRAME_BYTES_MAX = 16 << 20
LANES = 3
WRITE_BYTES = 64 << 10
"""Bytes given to the TLS layer ahead of the network: what an urgent frame has to wait for at most, besides the
frame under way."""
UNACKED_MS_MAX = 3000
"""A link whose peer acknowledges nothing for this long is broken; raft's heartbeats are always under way."""

HELLO = b"lictor-raft/1 ready\n"
"""What the accepting side sends once. In TLS 1.3 a dialler's handshake ends before its certificate is judged, so
only this says that the link is wanted."""

LaneOf = Callable[[bytes], int]
_LENGTH_BYTES = 4


class PeerRefused(RaftError):
    """Who answered at a peer's address is not that peer; check the addresses and certificates of the servers."""


def _tag(message: type) -> int:
    return cast(int, cast(Any, message).__struct_config__.tag)


_BULK = {_tag(AppendEntries): 1, _tag(InstallSnapshot): 2}


def lane_of_message(frame: bytes) -> int:
    """0: heartbeats, votes and replies; 1: entries; 2: snapshot chunks. A lower lane goes first.

    A message is a MessagePack array of under 16 elements whose first is its tag: the second byte.
    """
    return _BULK.get(frame[1], 0) if len(frame) > 1 else 0


def server_address(text: str) -> tuple[str, int]:
    """Split host:port; IPv6 in brackets. Raises RaftError."""
    host, colon, port = text.rpartition(":")
    if not colon or not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise RaftError(f"server address {text!r} is not host:port: correct it in the cluster's configuration")
    return host.removeprefix("[").removesuffix("]"), int(port)


class Sender(asyncio.Protocol):
    """A link that only sends: bounded lanes, many frames in one write.

    `ready` is done once the peer has taken the link; `closed` ends with the reason, or None.
    """

    def __init__(self, lane_of: LaneOf, queue_bytes_max: int, queue_frames_max: int) -> None:
        self._loop = loop = asyncio.get_running_loop()
        self.ready: asyncio.Future[None] = loop.create_future()
        self.closed: asyncio.Future[Exception | None] = loop.create_future()
        self._heard = b""
        self._lane_of = lane_of
        self._bytes_max, self._frames_max = queue_bytes_max, queue_frames_max
        self._lanes: tuple[deque[bytes], ...] = tuple(deque() for _ in range(LANES))
        self._bytes = self._frames = 0
        self._transport: asyncio.Transport | None = None
        self._paused = self._flushing = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._transport.set_write_buffer_limits(high=WRITE_BYTES)
        _tune(self._transport)

    def send(self, frame: bytes) -> bool:
        """Queue a frame; False if the queue is full or the link is gone."""
        if (
            self._transport is None
            or self._transport.is_closing()
            or self._frames >= self._frames_max
            or self._bytes + len(frame) > self._bytes_max
        ):
            return False
        if not self._flushing and not self._paused and not self._frames:
            # The first frame of a turn of the loop leaves at once, those after it together.
            self._flushing = True
            self._loop.call_soon(self._flush)
            self._transport.write(len(frame).to_bytes(_LENGTH_BYTES, "big") + frame)
            return True
        self._lanes[self._lane_of(frame)].append(frame)
        self._bytes += len(frame)
        self._frames += 1
        if not self._flushing and not self._paused:
            self._flushing = True
            self._loop.call_soon(self._flush)
        return True

    def close(self) -> None:
        """Write out what is queued, then close."""
        if self._transport is not None and not self._transport.is_closing():
            while self._frames:
                self._transport.write(b"".join(self._batch()))
            self._transport.close()

    def abort(self) -> None:
        """Close at once."""
        if self._transport is not None:
            self._transport.abort()

    def pause_writing(self) -> None:
        self._paused = True

    def resume_writing(self) -> None:
        self._paused = False
        if not self._flushing:
            self._flush()

    def data_received(self, data: bytes) -> None:
        self._heard += data
        if self._heard == HELLO:
            if not self.ready.done():
                self.ready.set_result(None)
        elif not HELLO.startswith(self._heard):
            if self.ready.done():
                log.warning("raft: a peer answered on a link that is for sending only; closed it")
            self.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        for lane in self._lanes:
            lane.clear()
        self._bytes = self._frames = 0
        if not self.ready.done():
            self.ready.set_exception(PeerRefused(f"it closed the link ({exc or 'without a reason'})"))
            self.ready.exception()  # whoever waits is told; no one need wait
        if not self.closed.done():
            self.closed.set_result(exc)

    def _flush(self) -> None:
        self._flushing = False
        while self._transport is not None and self._frames and not self._paused:
            self._transport.write(b"".join(self._batch()))

    def _batch(self) -> list[bytes]:
        parts: list[bytes] = []
        size = 0
        for lane in self._lanes:
            while lane and size < WRITE_BYTES:
                frame = lane.popleft()
                parts += (len(frame).to_bytes(_LENGTH_BYTES, "big"), frame)
                size += len(frame)
                self._frames -= 1
        self._bytes -= size
        return parts


class Receiver(asyncio.Protocol):
    """A link that only receives."""

    def __init__(
        self,
        peer: str,
        frame_bytes_max: int,
        *,
        on_frame: Callable[[str, bytes], None],
        on_read: Callable[[], None],
        on_open: Callable[[Receiver], None],
        on_closed: Callable[[Receiver], None],
    ) -> None:
        self.peer = peer
        self._frame_bytes_max = frame_bytes_max
        self._on_frame, self._on_read, self._on_open, self._on_closed = on_frame, on_read, on_open, on_closed
        self._buffer = bytearray()
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        _tune(self._transport)
        self._transport.write(HELLO)
        self._on_open(self)

    def data_received(self, data: bytes) -> None:
        buffer = self._buffer
        body = len(data) - _LENGTH_BYTES
        if not buffer and 0 <= body <= self._frame_bytes_max and int.from_bytes(data[:_LENGTH_BYTES], "big") == body:
            # Most often one whole frame comes.
            if self._transport is not None and self._take(data[_LENGTH_BYTES:]):
                self._on_read()
            return
        buffer += data
        start = 0
        while self._transport is not None and len(buffer) - start >= _LENGTH_BYTES:
            length = int.from_bytes(buffer[start : start + _LENGTH_BYTES], "big")
            if length > self._frame_bytes_max:
                self._refuse(f"it announced a message of {length} bytes")
                return
            end = start + _LENGTH_BYTES + length
            if len(buffer) < end:
                break
            frame = bytes(buffer[start + _LENGTH_BYTES : end])
            start = end
            if not self._take(frame):
                return
        del buffer[:start]
        if start:
            self._on_read()

    def _take(self, frame: bytes) -> bool:
        """Hand a frame on; False: it was none that may come, and the link is closed."""
        try:
            self._on_frame(self.peer, frame)
        except RaftError as error:
            self._refuse(str(error))
            return False
        return True

    def eof_received(self) -> bool:
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._buffer.clear()
        self._on_closed(self)

    def abort(self) -> None:
        """Close at once."""
        if self._transport is not None:
            transport, self._transport = self._transport, None
            transport.abort()

    def _refuse(self, why: str) -> None:
        log.warning("raft: closed the link from server %s: %s", self.peer, why)
        self.abort()


def _tune(transport: asyncio.Transport) -> None:
    """Small messages leave at once, and a peer that vanished is noticed by what it leaves unacknowledged."""
    sock = transport.get_extra_info("socket")
    if sock is None or sock.family not in (socket.AF_INET, socket.AF_INET6):
        return
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if hasattr(socket, "TCP_NOTSENT_LOWAT"):
        # What the kernel holds unsent cannot be overtaken by a heartbeat any more.
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, 2 * WRITE_BYTES)
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, UNACKED_MS_MAX)
