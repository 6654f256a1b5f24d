"""One end of an HTTP/2 connection (RFC 9113), without I/O: bytes to events, and what is to be sent to bytes.

Of the protocol it does what a proxy needs: no push, no priorities, no upgrade from HTTP/1.1. What the other end does
wrong ends a stream or the connection as the RFC says, and the connection in some cases where a stream would do.

``tests/property/test_http2_core.py`` holds it against the ``h2`` package.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any, Final

from h2.errors import ErrorCodes

from proxy.http.head import Field
from proxy.http2.errors import Http2Error
from proxy.http2.events import (
    DataCame,
    Event,
    GoneAway,
    Pinged,
    RequestCame,
    ResponseCame,
    SettingsCame,
    StreamWasReset,
    TrailersCame,
    WindowOpened,
)
from proxy.http2.fields import Checked, check_request, check_response, check_trailers, malformed
from proxy.http2.hpack import Decoder, Encoder, is_never_indexed, never_indexed
from proxy.http2.streams import WINDOW_MAX, Resets, Stream, Window

PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
LAST_STREAM_ID: Final = (1 << 31) - 1
FRAME_BYTES_MAX: Final = 16 * 1024
"""What we take, which is the least that may be (section 4.2)."""
BLOCK_FRAMES_MAX: Final = 64
"""Frames that one header block may come in."""
BLOCK_BYTES_MAX: Final = 128 * 1024
"""What it may be encoded: twice what its fields may be."""
REFUSALS_MAX: Final = 1000
"""Streams refused for being too many, from an end that cannot know yet; then it is told to calm down."""
HINTS_MAX: Final = 100
"""Informational responses to one request: they are not held back by any window."""
_WINDOW: Final = 65535
"""What every window begins with (section 6.9.2)."""

_DATA: Final = 0
_HEADERS: Final = 1
_PRIORITY: Final = 2
_RST_STREAM: Final = 3
_SETTINGS: Final = 4
_PUSH_PROMISE: Final = 5
_PING: Final = 6
_GOAWAY: Final = 7
_WINDOW_UPDATE: Final = 8
_CONTINUATION: Final = 9
_END_STREAM: Final = 0x01
_ACK: Final = 0x01
_END_HEADERS: Final = 0x04
_PADDED: Final = 0x08
_PRIORITIZED: Final = 0x20

_TABLE_SIZE: Final = 1
_ENABLE_PUSH: Final = 2
_STREAMS_MAX: Final = 3
_INITIAL_WINDOW: Final = 4
_FRAME_SIZE: Final = 5
_LIST_SIZE: Final = 6
_CONNECT_PROTOCOL: Final = 8
_FRAME_SIZE_MAX: Final = (1 << 24) - 1

_head: Final = struct.Struct(">HBBBL").pack
_setting: Final = struct.Struct(">HL").pack
_long: Final = struct.Struct(">L").pack
_longs: Final = struct.Struct(">LL").pack


def frame(kind: int, flags: int, stream_id: int, payload: bytes) -> bytes:
    """Return a frame (section 4.1)."""
    size = len(payload)
    made: bytes = _head(size >> 8, size & 0xFF, kind, flags, stream_id)
    return made + payload


def goaway(last_stream_id: int, code: int) -> bytes:
    """Return a frame that says which streams were looked at, and why no more are."""
    return frame(_GOAWAY, 0, 0, _longs(last_stream_id, code))


def _wrong(text: str) -> Http2Error:
    return Http2Error(ErrorCodes.PROTOCOL_ERROR, text)


def _wrong_size(text: str) -> Http2Error:
    return Http2Error(ErrorCodes.FRAME_SIZE_ERROR, text)


def _number(data: bytes, at: int) -> int:
    return (data[at] << 24) | (data[at + 1] << 16) | (data[at + 2] << 8) | data[at + 3]


class Core:
    """One end. What it wants to send, :meth:`to_send` gives."""

    def __init__(self, *, client: bool, streams_max: int, stream_window: int, list_bytes_max: int) -> None:
        """``streams_max``: that the other end may have open; ``stream_window``: bytes each of them may send ahead,
        and the connection as much as all together; ``list_bytes_max``: of a field list."""
        self._client = client
        self._streams_max = streams_max
        self._stream_window = stream_window
        self._streams: dict[int, Stream] = {}
        self._resets = Resets()
        self._refused = 0
        self._known = False
        """The other end has taken our settings."""
        self._next_id = 1
        """Of the streams that we open."""
        self.last_stream_id = 0
        """The newest that the other end opened."""
        self._decoder = Decoder(list_bytes_max)
        self._encoder = Encoder()
        self._rest = b""
        """Of what came, the part that is no whole frame yet."""
        self._preface = b"" if client else PREFACE
        """What of it is still to come."""
        self._block: list[bytes] = []
        """The pieces of a header block that is not whole yet."""
        self._block_bytes = 0
        self._block_id = 0
        self._block_flags = 0
        self._window = Window(max(streams_max * stream_window, _WINDOW))
        self._room = _WINDOW
        """What the other end takes on all streams together."""
        self.peer_streams_max = WINDOW_MAX
        """Streams that the other end takes."""
        self._peer_window = _WINDOW
        self._peer_frame_bytes = FRAME_BYTES_MAX
        self._out: list[bytes] = []
        self._greet(list_bytes_max)

    def _greet(self, list_bytes_max: int) -> None:
        said = _setting(_STREAMS_MAX, self._streams_max) + _setting(_INITIAL_WINDOW, self._stream_window)
        said += _setting(_LIST_SIZE, list_bytes_max)
        if self._client:
            self._out.append(PREFACE)
            said += _setting(_ENABLE_PUSH, 0)
        self._out.append(frame(_SETTINGS, 0, 0, said))
        if self._window.size > _WINDOW:
            self._open_window(0, self._window.size - _WINDOW)

    # To the other end

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
        flags = _END_STREAM if end else 0
        most = self._peer_frame_bytes
        if len(block) <= most:
            self._frame(_HEADERS, flags | _END_HEADERS, stream_id, block)
        else:
            self._frame(_HEADERS, flags, stream_id, block[:most])
            for at in range(most, len(block), most):
                last = at + most >= len(block)
                self._frame(_CONTINUATION, _END_HEADERS if last else 0, stream_id, block[at : at + most])
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
        self._frame(_DATA, _END_STREAM if end else 0, stream_id, data)
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
        more = self._window.give_back(size)
        if more:
            self._open_window(0, more)
        stream = self._streams.get(stream_id)
        if stream is not None and not stream.came_end:
            more = stream.window.give_back(size)
            if more:
                self._open_window(stream_id, more)

    def reset(self, stream_id: int, code: int) -> None:
        """Cancel a stream, unless it has ended."""
        if stream_id in self._streams:
            self._cancel(stream_id, code)

    def _cancel(self, stream_id: int, code: int) -> None:
        if self._streams.pop(stream_id, None) is not None:
            self._resets.add(stream_id)
        self._frame(_RST_STREAM, 0, stream_id, _long(code))

    def _frame(self, kind: int, flags: int, stream_id: int, payload: bytes) -> None:
        size = len(payload)
        self._out.append(_head(size >> 8, size & 0xFF, kind, flags, stream_id))
        if size:
            self._out.append(payload)

    def _open_window(self, stream_id: int, size: int) -> None:
        self._frame(_WINDOW_UPDATE, 0, stream_id, _long(size))

    def _sent_end(self, stream: Stream) -> None:
        stream.sent_end = True
        if stream.came_end:
            del self._streams[stream.id]

    # From the other end

    def receive(self, data: bytes) -> list[Event]:
        """Take bytes. Raises :class:`Http2Error` when the connection has to end: :meth:`to_send` then tells the other
        end why, and nothing more may be received."""
        events: list[Event] = []
        try:
            if self._preface:
                data = self._begin(data)
            if self._rest:
                data = self._rest + data
                self._rest = b""
            at = 0
            have = len(data)
            while have - at >= 9:
                size = (data[at] << 16) | (data[at + 1] << 8) | data[at + 2]
                if size > FRAME_BYTES_MAX:
                    raise _wrong_size(f"a frame of {size} bytes, where {FRAME_BYTES_MAX} are taken")
                begin = at + 9
                if have - begin < size:
                    break
                stream_id = _number(data, at + 5) & LAST_STREAM_ID
                self._take(data[at + 3], data[at + 4], stream_id, data[begin : begin + size], events)
                at = begin + size
            if at < have:
                self._rest = data[at:]
        except Http2Error as error:
            self._rest = b""
            self._block = []
            self._out.append(goaway(self.last_stream_id, error.code))
            raise
        return events

    def _begin(self, data: bytes) -> bytes:
        expected = self._preface[: len(data)]
        if data[: len(expected)] != expected:
            raise _wrong("no HTTP/2: the preface is wrong")
        self._preface = self._preface[len(expected) :]
        return data[len(expected) :]

    def _take(self, kind: int, flags: int, stream_id: int, payload: bytes, events: list[Event]) -> None:
        """Take a frame."""
        if self._block_id and (kind != _CONTINUATION or stream_id != self._block_id):
            raise _wrong("a frame within a header block")
        if kind == _DATA:
            self._take_data(flags, stream_id, payload, events)
        elif kind == _HEADERS:
            self._take_headers(flags, stream_id, payload, events)
        elif kind == _WINDOW_UPDATE:
            self._take_window(stream_id, payload, events)
        elif kind == _CONTINUATION:
            if not self._block_id:
                raise _wrong("CONTINUATION of no header block")
            self._take_piece(flags, payload, events)
        elif kind == _RST_STREAM:
            self._take_reset(stream_id, payload, events)
        elif kind == _PRIORITY:
            if not stream_id:
                raise _wrong("PRIORITY of no stream")
            if len(payload) != 5:
                raise _wrong_size("PRIORITY is of five bytes")
            _check_dependency(stream_id, payload)
        elif kind == _PUSH_PROMISE:
            raise _wrong("a push, which nobody asked for")
        elif kind in (_SETTINGS, _PING, _GOAWAY):
            if stream_id:
                raise _wrong("SETTINGS, PING or GOAWAY on a stream")
            if kind == _SETTINGS:
                self._take_settings(flags, payload, events)
            elif kind == _PING:
                self._take_ping(flags, payload, events)
            elif len(payload) < 8:
                raise _wrong_size("GOAWAY is of eight bytes or more")
            else:
                events.append(GoneAway(_number(payload, 0) & LAST_STREAM_ID))
        # Others are to be ignored (section 5.5).

    # Streams

    def _is_idle(self, stream_id: int) -> bool:
        """Whether a stream was not opened yet. Clients open those with odd ids; nothing opens the others."""
        if self._client:
            return not stream_id & 1 or stream_id >= self._next_id
        return not stream_id & 1 or stream_id > self.last_stream_id

    def _take_data(self, flags: int, stream_id: int, payload: bytes, events: list[Event]) -> None:
        flow = len(payload)
        if not stream_id:
            raise _wrong("DATA of no stream")
        data = _without_padding(payload) if flags & _PADDED else payload
        self._window.take(flow)
        stream = self._streams.get(stream_id)
        if stream is None or stream.came_end:
            if stream is None and self._is_idle(stream_id):
                raise _wrong("DATA of a stream that nobody opened")
            # It was sent in ignorance of a reset, or against the rules; either way nobody takes it.
            more = self._window.give_back(flow)
            if more:
                self._open_window(0, more)
            self._refuse_more(stream_id, events)
            return
        if not stream.came_head:
            raise _wrong("DATA before a response")
        stream.window.take(flow)
        end = flags & _END_STREAM != 0
        stream.count(len(data), end=end)
        if end:
            self._came_end(stream)
        events.append(DataCame(stream_id, data, flow, end=end))

    def _refuse_more(self, stream_id: int, events: list[Event]) -> None:
        """Something came on a stream that was at its end: it is cancelled, once more if need be (section 5.1)."""
        if stream_id in self._streams:
            events.append(StreamWasReset(stream_id, ErrorCodes.STREAM_CLOSED))
        self._cancel(stream_id, ErrorCodes.STREAM_CLOSED)

    def _came_end(self, stream: Stream) -> None:
        stream.came_end = True
        if stream.sent_end:
            del self._streams[stream.id]

    def _take_headers(self, flags: int, stream_id: int, payload: bytes, events: list[Event]) -> None:
        if not stream_id:
            raise _wrong("HEADERS of no stream")
        if flags & (_PADDED | _PRIORITIZED):
            if flags & _PADDED:
                payload = _without_padding(payload)
            if flags & _PRIORITIZED:
                if len(payload) < 5:
                    raise _wrong_size("HEADERS that say their priority are of five bytes or more")
                _check_dependency(stream_id, payload)
                payload = payload[5:]
        if flags & _END_HEADERS:
            self._take_block(flags & _END_STREAM != 0, stream_id, payload, events)
        else:
            self._block_id = stream_id
            self._block_flags = flags
            self._block = [payload]
            self._block_bytes = len(payload)

    def _take_piece(self, flags: int, payload: bytes, events: list[Event]) -> None:
        self._block.append(payload)
        self._block_bytes += len(payload)
        if len(self._block) > BLOCK_FRAMES_MAX or self._block_bytes > BLOCK_BYTES_MAX:
            raise Http2Error(ErrorCodes.ENHANCE_YOUR_CALM, "a header block that does not end")
        if flags & _END_HEADERS:
            stream_id, block = self._block_id, b"".join(self._block)
            self._block_id = 0
            self._block = []
            self._take_block(self._block_flags & _END_STREAM != 0, stream_id, block, events)

    def _take_block(self, end: bool, stream_id: int, block: bytes, events: list[Event]) -> None:
        fields = self._decoder.decode(block)  # be it wanted or not: it changes what the next one means
        stream = self._streams.get(stream_id)
        if stream is None:
            if not self._client and stream_id & 1 and stream_id > self.last_stream_id:
                self._take_request(end, stream_id, fields, events)
            elif self._is_idle(stream_id):
                raise _wrong("HEADERS of a stream that nobody could open")
            elif not self._resets.has(stream_id):
                raise Http2Error(ErrorCodes.STREAM_CLOSED, "HEADERS of a stream that has ended")
            else:
                self._cancel(stream_id, ErrorCodes.STREAM_CLOSED)
        elif stream.came_end:
            self._refuse_more(stream_id, events)
        elif stream.came_head:
            seen = check_trailers(fields)
            if not end:
                raise malformed("trailers that do not end the stream")
            stream.count(0, end=True)
            self._came_end(stream)
            events.append(TrailersCame(stream_id, _one_cookie(fields, seen)))
        else:
            self._take_response(end, stream, fields, events)

    def _take_request(self, end: bool, stream_id: int, fields: list[Field], events: list[Event]) -> None:
        self.last_stream_id = stream_id
        if len(self._streams) >= self._streams_max:
            self._refused += 1
            if self._known or self._refused > REFUSALS_MAX:
                raise Http2Error(ErrorCodes.ENHANCE_YOUR_CALM, f"more than {self._streams_max} streams")
            self._resets.add(stream_id)
            self._cancel(stream_id, ErrorCodes.REFUSED_STREAM)
            return
        seen = check_request(fields)
        stream = Stream(stream_id, self._stream_window, self._peer_window)
        stream.came_head = True
        stream.came_end = end
        stream.expect(seen.length, end=end)
        self._streams[stream_id] = stream
        events.append(RequestCame(stream_id, _one_cookie(fields, seen), end=end))

    def _take_response(self, end: bool, stream: Stream, fields: list[Field], events: list[Event]) -> None:
        seen = check_response(fields)
        if seen.status >= 200:
            stream.came_head = True
            if stream.no_body or seen.status == 204 or seen.status == 304:
                stream.expect(0, end=False)
            else:
                stream.expect(seen.length, end=end)
            if end:
                self._came_end(stream)
        elif end:
            raise malformed("an informational response that ends the stream")
        else:
            stream.hints += 1
            if stream.hints > HINTS_MAX:
                raise Http2Error(ErrorCodes.ENHANCE_YOUR_CALM, "informational responses without end")
        events.append(ResponseCame(stream.id, _one_cookie(fields, seen), seen.status, end=end))

    def _take_reset(self, stream_id: int, payload: bytes, events: list[Event]) -> None:
        if len(payload) != 4:
            raise _wrong_size("RST_STREAM is of four bytes")
        if not stream_id or self._is_idle(stream_id):
            raise _wrong("RST_STREAM of a stream that nobody opened")
        if self._streams.pop(stream_id, None) is not None:
            self._resets.add(stream_id)
            events.append(StreamWasReset(stream_id, _number(payload, 0)))

    # Windows, settings, pings

    def _take_window(self, stream_id: int, payload: bytes, events: list[Event]) -> None:
        if len(payload) != 4:
            raise _wrong_size("WINDOW_UPDATE is of four bytes")
        size = _number(payload, 0) & WINDOW_MAX
        if not size:
            raise _wrong("WINDOW_UPDATE by nothing")
        if not stream_id:
            self._room += size
            if self._room > WINDOW_MAX:
                raise Http2Error(ErrorCodes.FLOW_CONTROL_ERROR, "a window beyond all bounds")
            events.append(WindowOpened(0))
            return
        stream = self._streams.get(stream_id)
        if stream is None:
            if self._is_idle(stream_id):
                raise _wrong("WINDOW_UPDATE of a stream that nobody opened")
            return
        stream.room += size
        if stream.room > WINDOW_MAX:
            events.append(StreamWasReset(stream_id, ErrorCodes.FLOW_CONTROL_ERROR))
            self._cancel(stream_id, ErrorCodes.FLOW_CONTROL_ERROR)
        else:
            events.append(WindowOpened(stream_id))

    def _take_settings(self, flags: int, payload: bytes, events: list[Event]) -> None:
        if flags & _ACK:
            if payload:
                raise _wrong_size("an acknowledgement of settings with settings")
            self._known = True
            return
        if len(payload) % 6:
            raise _wrong_size("SETTINGS are of six bytes each")
        before = self._peer_window
        for at in range(0, len(payload), 6):
            self._set((payload[at] << 8) | payload[at + 1], _number(payload, at + 2))
        grown = self._peer_window - before
        if grown:
            for stream in self._streams.values():
                stream.room += grown
                if stream.room > WINDOW_MAX:
                    raise Http2Error(ErrorCodes.FLOW_CONTROL_ERROR, "a window beyond all bounds")
        self._frame(_SETTINGS, _ACK, 0, b"")
        events.append(SettingsCame(windows=grown != 0))

    def _set(self, code: int, value: int) -> None:
        """Take one setting (section 6.5.2). The values are 32 bits without a sign."""
        if code == _TABLE_SIZE:
            self._encoder.allow(value)
        elif code == _ENABLE_PUSH:
            if value > 1 or (self._client and value):
                raise _wrong(f"ENABLE_PUSH is {value}")
        elif code == _STREAMS_MAX:
            self.peer_streams_max = value
        elif code == _INITIAL_WINDOW:
            if value > WINDOW_MAX:
                raise Http2Error(ErrorCodes.FLOW_CONTROL_ERROR, f"INITIAL_WINDOW_SIZE is {value}")
            self._peer_window = value
        elif code == _FRAME_SIZE:
            if not FRAME_BYTES_MAX <= value <= _FRAME_SIZE_MAX:
                raise _wrong(f"MAX_FRAME_SIZE is {value}")
            self._peer_frame_bytes = value
        elif code == _CONNECT_PROTOCOL and value > 1:
            raise _wrong(f"ENABLE_CONNECT_PROTOCOL is {value}")

    def _take_ping(self, flags: int, payload: bytes, events: list[Event]) -> None:
        if len(payload) != 8:
            raise _wrong_size("PING is of eight bytes")
        if not flags & _ACK:
            self._frame(_PING, _ACK, 0, payload)
            events.append(Pinged(0))


def _without_padding(payload: bytes) -> bytes:
    """Return what a padded frame holds (section 6.1)."""
    size = len(payload)
    if not size:
        raise _wrong_size("a padded frame that does not say by how much")
    padding = payload[0]
    if padding >= size:
        raise _wrong("more padding than there is of the frame")
    return payload[1 : size - padding]


def _check_dependency(stream_id: int, payload: bytes) -> None:
    if _number(payload, 0) & LAST_STREAM_ID == stream_id:
        raise _wrong("a stream that depends on itself")


def _one_cookie(fields: list[Field], seen: Checked) -> list[Field]:
    """Return the fields, with cookies that came in pieces put together (section 8.2.3), behind the others."""
    if seen.cookies < 2:
        return fields
    every: list[Any] = list(fields)
    pieces = [field for field in every if field[0] == b"cookie"]
    value = b"; ".join([field[1] for field in pieces])
    secret = [True for field in pieces if is_never_indexed(field)]
    cookie: Any = never_indexed(b"cookie", value) if secret else (b"cookie", value)
    return [*[field for field in every if field[0] != b"cookie"], cookie]
