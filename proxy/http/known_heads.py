"""Heads that llhttp has read before, known again by their bytes.

A parser that calls back for each piece is a third of what a request costs, and a service's calls, and an app's
answers, often differ from the one before in their first line alone, or in nothing. So what llhttp made of the lines
below the first is kept by their bytes, and so is what it made of a first line by itself: the same bytes in the same
state of the parser mean the same. Nothing is read here: whatever was not seen before, or was not of the simplest kind
(HTTP/1.1, a length or no body, a connection that stays open), is left to llhttp from its beginning.

``tests/property/test_http_known_heads.py`` holds the two ways against each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from httptools import HttpParserError, HttpParserUpgrade, HttpRequestParser

from proxy.http.head import Field, RequestHead, ResponseHead

KEPT_MAX: Final = 512
"""Of each kind; when there are as many all are forgotten, so those in use are soon there again."""
KEPT_BYTES_MAX: Final = 2048
"""Longer ones are not kept."""
TRIALS: Final = 8
"""Once a connection has had so many heads in a row that were not known, only one in so many is kept."""
_END: Final = b"\r\n\r\n"


class _Known:
    """What was read of some lines; the lists are nobody's to change."""

    __slots__ = ("count", "fields", "length", "lines", "reason", "status")

    def __init__(
        self,
        fields: list[Field],
        lines: list[bytes],
        length: int | None,
        count: int,
        status: int = 0,
        reason: bytes = b"",
    ) -> None:
        self.fields = fields
        self.lines = lines
        self.length = length
        self.count = count
        """Headers that came, those that end here included."""
        self.status = status
        self.reason = reason


_blocks: Final[dict[bytes, _Known]] = {}
"""By a request's bytes from the end of its first line to the end of its head."""
_first_lines: Final[dict[bytes, tuple[bytes, bytes] | None]] = {}
"""Method and target, by a request's first line; None for one that is not of the simplest kind."""
_answers: Final[dict[bytes, _Known]] = {}
"""By the whole head of a response."""


def known_request(data: bytes, head_bytes_max: int, header_count_max: int) -> tuple[RequestHead, int] | None:
    """Return the head of the one request that ``data`` is, and where its body begins, if its bytes are known."""
    first = data.find(b"\r\n")
    end = data.find(_END, first) + 4 if first > 0 else 0
    if end < 4 or end > head_bytes_max:
        return None
    known = _blocks.get(data[first:end])
    if known is None or known.count > header_count_max or (known.length or 0) != len(data) - end:
        return None
    line = _read_first_line(data[:first])
    if line is None:
        return None
    head = RequestHead(line[0], line[1], http10=False, keep_alive=True)
    head.fields, head.lines, head.length = known.fields, known.lines, known.length
    return head, end


def remember_request(data: bytes, head: RequestHead, count: int) -> None:
    """Keep what llhttp made of ``data``, which was one whole request with ``count`` headers and nothing else."""
    if head.http10 or not head.keep_alive or head.chunked or head.upgrade or head.expects:
        return
    first = data.find(b"\r\n")
    end = _end_of_head(data, head.length or 0)
    # The first line must be one: only then were the lines below it read as headers.
    if end and data[:first] == head.method + b" " + head.target + b" HTTP/1.1":
        _keep(_blocks, data[first:end], _Known(head.fields, head.lines, head.length, count))


def known_response(data: bytes, head_bytes_max: int, header_count_max: int) -> tuple[ResponseHead, int] | None:
    """Return the head of the one final response that ``data`` is, and where its body begins, if it is known.

    Not for an answer to HEAD, whose length is not that of a body.
    """
    end = data.find(_END) + 4
    if end < 4 or end > head_bytes_max:
        return None
    known = _answers.get(data[:end])
    if known is None or known.count > header_count_max or known.length != len(data) - end:
        return None
    head = ResponseHead(known.status, known.reason)
    head.fields, head.lines, head.length = known.fields, known.lines, known.length
    return head, end


def remember_response(data: bytes, head: ResponseHead, fields: list[Field], lines: list[bytes], count: int) -> None:
    """Keep what llhttp made of ``data``, which was one whole final response of HTTP/1.1, not to HEAD, that leaves the
    connection open, with ``count`` headers, and nothing else. ``head`` may have been edited since: it had ``fields``
    and ``lines``."""
    if head.length is None or head.chunked or head.upgrade or head.status in (204, 304):
        return
    end = _end_of_head(data, head.length)
    if end:
        _keep(_answers, data[:end], _Known(fields, lines, head.length, count, head.status, head.reason))


def _end_of_head(data: bytes, length: int) -> int:
    """Return where the head ends that ``length`` bytes of body follow; 0 when that is not beyond doubt."""
    end = data.find(_END) + 4
    if end < 4 or end > KEPT_BYTES_MAX or len(data) - end != length:
        return 0
    # A line that ends otherwise, should a parser ever allow it, could have ended the head before.
    return end if data.count(b"\n", 0, end) == data.count(b"\r\n", 0, end) else 0


def _keep(known: dict[bytes, _Known], key: bytes, what: _Known) -> None:
    if len(known) >= KEPT_MAX:
        known.clear()
    known[key] = what


class _FirstLine:
    """What llhttp says of a first line with no headers below it."""

    def __init__(self) -> None:
        self.parser = HttpRequestParser(self)
        self.target = b""
        self.headers = False
        self.requests = 0

    def on_url(self, url: bytes) -> None:
        self.target += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers = True

    def on_message_complete(self) -> None:
        self.requests += 1

    def read(self, line: bytes) -> tuple[bytes, bytes] | None:
        """Return method and target. A parser is of no use after a line for which this is None."""
        self.target = b""
        self.requests = 0
        try:
            self.parser.feed_data(line + _END)
        except (HttpParserError, HttpParserUpgrade):
            return None
        target = self.target
        if self.requests != 1 or self.headers or self.parser.get_http_version() != "1.1":
            return None
        if target[:1] != b"/" or b"#" in target:
            return None
        return self.parser.get_method(), target


_reader: Final[list[_FirstLine]] = []


def _read_first_line(line: bytes) -> tuple[bytes, bytes] | None:
    if line in _first_lines:
        return _first_lines[line]
    reader = _reader.pop() if _reader else _FirstLine()
    found = reader.read(line)
    if found is not None:
        _reader.append(reader)
    if len(line) <= KEPT_BYTES_MAX:
        if len(_first_lines) >= KEPT_MAX:
            _first_lines.clear()
        _first_lines[line] = found
    return found


def forget_all() -> None:
    """Know nothing any more (for tests)."""
    _blocks.clear()
    _first_lines.clear()
    _answers.clear()


def sizes() -> Sequence[int]:
    """How many of each kind are kept."""
    return len(_blocks), len(_first_lines), len(_answers)
