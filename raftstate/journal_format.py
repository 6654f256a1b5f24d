"""How the journal's bytes are laid out: pure functions from values to bytes and back.

A *segment* is a header followed by records. Each *record* carries length, kind, term, index and a CRC32 that
is seeded with the CRC of the record before it, across segments: bytes that once stood elsewhere, or in an
older life of the file, never pass for the next record.

A *certificate* is a record outside that chain. It is written after a sync has returned, so finding one at
offset X says: everything before X was durable. It stands for itself (own CRC, own offset, the segment's
nonce), so it can be found behind damage. That decides between the two reasons for an unreadable record:

- no certificate behind it: a torn tail of a write that was never synced, which may be cut;
- a certificate behind it: something acknowledged is damaged, which must be refused.

A *closing mark* is a certificate under the opposite nonce, at the end of a segment. It is written once the segment
behind it is durable, so one without a next segment says: the newest segment has gone, and what it held with it.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple
from zlib import crc32

Entry = tuple[bytes, int, int]
"""A log entry as pysyncobj has it: (command, index, term)."""

VERSION = 1


class Kind(IntEnum):
    """What a record says. Zero is no kind: a run of zero bytes must not parse."""

    ENTRY = 1  # append (payload, index, term)
    CUT = 2  # remove the entries from `index` on: they conflicted
    COMPACT = 3  # remove the entries below `index`; payload: number of the first segment still needed
    RESET = 4  # a snapshot was installed: the log is the one empty entry (b"", index, term)
    CLEAR = 5  # the log is empty
    VOTE = 6  # current term is `term`; payload: who got this server's vote


class Record(NamedTuple):
    """One change of the log or of term and vote."""

    kind: Kind
    term: int
    idx: int
    payload: bytes = b""


_RECORD = struct.Struct("<IIBQQ")  # crc, payload length, kind, term, index
_RECORD_TAIL = struct.Struct("<IBQQ")
_CRC = struct.Struct("<I")
FIRST_SEGMENT = struct.Struct("<Q")
RECORD_OVERHEAD = _RECORD.size
PAYLOAD_BYTES_MAX = 1 << 30

# Where a record has its length stands 0xFFFFFFFF, which no record has.
_CERTIFICATE_MAGIC = b"\x9dCRT\xff\xff\xff\xff"
_CERTIFICATE = struct.Struct("<8s16sQQIQI")  # magic, nonce, segment, own offset, chain, commit index, crc
CERTIFICATE_BYTES = _CERTIFICATE.size

_HEADER_MAGIC = b"LICTORJ\n"
# magic, version, segment, nonce, first segment needed, previous segment's bytes, chain, term, commit index,
# length of the vote that follows
_HEADER = struct.Struct("<8sHQ16sQQIQQH")


def encode_vote(voted_for: str | None) -> bytes:
    """A vote as payload; None (no vote yet in this term) differs from the empty name."""
    return b"" if voted_for is None else b"\x01" + voted_for.encode()


def decode_vote(payload: bytes) -> str | None:
    """Inverse of `encode_vote`."""
    return payload[1:].decode() if payload else None


def encode_record(record: Record, chain: int) -> tuple[bytes, int]:
    """The record's bytes, and the chain value for the record after it."""
    kind, term, index, payload = record
    tail = _RECORD_TAIL.pack(len(payload), kind, term, index)
    crc = crc32(payload, crc32(tail, chain))
    return _CRC.pack(crc) + tail + payload, crc


def decode_record(data: bytes, offset: int, chain: int) -> tuple[Record, int, int] | None:
    """(record, offset behind it, chain) of the record at `offset`; None if none stands there whole."""
    start = offset + _RECORD.size
    if start > len(data):
        return None
    crc, length, kind, term, index = _RECORD.unpack_from(data, offset)
    if length > PAYLOAD_BYTES_MAX or start + length > len(data):
        return None
    payload = data[start : start + length]
    if crc32(payload, crc32(data[offset + 4 : start], chain)) != crc:
        return None
    try:
        return Record(Kind(kind), term, index, payload), start + length, crc
    except ValueError:
        return None


@dataclass(frozen=True, slots=True)
class Header:
    """The start of a segment, with what is needed to replay from here when older segments are gone.

    `previous_bytes` and `chain` seal the segment before: it ends there, with that chain value, and all of it was
    durable before this header was written.
    """

    segment: int
    nonce: bytes
    first_segment: int
    previous_bytes: int
    chain: int
    term: int
    voted_for: str | None
    commit_index: int

    def encode(self) -> bytes:
        """The header's bytes."""
        vote = encode_vote(self.voted_for)
        head = (
            _HEADER.pack(
                _HEADER_MAGIC,
                VERSION,
                self.segment,
                self.nonce,
                self.first_segment,
                self.previous_bytes,
                self.chain,
                self.term,
                self.commit_index,
                len(vote),
            )
            + vote
        )
        return head + _CRC.pack(crc32(head))


def decode_header(data: bytes) -> tuple[Header, int] | None:
    """The header at the start of a segment's bytes and the offset behind it; None if it is not whole."""
    if len(data) < _HEADER.size:
        return None
    magic, version, segment, nonce, first, previous, chain, term, commit, vote_bytes = _HEADER.unpack_from(data)
    end = _HEADER.size + vote_bytes
    if magic != _HEADER_MAGIC or version != VERSION or end + _CRC.size > len(data):
        return None
    if _CRC.unpack_from(data, end)[0] != crc32(data[:end]):
        return None
    voted_for = decode_vote(data[_HEADER.size : end])
    return Header(segment, nonce, first, previous, chain, term, voted_for, commit), end + _CRC.size


@dataclass(frozen=True, slots=True)
class Certificate:
    """Says that everything before `offset` of `segment` was durable, and which index was committed then."""

    nonce: bytes
    segment: int
    offset: int
    chain: int
    commit_index: int

    def encode(self) -> bytes:
        """The certificate's bytes."""
        body = _CERTIFICATE.pack(
            _CERTIFICATE_MAGIC, self.nonce, self.segment, self.offset, self.chain, self.commit_index, 0
        )[: -_CRC.size]
        return body + _CRC.pack(crc32(body))


def decode_certificate(data: bytes, offset: int) -> Certificate | None:
    """The certificate at `offset`, if one stands there whole and speaks of that offset."""
    if not data.startswith(_CERTIFICATE_MAGIC, offset) or offset + CERTIFICATE_BYTES > len(data):
        return None
    _, nonce, segment, own, chain, commit, crc = _CERTIFICATE.unpack_from(data, offset)
    if own != offset or crc32(data[offset : offset + CERTIFICATE_BYTES - _CRC.size]) != crc:
        return None
    return Certificate(nonce, segment, own, chain, commit)


def unknown_version(data: bytes) -> int | None:
    """The format version of a segment that a later Lictor wrote; None if it is one of ours, or no segment."""
    if len(data) < _HEADER.size or not data.startswith(_HEADER_MAGIC):
        return None
    version: int = _HEADER.unpack_from(data)[1]
    return version if version > VERSION else None


def find_certificates(data: bytes, offset: int, segment: int, nonce: bytes | None) -> Iterator[Certificate]:
    """Certificates of this segment at or behind `offset`. `nonce` None: the header is lost, any nonce will do."""
    at = data.find(_CERTIFICATE_MAGIC, offset)
    while at >= 0:
        found = decode_certificate(data, at)
        if found is not None and found.segment == segment and nonce in (None, found.nonce):
            yield found
        at = data.find(_CERTIFICATE_MAGIC, at + 1)


def closing_mark(header: Header, offset: int) -> bytes:
    """What ends the segment of this header at `offset`: the next one is durable."""
    return Certificate(_opposite(header.nonce), header.segment, offset, 0, 0).encode()


def is_closed(data: bytes, offset: int, header: Header) -> bool:
    """Whether a segment has a closing mark at or behind `offset`."""
    return any(find_certificates(data, offset, header.segment, _opposite(header.nonce)))


def _opposite(nonce: bytes) -> bytes:
    return bytes(byte ^ 0xFF for byte in nonce)


def segment_name(number: int) -> str:
    """File name of a segment; names sort as the segments do."""
    return f"{number:016x}.journal"


def segment_number(name: str) -> int | None:
    """Number of the segment that has this file name; None for any other file."""
    stem, dot, suffix = name.partition(".")
    if not dot or suffix != "journal" or len(stem) != 16:
        return None
    try:
        return int(stem, 16)
    except ValueError:
        return None
