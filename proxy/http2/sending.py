"""What one end of an HTTP/2 connection sends (RFC 9113): frames within the windows and limits of the other end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from proxy.http2.frames import (
    CONTINUATION,
    DATA,
    ENABLE_PUSH,
    END_HEADERS,
    END_STREAM,
    FRAME_BYTES_MAX,
    HEADERS,
    INITIAL_WINDOW,
    LAST_STREAM_ID,
    LIST_SIZE,
    PREFACE,
    RST_STREAM,
    SETTINGS,
    STREAMS_MAX,
    WINDOW_UPDATE,
    frame,
    number,
    pack_head,
    setting,
)
from proxy.http2.hpack import Encoder
from proxy.http2.streams import WINDOW_MAX, Resets, Stream, Window

_WINDOW: Final = 65535
"""What every window begins with (section 6.9.2)."""


class Sending:
    """The half of :class:`proxy.http2.core.Core` that sends. What it wants to send, :meth:`to_send` gives."""

    def __init__(self, *, client: bool, streams_max: int, stream_window: int, list_bytes_max: int) -> None:
        """As :class:`proxy.http2.core.Core`'s."""
        self._client = client
        self._streams_max = streams_max
        self._stream_window = stream_window
        self._streams: dict[int, Stream] = {}
        self._resets = Resets()
        self._next_id = 1
        """Of the streams that we open."""
        self._encoder = Encoder()
        self._window = Window(max(streams_max * stream_window, _WINDOW))
        """What the other end may send on all streams together."""
        self._room = _WINDOW
        """What it takes on all of them."""
        self.peer_streams_max = WINDOW_MAX
        """Streams that the other end takes."""
        self._peer_window = _WINDOW
        self._peer_frame_bytes = FRAME_BYTES_MAX
        self._out: list[bytes] = []
        self._greet(list_bytes_max)

    def _greet(self, list_bytes_max: int) -> None:
        said = setting(STREAMS_MAX, self._streams_max) + setting(INITIAL_WINDOW, self._stream_window)
        said += setting(LIST_SIZE, list_bytes_max)
        if self._client:
            self._out.append(PREFACE)
            said += setting(ENABLE_PUSH, 0)
        self._out.append(frame(SETTINGS, 0, 0, said))
        if self._window.size > _WINDOW:
            self._open_window(0, self._window.size - _WINDOW)

    def to_send(self) -> bytes:
        """Return what is to be sent, once."""
        if not self._out:
            return b""
        data = self._out[0] if len(self._out) == 1 else b"".join(self._out)
        self._out = []
        return data

    def open(self) -> int:
        """Return the id of a new stream of ours, to be used at once; 0 when they are used up."""
        stream_id = self._next_id
        if stream_id > LAST_STREAM_ID:
            return 0
        self._next_id = stream_id + 2
        self._streams[stream_id] = Stream(stream_id, self._stream_window, self._peer_window)
        return stream_id

    def send_headers(self, stream_id: int, fields: Sequence[Any], *, end: bool) -> bool:
        """Send fields: a request's, a response's, or trailers. Return False when the stream has ended."""
        stream = self._streams.get(stream_id)
        if stream is None or stream.sent_end:
            return False
        if self._client and not stream.sent_head:
            stream.no_body = (b":method", b"HEAD") in fields
        stream.sent_head = True
        block = self._encoder.encode(fields)
        flags = END_STREAM if end else 0
        most = self._peer_frame_bytes
        if len(block) <= most:
            self._frame(HEADERS, flags | END_HEADERS, stream_id, block)
        else:
            self._frame(HEADERS, flags, stream_id, block[:most])
            for at in range(most, len(block), most):
                last = at + most >= len(block)
                self._frame(CONTINUATION, END_HEADERS if last else 0, stream_id, block[at : at + most])
        if end:
            self._sent_end(stream)
        return True

    def send_data(self, stream_id: int, data: bytes, *, end: bool) -> bool:
        """Send data, for which there is :meth:`room`. Return False when the stream has ended."""
        stream = self._streams.get(stream_id)
        if stream is None or stream.sent_end:
            return False
        size = len(data)
        if size:
            assert size <= min(stream.room, self._room, self._peer_frame_bytes)
            stream.room -= size
            self._room -= size
        self._frame(DATA, END_STREAM if end else 0, stream_id, data)
        if end:
            self._sent_end(stream)
        return True

    def room(self, stream_id: int) -> int:
        """How many bytes can be sent on a stream in one frame: 0 or less means none; -1 also that it has ended."""
        stream = self._streams.get(stream_id)
        if stream is None or stream.sent_end:
            return -1
        return max(0, min(stream.room, self._room, self._peer_frame_bytes))

    def give_back(self, stream_id: int, size: int) -> None:
        """So much of what came on a stream has been dealt with."""
        self._lose(size)
        stream = self._streams.get(stream_id)
        if stream is not None and not stream.came_end:
            more = stream.window.give_back(size)
            if more:
                self._open_window(stream_id, more)

    def reset(self, stream_id: int, code: int) -> None:
        """Cancel a stream, unless it has ended."""
        if stream_id in self._streams:
            self._cancel(stream_id, code)

    def _lose(self, size: int) -> None:
        """So much of the connection's window is free again, whatever becomes of the stream's."""
        more = self._window.give_back(size)
        if more:
            self._open_window(0, more)

    def _cancel(self, stream_id: int, code: int) -> None:
        self._streams.pop(stream_id, None)
        self._resets.add(stream_id, by_us=True)
        self._frame(RST_STREAM, 0, stream_id, number(code))

    def _frame(self, kind: int, flags: int, stream_id: int, payload: bytes) -> None:
        size = len(payload)
        self._out.append(pack_head(size >> 8, size & 0xFF, kind, flags, stream_id))
        if size:
            self._out.append(payload)

    def _open_window(self, stream_id: int, size: int) -> None:
        self._frame(WINDOW_UPDATE, 0, stream_id, number(size))

    def _sent_end(self, stream: Stream) -> None:
        stream.sent_end = True
        if stream.came_end:
            del self._streams[stream.id]
