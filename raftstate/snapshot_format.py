"""A snapshot's bytes: pure encoder and decoder, the same for files and for `lictor snapshot save`.

    magic "LICTORS\\n", u16 version, u32 header length, header (JSON), u32 crc
    per chunk:  u32 length, u32 crc, bytes       the crc is seeded with the crc before it
    trailer:    u32 0xFFFFFFFF, u64 chunks, u64 bytes, sha256 over all chunks (32 bytes), u32 crc

The chained CRCs find damage as early as the chunk it is in; the SHA-256 stands for the whole.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator
from typing import Any
from zlib import crc32

import msgspec

from raftstate.errors import SnapshotDamaged

VERSION = 1
CHUNK_BYTES_MAX = 64 << 20
HEADER_BYTES_MAX = 1 << 20

_MAGIC = b"LICTORS\n"
_LEAD = struct.Struct("<8sHI")
_CRC = struct.Struct("<I")
_CHUNK = struct.Struct("<II")
_END = 0xFFFFFFFF
_TRAILER = struct.Struct("<IQQ32s")
_TRAILER_BYTES = _TRAILER.size + _CRC.size


class SnapshotHeader(msgspec.Struct, frozen=True):
    """What a snapshot says of itself: the log position it stands for and who was a member then."""

    index: int
    term: int
    members: dict[str, Any]
    created: float
    """Unix time, seconds."""


class SnapshotSummary(msgspec.Struct, frozen=True):
    """What a whole, verified snapshot holds."""

    header: SnapshotHeader
    chunks: int
    bytes: int
    """Bytes of state, without the framing."""
    sha256: str


class SnapshotEncoder:
    """Turns chunks into framed bytes: `start()`, then `chunk()` each, then `finish()`."""

    def __init__(self, header: SnapshotHeader) -> None:
        self._header = header
        self._crc = 0
        self._chunks = 0
        self._bytes = 0
        self._sha256 = hashlib.sha256()

    def start(self) -> bytes:
        """The header's bytes."""
        body = msgspec.json.encode(self._header)
        lead = _LEAD.pack(_MAGIC, VERSION, len(body)) + body
        self._crc = crc32(lead)
        return lead + _CRC.pack(self._crc)

    def chunk(self, data: bytes) -> bytes:
        """One framed chunk. Raises ValueError above CHUNK_BYTES_MAX."""
        if len(data) > CHUNK_BYTES_MAX:
            raise ValueError(f"a snapshot chunk has {len(data)} bytes, more than {CHUNK_BYTES_MAX}")
        self._crc = crc32(data, crc32(_CRC.pack(len(data)), self._crc))
        self._sha256.update(data)
        self._chunks += 1
        self._bytes += len(data)
        return _CHUNK.pack(len(data), self._crc) + data

    def finish(self) -> bytes:
        """The trailer's bytes."""
        body = _TRAILER.pack(_END, self._chunks, self._bytes, self._sha256.digest())
        return body + _CRC.pack(crc32(body, self._crc))


class SnapshotDecoder:
    """Checks framed bytes as they come and gives the chunks back. `where` names the source in errors.

    Feed it everything, then call `finish`; a chunk given out is verified, but only `finish` says that the
    snapshot is whole.
    """

    def __init__(self, where: str, *, advice: str | None = None) -> None:
        self._where, self._advice = where, advice
        self._buffer = bytearray()
        self._crc = 0
        self._chunks = 0
        self._bytes = 0
        self._sha256 = hashlib.sha256()
        self._done = False
        self.header: SnapshotHeader | None = None

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Yield the chunks that are now whole. Raises SnapshotDamaged."""
        if self._done and data:
            raise self._damaged("bytes follow the end")
        self._buffer += data
        if self.header is None and not self._take_header():
            return
        while not self._done and (chunk := self._take_chunk()) is not None:
            yield chunk

    def finish(self) -> SnapshotSummary:
        """Nothing more comes. Raises SnapshotDamaged unless the snapshot was whole."""
        if not self._done or self.header is None:
            raise self._damaged("the end is missing")
        return SnapshotSummary(self.header, self._chunks, self._bytes, self._sha256.hexdigest())

    def _take_header(self) -> bool:
        buffer = self._buffer
        if not buffer.startswith(_MAGIC[: len(buffer)]):
            raise self._damaged("it does not start as a snapshot of Lictor does")
        if len(buffer) < _LEAD.size:
            return False
        _, version, length = _LEAD.unpack_from(buffer)
        if version != VERSION:
            raise self._damaged(f"format version {version} is not one this Lictor can read")
        if length > HEADER_BYTES_MAX:
            raise self._damaged("the header fails its checksum")
        end = _LEAD.size + length
        if len(buffer) < end + _CRC.size:
            return False
        self._crc = crc32(buffer[:end])
        if _CRC.unpack_from(buffer, end)[0] != self._crc:
            raise self._damaged("the header fails its checksum")
        try:
            self.header = msgspec.json.decode(bytes(buffer[_LEAD.size : end]), type=SnapshotHeader)
        except msgspec.MsgspecError as error:
            raise self._damaged(f"the header cannot be read: {error}") from error
        del buffer[: end + _CRC.size]
        return True

    def _take_chunk(self) -> bytes | None:
        buffer = self._buffer
        if len(buffer) < _CHUNK.size:
            return None
        length, crc = _CHUNK.unpack_from(buffer)
        if length == _END:
            self._take_trailer()
            return None
        if length > CHUNK_BYTES_MAX:
            raise self._damaged(f"chunk {self._chunks} fails its checksum")
        end = _CHUNK.size + length
        if len(buffer) < end:
            return None
        chunk = bytes(buffer[_CHUNK.size : end])
        self._crc = crc32(chunk, crc32(_CRC.pack(length), self._crc))
        if crc != self._crc:
            raise self._damaged(f"chunk {self._chunks} fails its checksum")
        del buffer[:end]
        self._sha256.update(chunk)
        self._chunks += 1
        self._bytes += length
        return chunk

    def _take_trailer(self) -> None:
        buffer = self._buffer
        if len(buffer) < _TRAILER_BYTES:
            return
        body = bytes(buffer[: _TRAILER.size])
        if _CRC.unpack_from(buffer, _TRAILER.size)[0] != crc32(body, self._crc):
            raise self._damaged("the trailer fails its checksum")
        if body != _TRAILER.pack(_END, self._chunks, self._bytes, self._sha256.digest()):
            raise self._damaged("the whole fails its checksum")
        if len(buffer) > _TRAILER_BYTES:
            raise self._damaged("bytes follow the end")
        buffer.clear()
        self._done = True

    def _damaged(self, what: str) -> SnapshotDamaged:
        if self._advice is None:
            return SnapshotDamaged(self._where, what)
        return SnapshotDamaged(self._where, what, advice=self._advice)
