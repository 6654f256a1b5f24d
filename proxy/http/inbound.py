"""The destination's side: requests from the mesh, each decided, then sent to the app.

A request is decided when its turn has come, by the policy of that moment, before any byte of it is sent on.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from proxy.authz import Decision, Request
from proxy.errors import ProxyError
from proxy.http.connection import HttpConnection
from proxy.http.options import HttpStats
from proxy.http.parser import Message
from proxy.http.replies import denial
from proxy.http.side import HttpSide
from proxy.http.upstream import Upstream
from proxy.stream import Channel
from raftstate.model.identity import Identity

log = logging.getLogger("lictor.proxy.http")

Dial = Callable[[Channel], Awaitable[Channel]]
"""Opens a connection whose peer is, from its first byte on, the channel given; raises ProxyError or OSError."""
Decide = Callable[[Request], Decision]


class InboundHttp(HttpSide):
    """The HTTP filter in front of one app."""

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
        return InboundConnection(self, downstream, peer, dial, decide, stats, identity, on_done)


class InboundConnection(HttpConnection):
    """A connection from the mesh. It keeps one connection to the app."""

    __slots__ = ("_decide", "_dial_app", "_identity", "_source")

    def __init__(
        self,
        side: InboundHttp,
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

    def adopt(self, channel: Channel) -> None:
        """Use a connection to the app that is there already for the first request. Call before any bytes come."""
        upstream = Upstream(self, self._options)
        upstream.channel = channel
        channel.peer = upstream
        self._upstream = upstream

    def _party(self) -> tuple[str, str]:
        return self._source.service, self._source.instance

    def _route(self, message: Message) -> None:
        head = message.head
        assert head is not None
        request = head.request()
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
        upstream = Upstream(self, self._options)
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
