"""The destination's side of HTTP/2: streams from the mesh, each decided, then carried over to the app.

Bytes are acknowledged to the sender only when they have gone to the other side, so what an exchange holds is at most
its window, both ways.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from h2.errors import ErrorCodes
from h2.events import (
    ConnectionTerminated,
    DataReceived,
    Event,
    InformationalResponseReceived,
    PingReceived,
    RemoteSettingsChanged,
    RequestReceived,
    ResponseReceived,
    StreamReset,
    TrailersReceived,
    WindowUpdated,
)
from h2.exceptions import H2Error

from proxy.errors import ProxyError
from proxy.http.errors import BadRequest
from proxy.http.inbound import Decide, Dial
from proxy.http.options import HttpStats
from proxy.http.replies import denial
from proxy.http.side import NEVER, HttpSide
from proxy.http2.exchange import Exchange, Part, pump
from proxy.http2.half import Half
from proxy.http2.head import RequestHead, local_answer, passed_on, read_request
from proxy.stream import Channel
from raftstate.model.identity import Identity

log = logging.getLogger("lictor.proxy.http")

_CONTROL_WHILE_FULL_MAX = 1000
"""Pings and settings from a client that reads nothing; then it is cut off."""
_RESETS_MAX = 200
"""Streams that a client may reset beyond half of those it opened; then it is cut off (CVE-2023-44487)."""


class InboundHttp2(HttpSide):
    """The HTTP/2 filter in front of one app."""

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
    ) -> Http2Connection:
        """As :meth:`proxy.http.InboundHttp.serve`."""
        return Http2Connection(self, downstream, peer, dial, decide, stats, identity, on_done)


class Http2Connection:
    """A connection from the mesh and the connection to the app that belongs to it."""

    def __init__(
        self,
        side: InboundHttp2,
        channel: Channel,
        source: Identity,
        dial: Dial,
        decide: Decide,
        stats: HttpStats,
        identity: bytes,
        on_done: Callable[[], None] | None,
    ) -> None:
        self._side = side
        self._options = side.options
        self._source = source
        self._dial_app = dial
        self._decide = decide
        self._stats = stats
        self._identity = identity
        self._on_done = on_done
        self._exchanges: dict[int, Exchange] = {}
        """By the client's stream id."""
        self._by_app: dict[tuple[Half, int], Exchange] = {}
        self._app: Half | None = None
        """The connection that takes new streams."""
        self._coming: Half | None = None
        """The connection that is being made."""
        self._apps: set[Half] = set()
        self._waiting: list[Exchange] = []
        """Exchanges that wait for a connection to the app."""
        self._adopted: Channel | None = None
        self._opened = self._resets = self._controls_while_full = 0
        self._leaving = False
        """No more streams are taken; the end comes with the last one."""
        self._done = False
        self.deadline = self._idle_deadline()
        self._client = Half(
            client=False,
            linger_s=side.options.linger_s,
            on_events=self._client_events,
            on_end=self._client_ended,
            on_room=self._client_room,
        )
        self._client.channel = channel
        channel.peer = self._client
        side.keep(self)
        self._client.flush()

    # For whoever serves the connection

    @property
    def receiver(self) -> Channel:
        """Where the client's bytes go."""
        return self._client

    def adopt(self, channel: Channel) -> None:
        """Use a connection to the app that is there already. Call before any bytes come."""
        self._adopted = channel
        self._app = self._new_app(channel)

    def cut(self, error: Exception | None = None) -> None:
        """Drop the connection at once, both sides, whatever is under way."""
        if not self._done:
            for exchange in list(self._exchanges.values()):
                self._count(exchange, 0, "cut")
            self._client.cut(error)
            self._finish()

    def drain(self) -> None:
        """Take no more streams; end with the last one."""
        if not self._leaving and not self._done:
            self._leaving = True
            self._client.go_away()
            self._settle()

    def expire(self) -> None:
        """The deadline has passed."""
        now = self._side.loop.time()
        late = [each for each in self._exchanges.values() if each.deadline <= now]
        for exchange in late:
            self._answer(exchange, 504, f"{self._options.service!r} did not answer in time", "timeout")
        self._flush()
        if not late and not self._exchanges:
            self.drain()

    # Events of the client's connection

    def _client_events(self, half: Half, events: list[Event]) -> None:
        try:
            for event in events:
                self._client_event(event)
                if self._done:
                    return
            self._flush()
        except H2Error as error:
            self._side.burst_log.warning(f"an HTTP/2 connection of {self._source.service} is cut: {error!r}")
            self.cut(error)
        except Exception as error:  # a fault here must end this connection, not the session that carries others
            log.exception("an HTTP/2 connection of %s is cut", self._source.service)
            self.cut(error)

    def _client_event(self, event: Event) -> None:
        if isinstance(event, RequestReceived):
            self._request(event)
        elif isinstance(event, DataReceived):
            exchange = self._exchanges.get(event.stream_id)
            if exchange is None:
                self._client.acknowledge(event.stream_id, event.flow_controlled_length)
            else:
                end = event.stream_ended is not None
                exchange.to_app.append(Part(event.data, event.flow_controlled_length, end=end))
                self._pump_to_app(exchange)
        elif isinstance(event, TrailersReceived):
            exchange = self._exchanges.get(event.stream_id)
            if exchange is not None:
                trailers = passed_on(event.headers, response=False) if exchange.keep_trailers else None
                exchange.to_app.append(Part(b"", 0, end=True, trailers=trailers))
                self._pump_to_app(exchange)
        elif isinstance(event, WindowUpdated):
            for exchange in self._concerned(event.stream_id, self._exchanges):
                self._pump_to_client(exchange)
        elif isinstance(event, StreamReset):
            self._client_reset(event)
        elif isinstance(event, RemoteSettingsChanged | PingReceived):
            self._control()
            for exchange in list(self._exchanges.values()):
                self._pump_to_client(exchange)
        elif isinstance(event, ConnectionTerminated):
            self._leaving = True

    @staticmethod
    def _concerned(stream_id: int, exchanges: dict[int, Exchange]) -> list[Exchange]:
        if not stream_id:
            return list(exchanges.values())
        exchange = exchanges.get(stream_id)
        return [] if exchange is None else [exchange]

    def _control(self) -> None:
        if self._client.full:
            self._controls_while_full += 1
            if self._controls_while_full > _CONTROL_WHILE_FULL_MAX:
                self.cut(ProxyError("client makes us answer but reads nothing"))

    def _client_reset(self, event: StreamReset) -> None:
        exchange = self._exchanges.pop(event.stream_id, None)
        self._resets += 1
        if exchange is not None:
            self._count(exchange, 0, "cut")
            self._forget_app(exchange, ErrorCodes.CANCEL)
        if self._resets > _RESETS_MAX and self._resets * 2 > self._opened:
            self._side.burst_log.warning(f"{self._source.service} resets streams faster than it uses them; cut off")
            self._client.go_away(ErrorCodes.ENHANCE_YOUR_CALM)
            self.cut()

    def _request(self, event: RequestReceived) -> None:
        self._opened += 1
        now = self._side.loop.time()
        head = RequestHead()
        exchange = Exchange(event.stream_id, head, [], now)
        self._exchanges[event.stream_id] = exchange
        if event.stream_ended is not None:
            exchange.to_app.append(Part(b"", 0, end=True))
        try:
            head = exchange.head = read_request(event.headers)
        except BadRequest as error:
            self._answer(exchange, error.status, str(error), "malformed")
            return
        if self._leaving:
            self._refuse(exchange)
            return
        request = head.request()
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
        target = head.target
        if decision.permissions:
            target = request.forward_target.encode("latin-1")
            exchange.keep_trailers = False
        exchange.headers = head.wire(target, self._identity)
        if self._options.response_timeout_s:
            exchange.deadline = now + self._options.response_timeout_s
        self._launch(exchange)

    def _client_ended(self, half: Half, error: Exception | None) -> None:
        for exchange in list(self._exchanges.values()):
            self._count(exchange, 0, "cut")
        self._finish()

    def _client_room(self, half: Half) -> None:
        self._controls_while_full = 0
        for exchange in list(self._exchanges.values()):
            self._pump_to_client(exchange)
        self._flush()

    # To the app

    def _new_app(self, channel: Channel | None = None) -> Half:
        half = Half(
            client=True,
            linger_s=self._options.linger_s,
            on_events=self._app_events,
            on_end=self._app_ended,
            on_room=self._app_room,
        )
        self._apps.add(half)
        if channel is not None:
            half.channel = channel
            channel.peer = half
            half.flush()
        return half

    def _launch(self, exchange: Exchange) -> None:
        app = self._app
        if app is None or app.closed:
            self._waiting.append(exchange)
            if len(self._waiting) == 1:
                self._side.tasks.spawn(self._connect())
            return
        conn = app.conn
        if conn.open_outbound_streams >= conn.remote_settings.max_concurrent_streams:
            self._refuse(exchange)
            return
        exchange.app, exchange.app_id = app, conn.get_next_available_stream_id()
        self._by_app[app, exchange.app_id] = exchange
        first = exchange.to_app[0] if exchange.to_app else None
        ended = first is not None and first.end and not first.data and first.trailers is None and not first.flow
        if ended:
            exchange.to_app.popleft()
            exchange.request_ended = True
        headers, exchange.headers = exchange.headers, []
        if app.send_headers(exchange.app_id, headers, end=ended):
            self._pump_to_app(exchange)
        else:
            self._answer(exchange, 502, f"{self._options.service!r} takes no more requests", "app-down")

    async def _connect(self) -> None:
        half = self._coming = self._new_app()
        problem = ""
        try:
            async with asyncio.timeout(self._options.dial_timeout_s or None):
                half.channel = await self._dial_app(half)
        except TimeoutError:
            problem = "did not take the connection in time"
        except (OSError, ProxyError) as error:
            problem = "cannot be reached"
            self._side.burst_log.warning(f"app of {self._options.service!r} cannot be reached: {error}")
        if half.closed and not problem:
            problem = "closed the connection"
        self._coming = None
        waiting, self._waiting = self._waiting, []
        if problem or self._done:
            self._apps.discard(half)
            half.close()
        else:
            self._app = half
        for exchange in waiting:
            if self._exchanges.get(exchange.client_id) is not exchange:
                continue  # the client gave it up
            if problem:
                self._answer(exchange, 503, f"{self._options.service!r} {problem}", "app-down")
            else:
                self._launch(exchange)
        self._flush()

    def _pump_to_app(self, exchange: Exchange) -> None:
        if exchange.app is not None and not exchange.app.closed:
            source = (self._client, exchange.client_id)
            if pump(exchange.to_app, source, (exchange.app, exchange.app_id)):
                exchange.request_ended = True

    def _pump_to_client(self, exchange: Exchange) -> None:
        if exchange.app is None:
            return
        source = (exchange.app, exchange.app_id)
        if exchange.to_client and pump(exchange.to_client, source, (self._client, exchange.client_id)):
            self._count(exchange, exchange.status, "app")
            self._exchanges.pop(exchange.client_id, None)
            if not exchange.request_ended:
                # The answer is whole; what the client still sends interests nobody (RFC 9113, section 8.1).
                self._client.reset(exchange.client_id, ErrorCodes.NO_ERROR)
                self._forget_app(exchange, ErrorCodes.NO_ERROR)
            else:
                self._by_app.pop(source, None)

    # Events of the app's connection

    def _app_events(self, half: Half, events: list[Event]) -> None:
        try:
            for event in events:
                self._app_event(half, event)
            self._flush()
        except H2Error as error:
            self._app_ended(half, error)
            half.cut(error)

    def _app_event(self, half: Half, event: Event) -> None:
        stream_id: int = getattr(event, "stream_id", 0) or 0
        exchange = self._by_app.get((half, stream_id))
        if isinstance(event, WindowUpdated | RemoteSettingsChanged):
            concerned = [exchange] if exchange is not None else list(self._exchanges.values())
            for each in concerned:
                if each.app is half:
                    self._pump_to_app(each)
        elif isinstance(event, ConnectionTerminated):
            self._app_leaves(half, event.last_stream_id or 0)
        elif isinstance(event, DataReceived):
            if exchange is None:
                half.acknowledge(stream_id, event.flow_controlled_length)
                return
            end = event.stream_ended is not None
            exchange.sent += len(event.data)
            exchange.to_client.append(Part(event.data, event.flow_controlled_length, end=end))
            self._pump_to_client(exchange)
        elif exchange is None:
            return
        elif isinstance(event, ResponseReceived | InformationalResponseReceived):
            self._response(exchange, event)
        elif isinstance(event, TrailersReceived):
            trailers = passed_on(event.headers, response=False)
            exchange.to_client.append(Part(b"", 0, end=True, trailers=trailers))
            self._pump_to_client(exchange)
        elif isinstance(event, StreamReset):
            self._app_reset(exchange, event.error_code)

    def _response(self, exchange: Exchange, event: ResponseReceived | InformationalResponseReceived) -> None:
        headers = passed_on(event.headers, response=True)
        final = isinstance(event, ResponseReceived)
        ended = isinstance(event, ResponseReceived) and event.stream_ended is not None
        if final:
            exchange.status = int(dict(headers)[b":status"])
            exchange.deadline = NEVER
        self._client.send_headers(exchange.client_id, headers, end=ended)
        if ended:
            self._count(exchange, exchange.status, "app")
            self._exchanges.pop(exchange.client_id, None)
            if not exchange.request_ended:
                self._client.reset(exchange.client_id, ErrorCodes.NO_ERROR)
                self._forget_app(exchange, ErrorCodes.NO_ERROR)
            elif exchange.app is not None:
                self._by_app.pop((exchange.app, exchange.app_id), None)

    def _app_reset(self, exchange: Exchange, code: ErrorCodes | int) -> None:
        if exchange.app is not None:
            self._by_app.pop((exchange.app, exchange.app_id), None)
        if self._exchanges.pop(exchange.client_id, None) is not None:
            self._count(exchange, 0, "cut")
            self._client.reset(exchange.client_id, code)

    def _app_leaves(self, half: Half, last_stream_id: int) -> None:
        """The app takes no more streams here; those beyond ``last_stream_id`` it has not looked at."""
        if self._app is half:
            self._app = None
        for (of, app_id), exchange in list(self._by_app.items()):
            if of is half and app_id > last_stream_id:
                del self._by_app[of, app_id]
                self._refuse(exchange)

    def _app_ended(self, half: Half, error: Exception | None) -> None:
        self._apps.discard(half)
        if self._app is half:
            self._app = None
        for (of, app_id), exchange in list(self._by_app.items()):
            if of is not half:
                continue
            del self._by_app[of, app_id]
            if exchange.status:
                self._app_reset(exchange, ErrorCodes.INTERNAL_ERROR)
            else:
                self._answer(exchange, 502, f"{self._options.service!r} gave no usable answer", "app-down")
        if error is not None:
            self._side.burst_log.warning(f"app of {self._options.service!r}: {error}")
        self._flush()

    def _app_room(self, half: Half) -> None:
        for exchange in list(self._exchanges.values()):
            if exchange.app is half:
                self._pump_to_app(exchange)
        self._flush()

    # Ends

    def _answer(self, exchange: Exchange, status: int, error: str, origin: str) -> None:
        """Answer ourselves and be done with the exchange."""
        self._exchanges.pop(exchange.client_id, None)
        self._count(exchange, status, origin)
        self._forget_app(exchange, ErrorCodes.CANCEL)
        ended = exchange.request_ended or any(part.end for part in exchange.to_app)
        client, stream_id = self._client, exchange.client_id
        for part in exchange.to_app:
            client.acknowledge(stream_id, part.flow)
        headers, body = local_answer(status, error, grpc=exchange.head.grpc)
        if exchange.head.method == b"HEAD" or client.room(stream_id) < len(body):
            body = b""
        client.send_headers(stream_id, headers, end=not body)
        if body:
            client.send_data(stream_id, body, end=True)
        if not ended:
            client.reset(stream_id, ErrorCodes.NO_ERROR)

    def _refuse(self, exchange: Exchange) -> None:
        """Nothing was done with it: the client may send it again, on another connection."""
        self._exchanges.pop(exchange.client_id, None)
        self._count(exchange, 0, "cut")
        self._client.reset(exchange.client_id, ErrorCodes.REFUSED_STREAM)

    def _forget_app(self, exchange: Exchange, code: ErrorCodes) -> None:
        app = exchange.app
        if app is None:
            return
        self._by_app.pop((app, exchange.app_id), None)
        exchange.app = None
        for part in exchange.to_client:
            app.acknowledge(exchange.app_id, part.flow)
        app.reset(exchange.app_id, code)

    def _count(self, exchange: Exchange, status: int, origin: str) -> None:
        seconds = self._side.loop.time() - exchange.started
        head = exchange.head
        self._stats.request(head.method.decode("latin-1"), status, seconds, origin)
        if self._side.told is not None:
            party, request = (self._source.service, self._source.instance), (head.method, head.target, head.fields)
            self._side.told(party, "h2", request, (status, origin, exchange.sent), seconds)

    def _flush(self) -> None:
        """Send what all this has made, and see what follows."""
        for app in list(self._apps):
            app.flush()
            if app is not self._app and app is not self._coming and not any(of is app for of, _ in self._by_app):
                self._apps.discard(app)
                app.close()
        self._client.flush()
        self._settle()

    def _settle(self) -> None:
        if self._done:
            return
        if self._leaving and not self._exchanges:
            self._client.close()
            self._finish()
        elif self._exchanges:
            timeout_s = self._options.response_timeout_s
            self.deadline = min(each.deadline for each in self._exchanges.values()) if timeout_s else NEVER
        else:
            self.deadline = self._idle_deadline()

    def _idle_deadline(self) -> float:
        idle_s = self._options.idle_timeout_s
        return self._side.loop.time() + idle_s if idle_s else NEVER

    def _finish(self) -> None:
        if self._done:
            return
        self._done = True
        self.deadline = NEVER
        self._exchanges.clear()
        busy = {of for of, _ in self._by_app}
        self._by_app.clear()
        for app in self._apps:
            if app in busy:
                app.cut()
            else:
                app.close()
        self._apps.clear()
        self._side.connections.discard(self)
        if self._on_done is not None:
            self._on_done()
