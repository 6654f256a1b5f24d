"""HTTP/2's frames as they are on the wire (RFC 9113, sections 4 and 6), and what the other end is told by."""

from __future__ import annotations

import struct
from typing import Final

from h2.errors import ErrorCodes

from proxy.http2.errors import Http2Error

PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
LAST_STREAM_ID: Final = (1 << 31) - 1
FRAME_BYTES_MAX: Final = 16 * 1024
"""What we take, which is the least that may be (section 4.2)."""

DATA: Final = 0
HEADERS: Final = 1
PRIORITY: Final = 2
RST_STREAM: Final = 3
SETTINGS: Final = 4
PUSH_PROMISE: Final = 5
PING: Final = 6
GOAWAY: Final = 7
WINDOW_UPDATE: Final = 8
CONTINUATION: Final = 9

END_STREAM: Final = 0x01
ACK: Final = 0x01
END_HEADERS: Final = 0x04
PADDED: Final = 0x08
PRIORITIZED: Final = 0x20

TABLE_SIZE: Final = 1
ENABLE_PUSH: Final = 2
STREAMS_MAX: Final = 3
INITIAL_WINDOW: Final = 4
FRAME_SIZE: Final = 5
LIST_SIZE: Final = 6
CONNECT_PROTOCOL: Final = 8
FRAME_SIZE_MAX: Final = (1 << 24) - 1

pack_head: Final = struct.Struct(">HBBBL").pack
"""Of a frame: its size, but for the last octet; that octet; kind; flags; stream."""
_setting: Final = struct.Struct(">HL").pack
_long: Final = struct.Struct(">L").pack
_longs: Final = struct.Struct(">LL").pack


def frame(kind: int, flags: int, stream_id: int, payload: bytes) -> bytes:
    """Return a frame (section 4.1)."""
    size = len(payload)
    made: bytes = pack_head(size >> 8, size & 0xFF, kind, flags, stream_id)
    return made + payload


def goaway(last_stream_id: int, code: int) -> bytes:
    """Return a frame that says which streams were looked at, and why no more are."""
    made: bytes = _longs(last_stream_id, code)
    return frame(GOAWAY, 0, 0, made)


def setting(code: int, value: int) -> bytes:
    """Return one setting, for a frame of them (section 6.5.1)."""
    made: bytes = _setting(code, value)
    return made


def number(value: int) -> bytes:
    """Return 32 bits: an error's code, a window's growth."""
    made: bytes = _long(value)
    return made


def number_at(data: bytes, at: int) -> int:
    """Return the 32 bits at a place."""
    return (data[at] << 24) | (data[at + 1] << 16) | (data[at + 2] << 8) | data[at + 3]


def without_padding(payload: bytes) -> bytes:
    """Return what a padded frame holds (section 6.1). Raises :class:`Http2Error`."""
    size = len(payload)
    if not size:
        raise wrong_size("a padded frame that does not say by how much")
    padding = payload[0]
    if padding >= size:
        raise wrong("more padding than there is of the frame")
    return payload[1 : size - padding]


def check_dependency(stream_id: int, payload: bytes) -> None:
    """Raise :class:`Http2Error` when a priority names its own stream (RFC 7540, section 5.3.1). Nothing else of
    priorities is heeded (RFC 9113, section 5.3.2)."""
    if number_at(payload, 0) & LAST_STREAM_ID == stream_id:
        raise wrong("a stream that depends on itself")


def wrong(text: str) -> Http2Error:
    """Return the error of a connection on which something came that may not."""
    return Http2Error(ErrorCodes.PROTOCOL_ERROR, text)


def wrong_size(text: str) -> Http2Error:
    """Return the error of a connection on which a frame of a size came that it may not have (section 4.2)."""
    return Http2Error(ErrorCodes.FRAME_SIZE_ERROR, text)
