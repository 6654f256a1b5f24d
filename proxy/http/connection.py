"""One connection on which clients send requests, up to the point where a request needs somewhere to go.

On it one request at a time: a pipelined one waits, unparsed where possible, until its predecessor is answered.
Where requests go is for the subclasses to say: to the app (:mod:`proxy.http.inbound`), or through the mesh
(:mod:`proxy.http.outbound`).
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable

from proxy.http.head import trailer_lines
from proxy.http.options import HttpStats
from proxy.http.parser import SLICE_BYTES, Message, RequestParser
from proxy.http.replies import local_reply
from proxy.http.side import NEVER, HttpSide
from proxy.http.tunnel import Tunnel
from proxy.http.upstream import Upstream, joined
from proxy.mux.core import NOBODY
from proxy.stream import Channel, Data

log = logging.getLogger("lictor.proxy.http")

_LINGER_BYTES = 1 << 20
"""What a connection that is being closed may still send before it is reset."""


class HttpConnection:
    """A client's connection: its channel's peer. Mutated only by calls of the event loop."""

    __slots__ = (
        "_active", "_answered", "_backlog", "_channel", "_client_ended", "_closing", "_connecting", "_done", "_ended",
        "_full", "_head_due", "_lingered", "_loop", "_on_done", "_options", "_parser", "_reading_paused", "_replay",
        "_replay_bytes", "_replay_bytes_max", "_side", "_started", "_stats", "_tunnelled", "_upstream",
        "_upstream_full", "deadline", "peer",
    )  # fmt: skip

    def __init__(
        self,
        side: HttpSide,
        channel: Channel,
        stats: HttpStats,
        on_done: Callable[[], None] | None,
        *,
        replay_bytes_max: int,
    ) -> None:
        self._side = side
        self._loop = side.loop
        self._channel = channel
        self._stats = stats
        self._options = side.options
        self._on_done = on_done
        self._parser = RequestParser(self._options)
        self._backlog: deque[Data] = deque()
        """From the client, not yet parsed."""
        self._active: Message | None = None
        """The request whose turn it is."""
        self._replay: list[bytes] | None = None
        """What was sent of it, as long as it can be sent again."""
        self._replay_bytes = 0
        self._replay_bytes_max = replay_bytes_max
        self._ended = False
        """It was sent whole."""
        self._upstream: Upstream | None = None
        self._connecting = False
        """A connection to send it on is being made."""
        self._upstream_full = False
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
        self._started = self._loop.time()
        self._answered = 0
        """Bytes of the active request's response; counted where somebody is told."""
        self.deadline = self._after(self._options.idle_timeout_s)
        """When :meth:`expire` is due, by the loop's clock."""
        self.peer: Channel = NOBODY
        channel.peer = self
        side.keep(self)

    # For subclasses

    def _route(self, message: Message) -> None:
        """It is the active request's turn: reply, or :meth:`_launch` it."""
        raise NotImplementedError

    def _connect(self, message: Message) -> None:
        """Find a connection for the active request and :meth:`_send` it there, now or later, or reply."""
        raise NotImplementedError

    def _retry(self, upstream: Upstream, error: Exception | None, message: Message) -> bool:
        """The connection was lost before a response came; return whether the request is on its way again."""
        raise NotImplementedError

    def _let_go(self, upstream: Upstream) -> None:
        """The response is complete; ``upstream`` can take another request unless ``lost``."""
        raise NotImplementedError

    def _party(self) -> tuple[str, str]:
        """Return service and instance of the far side, as far as known."""
        raise NotImplementedError

    def _timed_out(self, message: Message) -> None:
        """The response did not begin in time. The connection to the upstream is dropped already."""
        self._reply(504, f"{self._options.service!r} did not answer in time", "timeout")

    def _launch(self, message: Message, head: bytes) -> None:
        """Send the active request with this head."""
        self._replay = [head]
        self._replay_bytes = 0
        self.deadline = NEVER
        if message.complete:
            self._await_response()
        self._connect(message)

    def _send(self, message: Message, upstream: Upstream) -> None:
        """Send the active request on ``upstream``, from its beginning."""
        head, replay = message.head, self._replay
        assert head is not None
        assert replay is not None
        self._connecting = False
        if upstream is not self._upstream:
            self._upstream = upstream
            self._upstream_full = False
            if self._full:
                upstream.channel.pause_reading()
        upstream.begin(head, keep_client=head.keep_alive and not self._side.draining)
        if head.has_body:
            self._ended = False
            self._forward(message, list(replay))
        else:
            self._ended = True
            upstream.channel.write(replay[0])

    def _await_response(self) -> None:
        if self._options.response_timeout_s:
            self.deadline = self._after(self._options.response_timeout_s)

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

    def abort(self, error: Exception | None = None) -> None:
        """The client's connection was cut."""
        if self._active is not None:
            self._count(0, "cut")
        self._finish()

    def pause_reading(self) -> None:
        self._full = True
        if self._upstream is not None:
            self._upstream.channel.pause_reading()

    def resume_reading(self) -> None:
        self._full = False
        if self._upstream is not None:
            self._upstream.channel.resume_reading()
        if not self._closing:
            self._advance()

    # For whoever serves the connection

    def cut(self, error: Exception | None = None) -> None:
        """Drop the connection at once, both sides, whatever is under way."""
        if not self._done:
            if self._active is not None:
                self._count(0, "cut")
            self._channel.abort(error)
            self._finish()

    def drain(self) -> None:
        """Close when nothing is under way."""
        if self._active is None and not self._parser.begun and not self._closing and not self._tunnelled:
            self._close()

    def expire(self) -> None:
        """The deadline has passed."""
        message = self._active
        if self._closing:
            self.cut()
        elif message is None:
            if self._parser.begun:
                self._channel.write(local_reply(408, "the request's headers took too long", close=True))
                self._stats.request("", 408, self._options.head_timeout_s, "timeout")
            self._close()
        elif message.complete and (self._upstream is None or self._upstream.head is None):
            self._drop_upstream()
            self._connecting = False
            self._timed_out(message)
            self._advance()
        else:
            self.deadline = NEVER

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
                self._start(messages.popleft())
            elif self._connecting:
                break
            else:
                self._forward(self._active, [])
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

    def _start(self, message: Message) -> None:
        self._active = message
        self._answered = 0
        self._started = self._loop.time()
        self._ended = self._head_due = False
        if message.refusal is not None or message.head is None:
            self._refuse(message)
        else:
            self._route(message)

    def _refuse(self, message: Message) -> None:
        refusal = message.refusal
        assert refusal is not None
        self._reply(refusal.status, str(refusal), "malformed", close=True)

    def _forward(self, message: Message, out: list[bytes]) -> None:
        """Send on what has come of the active request's body, behind ``out``."""
        head, upstream = message.head, self._upstream
        if message.refusal is not None:
            responding = upstream is not None and upstream.head is not None
            self._drop_upstream()
            if responding:
                self.cut()
            else:
                self._refuse(message)
            return
        if upstream is None or head is None:
            return
        if not self._ended or message.body:
            fresh: list[bytes] = []
            if message.body:
                if head.chunked:
                    for piece in message.body:
                        fresh += (b"%x\r\n" % len(piece), piece, b"\r\n")
                else:
                    fresh += message.body
                message.body.clear()
            if message.complete and not message.sent:
                message.sent = True
                if head.chunked:
                    trailers = trailer_lines(message.trailers) if message.keep_trailers else b""
                    fresh.append(b"0\r\n" + trailers + b"\r\n")
                self._await_response()
            if message.complete:
                self._ended = True
            if fresh:
                self._remember(fresh)
                out += fresh
        if out:
            for piece in joined(out):
                upstream.channel.write(piece)

    def _remember(self, pieces: list[bytes]) -> None:
        if self._replay is not None:
            self._replay_bytes += sum(map(len, pieces))
            if self._replay_bytes > self._replay_bytes_max:
                self._replay = None
            else:
                self._replay += pieces

    # Owner: what comes back

    def response_output(self, upstream: Upstream, pieces: list[bytes]) -> None:
        if upstream is self._upstream:
            if self._side.told is not None:
                self._answered += sum(map(len, pieces))
            for piece in joined(pieces):
                self._channel.write(piece)

    def response_complete(self, upstream: Upstream) -> None:
        message, head = self._active, upstream.head
        if upstream is not self._upstream or message is None or head is None:
            return
        self._count(head.status, "app")
        if not (upstream.reusable and self._ended):
            upstream.close()
            self._upstream = None
        self._let_go(upstream)
        whole = message.complete
        self._active = self._replay = None
        self.deadline = self._after(self._options.idle_timeout_s)
        if not whole or not upstream.keep_client:
            self._close()
            return
        if self._parser.held is not None:
            self._parser.resume()
        self._advance()

    def response_switched(self, upstream: Upstream, rest: Data) -> None:
        if upstream is not self._upstream:
            return
        self._count(101, "app")
        self._active = self._replay = None
        self._tunnelled = True
        self.deadline = NEVER
        early = [self._parser.held or b"", *self._backlog]
        self._backlog.clear()
        Tunnel(self._channel, upstream.channel, self._tunnel_ended)
        for data in early:
            if data:
                upstream.channel.write(data)
        if rest:
            self._channel.write(rest)
        if self._client_ended:
            self._channel.peer.write_eof()
        if self._reading_paused and not self._upstream_full:
            self._channel.resume_reading()

    def _tunnel_ended(self) -> None:
        self._upstream = None  # its channel has ended by itself
        self._finish()

    def upstream_lost(self, upstream: Upstream, error: Exception | None) -> None:
        if upstream is not self._upstream:
            return
        self._upstream = None
        self._upstream_full = False
        message = self._active
        if message is None or message.head is None:
            self._settle()
        elif upstream.head is not None:
            self.cut(error)
        elif not self._retry(upstream, error, message):
            if error is not None:
                self._side.burst_log.warning(f"{self._options.service!r}: {error}")
            self._reply(502, f"{self._options.service!r} gave no usable answer", "app-down")
            self._advance()

    def upstream_full(self, upstream: Upstream, full: bool) -> None:
        if upstream is self._upstream:
            self._upstream_full = full
            if full:
                self._settle()
            else:
                self._advance()

    # Ends

    def _reply(self, status: int, error: str, origin: str, *, close: bool = False) -> None:
        """Answer the active request ourselves and be done with it."""
        message = self._active
        assert message is not None
        head = message.head
        self._connecting = False
        close = close or head is None or not head.keep_alive or not message.complete or self._side.draining
        self._channel.write(
            local_reply(
                status,
                error,
                head_only=head is not None and head.method == b"HEAD",
                close=close,
                http10=head is not None and head.http10,
            )
        )
        self._count(status, origin)
        self._active = self._replay = None
        self.deadline = self._after(self._options.idle_timeout_s)
        if close:
            self._close()
        elif self._parser.held is not None:
            self._parser.resume()

    def _count(self, status: int, origin: str) -> None:
        message = self._active
        head = message.head if message is not None else None
        seconds = self._loop.time() - self._started
        self._stats.request(head.method.decode() if head is not None else "", status, seconds, origin)
        if self._side.told is not None:
            request = (head.method, head.target, head.fields) if head is not None else (b"", b"", ())
            self._side.told(self._party(), "http/1.1", request, (status, origin, self._answered), seconds)

    def _after(self, seconds: float) -> float:
        return self._loop.time() + seconds if seconds else NEVER

    def _drop_upstream(self) -> None:
        upstream, self._upstream = self._upstream, None
        self._upstream_full = False
        if upstream is not None:
            upstream.close()

    def _close(self) -> None:
        """Send nothing more; what the client still sends is thrown away until it ends too."""
        if self._closing:
            return
        self._closing = True
        self._backlog.clear()
        self._parser.messages.clear()
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
        self._side.connections.discard(self)
        if self._on_done is not None:
            self._on_done()
