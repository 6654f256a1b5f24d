"""Frames of ``lictor-mux/1``. Pure.

Header, 8 bytes, big-endian::

    kind: 8 bits | payload length: 24 bits | stream id: 32 bits

Stream ids are odd, chosen by the side that dialed the session, growing; id 0 is the session itself. A DATA payload
may be as long as the length field allows and is handed on piecewise as it arrives, so a long frame needs no buffer;
every other payload is short, so what the parser holds is bounded.
"""

from __future__ import annotations

import struct
from typing import Final

from proxy.errors import MuxError

DATA: Final = 1
"""Bytes of a stream."""
FIN: Final = 2
"""The sender's direction of the stream has ended; no payload."""
WINDOW: Final = 3
"""Payload u32: the receiver of the stream's bytes grants so many more."""
OPEN: Final = 4
"""A new stream; payload: the service asked for, UTF-8."""
ACCEPT: Final = 5
"""The stream is admitted and the app connected; no payload."""
REFUSE: Final = 6
"""The stream was not admitted, none of its bytes reached the app; payload: code u8, reason UTF-8."""
RESET: Final = 7
"""The stream is dropped in both directions; payload: code u8, reason UTF-8."""
PING: Final = 8
"""Payload: up to 8 bytes to be sent back."""
PONG: Final = 9
GOAWAY: Final = 10
"""The sender takes no more streams; live ones go on. Payload: code u8, reason UTF-8."""

HEADER_BYTES: Final = 8
MAX_CONTROL_BYTES: Final = 1024
"""Longest payload of a frame that is not DATA."""
MAX_DATA_BYTES: Final = (1 << 24) - 1
COPY_BYTES: Final = 16 * 1024
"""A shorter piece of DATA is copied out of the read buffer, so that it does not keep the buffer alive."""

_NAMES: Final = {
    DATA: "DATA", FIN: "FIN", WINDOW: "WINDOW", OPEN: "OPEN", ACCEPT: "ACCEPT", REFUSE: "REFUSE",
    RESET: "RESET", PING: "PING", PONG: "PONG", GOAWAY: "GOAWAY",
}  # fmt: skip

# Codes of REFUSE, RESET and GOAWAY.
NORMAL: Final = 0
DENIED: Final = 1
APP_DOWN: Final = 2
DRAINING: Final = 3
TOO_MANY: Final = 4
WRONG_SERVICE: Final = 5
NOT_READY: Final = 6
CANCELLED: Final = 7
LOST: Final = 8
PROTOCOL_ERROR: Final = 9
TIMED_OUT: Final = 10
REVOKED: Final = 11
CODE_NAMES: Final = {
    NORMAL: "normal", DENIED: "denied", APP_DOWN: "app-down", DRAINING: "draining", TOO_MANY: "too-many-streams",
    WRONG_SERVICE: "wrong-service", NOT_READY: "not-ready", CANCELLED: "cancelled", LOST: "session-lost",
    PROTOCOL_ERROR: "protocol-error", TIMED_OUT: "timed-out", REVOKED: "revoked",
}  # fmt: skip

_ON_SESSION: Final = frozenset({PING, PONG, GOAWAY})

HEADER: Final = struct.Struct(">II")
_pack_header: Final = HEADER.pack
_unpack_header: Final = HEADER.unpack_from
_U32: Final = struct.Struct(">I")


Frame = tuple[int, int, bytes | memoryview]
"""Kind, stream id and payload of a frame, or of one piece of a DATA frame. Plain, for there are very many."""


def header(kind: int, stream_id: int, length: int) -> bytes:
    """Return the header of a frame whose payload of ``length`` bytes follows."""
    return _pack_header(kind << 24 | length, stream_id)


def frame(kind: int, stream_id: int, payload: bytes = b"") -> bytes:
    """Return a whole frame; for the short kinds."""
    return _pack_header(kind << 24 | len(payload), stream_id) + payload


def window(stream_id: int, credit: int) -> bytes:
    """Return a WINDOW frame."""
    return _pack_header(WINDOW << 24 | 4, stream_id) + _U32.pack(credit)


def coded(kind: int, stream_id: int, code: int, text: str) -> bytes:
    """Return a REFUSE, RESET or GOAWAY frame; the text is cut to fit."""
    payload = bytes((code,)) + text.encode()[: MAX_CONTROL_BYTES - 1]
    return frame(kind, stream_id, payload)


def decode_window(payload: bytes | memoryview) -> int:
    """Return the credit in a WINDOW payload. Raises :class:`MuxError`."""
    if len(payload) != 4:
        raise MuxError(f"WINDOW payload has {len(payload)} bytes, not 4")
    credit: int = _U32.unpack(payload)[0]
    return credit


def decode_coded(payload: bytes | memoryview) -> tuple[int, str]:
    """Return code and text of a REFUSE, RESET or GOAWAY payload. Raises :class:`MuxError`."""
    if not payload:
        raise MuxError("REFUSE, RESET or GOAWAY without a code")
    return payload[0], bytes(payload[1:]).decode("utf-8", "replace")


class FrameParser:
    """Cuts a byte stream into frames, whatever the sizes in which it arrives. Holds less than one short frame."""

    __slots__ = ("_data_left", "_data_stream", "_tail")

    def __init__(self) -> None:
        self._tail = b""
        self._data_left = 0
        self._data_stream = 0

    @property
    def held_bytes(self) -> int:
        """Bytes kept for the next call; at most a header and a short payload."""
        return len(self._tail)

    def only_data_for(self, data: bytes) -> int:
        """Return the id of a stream when ``data`` is one whole DATA frame for it and nothing else, else 0: then
        :meth:`feed` is to look at it."""
        size = len(data)
        if size <= HEADER_BYTES or data[0] != DATA or self._data_left or self._tail:
            return 0
        if data[1] << 16 | data[2] << 8 | data[3] != size - HEADER_BYTES:
            return 0
        return data[4] << 24 | data[5] << 16 | data[6] << 8 | data[7]

    def feed(self, data: bytes) -> list[Frame]:
        """Return the frames (and pieces of DATA) that ``data`` completes. Raises :class:`MuxError`."""
        if self._tail:
            data = self._tail + data
            self._tail = b""
        frames: list[Frame] = []
        append = frames.append
        position, end = 0, len(data)
        if self._data_left:
            position = min(self._data_left, end)
            self._data_left -= position
            append((DATA, self._data_stream, _slice(data, 0, position)))
        while end - position >= HEADER_BYTES:
            word, stream_id = _unpack_header(data, position)
            kind, length = word >> 24, word & 0xFFFFFF
            start = position + HEADER_BYTES
            stop = start + length
            if kind == DATA:
                if not length:
                    raise MuxError("DATA frame without data")
                if stop > end:
                    self._data_left = stop - end
                    self._data_stream = stream_id
                    if end > start:
                        append((DATA, stream_id, _slice(data, start, end)))
                    return frames
                append((DATA, stream_id, data[start:stop] if length < COPY_BYTES else memoryview(data)[start:stop]))
            else:
                if kind not in _NAMES:
                    raise MuxError(f"unknown frame kind {kind}")
                if length > MAX_CONTROL_BYTES:
                    raise MuxError(f"{_NAMES[kind]} frame of {length} bytes, at most {MAX_CONTROL_BYTES} are allowed")
                if (kind in _ON_SESSION) != (stream_id == 0):
                    raise MuxError(f"{_NAMES[kind]} frame on stream {stream_id}")
                if stop > end:
                    break
                append((kind, stream_id, data[start:stop]))
            position = stop
        if position < end:
            self._tail = data[position:]
        return frames


def without_header(data: bytes) -> bytes | memoryview:
    """Return the payload of a frame that is all of ``data``."""
    return _slice(data, HEADER_BYTES, len(data))


def _slice(data: bytes, start: int, stop: int) -> bytes | memoryview:
    if stop - start < COPY_BYTES:
        return data[start:stop]
    return memoryview(data)[start:stop]
