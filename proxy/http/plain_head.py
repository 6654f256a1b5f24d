"""Heads in their plainest form, read in one pass, without a parser that calls back for each piece.

Nearly all heads are of this form and come whole. What is accepted here is a part of what RFC 9112 allows that can be
read in one way only, and is read as :mod:`proxy.http.parser` and :mod:`proxy.http.upstream` read it with llhttp:
``None`` is returned for everything else, however slightly it differs, and for all that is to be refused; they then
parse it from its beginning. ``tests/property/test_http_plain_head.py`` holds the two against each other.
"""

from __future__ import annotations

import re
from typing import Final

from proxy.http.head import (
    CONNECTION,
    DROP,
    EXPECT,
    HOST,
    HOST_VALUE,
    LENGTH,
    NAMES,
    RequestHead,
    ResponseHead,
    classify,
)  # fmt: skip

HEAD_BYTES_MAX: Final = 8 * 1024
"""Longer heads are for the parsers."""
_PRINTABLE: Final = bytes(range(0x20, 0x7F)) + bytes(range(0x80, 0x100))
_LINE_END: Final = b"\r\n"
_TOKEN: Final = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")
_METHODS: Final = frozenset((b"GET", b"HEAD", b"POST", b"PUT", b"DELETE", b"PATCH", b"OPTIONS"))
_STATUS: Final = re.compile(rb"HTTP/1\.1 ([2-5][0-9][0-9]) ([!-~]+(?: [!-~]+)*)")
_BODILESS: Final = (204, 304)
_STATUSES_MAX: Final = 256
_STATUS_BYTES_MAX: Final = 64

_statuses: Final[dict[bytes, tuple[int, bytes]]] = {}
"""Status lines seen, with status and reason. Bounded; a cache only."""


def _lines(head: bytes) -> list[bytes] | None:
    """Return a head's lines when each byte and each end of a line is what it seems to be."""
    lines = head.split(_LINE_END)
    # No control characters but the line ends at which it was split, and no blanks around a value.
    if head.translate(None, _PRINTABLE) != _LINE_END * (len(lines) - 1):
        return None
    if b":  " in head or b" \r" in head or head.endswith(b" "):
        return None
    return lines


def read_plain_request(head: bytes, body_bytes: int, header_count_max: int) -> RequestHead | None:
    """Return a request's head, read.

    ``head`` are its lines up to the empty one (without the end of the last); ``body_bytes`` is how many bytes came
    behind that: its body must be neither shorter nor longer. ``None``: leave it to the parser.
    """
    lines = _lines(head) if len(head) <= HEAD_BYTES_MAX else None
    if lines is None or len(lines) > header_count_max:
        return None
    method, _, rest = lines.pop(0).partition(b" ")
    target, _, version = rest.partition(b" ")
    if version != b"HTTP/1.1" or method not in _METHODS or target[:1] != b"/":
        return None
    if b"#" in target or not target.isascii():
        return None
    request = RequestHead(method, target, http10=False, keep_alive=True)
    fields = request.fields
    dropped = False
    host: bytes | None = None
    for at, line in enumerate(lines):
        name, colon, value = line.partition(b": ")
        known = NAMES.get(name)
        if known is None or not colon:
            if not colon or _TOKEN.fullmatch(name) is None:
                return None
            known = classify(name)
        lower, kind = known
        if kind:
            if kind == HOST:
                if host is not None or HOST_VALUE.fullmatch(value) is None:
                    return None
                host = value
            elif kind == LENGTH:
                if request.length is not None or value != b"%d" % body_bytes:
                    return None
                request.length = body_bytes
            elif (kind == CONNECTION and value.lower() == b"keep-alive") or (
                kind == DROP and lower != b"proxy-connection"  # which llhttp heeds
            ):
                lines[at] = b""
                dropped = True
                continue
            else:
                return None
        fields.append((lower, value))
    if host is None or (body_bytes and request.length is None):
        return None
    request.lines = [line for line in lines if line] if dropped else lines
    return request


def read_plain_response(head: bytes, body_bytes: int, header_count_max: int) -> ResponseHead | None:
    """Return the head of a final response that is of this length and has come whole; else as above."""
    lines = _lines(head) if len(head) <= HEAD_BYTES_MAX else None
    if lines is None or len(lines) > header_count_max:
        return None
    start = lines.pop(0)
    status = _statuses.get(start) or _status(start)
    if status is None:
        return None
    response = ResponseHead(status[0], status[1])
    fields = response.fields
    dropped = False
    for at, line in enumerate(lines):
        name, colon, value = line.partition(b": ")
        known = NAMES.get(name)
        if known is None or not colon:
            if not colon or _TOKEN.fullmatch(name) is None:
                return None
            known = classify(name)
        lower, kind = known
        if kind:
            if kind == LENGTH:
                if response.length is not None or value != b"%d" % body_bytes:
                    return None
                response.length = body_bytes
            elif (kind == CONNECTION and value.lower() == b"keep-alive") or (
                kind == DROP and lower != b"proxy-connection"
            ):
                lines[at] = b""
                dropped = True
                continue
            elif kind not in (HOST, EXPECT):  # which say nothing in a response
                return None
        fields.append((lower, value))
    if response.length is None:
        return None
    response.lines = [line for line in lines if line] if dropped else lines
    return response


def _status(line: bytes) -> tuple[int, bytes] | None:
    match = _STATUS.fullmatch(line)
    if match is None:
        return None
    status = (int(match[1]), match[2])
    if status[0] in _BODILESS:
        return None
    if len(_statuses) < _STATUSES_MAX and len(line) <= _STATUS_BYTES_MAX:
        _statuses[line] = status
    return status
