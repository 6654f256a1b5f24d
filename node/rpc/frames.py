"""The wire form: a 4-byte big-endian length, then a MessagePack array ``[kind, call id, ...]``. Sans I/O.

Bodies are MessagePack of their own, opaque here. Lengths are bounded before anything is allocated for them.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Annotated

import msgspec

from node.errors import NodeError

REQUEST_BYTES_MAX = 9 * 1024 * 1024
"""Largest frame a server takes: the largest command (8 MiB) and its envelope."""
RESPONSE_BYTES_MAX = 128 * 1024 * 1024
"""Largest frame a client takes: a whole view of a large cluster."""

CallId = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
Millis = Annotated[int, msgspec.Meta(ge=0, le=24 * 3600 * 1000)]
Short = Annotated[str, msgspec.Meta(max_length=64)]


class BadFrame(NodeError):
    """The peer sent what is not a frame of this protocol; the connection is closed."""

    code = "bad-frame"


class _Frame(msgspec.Struct, frozen=True, array_like=True, tag_field="t"):
    call: CallId


class Request(_Frame, frozen=True, tag=1):
    """Begin a call. `timeout_ms` is what remains of the caller's deadline (0: none, a stream)."""

    method: Short
    timeout_ms: Millis
    body: bytes
    upload: bool = False


class Response(_Frame, frozen=True, tag=2):
    """The value of a call; ends it."""

    body: bytes


class Failure(_Frame, frozen=True, tag=3):
    """An error, by code (`node.errors`); ends the call."""

    code: Short
    text: str
    reason: Short = ""
    http_status: int = 500


class Item(_Frame, frozen=True, tag=4):
    """One item of a stream, or one piece of an upload."""

    body: bytes


class End(_Frame, frozen=True, tag=5):
    """No more items. From a server it ends the call; from a client it ends the upload."""


class Cancel(_Frame, frozen=True, tag=6):
    """The caller wants no answer any more."""


class Ping(_Frame, frozen=True, tag=7):
    """Are you there? `call` is echoed."""


class Pong(_Frame, frozen=True, tag=8):
    """Yes."""


Frame = Request | Response | Failure | Item | End | Cancel | Ping | Pong

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Frame] = msgspec.msgpack.Decoder(Frame)
_length = struct.Struct(">I")


def encode_frame(frame: Frame) -> bytes:
    """Return the frame with its length in front."""
    body = _encoder.encode(frame)
    return _length.pack(len(body)) + body


class FrameReader:
    """Cuts a byte stream into frames. After BadFrame it takes nothing more."""

    def __init__(self, bytes_max: int) -> None:
        self._bytes_max = bytes_max
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[Frame]:
        """Yield the frames completed by `data`. Raises BadFrame."""
        buffer = self._buffer
        buffer += data
        start = 0
        try:
            while len(buffer) - start >= 4:
                (size,) = _length.unpack_from(buffer, start)
                if size > self._bytes_max:
                    raise BadFrame(f"frame of {size} bytes exceeds {self._bytes_max}: split the request")
                if len(buffer) - start - 4 < size:
                    break
                body = bytes(memoryview(buffer)[start + 4 : start + 4 + size])
                start += 4 + size
                yield _decode(body)
        finally:
            del buffer[:start]


def _decode(body: bytes) -> Frame:
    try:
        return _decoder.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise BadFrame(f"malformed frame ({error}): both ends must run the same version") from None
