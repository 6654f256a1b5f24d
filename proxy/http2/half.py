"""One HTTP/2 connection on a channel: bytes to events, and out again with the channel's back-pressure."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Final

from h2.errors import ErrorCodes

from proxy.errors import ProxyError
from proxy.http.head import Field
from proxy.http2.core import Core
from proxy.http2.errors import Http2Error
from proxy.http2.events import Event
from proxy.http2.frames import LAST_STREAM_ID, PREFACE, goaway
from proxy.mux.core import NOBODY
from proxy.stream import Channel, Data

__all__ = ["PREFACE", "Half"]

STREAMS_MAX: Final = 128
STREAM_WINDOW_BYTES: Final = 128 * 1024
"""A connection's window is as much as all its streams together, so that one that is not taken off never holds up the
others."""
HEADER_LIST_BYTES_MAX: Final = 64 * 1024
GREETING_S: Final = 10.0
"""How long the other end may take to say its settings and to take ours (RFC 9113, section 6.5.3)."""
_CONTROL_WHILE_FULL_MAX: Final = 1000
"""Pings and settings from an end that reads nothing; then it is cut off."""
OWED_BYTES_MAX: Final = 1024 * 1024
"""What is sent to an end that reads nothing, beside bodies, which wait: answers, resets, and what else it makes us
send. Then it is cut off."""


def _nothing_came(half: Half, events: list[Event]) -> None:
    """What one that is closed calls."""


def _nothing_ended(half: Half, error: Exception | None) -> None:
    """As above."""


def _nothing_free(half: Half) -> None:
    """As above."""


class Half:
    """The channel's peer. Its three callbacks tell the owner: events, the end, and room in the channel."""

    __slots__ = (
        "_closer",
        "_controls_while_full",
        "_greeting",
        "_greeting_s",
        "_linger_s",
        "_on_end",
        "_on_events",
        "_on_room",
        "_owed",
        "channel",
        "closed",
        "core",
        "full",
        "peer",
    )

    def __init__(
        self,
        *,
        client: bool,
        linger_s: float,
        on_events: Callable[[Half, list[Event]], None],
        on_end: Callable[[Half, Exception | None], None],
        on_room: Callable[[Half], None],
        streams_max: int = STREAMS_MAX,
        greeting_s: float = GREETING_S,
    ) -> None:
        self.channel: Channel = NOBODY
        self.peer: Channel = NOBODY
        self.closed = False
        """Nothing more is sent or taken."""
        self.full = False
        """The channel takes no more for now: no data frames are made for it."""
        self._controls_while_full = 0
        self._linger_s = linger_s
        self._closer: asyncio.TimerHandle | None = None
        """Runs once we have ended our direction, until the other end ends too."""
        self._greeting_s = greeting_s
        """0 once it is being waited for."""
        self._greeting: asyncio.TimerHandle | None = None
        """Runs from the first bytes that we send until the other end has said its settings and taken ours."""
        self._on_events = on_events
        self._on_end = on_end
        self._on_room = on_room
        self._owed = 0
        """Bytes sent since then."""
        self.core = Core(
            client=client,
            streams_max=streams_max,
            stream_window=STREAM_WINDOW_BYTES,
            list_bytes_max=HEADER_LIST_BYTES_MAX,
        )

    def flush(self) -> None:
        """Send what the connection wants to send."""
        if self.channel is not NOBODY and not self.closed:
            data = self.core.to_send()
            if data:
                if self.full:
                    self._owed += len(data)
                self.channel.write(data)
                if self._greeting_s:
                    self._greeting = asyncio.get_running_loop().call_later(self._greeting_s, self._not_greeted)
                    self._greeting_s = 0.0

    def _not_greeted(self) -> None:
        self._greeting = None
        if not self.closed:
            on_end = self._on_end
            slow = Http2Error(ErrorCodes.SETTINGS_TIMEOUT, "sent no SETTINGS in time, or did not acknowledge ours")
            self.go_away(ErrorCodes.SETTINGS_TIMEOUT, self.core.last_stream_id)
            self.close()
            on_end(self, slow)

    # Streams. Each returns False when the stream has ended: the peer may have reset it in bytes that the core has
    # seen already and whose event is still to come.

    def send_headers(self, stream_id: int, headers: Sequence[Field], *, end: bool) -> bool:
        """Send a header list, or trailers."""
        return self.core.send_headers(stream_id, headers, end=end)

    def send_data(self, stream_id: int, data: bytes | bytearray, *, end: bool) -> bool:
        """Send data, for which there must be room: :meth:`room`."""
        return self.core.send_data(stream_id, bytes(data), end=end)

    def room(self, stream_id: int) -> int:
        """How many bytes can be sent on a stream in one frame; -1 when it has ended."""
        return self.core.room(stream_id)

    def acknowledge(self, stream_id: int, size: int) -> None:
        """Give the peer back ``size`` of its window."""
        if size and not self.closed:
            self.core.give_back(stream_id, size)

    def reset(self, stream_id: int, code: ErrorCodes | int) -> None:
        """Cancel a stream."""
        if not self.closed:
            self.core.reset(stream_id, code)

    def go_away(self, error: ErrorCodes = ErrorCodes.NO_ERROR, last_stream_id: int = LAST_STREAM_ID) -> None:
        """Tell the peer to open no more streams; those under way go on."""
        if not self.closed:
            self.channel.write(goaway(last_stream_id, error))

    def controlled(self) -> bool:
        """The peer sent something that we have to answer at once; return whether it may go on so."""
        if self.full:
            self._controls_while_full += 1
        return self._controls_while_full <= _CONTROL_WHILE_FULL_MAX

    def take_leave(self) -> None:
        """End the connection: all streams have ended, and those that still come were not looked at."""
        if not self.closed:
            self.flush()
            self.go_away(last_stream_id=self.core.last_stream_id)
            self.close()

    def close(self) -> None:
        """Send what is left and end our direction. An end that stays open all the same is cut after a while."""
        if not self.closed:
            self.flush()
            self._part()
            self.channel.write_eof()
            self._closer = asyncio.get_running_loop().call_later(self._linger_s, self.channel.abort)

    def cut(self, error: Exception | None = None) -> None:
        """Drop the connection at once."""
        if not self.closed:
            self._part()
            self.channel.abort(error)

    def _part(self) -> None:
        """It is closed. What refers to each other is parted, so that all of it, which is much, is freed when the last
        of the two is let go of, and not when the collector comes by, which is seldom."""
        self.closed = True
        self._greeting_s = 0.0
        self._stop_greeting()
        self._on_events = _nothing_came
        self._on_end = _nothing_ended
        self._on_room = _nothing_free

    # Channel

    def write(self, data: Data) -> None:
        """Bytes from the other end."""
        if self.closed:
            return
        if self.full and self._owed > OWED_BYTES_MAX:
            on_end = self._on_end
            beyond = ProxyError("makes us answer but reads nothing")
            self.cut(beyond)
            on_end(self, beyond)
            return
        try:
            events = self.core.receive(bytes(data))
        except Http2Error as error:
            on_end = self._on_end
            self.flush()  # with the GOAWAY that the core has made
            self.close()
            on_end(self, error)
            return
        if self._greeting is not None and self.core.greeted:
            self._stop_greeting()
        self._on_events(self, events)

    def write_eof(self) -> None:
        """The other end has ended; in HTTP/2 that is the end of the connection."""
        on_end = self._on_end
        self.close()
        self._stop_lingering()
        on_end(self, None)

    def abort(self, error: Exception | None = None) -> None:
        """The connection was cut."""
        self._stop_lingering()
        if not self.closed:
            on_end = self._on_end
            self._part()
            on_end(self, error)

    def _stop_greeting(self) -> None:
        if self._greeting is not None:
            self._greeting.cancel()
            self._greeting = None

    def _stop_lingering(self) -> None:
        if self._closer is not None:
            self._closer.cancel()
            self._closer = None

    def pause_reading(self) -> None:
        self.full = True

    def resume_reading(self) -> None:
        self.full = False
        self._controls_while_full = self._owed = 0
        if not self.closed:
            self._on_room(self)
