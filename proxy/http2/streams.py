"""One stream of an HTTP/2 connection, and the windows of flow control (RFC 9113, sections 5.1 and 5.2)."""

from __future__ import annotations

from typing import Final

from h2.errors import ErrorCodes

from proxy.http2.errors import Http2Error
from proxy.http2.fields import UNKNOWN, malformed

WINDOW_MAX: Final = (1 << 31) - 1
_RESETS_KEPT: Final = 1024
"""Streams that were reset are known as such for so many more at least; no peer has as many under way."""


class Window:
    """How much the other end may send us, of which it gets back what has been dealt with, in few pieces."""

    def __init__(self, size: int) -> None:
        self.size = size
        """What it may send now."""
        self._size_max = size
        self._done = 0

    def take(self, size: int) -> None:
        """So much has come. Raises :class:`Http2Error` when that is more than there was room for."""
        self.size -= size
        if self.size < 0:
            raise Http2Error(ErrorCodes.FLOW_CONTROL_ERROR, "more data than there was room for")

    def give_back(self, size: int) -> int:
        """So much has been dealt with; return by how much to open the window now, or 0.

        That waits until it is half of the window, or the window is shut.
        """
        self._done += size
        shut = self.size == 0 and self._done > min(1024, self._size_max // 4)
        if not shut and self._done < self._size_max // 2:
            return 0
        more = min(self._done, self._size_max - self.size)
        self._done = 0
        self.size += more
        return more


class Stream:
    """A stream that has not ended both ways."""

    def __init__(self, stream_id: int, window: int, room: int) -> None:
        self.id = stream_id
        self.window = Window(window)
        self.room = room
        """What the other end takes; may be below zero (section 6.9.2)."""
        self.came_head = False
        """Fields have come that are not informational."""
        self.came_end = False
        self.sent_head = False
        self.sent_end = False
        self.hints = 0
        """Informational responses that have come."""
        self.no_body = False
        """What comes answers a request by HEAD."""
        self._length = UNKNOWN
        self._came = 0

    def expect(self, length: int, *, end: bool) -> None:
        """A message comes that says to be so long, or nothing of it; ``end``: it has no body. Raises
        :class:`~proxy.http2.errors.StreamError`."""
        self._length = length
        if end and length > 0:
            raise malformed(f"Content-Length is {length}, and there is no body")

    def count(self, size: int, *, end: bool) -> None:
        """So much of the body has come. Raises :class:`~proxy.http2.errors.StreamError` when that is not what it was
        said to be."""
        self._came += size
        if self._length != UNKNOWN and (self._came > self._length or (end and self._came < self._length)):
            raise malformed(f"a body that is not of the {self._length} bytes that Content-Length says")


class Resets:
    """Which of the streams that have ended were reset, and by whom, as far as that is still of interest."""

    def __init__(self) -> None:
        self._recent: dict[int, bool] = {}
        self._before: dict[int, bool] = {}

    def add(self, stream_id: int, *, by_us: bool) -> None:
        """A stream was reset."""
        if len(self._recent) >= _RESETS_KEPT:
            self._before = self._recent
            self._recent = {}
        self._recent[stream_id] = by_us

    def has(self, stream_id: int) -> bool:
        """Whether a stream was reset, by either end."""
        return stream_id in self._recent or stream_id in self._before

    def by_us(self, stream_id: int) -> bool:
        """Whether we reset a stream: what still comes on it was under way then, or its sender does not care."""
        if stream_id in self._recent:
            return self._recent[stream_id]
        return self._before.get(stream_id, False)
