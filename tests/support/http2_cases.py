"""HTTP/2 by hand, for what no library would send: frames and header blocks, and what is to become of them."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

import pytest
from h2.errors import ErrorCodes

from proxy.http2.frames import PREFACE, frame

SETTINGS = frame(4, 0, 0, b"")
ACK = frame(4, 1, 0, b"")
PING = frame(6, 0, 0, b"12345678")
E = ErrorCodes
END, HEAD_ENDS, PADDED, PRIORITY = 1, 4, 8, 32


@dataclass(frozen=True)
class Stream:
    """A stream is reset, and nothing else."""

    code: ErrorCodes
    id: int = 1


@dataclass(frozen=True)
class Connection:
    """The connection ends."""

    code: ErrorCodes


@dataclass(frozen=True)
class Fine:
    """Nothing ends."""


@dataclass(frozen=True)
class Case:
    rule: str
    sent: bytes
    outcome: Stream | Connection | Fine
    before: bytes = field(default=PREFACE + SETTINGS + ACK)
    """What is in order, of one who asks; of one who answers without the preface."""
    asked: int | None = None
    """Requests that have gone on, where that is of interest."""


def number(value: int) -> bytes:
    return struct.pack(">L", value)


def string(text: bytes) -> bytes:
    assert len(text) < 127
    return bytes([len(text)]) + text


def literal(name: bytes, value: bytes) -> bytes:
    """A field that goes into no table."""
    return b"\x00" + string(name) + string(value)


POST, HTTP, ROOT, HOST = b"\x83", b"\x86", b"\x84", b"\x01" + string(b"db")
ASK = POST + HTTP + ROOT + HOST
CUT = POST + HTTP
X = literal(b"x", b"y")
HUFFMAN = b"\x00\x01x"
"""A field's name, whose value follows in Huffman's code."""
LARGE_FIELD = b"\x40\x01x\x7f\xa1\x1e" + b"v" * 4000
"""It goes into the table, as its newest entry."""
LENGTH_3 = literal(b"content-length", b"3")


def headers(block: bytes, *, stream: int = 1, end: bool = False, flags: int = HEAD_ENDS) -> bytes:
    return frame(1, flags | (END if end else 0), stream, block)


def data(body: bytes = b"", *, stream: int = 1, end: bool = False) -> bytes:
    return frame(0, END if end else 0, stream, body)


def rst(stream: int = 1, code: int = 8) -> bytes:
    return frame(3, 0, stream, number(code))


def window(size: int, stream: int = 1) -> bytes:
    return frame(8, 0, stream, number(size))


def settings(*pairs: tuple[int, int]) -> bytes:
    return frame(4, 0, 0, b"".join(struct.pack(">HL", *pair) for pair in pairs))


def priority(stream: int, on: int) -> bytes:
    return frame(2, 0, stream, number(on) + b"\x0f")


OPEN = headers(ASK)
ASKED_ALL = headers(ASK, end=True)
SAYS_3 = headers(ASK + LENGTH_3)
MAX = (1 << 31) - 1
WRONG = Connection(E.PROTOCOL_ERROR)
SIZE = Connection(E.FRAME_SIZE_ERROR)
FLOW = Connection(E.FLOW_CONTROL_ERROR)
BLOCK = Connection(E.COMPRESSION_ERROR)
MALFORMED = Stream(E.PROTOCOL_ERROR)
CLOSED = Stream(E.STREAM_CLOSED)
FINE = Fine()


def named(cases: list[Case]) -> pytest.MarkDecorator:
    names = [case.rule for case in cases]
    assert len(set(names)) == len(names), "each rule once"
    return pytest.mark.parametrize("case", cases, ids=names)


def judged(outcome: Stream | Connection | Fine, got: tuple[list[tuple[int, int]], list[int]]) -> bool:
    if isinstance(outcome, Stream):
        return got == ([(outcome.id, outcome.code)], [])
    if isinstance(outcome, Connection):
        return got[1] == [outcome.code]
    return got == ([], [])
