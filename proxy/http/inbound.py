"""The destination's side: requests from the mesh, each decided, then sent to the app.

A request is decided when its turn has come, by the policy of that moment, before any byte of it is sent on.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from proxy.authz import Decision, Request
from proxy.errors import ProxyError, StreamClosed
from proxy.http.connection import HttpConnection
from proxy.http.options import HttpStats
from proxy.http.parser import Message
from proxy.http.replies import denial
from proxy.http.side import HttpSide
from proxy.http.upstream import Upstream
from proxy.mux import frames
from proxy.mux.core import MuxStream
from proxy.peername import peername_of
from proxy.stream import Channel, Data
from raftstate.model.identity import Identity

log = logging.getLogger("lictor.proxy.http")

Dial = Callable[[Channel], Awaitable[Channel]]
"""Opens a connection whose peer is, from its first byte on, the channel given; raises ProxyError or OSError."""
Decide = Callable[[Request], Decision]


def still_allowed(decide: Decide, request: Request, sent: bytes) -> bool:
    """Whether a request that is under way is allowed now, too. ``sent`` is the target that the app was given: where
    permissions hold now, it must be the one that they were asked about."""
    try:
        decision = decide(request)
    except Exception:  # deny, whatever is wrong
        log.exception("a request could not be decided again and is ended")
        return False
    if not decision.allowed:
        return False
    return not decision.permissions or request.forward_target.encode("latin-1") == sent


class InboundConnection(HttpConnection):
    """A connection from the mesh. It keeps one connection to the app."""

    __slots__ = ("_decide", "_dial_app", "_identity", "_sent_target", "_source", "_switched_by")

    def __init__(
        self,
        side: HttpSide,
        channel: Channel,
        source: Identity,
        dial: Dial,
        decide: Decide,
        stats: HttpStats,
        identity: bytes,
        on_done: Callable[[], None] | None,
    ) -> None:
        super().__init__(side, channel, stats, on_done, replay_bytes_max=0)
        self._source = source
        self._dial_app = dial
        self._decide = decide
        self._identity = identity
        self._sent_target = b""
        """Of the active request, or the one that began the tunnel, as the app was given it."""
        self._switched_by: Request | None = None
        """The request that began the tunnel."""

    @property
    def source(self) -> tuple[str, str]:
        """Service and instance of the caller."""
        return self._source.service, self._source.instance

    def recheck(self) -> int:
        """Decide again what is under way, and end it if it is not allowed any more; return how many requests ended.

        Where nothing of the answer was sent the caller is told that it is denied; else the connection is cut.
        """
        active = self._active
        head = active.head if active is not None else None
        request = head.request() if head is not None else self._switched_by
        if request is None or self._closing:
            return 0
        if still_allowed(self._decide, request, self._sent_target):
            if active is not None:
                active.keep_trailers = False  # they come after the decision
            return 0
        upstream = self._upstream
        if active is None or (upstream is not None and upstream.head is not None):
            self.cut(StreamClosed("the intention allows the request no more"))
        else:
            self._drop_upstream()
            self._connecting = False
            self._reply(403, denial(self._options.service, self._source), "denied")
            self._advance()
        return 1

    def response_switched(self, upstream: Upstream, rest: Data) -> None:
        if upstream is self._upstream and self._active is not None and self._active.head is not None:
            self._switched_by = self._active.head.request()
        super().response_switched(upstream, rest)

    def adopt(self, channel: Channel) -> None:
        """Use a connection to the app that is there already for the first request. Call before any bytes come."""
        upstream = Upstream(self, self._options, self._side.memory)
        upstream.channel = channel
        channel.peer = upstream
        self._upstream = upstream

    def _party(self) -> tuple[str, str]:
        return self.source

    def _route(self, message: Message) -> None:
        head = message.head
        assert head is not None
        request = head.request()
        tracer = self._tracer
        trace = self._trace = tracer.begin(head.fields) if tracer is not None else None
        if trace is not None and trace.recorded:
            trace.peer = peername_of(self._channel)
        try:
            decision = self._decide(request)
        except Exception:  # deny, whatever is wrong
            log.exception("a request could not be decided and is refused")
            self._reply(500, "the request could not be decided", "denied")
            return
        if not decision.allowed:
            if decision.permissions and request.ambiguity:
                self._reply(400, request.ambiguity, "malformed")
            else:
                self._reply(403, denial(self._options.service, self._source), "denied")
            return
        target = head.target
        if decision.permissions:
            target = request.forward_target.encode("latin-1")
            message.keep_trailers = False
        self._sent_target = target
        if trace is not None:
            head.lines = trace.lines(head.fields, head.lines)  # not the fields: what came is what is decided on
        self._launch(message, head.wire(target, self._identity))

    def _connect(self, message: Message) -> None:
        upstream = self._upstream
        if upstream is not None and upstream.reusable:
            self._send(message, upstream)
        else:
            self._connecting = True
            self._side.tasks.spawn(self._dial(message))

    async def _dial(self, message: Message) -> None:
        service = self._options.service
        upstream = Upstream(self, self._options, self._side.memory)
        problem = ""
        try:
            async with asyncio.timeout(self._options.dial_timeout_s or None):
                upstream.channel = await self._dial_app(upstream)
        except TimeoutError:
            problem = "did not take the connection in time"
        except (OSError, ProxyError) as error:
            problem = "cannot be reached"
            self._side.burst_log.warning(f"app of {service!r} cannot be reached: {error}")
        if self._done or self._active is not message or not self._connecting:
            upstream.close()
            return
        if problem and isinstance(self._channel, MuxStream):
            # Another instance may have an app that can be reached, and nothing of this request has reached ours.
            self._count(503, "app-down")
            self._channel.reset(frames.APP_DOWN, f"app {problem}")
            self._finish()
            return
        if problem:
            self._reply(503, f"{service!r} {problem}", "app-down")
        elif upstream.lost:
            self._reply(502, f"{service!r} closed the connection", "app-down")
        else:
            self._send(message, upstream)
        self._advance()

    def _retry(self, upstream: Upstream, error: Exception | None, message: Message) -> bool:
        head = message.head
        assert head is not None
        if upstream.served > 1 and not upstream.heard and head.idempotent and not head.has_body:
            # The app closed a connection that had been idle just as the request was sent: nothing was served of it.
            self._connect(message)
            return True
        return False

    def _let_go(self, upstream: Upstream) -> None:
        """It is kept for the next request."""
