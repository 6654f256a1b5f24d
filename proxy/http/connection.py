"""One connection on which clients send requests, up to the point where a request needs somewhere to go.

How requests come in is for :mod:`proxy.http.intake`; here each is sent on, and its response sent back. Where they go
is for the subclasses to say: to the app (:mod:`proxy.http.inbound`) or through the mesh (:mod:`proxy.http.outbound`).
"""

from __future__ import annotations

from collections.abc import Callable

from proxy.http.errors import TooMuchHeld
from proxy.http.head import name_host, trailer_lines
from proxy.http.intake import Intake
from proxy.http.options import LIMITED, HttpStats
from proxy.http.parser import OVERLOADED, Message
from proxy.http.replies import local_reply
from proxy.http.side import NEVER, HttpSide
from proxy.http.tunnel import Tunnel
from proxy.http.upstream import Upstream, joined
from proxy.stream import Channel, Data
from proxy.tracing import RequestTrace


class HttpConnection(Intake):
    """A client's connection, and the upstream of the request whose turn it is."""

    __slots__ = (
        "_answered", "_asked_at", "_replay", "_replay_bytes", "_replay_bytes_max", "_started", "_trace", "_tracer",
        "_upstream",
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
        super().__init__(side, channel, stats, on_done)
        self._replay: list[bytes] | None = None
        """What was sent of the active request, as long as it can be sent again."""
        self._replay_bytes = 0
        self._replay_bytes_max = replay_bytes_max
        self._upstream: Upstream | None = None
        self._started = self._loop.time()
        self._asked_at = NEVER
        """When the active request had come whole; kept where there is a limit to what follows."""
        self._answered = 0
        """Bytes of the active request's response; counted where somebody is told."""
        self._tracer = side.tracer
        self._trace: RequestTrace | None = None
        """What is made of the active request's trace context; None: nothing."""

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
        """The request has come whole."""
        limit_s = self._limit_s()
        if limit_s:
            if self._asked_at == NEVER:
                self._asked_at = self._loop.time()
            self.deadline = self._asked_at + limit_s
            self._side.heed(self.deadline)

    def _limit_s(self) -> float:
        """How long the response may take to come, all of it; 0: for ever."""
        return self._options.response_timeout_s

    def _finish_by(self) -> float:
        limit_s = self._limit_s()
        return self._asked_at + limit_s if limit_s else NEVER

    # Channel: what the client's connection calls

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

    def cut(self, error: Exception | None = None) -> None:
        """Drop the connection at once, both sides, whatever is under way."""
        if not self._done:
            if self._active is not None:
                self._count(0, "cut")
            self._channel.abort(error)
            self._finish()

    def drain(self) -> None:
        """Close when nothing is under way, and let the answer to what is say so."""
        upstream = self._upstream
        if upstream is not None and upstream.head is None:
            upstream.keep_client = False
        super().drain()

    # Requests

    def _begin(self, message: Message) -> None:
        self._answered = 0
        self._trace = None
        self._started = self._loop.time()
        self._asked_at = NEVER
        head = message.head
        if message.refusal is not None or head is None:
            self._refuse(message)
            return
        if head.http10:
            name_host(head, self._options.service)
        self._route(message)

    def _more(self, message: Message) -> None:
        self._forward(message, [])

    def _overdue(self, message: Message) -> None:
        if message.complete and (self._upstream is None or self._upstream.head is None):
            self._drop_upstream()
            self._connecting = False
            self._timed_out(message)
            self._advance()
        elif self._finish_by() <= self._loop.time():
            self.cut()
        else:
            self.deadline = self._finish_by()
            self._side.heed(self.deadline)

    def _refuse(self, message: Message) -> None:
        refusal = message.refusal
        assert refusal is not None
        origin = "overloaded" if refusal.status == OVERLOADED else "malformed"
        if origin == "overloaded":
            self._side.burst_log.warning(f"{self._options.service!r}: a request is refused: {refusal}")
        self._reply(refusal.status, str(refusal), origin, close=True)

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
        now = self._loop.time()
        self._count(head.status, "app", now)
        if not (upstream.reusable and self._ended):
            upstream.close()
            self._upstream = None
        keep_client = upstream.keep_client  # another request may have it in a moment
        self._let_go(upstream)
        whole = message.complete
        self._active = self._replay = None
        idle_s = self._options.idle_timeout_s
        self.deadline = now + idle_s if idle_s else NEVER
        if not whole or not keep_client:
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
        Tunnel(self._channel, upstream.channel, self._tunnel_ended, self._stirred())
        for data in early:
            if data:
                upstream.channel.write(data)
        if rest:
            self._channel.write(rest)
        if self._client_ended:
            self._channel.peer.write_eof()
        if self._reading_paused and not self._upstream_full:
            self._channel.resume_reading()

    def _stirred(self) -> Callable[[], None] | None:
        """Return who wants to know when something passes the tunnel that begins."""
        return None

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
            if isinstance(error, TooMuchHeld):
                self._reply(OVERLOADED, str(error), "overloaded")
            else:
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
                limited=origin == LIMITED,
            )
        )
        self._count(status, origin)
        self._active = self._replay = None
        self.deadline = self._after(self._options.idle_timeout_s)
        if close:
            self._close()
        elif self._parser.held is not None:
            self._parser.resume()

    def _count(self, status: int, origin: str, now: float | None = None) -> None:
        message = self._active
        head = message.head if message is not None else None
        seconds = (self._loop.time() if now is None else now) - self._started
        self._stats.request(head.method_name if head is not None else "", status, seconds, origin)
        if self._side.told is not None:
            request = (head.method, head.target, head.fields) if head is not None else (b"", b"", ())
            answer = (status, origin, self._answered)
            self._side.told(self._party(), "http/1.1", request, answer, seconds, self._trace)

    def _drop_upstream(self) -> None:
        upstream, self._upstream = self._upstream, None
        self._upstream_full = False
        if upstream is not None:
            upstream.close()
