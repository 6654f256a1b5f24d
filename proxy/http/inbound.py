"""The destination's side: requests from the mesh, each decided, then sent to the app.

One :class:`InboundHttp` per app, one :class:`InboundConnection` per connection from the mesh, on it one request at
a time: a pipelined one waits, unparsed where possible, until its predecessor is answered. It is decided when its
turn has come, by the policy of that moment.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable

from proxy.authz import Decision, Request
from proxy.errors import ProxyError
from proxy.http.head import trailer_lines
from proxy.http.options import HttpOptions, HttpStats
from proxy.http.parser import SLICE_BYTES, Message, RequestParser
from proxy.http.replies import denial, local_reply
from proxy.http.tunnel import Tunnel
from proxy.http.upstream import Upstream, joined
from proxy.logs import BurstLog
from proxy.mux.core import NOBODY
from proxy.stream import Channel, Data
from proxy.tasks import Tasks
from raftstate.model.identity import Identity

log = logging.getLogger("lictor.proxy.http")

Dial = Callable[[Channel], Awaitable[Channel]]
"""Opens a connection whose peer is, from its first byte on, the channel given; raises ProxyError or OSError."""
Decide = Callable[[Request], Decision]
_NEVER = float("inf")
_LINGER_BYTES = 1 << 20
"""What a connection that is being closed may still send before it is reset."""


class InboundHttp:
    """The HTTP filter in front of one app. ``options`` may be replaced; new connections then go by the new ones."""

    def __init__(self, options: HttpOptions) -> None:
        self.options = options
        self.tasks = Tasks("http filter")
        self.connections: set[InboundConnection] = set()
        self.draining = False
        self.burst_log = BurstLog(log)
        self.loop = asyncio.get_running_loop()
        self._sweeper: asyncio.TimerHandle | None = None

    def serve(
        self,
        downstream: Channel,
        *,
        peer: Identity,
        dial: Dial,
        decide: Decide,
        stats: HttpStats,
        identity: bytes = b"",
        on_done: Callable[[], None] | None = None,
    ) -> InboundConnection:
        """Serve a connection from ``peer``; its bytes come to the returned object as the channel's peer.

        ``dial`` connects to the app when there is a request for it (:meth:`InboundConnection.adopt` gives a
        connection that is there already); ``decide`` is asked about each request when its turn has come;
        ``identity`` is the value of ``x-forwarded-client-cert``; ``on_done`` is called once, at the end.
        """
        connection = InboundConnection(self, downstream, peer, dial, decide, stats, identity, on_done)
        self.connections.add(connection)
        if self._sweeper is None:
            self._sweeper = self.loop.call_later(self.options.sweep_s, self._sweep)
        return connection

    def drain(self) -> None:
        """Let requests under way end, then close their connections; idle ones at once."""
        self.draining = True
        for connection in list(self.connections):
            connection.drain()

    async def close(self) -> None:
        """Cut everything."""
        for connection in list(self.connections):
            connection.cut()
        if self._sweeper is not None:
            self._sweeper.cancel()
        await self.tasks.close()

    def _sweep(self) -> None:
        self._sweeper = None
        now = self.loop.time()
        for connection in [each for each in self.connections if each.deadline <= now]:
            connection.expire()
        if self.connections:
            self._sweeper = self.loop.call_later(self.options.sweep_s, self._sweep)


class InboundConnection:
    """One connection from the mesh: its channel's peer. Mutated only by calls of the event loop."""

    __slots__ = (
        "_active", "_backlog", "_channel", "_client_ended", "_closing", "_decide", "_dial_app", "_dialing", "_done",
        "_ended", "_full", "_head_due", "_http", "_identity", "_lingered", "_loop", "_on_done", "_options", "_parser",
        "_peer", "_reading_paused", "_started", "_stats", "_tunnelled", "_upstream", "_upstream_full",
        "_wire", "deadline", "peer",
    )  # fmt: skip

    def __init__(
        self,
        http: InboundHttp,
        channel: Channel,
        peer: Identity,
        dial: Dial,
        decide: Decide,
        stats: HttpStats,
        identity: bytes,
        on_done: Callable[[], None] | None,
    ) -> None:
        self._http = http
        self._loop = http.loop
        self._channel = channel
        self._peer = peer
        self._dial_app = dial
        self._decide = decide
        self._stats = stats
        self._options = http.options
        self._identity = identity
        self._on_done = on_done
        self._parser = RequestParser(self._options)
        self._backlog: deque[Data] = deque()
        """From the client, not yet parsed."""
        self._active: Message | None = None
        """The request whose turn it is."""
        self._wire = b""
        """Its head as sent, as long as it can be sent again."""
        self._ended = False
        """It was sent whole."""
        self._upstream: Upstream | None = None
        self._dialing = False
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
        self.deadline = self._after(self._options.idle_timeout_s)
        """When :meth:`expire` is due, by the loop's clock."""
        self.peer: Channel = NOBODY
        channel.peer = self

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
            log.exception("a connection from %s is cut", self._peer.service)
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

    def adopt(self, channel: Channel) -> None:
        """Use a connection to the app that is there already for the first request. Call before any bytes come."""
        upstream = Upstream(self, self._options)
        upstream.channel = channel
        channel.peer = upstream
        self._upstream = upstream

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
        options = self._options
        if self._closing:
            self.cut()
        elif self._active is None:
            if self._parser.begun:
                self._channel.write(local_reply(408, "the request's headers took too long", close=True))
                self._stats.request("", 408, options.head_timeout_s, "timeout")
            self._close()
        elif self._dialing or self._upstream is None or self._upstream.head is None:
            if self._active.complete:
                self._drop_upstream()
                self._reply(504, f"{options.service!r} did not answer in time", "timeout")
                self._advance()
        else:
            self.deadline = _NEVER

    # Requests

    def _blocked(self) -> bool:
        """Whether bytes from the client must wait, unparsed."""
        active = self._active
        if active is not None and (active.complete or self._dialing or self._upstream_full):
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
            elif self._dialing:
                break
            else:
                self._forward(self._active)
                break

    def _settle(self) -> None:
        """Set what follows from the state: reading on or not, the end, the deadline."""
        if self._done or self._closing:
            return
        active, parser = self._active, self._parser
        if not self._backlog:
            if active is None and not parser.messages:
                if self._client_ended or parser.stopped or (self._http.draining and not parser.begun):
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
        self._started = self._loop.time()
        self._ended = self._head_due = False
        if message.refusal is not None or message.head is None:
            self._refuse(message)
            return
        head = message.head
        request = head.request()
        try:
            decision = self._decide(request)
        except Exception:  # deny, whatever is wrong; the connection's transport must not see it either
            log.exception("a request could not be decided and is refused")
            self._reply(500, "the request could not be decided", "denied")
            return
        if not decision.allowed:
            if decision.permissions and request.ambiguity:
                self._reply(400, request.ambiguity, "malformed")
            else:
                self._reply(403, denial(self._options.service, self._peer), "denied")
            return
        target = request.forward_target.encode("latin-1") if decision.permissions else head.target
        self._wire = head.wire(target, self._identity)
        timeout_s = self._options.response_timeout_s
        self.deadline = self._started + timeout_s if timeout_s and message.complete else _NEVER
        self._send_head()

    def _refuse(self, message: Message) -> None:
        refusal = message.refusal
        assert refusal is not None
        self._reply(refusal.status, str(refusal), "malformed", close=True)

    def _send_head(self) -> None:
        """Send the active request's head, on the connection at hand or on a new one."""
        message, upstream = self._active, self._upstream
        assert message is not None
        assert message.head is not None
        if upstream is None or not upstream.reusable:
            self._dialing = True
            self._http.tasks.spawn(self._dial(message))
            return
        upstream.begin(message.head, keep_client=message.head.keep_alive and not self._http.draining)
        if message.head.has_body:
            pieces = [self._wire]
            self._wire = b""
            self._forward(message, pieces)
        else:
            self._ended = True
            upstream.channel.write(self._wire)

    async def _dial(self, message: Message) -> None:
        upstream = Upstream(self, self._options)
        problem = ""
        try:
            async with asyncio.timeout(self._options.dial_timeout_s or None):
                upstream.channel = await self._dial_app(upstream)
        except TimeoutError:
            problem = "did not take the connection in time"
        except (OSError, ProxyError) as error:
            problem = "cannot be reached"
            self._http.burst_log.warning(f"app of {self._options.service!r} cannot be reached: {error}")
        if self._done or self._active is not message or not self._dialing:
            upstream.close()
            return
        self._dialing = False
        if problem:
            self._reply(503, f"{self._options.service!r} {problem}", "app-down")
        elif upstream.lost:
            self._reply(502, f"{self._options.service!r} closed the connection", "app-down")
        else:
            self._upstream = upstream
            self._upstream_full = False
            if self._full:
                upstream.channel.pause_reading()
            self._send_head()
        self._advance()

    def _forward(self, message: Message, pieces: list[bytes] | None = None) -> None:
        """Send on what has come of the active request's body; ``pieces`` go before it."""
        out = [] if pieces is None else pieces
        head, upstream = message.head, self._upstream
        if message.refusal is not None:
            responding = upstream is not None and upstream.head is not None
            self._drop_upstream()
            if responding:
                self.cut()
            else:
                self._refuse(message)
            return
        if upstream is None or head is None or self._ended:
            return
        if message.body:
            if head.chunked:
                for piece in message.body:
                    out += (b"%x\r\n" % len(piece), piece, b"\r\n")
            else:
                out += message.body
            message.body.clear()
        if message.complete:
            self._ended = True
            if head.chunked:
                out.append(b"0\r\n" + trailer_lines(message.trailers) + b"\r\n")
            timeout_s = self._options.response_timeout_s
            if timeout_s:
                self.deadline = self._after(timeout_s)
        if out:
            for piece in joined(out):
                upstream.channel.write(piece)

    # Owner: what comes back

    def response_output(self, upstream: Upstream, pieces: list[bytes]) -> None:
        if upstream is self._upstream:
            for piece in joined(pieces):
                self._channel.write(piece)

    def response_complete(self, upstream: Upstream) -> None:
        message, head = self._active, upstream.head
        if upstream is not self._upstream or message is None or head is None:
            return
        self._count(head.status, "app")
        if not upstream.reusable or not self._ended:
            upstream.close()
            self._upstream = None
        whole = message.complete
        self._active = None
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
        self._active = None
        self._tunnelled = True
        self.deadline = _NEVER
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
            return
        if upstream.head is not None:
            self.cut(error)
            return
        if upstream.served > 1 and not upstream.heard and message.head.idempotent and not message.head.has_body:
            # The app closed a connection that had been idle just as the request was sent: nothing was served of it.
            self._send_head()
            return
        if error is not None:
            self._http.burst_log.warning(f"app of {self._options.service!r}: {error}")
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
        self._dialing = False
        close = close or head is None or not head.keep_alive or not message.complete or self._http.draining
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
        self._active = None
        self.deadline = self._after(self._options.idle_timeout_s)
        if close:
            self._close()
        elif self._parser.held is not None:
            self._parser.resume()

    def _count(self, status: int, origin: str) -> None:
        message = self._active
        method = message.head.method.decode() if message is not None and message.head is not None else ""
        self._stats.request(method, status, self._loop.time() - self._started, origin)

    def _after(self, seconds: float) -> float:
        return self._loop.time() + seconds if seconds else _NEVER

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
        self._dialing = False
        self.deadline = _NEVER
        self._drop_upstream()
        self._http.connections.discard(self)
        if self._on_done is not None:
            self._on_done()
