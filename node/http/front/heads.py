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
_VALUE = re.compile(rb"[\t -~]*")
_METHODS = frozenset({b"GET", b"PUT", b"POST", b"DELETE"})
_NOT_PLAIN = frozenset(
    {"transfer-encoding", "content-encoding", "expect", "upgrade", "te", "trailer", "http2-settings", "keep-alive"}
    | {"proxy-connection"}
)


class Head:
    """A plain request's head. Requests with the same bytes share it."""

    __slots__ = ("body_size", "match", "memo", "message", "parked", "raw", "size")

    def __init__(self, message: RawRequestMessage, raw: bytes, body_size: int) -> None:
        self.message = message
        self.raw = raw
        self.size = len(raw)
        """Bytes of the head, its last line's end included."""
        self.body_size = body_size
        self.match: Any = None
        """The route, once it has been found; see `routing.py`."""
        self.memo: Any = None
        """What a request with this head was answered, if that can be answered again; see `repeats.py`."""
        self.parked: Any = None
        """What a request with this head last waited for; see `parking.py`."""


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
    target = collector.url.decode("ascii")
    path, _, query = target.partition("?")
    url = URL.build(path=path, query_string=query, encoded=True)
    message = RawRequestMessage(
        method.decode("ascii"),
        target,
        HttpVersion11,
        CIMultiDictProxy(headers),
        tuple(collector.fields),
        False,
        None,
        False,
        False,
        url,
    )
    return Head(message, data, body_size)


def _body_size(length: str | None) -> int | None:
    """Return the body's size, None for one that is gathered elsewhere."""
    if length is None:
        return 0
    if not length.isdigit() or len(length) > 8 or int(length) > BODY_BYTES_MAX:
        return None
    return int(length)


class HeadCache:
    """Heads by their bytes: a client that asks the same again sends the same bytes. The least recently used goes."""

    def __init__(self, streams: tuple[str, ...], entries_max: int = 256, bytes_max: int = 2048) -> None:
        self._streams = streams
        self._entries_max, self._bytes_max = entries_max, bytes_max
        self._held: dict[bytes, Head] = {}

    def __len__(self) -> int:
        return len(self._held)

    def head(self, data: bytes) -> Head | None:
        """Return the head, None if aiohttp is to have the request."""
        held = self._held.pop(data, None)
        if held is not None:
            self._held[data] = held
            return held
        head = parse_head(data)
        if head is None or self._streamed(head.message.url.raw_path):
            return None
        if head.message.method == "GET" and len(data) <= self._bytes_max:
            self._held[data] = head
            if len(self._held) > self._entries_max:
                del self._held[next(iter(self._held))]
        return head

    def _streamed(self, path: str) -> bool:
        """Whether a handler may send its answer, or read the body, piece by piece, which takes aiohttp's protocol."""
        return (unquote(path) if "%" in path else path).startswith(self._streams)
