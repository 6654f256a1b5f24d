"""One end of an HTTP/2 connection (RFC 9113), without I/O: bytes to events, and what is to be sent to bytes.

Of the protocol it does what a proxy needs: no push, no priorities, no upgrade from HTTP/1.1. What the other end does
wrong ends a stream or the connection, as the RFC says.

``tests/security/test_http2_conformance.py`` walks through the RFC; ``tests/property/test_http2_core.py`` holds this
against the ``h2`` package.
"""

from __future__ import annotations

from typing import Any, Final

from h2.errors import ErrorCodes

from proxy.http.head import Field
from proxy.http2.errors import Http2Error, StreamError
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
from proxy.http2.frames import (
    ACK,
    CONNECT_PROTOCOL,
    CONTINUATION,
    DATA,
    ENABLE_PUSH,
    END_HEADERS,
    END_STREAM,
    FRAME_BYTES_MAX,
    FRAME_SIZE,
    FRAME_SIZE_MAX,
    GOAWAY,
    HEADERS,
    INITIAL_WINDOW,
    LAST_STREAM_ID,
    PADDED,
    PING,
    PREFACE,
    PRIORITIZED,
    PRIORITY,
    PUSH_PROMISE,
    RST_STREAM,
    SETTINGS,
    STREAMS_MAX,
    TABLE_SIZE,
    WINDOW_UPDATE,
    check_dependency,
    goaway,
    number_at,
    without_padding,
    wrong,
    wrong_size,
)
from proxy.http2.hpack import Decoder, is_never_indexed, never_indexed
from proxy.http2.sending import Sending
from proxy.http2.streams import WINDOW_MAX, Stream

BLOCK_FRAMES_MAX: Final = 64
"""Frames that one header block may come in."""
BLOCK_BYTES_MAX: Final = 128 * 1024
"""What it may be encoded: twice what its fields may be."""
REFUSALS_MAX: Final = 1000
"""Streams refused for being too many; then the other end is told to calm down."""
HINTS_MAX: Final = 100
"""Informational responses to one request: they are not held back by any window."""


class Core(Sending):
    """One end. What it wants to send, :meth:`to_send` gives."""

    def __init__(self, *, client: bool, streams_max: int, stream_window: int, list_bytes_max: int) -> None:
        """``streams_max``: that the other end may have open; ``stream_window``: bytes each of them may send ahead,
        and the connection as much as all together; ``list_bytes_max``: of a field list."""
        super().__init__(
            client=client, streams_max=streams_max, stream_window=stream_window, list_bytes_max=list_bytes_max
        )
        self._refused = 0
        self._known = False
        """The other end has taken our settings."""
        self._told = False
        """It has said its own."""
        self.last_stream_id = 0
        """The newest that the other end opened."""
        self._decoder = Decoder(list_bytes_max)
        self._rest = b""
        """Of what came, the part that is no whole frame yet."""
        self._preface = b"" if client else PREFACE
        """What of it is still to come."""
        self._block: list[bytes] = []
        """The pieces of a header block that is not whole yet."""
        self._block_bytes = 0
        self._block_id = 0
        self._block_flags = 0

    @property
    def greeted(self) -> bool:
        """Whether the other end has said its settings and taken ours (section 6.5.3)."""
        return self._told and self._known

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
                if not self._told:
                    _check_first(data[at : at + 9])
                size = (data[at] << 16) | (data[at + 1] << 8) | data[at + 2]
                if size > FRAME_BYTES_MAX:
                    raise wrong_size(f"a frame of {size} bytes, where {FRAME_BYTES_MAX} are taken")
                begin = at + 9
                if have - begin < size:
                    break
                stream_id = number_at(data, at + 5) & LAST_STREAM_ID
                kind, flags = data[at + 3], data[at + 4]
                at = begin + size
                try:
                    self._take(kind, flags, stream_id, data[begin:at], events)
                except StreamError as error:
                    self._fail(kind, stream_id, size, error, events)
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
            raise wrong("no HTTP/2: the preface is wrong")
        self._preface = self._preface[len(expected) :]
        return data[len(expected) :]

    def _take(self, kind: int, flags: int, stream_id: int, payload: bytes, events: list[Event]) -> None:
        """Take a frame."""
        if self._block_id and (kind != CONTINUATION or stream_id != self._block_id):
            raise wrong("a frame within a header block")
        if kind == DATA:
            self._take_data(flags, stream_id, payload, events)
        elif kind == HEADERS:
            self._take_headers(flags, stream_id, payload, events)
        elif kind == WINDOW_UPDATE:
            self._take_window(stream_id, payload, events)
        elif kind == CONTINUATION:
            if not self._block_id:
                raise wrong("CONTINUATION of no header block")
            self._take_piece(flags, payload, events)
        elif kind == RST_STREAM:
            self._take_reset(stream_id, payload, events)
        elif kind == PRIORITY:
            self._take_priority(stream_id, payload)
        elif kind == PUSH_PROMISE:
            raise wrong("a push, which nobody asked for")
        elif kind in (SETTINGS, PING, GOAWAY):
            if stream_id:
                raise wrong("SETTINGS, PING or GOAWAY on a stream")
            if kind == SETTINGS:
                self._take_settings(flags, payload, events)
            elif kind == PING:
                self._take_ping(flags, payload, events)
            elif len(payload) < 8:
                raise wrong_size("GOAWAY is of eight bytes or more")
            else:
                events.append(GoneAway(number_at(payload, 0) & LAST_STREAM_ID))
        # Others are to be ignored (section 5.5).

    def _fail(self, kind: int, stream_id: int, size: int, error: StreamError, events: list[Event]) -> None:
        """What came ends its stream, and no more (section 5.4.2)."""
        if kind == DATA:
            self._lose(size)
        events.append(StreamWasReset(stream_id, error.code, str(error)))
        self._cancel(stream_id, error.code)

    # Streams

    def _is_idle(self, stream_id: int) -> bool:
        """Whether a stream was not opened yet. Clients open those with odd ids; nothing opens the others."""
        if self._client:
            return not stream_id & 1 or stream_id >= self._next_id
        return not stream_id & 1 or stream_id > self.last_stream_id

    def _take_data(self, flags: int, stream_id: int, payload: bytes, events: list[Event]) -> None:
        flow = len(payload)
        if not stream_id:
            raise wrong("DATA of no stream")
        data = without_padding(payload) if flags & PADDED else payload
        self._window.take(flow)
        stream = self._streams.get(stream_id)
        if stream is None or stream.came_end:
            if stream is None and self._is_idle(stream_id):
                raise wrong("DATA of a stream that nobody opened")
            # It was sent in ignorance of a reset, or against the rules; either way nobody takes it.
            self._lose(flow)
            self._refuse_more(stream_id, events)
            return
        stream.window.take(flow)
        if not stream.came_head:
            raise malformed("DATA before a response")
        end = flags & END_STREAM != 0
        stream.count(len(data), end=end)
        if end:
            self._came_end(stream)
        events.append(DataCame(stream_id, data, flow, end=end))

    def _refuse_more(self, stream_id: int, events: list[Event]) -> None:
        """Something came on a stream that was at its end: it is cancelled, unless it was under way when we did just
        that (section 5.1)."""
        if stream_id in self._streams:
            events.append(StreamWasReset(stream_id, ErrorCodes.STREAM_CLOSED, "more on a stream that was ended"))
        elif self._resets.by_us(stream_id):
            return
        self._cancel(stream_id, ErrorCodes.STREAM_CLOSED)

    def _came_end(self, stream: Stream) -> None:
        stream.came_end = True
        if stream.sent_end:
            del self._streams[stream.id]

    def _take_headers(self, flags: int, stream_id: int, payload: bytes, events: list[Event]) -> None:
        if not stream_id:
            raise wrong("HEADERS of no stream")
        if flags & (PADDED | PRIORITIZED):
            if flags & PADDED:
                payload = without_padding(payload)
            if flags & PRIORITIZED:
                if len(payload) < 5:
                    raise wrong_size("HEADERS that say their priority are of five bytes or more")
                check_dependency(stream_id, payload)
                payload = payload[5:]
        if flags & END_HEADERS:
            self._take_block(flags & END_STREAM != 0, stream_id, payload, events)
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
        if flags & END_HEADERS:
            stream_id, block = self._block_id, b"".join(self._block)
            self._block_id = 0
            self._block = []
            self._take_block(self._block_flags & END_STREAM != 0, stream_id, block, events)

    def _take_block(self, end: bool, stream_id: int, block: bytes, events: list[Event]) -> None:
        fields = self._decoder.decode(block)  # be it wanted or not: it changes what the next one means
        stream = self._streams.get(stream_id)
        if stream is None:
            if not self._client and stream_id & 1 and stream_id > self.last_stream_id:
                self._take_request(end, stream_id, fields, events)
            elif self._is_idle(stream_id):
                raise wrong("HEADERS of a stream that nobody could open")
            elif not self._resets.has(stream_id):
                raise Http2Error(ErrorCodes.STREAM_CLOSED, "HEADERS of a stream that has ended")
            else:
                self._refuse_more(stream_id, events)
            return
        if stream.came_end:
            self._refuse_more(stream_id, events)
            return
        self._decoder.check()
        if stream.came_head:
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
            if self._refused > REFUSALS_MAX:
                raise Http2Error(ErrorCodes.ENHANCE_YOUR_CALM, f"more than {self._streams_max} streams")
            self._cancel(stream_id, ErrorCodes.REFUSED_STREAM)
            return
        self._decoder.check()
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
            raise wrong_size("RST_STREAM is of four bytes")
        if not stream_id or self._is_idle(stream_id):
            raise wrong("RST_STREAM of a stream that nobody opened")
        if self._streams.pop(stream_id, None) is not None:
            self._resets.add(stream_id, by_us=False)
            events.append(StreamWasReset(stream_id, number_at(payload, 0)))

    def _take_priority(self, stream_id: int, payload: bytes) -> None:
        if not stream_id:
            raise wrong("PRIORITY of no stream")
        if len(payload) != 5:
            if stream_id in self._streams:
                raise StreamError(ErrorCodes.FRAME_SIZE_ERROR, "PRIORITY is of five bytes")
            raise wrong_size("PRIORITY is of five bytes")
        check_dependency(stream_id, payload)

    # Windows, settings, pings

    def _take_window(self, stream_id: int, payload: bytes, events: list[Event]) -> None:
        if len(payload) != 4:
            raise wrong_size("WINDOW_UPDATE is of four bytes")
        size = number_at(payload, 0) & WINDOW_MAX
        if not stream_id:
            if not size:
                raise wrong("WINDOW_UPDATE by nothing")
            self._room += size
            if self._room > WINDOW_MAX:
                raise Http2Error(ErrorCodes.FLOW_CONTROL_ERROR, "a window beyond all bounds")
            events.append(WindowOpened(0))
            return
        stream = self._streams.get(stream_id)
        if stream is None:
            if self._is_idle(stream_id):
                raise wrong("WINDOW_UPDATE of a stream that nobody opened")
            return
        if not size:
            raise StreamError(ErrorCodes.PROTOCOL_ERROR, "WINDOW_UPDATE by nothing")
        stream.room += size
        if stream.room > WINDOW_MAX:
            raise StreamError(ErrorCodes.FLOW_CONTROL_ERROR, "a window beyond all bounds")
        events.append(WindowOpened(stream_id))

    def _take_settings(self, flags: int, payload: bytes, events: list[Event]) -> None:
        if flags & ACK:
            if payload:
                raise wrong_size("an acknowledgement of settings with settings")
            self._known = True
            return
        if len(payload) % 6:
            raise wrong_size("SETTINGS are of six bytes each")
        before = self._peer_window
        for at in range(0, len(payload), 6):
            self._set((payload[at] << 8) | payload[at + 1], number_at(payload, at + 2))
        self._told = True
        grown = self._peer_window - before
        if grown:
            for stream in self._streams.values():
                stream.room += grown
                if stream.room > WINDOW_MAX:
                    raise Http2Error(ErrorCodes.FLOW_CONTROL_ERROR, "a window beyond all bounds")
        self._frame(SETTINGS, ACK, 0, b"")
        events.append(SettingsCame(windows=grown != 0))

    def _set(self, code: int, value: int) -> None:
        """Take one setting (section 6.5.2). The values are 32 bits without a sign."""
        if code == TABLE_SIZE:
            self._encoder.allow(value)
        elif code == ENABLE_PUSH:
            if value > 1 or (self._client and value):
                raise wrong(f"ENABLE_PUSH is {value}")
        elif code == STREAMS_MAX:
            self.peer_streams_max = value
        elif code == INITIAL_WINDOW:
            if value > WINDOW_MAX:
                raise Http2Error(ErrorCodes.FLOW_CONTROL_ERROR, f"INITIAL_WINDOW_SIZE is {value}")
            self._peer_window = value
        elif code == FRAME_SIZE:
            if not FRAME_BYTES_MAX <= value <= FRAME_SIZE_MAX:
                raise wrong(f"MAX_FRAME_SIZE is {value}")
            self._peer_frame_bytes = value
        elif code == CONNECT_PROTOCOL and value > 1:
            raise wrong(f"ENABLE_CONNECT_PROTOCOL is {value}")

    def _take_ping(self, flags: int, payload: bytes, events: list[Event]) -> None:
        if len(payload) != 8:
            raise wrong_size("PING is of eight bytes")
        if not flags & ACK:
            self._frame(PING, ACK, 0, payload)
            events.append(Pinged(0))


def _check_first(head: bytes) -> None:
    """Raise :class:`Http2Error` when what comes first are not settings (section 3.4); ``head``: of its frame."""
    if head.startswith(b"HTTP/"):
        raise wrong("no HTTP/2: it answers as HTTP/1.1 does")
    if head[3] != SETTINGS or head[4] & ACK:
        raise wrong("no HTTP/2: what comes first are not SETTINGS")


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
