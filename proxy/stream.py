"""The two faces of a byte pipe.

:class:`Channel` is the callback face, for the hot path: two channels are joined back to back (:func:`join`), and
what arrives at one is written to the other, with back-pressure, half-close and abort carried across. Sockets and
mux streams implement it.

:class:`ByteStream` is the coroutine face, for protocol code that wants to read and write in order (HTTP).
:class:`ChannelStream` gives it over any channel.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Final, Protocol

from proxy.errors import StreamClosed

Data = bytes | bytearray | memoryview
READ_LIMIT_BYTES: Final = 128 * 1024
"""How much a :class:`ChannelStream` holds unread before it stops its channel from reading."""


class ByteStream(Protocol):
    """A full-duplex byte stream with half-close."""

    async def read(self, max_bytes: int = 65536) -> bytes:
        """Return what has arrived (at least one byte), or ``b""`` at the end of the peer's data.

        Raises :class:`~proxy.errors.StreamClosed` when the stream was reset or cut.
        """
        ...

    def write(self, data: Data) -> None:
        """Queue ``data``; follow with :meth:`drain`. Ignored once the stream is closed."""
        ...

    async def drain(self) -> None:
        """Wait until the queue has room again. Raises :class:`~proxy.errors.StreamClosed`."""
        ...

    def write_eof(self) -> None:
        """End our direction; reading goes on. The stream closes when both directions have ended."""
        ...

    def abort(self) -> None:
        """Drop both directions at once; the peer sees a reset. Idempotent."""
        ...

    @property
    def closed(self) -> bool:
        """True once both directions have ended, or the stream was aborted, reset or cut."""
        ...


class Channel(Protocol):
    """One end of a callback pipe. It calls the same methods on its ``peer`` for what arrives from outside.

    After :meth:`abort` (either way) all calls are ignored.
    """

    peer: Channel

    def write(self, data: Data) -> None:
        """Send ``data`` outwards. The buffer must not change afterwards."""
        ...

    def write_eof(self) -> None:
        """End the outward direction."""
        ...

    def abort(self, error: Exception | None = None) -> None:
        """Drop the outside connection at once; does not call back into ``peer``."""
        ...

    def pause_reading(self) -> None:
        """Stop taking data from outside: the peer has enough. Idempotent."""
        ...

    def resume_reading(self) -> None:
        """Take data from outside again. Idempotent."""
        ...


class _Nobody:
    """Drops everything."""

    peer: Channel

    def write(self, data: Data) -> None:
        pass

    def write_eof(self) -> None:
        pass

    def abort(self, error: Exception | None = None) -> None:
        pass

    def pause_reading(self) -> None:
        pass

    def resume_reading(self) -> None:
        pass


NOBODY: Channel = _Nobody()
"""The peer of a stream that nobody took yet, or that nobody has any more."""


def join(a: Channel, b: Channel) -> None:
    """Put two channels back to back."""
    a.peer = b
    b.peer = a


class Early:
    """A channel's peer for as long as its real one is not known: it keeps what arrives, and how it ended."""

    __slots__ = ("_chunks", "_ended", "_error", "_held", "_lost", "peer")

    def __init__(self, channel: Channel) -> None:
        self.peer: Channel = channel
        self._chunks: list[Data] = []
        self._held = 0
        self._ended = self._lost = False
        self._error: Exception | None = None

    def write(self, data: Data) -> None:
        self._chunks.append(data)
        self._held += len(data)
        if self._held > READ_LIMIT_BYTES:
            self.peer.pause_reading()

    def write_eof(self) -> None:
        self._ended = True

    def abort(self, error: Exception | None = None) -> None:
        self._lost, self._error = True, error

    def pause_reading(self) -> None:
        """Nothing was sent yet, so this cannot be."""

    def resume_reading(self) -> None:
        """As above."""

    def release(self, to: Channel) -> None:
        """``to`` is the channel's peer now: give it what came. It may call for a pause meanwhile, and gets the rest
        all the same: that is bounded."""
        paused = self._held > READ_LIMIT_BYTES
        if paused:
            self.peer.resume_reading()
        chunks, self._chunks = self._chunks, []
        for data in chunks:
            to.write(data)
        if self._lost:
            to.abort(self._error)
        elif self._ended:
            to.write_eof()
        self.done()

    def done(self) -> None:
        """The channel has its peer. The two refer to each other; parted, they are freed without the collector."""
        self.peer = NOBODY


class ChannelStream:
    """:class:`ByteStream` over a channel: it is the channel's peer and keeps what arrives until it is read."""

    __slots__ = (
        "_chunks",
        "_drained",
        "_eof_in",
        "_eof_out",
        "_error",
        "_held",
        "_reading_paused",
        "_waiter",
        "peer",
    )

    def __init__(self, channel: Channel) -> None:
        self.peer: Channel = channel
        self._chunks: deque[Data] = deque()
        self._held = 0
        self._eof_in = self._eof_out = False
        self._error: Exception | None = None
        self._reading_paused = False
        self._waiter: asyncio.Future[None] | None = None
        self._drained: asyncio.Future[None] | None = None
        channel.peer = _Inlet(self)

    async def read(self, max_bytes: int = 65536) -> bytes:
        while not self._chunks:
            if self._error is not None:
                raise StreamClosed(str(self._error) or "stream was reset") from self._error
            if self._eof_in:
                return b""
            if self._waiter is not None:
                raise RuntimeError("two readers on one stream")
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        chunk = self._chunks.popleft()
        if len(chunk) > max_bytes:
            view = memoryview(chunk)
            self._chunks.appendleft(view[max_bytes:])
            chunk = view[:max_bytes]
        self._held -= len(chunk)
        if self._reading_paused and self._held <= READ_LIMIT_BYTES // 2:
            self._reading_paused = False
            self.peer.resume_reading()
        return chunk if isinstance(chunk, bytes) else bytes(chunk)

    def write(self, data: Data) -> None:
        if not self._eof_out and self._error is None and data:
            self.peer.write(data)

    async def drain(self) -> None:
        if self._error is not None:
            raise StreamClosed(str(self._error) or "stream was reset") from self._error
        if self._drained is not None:
            await asyncio.shield(self._drained)
            if self._error is not None:
                raise StreamClosed(str(self._error) or "stream was reset") from self._error

    def write_eof(self) -> None:
        if not self._eof_out and self._error is None:
            self._eof_out = True
            self.peer.write_eof()

    def abort(self) -> None:
        if not self.closed:
            self._fail(StreamClosed("stream was aborted on this side"))
            self.peer.abort()

    @property
    def closed(self) -> bool:
        return self._error is not None or (self._eof_in and self._eof_out)

    # What the channel delivers, through _Inlet.

    def _take(self, data: Data) -> None:
        self._chunks.append(data)
        self._held += len(data)
        if self._held > READ_LIMIT_BYTES and not self._reading_paused:
            self._reading_paused = True
            self.peer.pause_reading()
        self._wake()

    def _end(self) -> None:
        self._eof_in = True
        self._wake()

    def _fail(self, error: Exception | None) -> None:
        if self._error is None:
            self._error = error or StreamClosed("stream was reset")
            self._chunks.clear()
            self._held = 0
            self._wake()
            self._flowing(True)

    def _flowing(self, flowing: bool) -> None:
        if not flowing:
            if self._drained is None:
                self._drained = asyncio.get_running_loop().create_future()
        elif self._drained is not None:
            drained, self._drained = self._drained, None
            if not drained.done():
                drained.set_result(None)

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class _Inlet:
    """The channel's peer: turns the channel's calls into a ChannelStream's input."""

    __slots__ = ("_stream", "peer")

    def __init__(self, stream: ChannelStream) -> None:
        self._stream = stream
        self.peer: Channel = stream.peer

    def write(self, data: Data) -> None:
        self._stream._take(data)

    def write_eof(self) -> None:
        self._stream._end()

    def abort(self, error: Exception | None = None) -> None:
        self._stream._fail(error)

    def pause_reading(self) -> None:
        self._stream._flowing(False)

    def resume_reading(self) -> None:
        self._stream._flowing(True)
