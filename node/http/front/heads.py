"""A request's head out of its bytes, with httptools (llhttp, strict). Pure.

A head is taken here only if it is plain: HTTP/1.1 on a connection that stays open, one of a few methods, a target of
printable ASCII, each header once, a body by Content-Length or none. For any other :func:`parse_head` returns None and
aiohttp gets the bytes, untouched: what is odd or wrong has one judge, and one answer.
"""

from __future__ import annotations

import re
from typing import Any
from urllib.parse import unquote

import httptools
from aiohttp import HttpVersion11
from aiohttp.http import RawRequestMessage
from multidict import CIMultiDict, CIMultiDictProxy
from yarl import URL

HEAD_BYTES_MAX = 8000
"""Of a plain head; below aiohttp's bound on any one line of it."""
FIELDS_MAX = 48
BODY_BYTES_MAX = 64 * 1024
"""Of a plain request's body, which is gathered before the handler begins."""

_TARGET = re.compile(rb"/[!$-;=?-Z_a-z~\[\]]*")  # printable ASCII but " # < > \ ^ ` { | }
_LINE = re.compile(rb"(GET|PUT|POST|DELETE) (%s) HTTP/1\.1\r\n" % _TARGET.pattern)
_VALUE = re.compile(rb"[\t -~]*")
_METHODS = frozenset({b"GET", b"PUT", b"POST", b"DELETE"})
_NOT_PLAIN = frozenset(
    {"transfer-encoding", "content-encoding", "expect", "upgrade", "te", "trailer", "http2-settings", "keep-alive"}
    | {"proxy-connection"}
)


class Fields:
    """A head's lines below its first, parsed. Requests with the same bytes there share them."""

    __slots__ = ("body_size", "headers", "may_write", "raw")

    def __init__(self, headers: CIMultiDictProxy[str], raw: tuple[tuple[bytes, bytes], ...], body_size: int) -> None:
        self.headers, self.raw = headers, raw
        self.body_size = body_size
        self.may_write: bool | None = None
        """Whether a write with these is one for `writes.py`; None until that was asked."""


class Head:
    """A plain request's head. Requests with the same bytes share it."""

    __slots__ = ("_message", "body_size", "fields", "match", "memo", "method", "parked", "raw", "size", "target")

    def __init__(self, method: str, target: str, fields: Fields, raw: bytes) -> None:
        self.method, self.target, self.fields, self.raw = method, target, fields, raw
        self.size = len(raw)
        """Bytes of the head, its last line's end included."""
        self.body_size = fields.body_size
        self._message: RawRequestMessage | None = None
        self.match: Any = None
        """The route, once it has been found; see `routing.py`."""
        self.memo: Any = None
        """What a request with this head was answered, if that can be answered again; see `repeats.py`."""
        self.parked: Any = None
        """What a request with this head last waited for; see `parking.py`."""

    @property
    def message(self) -> RawRequestMessage:
        """The head as aiohttp's requests take it."""
        if self._message is None:
            path, _, query = self.target.partition("?")
            url = URL.build(path=path, query_string=query, encoded=True)
            headers, raw = self.fields.headers, self.fields.raw
            self._message = RawRequestMessage(
                self.method, self.target, HttpVersion11, headers, raw, False, None, False, False, url
            )
        return self._message


class _Collector:
    __slots__ = ("complete", "fields", "url")

    def __init__(self) -> None:
        self.url = b""
        self.fields: list[tuple[bytes, bytes]] = []
        self.complete = False

    def on_url(self, url: bytes) -> None:
        self.url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self.fields.append((name, value))

    def on_headers_complete(self) -> None:
        self.complete = True


def parse_head(data: bytes) -> Head | None:
    """Parse a head, which ends with the first empty line of ``data`` and of itself; None if it is not plain."""
    if len(data) > HEAD_BYTES_MAX:
        return None
    collector = _Collector()
    parser = httptools.HttpRequestParser(collector)
    try:
        parser.feed_data(data)
    except (httptools.HttpParserError, httptools.HttpParserUpgrade):
        return None
    method = parser.get_method()
    if (
        not collector.complete
        or method not in _METHODS
        or parser.get_http_version() != "1.1"
        or not parser.should_keep_alive()
        or parser.should_upgrade()
        or not _TARGET.fullmatch(collector.url)
        or len(collector.fields) > FIELDS_MAX
    ):
        return None
    headers: CIMultiDict[str] = CIMultiDict()
    for name, value in collector.fields:
        key, value = name.decode("ascii"), value.strip(b" \t")
        if not key or key in headers or key.lower() in _NOT_PLAIN or not _VALUE.fullmatch(value):
            return None
        headers[key] = value.decode("ascii")
    if "Host" not in headers or headers.get("Connection", "keep-alive").lower() != "keep-alive":
        return None
    body_size = _body_size(headers.get("Content-Length"))
    if body_size is None or (body_size and method == b"GET"):
        return None
    fields = Fields(CIMultiDictProxy(headers), tuple(collector.fields), body_size)
    return Head(method.decode("ascii"), collector.url.decode("ascii"), fields, data)


def _body_size(length: str | None) -> int | None:
    """Return the body's size, None for one that is gathered elsewhere."""
    if length is None:
        return 0
    if not length.isdigit() or len(length) > 8 or int(length) > BODY_BYTES_MAX:
        return None
    return int(length)


class HeadCache:
    """Heads by their bytes: a client that asks the same again sends the same bytes. The least recently used goes.

    Of heads that differ, as those of writes do, mostly the first line does: the lines below are kept by themselves.
    What llhttp makes of these does not depend on the first line, as long as that is a plain one.
    """

    def __init__(self, streams: tuple[str, ...], entries_max: int = 256, bytes_max: int = 2048) -> None:
        self._streams = streams
        self._entries_max, self._bytes_max = entries_max, bytes_max
        self._held: dict[bytes, Head] = {}
        self._fields: dict[bytes, Fields] = {}

    def __len__(self) -> int:
        return len(self._held)

    def head(self, data: bytes) -> Head | None:
        """Return the head, None if aiohttp is to have the request."""
        held = self._held.pop(data, None)
        if held is not None:
            self._held[data] = held
            return held
        head = self._parse(data)
        if head is None or self._streamed(head.target):
            return None
        if head.method == "GET" and len(data) <= self._bytes_max:
            self._held[data] = head
            if len(self._held) > self._entries_max:
                del self._held[next(iter(self._held))]
        return head

    def _parse(self, data: bytes) -> Head | None:
        end = data.find(b"\r\n") + 2
        line = _LINE.fullmatch(data, 0, end)
        if line is None or len(data) - end > self._bytes_max:
            return parse_head(data)
        below = data[end:]
        fields = self._fields.pop(below, None)
        if fields is None:
            head = parse_head(data)
            if head is None:
                return None
            fields = head.fields
            if len(self._fields) >= self._entries_max:
                del self._fields[next(iter(self._fields))]
        elif len(data) > HEAD_BYTES_MAX or (fields.body_size and line[1] == b"GET"):
            head = None
        else:
            head = Head(line[1].decode("ascii"), line[2].decode("ascii"), fields, data)
        self._fields[below] = fields
        return head

    def _streamed(self, target: str) -> bool:
        """Whether a handler may send its answer, or read the body, piece by piece, which takes aiohttp's protocol."""
        return (unquote(target) if "%" in target else target).startswith(self._streams)
