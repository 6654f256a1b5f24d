"""The destination's side of HTTP/2: streams from the mesh, each decided, then carried over to the app."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from h2.errors import ErrorCodes

from proxy.errors import ProxyError
from proxy.http.inbound import Decide, Dial, still_allowed
from proxy.http.options import HttpStats
from proxy.http.replies import denial
from proxy.http.side import HttpSide
from proxy.http2.connection import TURNED_AWAY_MAX, Http2Connection
from proxy.http2.errors import StreamError
from proxy.http2.exchange import Exchange, Part, Replay
from proxy.http2.head import grpc_ending, grpc_status_of
from proxy.http2.link import Link
from proxy.mux.core import MuxStream
from proxy.peername import peername_of
from proxy.stream import Channel
from raftstate.model.identity import Identity

log = logging.getLogger("lictor.proxy.http")

REPLAY_BYTES = 16 * 1024
"""What is kept of a request's body for an app that leaves without looking at it; a longer one is the caller's to send
again."""


class InboundHttp2Connection(Http2Connection):
    """A connection from the mesh and the connection to the app that belongs to it."""

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
        self._source = source
        self._dial_app = dial
        self._decide = decide
        self._identity = identity
        self._app: Link | None = None
        """The connection that takes new streams."""
        self._apps: set[Link] = set()
        """All connections to the app that are there, or are being made."""
        self._waiting: dict[int, Exchange] = {}
        """Exchanges that wait for a connection to the app, by the client's stream id."""
        self._held: dict[int, Exchange] = {}
        """Those that wait until the app has said how many streams it takes."""
        self._connecting = False
        super().__init__(side, channel, stats, on_done)

    def adopt(self, channel: Channel) -> None:
        """Use a connection to the app that is there already. Call before any bytes come."""
        self._app = self._new_app()
        self._app.attach(channel)

    def _client_name(self) -> str:
        return self._source.service

    @property
    def source(self) -> tuple[str, str]:
        """Service and instance of the caller."""
        return self._source.service, self._source.instance

    def _party(self, exchange: Exchange) -> tuple[str, str]:
        return self.source

    def recheck(self) -> int:
        """Decide again each stream that is under way, and end those that are not allowed any more; return how many.

        A caller that has had nothing of the answer yet is told that it is denied, and one that speaks gRPC always is.
        """
        ended = 0
        for exchange in list(self._exchanges.values()):
            sent = next((value for name, value in exchange.headers if name == b":path"), b"")
            if still_allowed(self._decide, exchange.head.request(), sent):
                exchange.keep_trailers = False  # they come after the decision
            else:
                self._withdraw(exchange)
                ended += 1
        self.flush()
        return ended

    def _withdraw(self, exchange: Exchange) -> None:
        text = denial(self._options.service, self._source)
        if not exchange.status:
            self._answer(exchange, 403, text, "denied")
            return
        self._forget_link(exchange, ErrorCodes.CANCEL)
        exchange.to_client.clear()
        if exchange.head.grpc:
            exchange.origin = "denied"
            exchange.grpc_status = grpc_status_of(403)
            exchange.to_client.append(Part(b"", 0, end=True, trailers=grpc_ending(403, text)))
            self._pump_to_client(exchange)
        else:
            self._count(exchange, 0, "cut")
            self._client.reset(exchange.client_id, ErrorCodes.CANCEL)
            self._remove(exchange)

    def _route(self, exchange: Exchange) -> None:
        request = exchange.head.request()
        if exchange.trace is not None:
            exchange.trace.peer = peername_of(self._client.channel)
        try:
            decision = self._decide(request)
        except Exception:  # deny, whatever is wrong
            log.exception("a request could not be decided and is refused")
            self._answer(exchange, 500, "the request could not be decided", "denied")
            return
        if not decision.allowed:
            if decision.permissions and request.ambiguity:
                self._answer(exchange, 400, request.ambiguity, "malformed")
            else:
                self._answer(exchange, 403, denial(self._options.service, self._source), "denied")
            return
        target = exchange.head.target
        if decision.permissions:
            target = request.forward_target.encode("latin-1")
            exchange.keep_trailers = False
        exchange.headers = exchange.head.wire(target, self._identity)
        if exchange.trace is not None:
            exchange.headers = exchange.trace.fields(exchange.headers)
        exchange.replay = Replay(REPLAY_BYTES)
        self._launch(exchange)

    def _asked(self, exchange: Exchange) -> None:
        super()._asked(exchange)
        if self._options.response_timeout_s:
            self._arm(exchange, exchange.asked_at + self._options.response_timeout_s)

    # To the app

    def _new_app(self) -> Link:
        link = Link(
            linger_s=self._options.linger_s,
            greeting_s=self._options.greeting_timeout_s,
            on_end=self._app_ended,
            on_known=self._app_known,
        )
        self._apps.add(link)
        return link

    def _launch(self, exchange: Exchange) -> None:
        app = self._app
        if app is None or app.closed or app.leaving:
            self._waiting[exchange.client_id] = exchange
            if not self._connecting:
                self._connecting = True
                self._side.tasks.spawn(self._connect())
        elif app.full and not app.known:
            self._held[exchange.client_id] = exchange
        elif app.full:
            self._refuse(exchange)
        elif not self._send(exchange, app):
            self._touched.add(app)
            self._launch(exchange)  # its ids are used up and it is leaving: on another one

    def _over(self, exchange: Exchange) -> None:
        # What a client has given up is let go of at once: an app may be silent for as long as it likes.
        self._waiting.pop(exchange.client_id, None)
        self._held.pop(exchange.client_id, None)

    async def _connect(self) -> None:
        link = self._new_app()
        problem = ""
        try:
            async with asyncio.timeout(self._options.dial_timeout_s or None):
                link.half.channel = await self._dial_app(link.half)
        except TimeoutError:
            problem = "did not take the connection in time"
        except (OSError, ProxyError) as error:
            problem = "cannot be reached"
            self._side.burst_log.warning(f"app of {self._options.service!r} cannot be reached: {error}")
        if link.closed and not problem:
            problem = "closed the connection"
        self._connecting = False
        waiting, self._waiting = self._waiting, {}
        if problem or self._done:
            self._apps.discard(link)
            link.half.close()
        else:
            self._app = link
            self._touched.add(link)
        for exchange in list(waiting.values()):
            if self._exchanges.get(exchange.client_id) is not exchange:
                continue  # the client gave it up
            if problem and isinstance(self._client.channel, MuxStream):
                # Another instance may have an app that can be reached; a new link will be told that ours cannot.
                self._refuse(exchange)
            elif problem:
                self._answer(exchange, 503, f"{self._options.service!r} {problem}", "app-down")
            else:
                self._launch(exchange)
        if problem and isinstance(self._client.channel, MuxStream):
            self.drain()
        self.flush()

    def not_served(self, exchange: Exchange, *, leaving: bool) -> None:
        if exchange.response_came:  # all the same; it goes on to the client
            exchange.request_ended = True
            return
        exchange.turned_away += 1
        if leaving and exchange.turned_away <= TURNED_AWAY_MAX and self._rewind(exchange):
            self._launch(exchange)
        else:
            self._refuse(exchange)

    def link_ended(self, exchange: Exchange, error: Exception | None) -> None:
        if isinstance(error, StreamError):  # else its link tells, once for all that was on it
            self._side.burst_log.warning(f"app of {self._options.service!r}: {error}")
        super().link_ended(exchange, error)

    def _lost(self, exchange: Exchange, error: Exception | None) -> None:
        self._answer(exchange, 502, f"{self._options.service!r} gave no usable answer", "app-down")

    def _app_known(self) -> None:
        """What waited to know how many streams the app takes goes on, or learns that it is too much."""
        held, self._held = self._held, {}
        for exchange in list(held.values()):
            if self._exchanges.get(exchange.client_id) is exchange:
                self._launch(exchange)
        if held:
            self.flush()

    def _app_ended(self, link: Link, error: Exception | None) -> None:
        self._apps.discard(link)
        if self._app is link:
            self._app = None
            self._app_known()
        if error is not None:
            self._side.burst_log.warning(f"app of {self._options.service!r}: {error}")

    def _finish(self) -> None:
        if self._done:
            return
        busy = {app for app in self._apps if app.exchanges}
        super()._finish()
        for app in self._apps:
            if app in busy:
                app.half.cut()
            else:
                app.half.close()
        self._apps.clear()
        self._held.clear()
        self._app = None  # its link refers to this
