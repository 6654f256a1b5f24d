"""A client's connection as far as its requests come in: one after the other, no faster than they are dealt with.

On it one request at a time: a pipelined one waits, unparsed where possible, until its predecessor is answered. What
is done with a request is for the subclasses.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable

from proxy.http.options import HttpStats
from proxy.http.parser import SLICE_BYTES, Message, RequestParser
from proxy.http.replies import local_reply
from proxy.http.side import NEVER, HttpSide
from proxy.mux.core import NOBODY
from proxy.stream import Channel, Data

log = logging.getLogger("lictor.proxy.http")

_LINGER_BYTES = 1 << 20
"""What a connection that is being closed may still send before it is reset."""


class Intake:
    """A client's connection: its channel's peer. Mutated only by calls of the event loop."""

    __slots__ = (
        "_active", "_backlog", "_channel", "_client_ended", "_closing", "_connecting", "_done", "_ended", "_full",
        "_head_due", "_lingered", "_loop", "_on_done", "_options", "_parser", "_reading_paused", "_side", "_stats",
        "_tunnelled", "_upstream_full", "deadline", "peer",
    )  # fmt: skip

    def __init__(
        self, side: HttpSide, channel: Channel, stats: HttpStats, on_done: Callable[[], None] | None
    ) -> None:
        self._side = side
        self._loop = side.loop
        self._channel = channel
        self._stats = stats
        self._options = side.options
        self._on_done = on_done
        self._parser = RequestParser(self._options, side.memory)
        self._backlog: deque[Data] = deque()
        """From the client, not yet parsed."""
        self._active: Message | None = None
        """The request whose turn it is."""
        self._ended = False
        """It was sent whole."""
        self._connecting = False
        """A connection to send it on is being made."""
        self._upstream_full = False
        """That connection takes no more for now."""
        self._full = False
        """The client takes no more for now."""
        self._reading_paused = False
        self._client_ended = False
        self._closing = False
        self._lingered = 0
        self._tunnelled = False
        self._head_due = False
        """The deadline is that of a head in the making."""
        self._done = False
        self.deadline = self._after(self._options.idle_timeout_s)
        """When :meth:`expire` is due, by the loop's clock."""
        self.peer: Channel = NOBODY
        channel.peer = self
        side.keep(self)

    # For subclasses

    def _begin(self, message: Message) -> None:
        """It is the request's turn; it may be none that can be accepted."""
        raise NotImplementedError

    def _more(self, message: Message) -> None:
        """More has come of the request whose turn it is."""
        raise NotImplementedError

    def _overdue(self, message: Message) -> None:
        """The deadline has passed, and it is this request's turn."""
        raise NotImplementedError

    def _drop_upstream(self) -> None:
        """Close what the request was sent on, if anything."""
        raise NotImplementedError

    def abort(self, error: Exception | None = None) -> None:
        """The client's connection was cut."""
        raise NotImplementedError

    def cut(self, error: Exception | None = None) -> None:
        """Drop the connection at once, both sides, whatever is under way."""
        raise NotImplementedError

    def pause_reading(self) -> None:
        """The client takes no more for now."""
        raise NotImplementedError

    def resume_reading(self) -> None:
        """The client takes more again."""
        raise NotImplementedError

    # Channel: what the client's connection calls

    def write(self, data: Data) -> None:
        """Request bytes."""
        if self._closing:
            self._lingered += len(data)
            if self._lingered > _LINGER_BYTES:
                self.cut()
            return
        try:
            if self._backlog or len(data) > SLICE_BYTES or self._blocked():
                self._backlog.append(data)
                self._pump()
            else:
                self._parser.feed(data)
                self._advance()
        except Exception as error:  # a fault here must end this connection, not the session that carries others
            log.exception("a connection is cut")
            self.cut(error)

    def write_eof(self) -> None:
        """The client sends no more."""
        self._client_ended = True
        if self._closing:
            self._finish()
        else:
            self._settle()

    # For whoever serves the connection

    def drain(self) -> None:
        """Close when nothing is under way."""
        if self._active is None and not self._parser.begun and not self._closing and not self._tunnelled:
            self._close()

    def expire(self) -> None:
        """The deadline has passed."""
        if self._closing:
            self.cut()
        elif self._active is not None:
            self._overdue(self._active)
        else:
            if self._parser.begun:
                self._channel.write(local_reply(408, "the request's headers took too long", close=True))
                self._stats.request("", 408, self._options.head_timeout_s, "timeout")
            self._close()

    # Requests

    def _blocked(self) -> bool:
        """Whether bytes from the client must wait, unparsed."""
        active = self._active
        if active is not None and (active.complete or self._connecting or self._upstream_full):
            return True
        return bool(self._parser.messages) or self._parser.held is not None

    def _pump(self) -> None:
        """Parse of the backlog what can be parsed now."""
        backlog = self._backlog
        while backlog and not self._closing and not self._blocked():
            data = backlog.popleft()
            if len(data) > SLICE_BYTES:
                view = memoryview(data)
                backlog.appendleft(view[SLICE_BYTES:])
                data = view[:SLICE_BYTES]
            self._parser.feed(data)
            self._turn()
        self._settle()

    def _advance(self) -> None:
        """Go on as far as possible, after anything has changed."""
        self._turn()
        if self._backlog:
            self._pump()
        else:
            self._settle()

    def _turn(self) -> None:
        """Start the next requests and send on what came of the one whose turn it is."""
        messages = self._parser.messages
        while not self._closing:
            if self._active is None:
                if not messages or self._full:
                    break
                message = self._active = messages.popleft()
                self._ended = self._head_due = False
                self._begin(message)
            elif self._connecting:
                break
            else:
                self._more(self._active)
                break

    def _settle(self) -> None:
        """Set what follows from the state: reading on or not, the end, the deadline."""
        if self._done or self._closing:
            return
        active, parser = self._active, self._parser
        if not self._backlog:
            if active is None and not parser.messages:
                if self._client_ended or parser.stopped or (self._side.draining and not parser.begun):
                    self._close()
                    return
                if parser.begun and not self._head_due:
                    self._head_due = True
                    self.deadline = self._after(self._options.head_timeout_s)
            elif self._client_ended and active is not None and not active.complete:
                self.cut()
                return
        paused = bool(self._backlog) or (self._upstream_full and not self._ended and self._active is not None)
        if paused is not self._reading_paused:
            self._reading_paused = paused
            if paused:
                self._channel.pause_reading()
            else:
                self._channel.resume_reading()

    # Ends

    def _close(self) -> None:
        """Send nothing more; what the client still sends is thrown away until it ends too."""
        if self._closing:
            return
        self._closing = True
        self._backlog.clear()
        self._parser.messages.clear()
        self._parser.release()
        self._drop_upstream()
        self._channel.write_eof()
        if self._client_ended:
            self._finish()
            return
        self.deadline = self._after(self._options.linger_s)
        if self._reading_paused:
            self._reading_paused = False
            self._channel.resume_reading()

    def _finish(self) -> None:
        """Both directions have ended, or the connection is gone."""
        if self._done:
            return
        self._done = self._closing = True
        self._active = None
        self._connecting = False
        self.deadline = NEVER
        self._drop_upstream()
        self._parser.release()
        self._side.connections.discard(self)
        if self._on_done is not None:
            self._on_done()

    def _after(self, seconds: float) -> float:
        return self._loop.time() + seconds if seconds else NEVER
