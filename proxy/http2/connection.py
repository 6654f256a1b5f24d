"""The client's side of HTTP/2: its connection, and the exchanges on it until each has ended.

Bytes are acknowledged to the sender only when they have gone to the other side, so what an exchange holds is at most
its window, both ways.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

from h2.errors import ErrorCodes

from proxy.errors import ProxyError
from proxy.http.errors import BadRequest
from proxy.http.head import Field
from proxy.http.options import HttpStats
from proxy.http.side import NEVER, HttpSide
from proxy.http2.errors import Http2Error
from proxy.http2.events import (
    DataCame,
    Event,
    GoneAway,
    Pinged,
    RequestCame,
    ResponseCame,
    SettingsCame,
    StreamWasReset,
    TrailersCame,
    WindowOpened,
)
from proxy.http2.exchange import Exchange, Part, add_data, fields_size, pump
from proxy.http2.half import STREAMS_MAX, Half
from proxy.http2.head import RequestHead, grpc_ending, grpc_status_of, local_answer, passed_on, read_request, value_of
from proxy.stream import Channel

if TYPE_CHECKING:
    from proxy.http2.link import Link

log = logging.getLogger("lictor.proxy.http")

TURNED_AWAY_MAX = 8
"""How often a request may meet somebody who is leaving. A server that ends its connections after a few requests turns
away whatever is under way just then, so that with much under way some requests meet several such ends."""


class Http2Connection:
    """A client's connection. Where its requests go is for the subclasses: :meth:`_route` and what follows it."""

    resets_max = 200
    """Streams that a client may reset, if they are more than half of those it opened; then it is cut off
    (CVE-2023-44487)."""

    def __init__(
        self,
        side: HttpSide,
        channel: Channel,
        stats: HttpStats,
        on_done: Callable[[], None] | None,
        *,
        streams_max: int = STREAMS_MAX,
    ) -> None:
        self._side = side
        self._options = side.options
        self._stats = stats
        self._on_done = on_done
        self._exchanges: dict[int, Exchange] = {}
        """By the client's stream id."""
        self._touched: set[Link] = set()
        """Links on which something may be there to be sent."""
        self._opened = self._resets = 0
        self._widened = False
        """All streams may have room now: they are looked at once for all that came together."""
        self._leaving = False
        """No more streams are taken; the end comes with the last one."""
        self._done = False
        self.deadline = self._idle_deadline()
        self._client = Half(
            client=False,
            linger_s=side.options.linger_s,
            greeting_s=side.options.greeting_timeout_s,
            streams_max=streams_max,
            on_events=self._client_events,
            on_end=self._client_ended,
            on_room=self._client_room,
        )
        self._client.channel = channel
        channel.peer = self._client
        side.keep(self)
        self._client.flush()

    # For the subclasses to say

    def _client_name(self) -> str:
        """Return whose connection this is, for logs."""
        raise NotImplementedError

    def _party(self, exchange: Exchange) -> tuple[str, str]:
        """Return service and instance of the far side."""
        raise NotImplementedError

    def _route(self, exchange: Exchange) -> None:
        """The request has come, and may go: bring it onto a link, now or later."""
        raise NotImplementedError

    def _lost(self, exchange: Exchange, error: Exception | None) -> None:
        """The link was lost before any response came, or what came was none."""
        raise NotImplementedError

    def not_served(self, exchange: Exchange, *, leaving: bool) -> None:
        """The other end said that it has not looked at the request, be it because it is leaving."""
        raise NotImplementedError

    def _over(self, exchange: Exchange) -> None:
        """The exchange has ended, one way or another."""

    def _edit(self, exchange: Exchange, headers: list[Field]) -> list[Field]:
        """Return the response's headers as the client gets them."""
        return headers

    def _timed_out(self, exchange: Exchange) -> None:
        """The exchange's deadline has passed."""
        text = f"{self._options.service!r} did not answer in time"
        if exchange.status:
            self._forget_link(exchange, ErrorCodes.CANCEL)
            self._end_early(exchange, 504, text)
        else:
            self._answer(exchange, 504, text, "timeout")

    def _asked(self, exchange: Exchange) -> None:
        """The request has come whole: its response may take so long from now on."""
        exchange.asked_at = self._side.loop.time()

    # For whoever serves the connection

    @property
    def receiver(self) -> Channel:
        """Where the client's bytes go."""
        return self._client

    def cut(self, error: Exception | None = None) -> None:
        """Drop the connection at once, both sides, whatever is under way."""
        if not self._done:
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
            if exchange.client_id in self._exchanges:
                self._timed_out(exchange)
        idle = not late and not self._exchanges
        self.flush()
        if self._done:
            return
        if idle:
            self.drain()
        else:
            self.deadline = min((each.deadline for each in self._exchanges.values()), default=self._idle_deadline())

    def _arm(self, exchange: Exchange, deadline: float) -> None:
        """Have :meth:`_timed_out` called at ``deadline``, by the loop's clock."""
        exchange.deadline = deadline
        if deadline < self.deadline:
            self.deadline = deadline
            self._side.heed(deadline)

    # Events of the client's connection

    def _client_events(self, half: Half, events: list[Event]) -> None:
        try:
            for event in events:
                self._client_event(event)
                if self._done:
                    return
            if self._widened:
                self._widened = False
                for exchange in list(self._exchanges.values()):
                    self._pump_to_client(exchange)
            self.flush()
        except Exception as error:  # a fault here must end this connection, not the session that carries others
            log.exception("an HTTP/2 connection of %s is cut", self._client_name())
            self.cut(error)

    def _client_event(self, event: Event) -> None:
        if isinstance(event, RequestCame):
            self._request(event)
        elif isinstance(event, DataCame):
            exchange = self._exchanges.get(event.stream_id)
            if exchange is None:
                self._client.acknowledge(event.stream_id, event.flow)
            else:
                add_data(exchange.to_link, event.data, event.flow, end=event.end)
                if event.end:
                    self._asked(exchange)
                self._more_came(exchange)
        elif isinstance(event, TrailersCame):
            exchange = self._exchanges.get(event.stream_id)
            if exchange is not None:
                trailers = passed_on(event.fields, response=False) if exchange.keep_trailers else None
                exchange.to_link.append(Part(b"", 0, end=True, trailers=trailers))
                self._asked(exchange)
                self._more_came(exchange)
        elif isinstance(event, WindowOpened):
            exchange = self._exchanges.get(event.stream_id)
            if exchange is not None:
                self._pump_to_client(exchange)
            elif not event.stream_id:
                self._widened = True
        elif isinstance(event, StreamWasReset):
            self._client_reset(event)
        elif isinstance(event, SettingsCame | Pinged):
            if not self._client.controlled():
                self.cut(ProxyError("client makes us answer but reads nothing"))
                return
            if isinstance(event, SettingsCame) and event.windows:
                self._widened = True
        elif isinstance(event, GoneAway):
            self._leaving = True

    def _more_came(self, exchange: Exchange) -> None:
        """There is more in ``to_link``."""
        self._pump_to_link(exchange)

    def _client_reset(self, event: StreamWasReset) -> None:
        exchange = self._exchanges.get(event.stream_id)
        self._resets += 1
        if event.text:
            self._side.burst_log.warning(f"a request of {self._client_name()} is refused: {event.text}")
        if exchange is not None:
            self._count(exchange, 0, "malformed" if event.text else "cut")
            self._forget_link(exchange, ErrorCodes.CANCEL if event.text else event.code)
            self._remove(exchange)
        elif event.text:
            self._count(Exchange(self, event.stream_id, RequestHead(), self._side.loop.time()), 0, "malformed")
        if self._resets > self.resets_max and self._resets * 2 > self._opened:
            self._side.burst_log.warning(f"{self._client_name()} resets streams faster than it uses them; cut off")
            self._client.go_away(ErrorCodes.ENHANCE_YOUR_CALM)
            self.cut()

    def _request(self, event: RequestCame) -> None:
        self._opened += 1
        if not self._exchanges:
            self.deadline = NEVER
        exchange = Exchange(self, event.stream_id, RequestHead(), self._side.loop.time())
        self._exchanges[event.stream_id] = exchange
        if event.end:
            exchange.to_link.append(Part(b"", 0, end=True))
            self._asked(exchange)
        try:
            exchange.head = read_request(event.fields)
        except BadRequest as error:
            self._answer(exchange, error.status, str(error), "malformed")
            return
        if self._leaving or self._side.memory.scarce:
            self._refuse(exchange)
            return
        exchange.head_bytes = fields_size(event.fields)
        self._account(exchange)
        if exchange.client_id in self._exchanges:
            if self._side.tracer is not None:
                exchange.trace = self._side.tracer.begin(exchange.head.fields, exchange.head.authority)
            self._route(exchange)

    def _client_ended(self, half: Half, error: Exception | None) -> None:
        if isinstance(error, Http2Error):
            self._side.burst_log.warning(f"an HTTP/2 connection of {self._client_name()} is ended: {error}")
        self._finish()

    def _client_room(self, half: Half) -> None:
        for exchange in list(self._exchanges.values()):
            self._pump_to_client(exchange)
        self.flush()

    # To and from the link

    def _send(self, exchange: Exchange, link: Link) -> bool:
        """Open a stream for the exchange and send what there is of it; False when the link takes no more."""
        first = exchange.to_link[0] if exchange.to_link else None
        ended = first is not None and first.only_ends
        if not link.open(exchange, end=ended):
            return False
        self._touched.add(link)
        if ended:
            exchange.to_link.popleft()
            exchange.request_ended = True
            if exchange.replay is not None:
                exchange.replay.add(b"", end=True)
        else:
            self._pump_to_link(exchange)
        return True

    def _pump_to_link(self, exchange: Exchange) -> None:
        link = exchange.link
        if link is not None and not link.closed and exchange.to_link:
            self._touched.add(link)
            source = (self._client, exchange.client_id)
            if pump(exchange.to_link, source, (link.half, exchange.link_id), exchange.replay):
                exchange.request_ended = True
        self._account(exchange)

    def _pump_to_client(self, exchange: Exchange) -> None:
        if not exchange.to_client:
            return
        link = exchange.link
        if link is not None:
            self._touched.add(link)
        source = (link.half if link is not None else None, exchange.link_id)
        if pump(exchange.to_client, source, (self._client, exchange.client_id)):
            self._answered_whole(exchange)
        else:
            self._account(exchange)

    def _account(self, exchange: Exchange) -> None:
        """Count what the exchange holds now; drop it if this process then holds too much."""
        if self._exchanges.get(exchange.client_id) is not exchange:
            return
        held = exchange.holds()
        if held == exchange.held:
            return
        memory = self._side.memory
        grown, exchange.held = held - exchange.held, held
        memory.held += grown
        if grown > 0 and memory.over:
            memory.overruns += 1
            self._side.burst_log.warning(f"a request of {self._client_name()} is dropped: the sidecar holds too much")
            self._count(exchange, 0, "cut")
            self._forget_link(exchange, ErrorCodes.CANCEL)
            self._client.reset(exchange.client_id, ErrorCodes.ENHANCE_YOUR_CALM)
            self._remove(exchange)

    def _answered_whole(self, exchange: Exchange) -> None:
        """All of the response was sent."""
        self._count(exchange, exchange.status, exchange.origin)
        # The answer is whole; what the client still sends, if it does, interests nobody (RFC 9113, section 8.1).
        self._client.reset(exchange.client_id, ErrorCodes.NO_ERROR)
        self._forget_link(exchange, None if exchange.request_ended else ErrorCodes.NO_ERROR)
        self._remove(exchange)

    # Owner

    def answered(self, exchange: Exchange, event: ResponseCame) -> None:
        headers = passed_on(event.fields, response=True)
        ended = event.end
        if event.status >= 200:
            exchange.status = event.status
            if exchange.replay is not None:
                exchange.replay.drop()
            if ended:
                exchange.grpc_status = value_of(headers, b"grpc-status")
            headers = self._edit(exchange, headers)
        self._client.send_headers(exchange.client_id, headers, end=ended)
        if ended:
            self._answered_whole(exchange)

    def came(self, exchange: Exchange) -> None:
        self._pump_to_client(exchange)

    def room(self, exchange: Exchange) -> None:
        self._pump_to_link(exchange)

    def was_reset(self, exchange: Exchange, code: ErrorCodes | int) -> None:
        if exchange.response_came:
            exchange.request_ended = True  # as far as anybody wants it; the response goes on to the client
            return
        self._count(exchange, 0, "cut")
        self._client.reset(exchange.client_id, code)
        self._remove(exchange)

    def link_ended(self, exchange: Exchange, error: Exception | None) -> None:
        if exchange.response_came:
            exchange.request_ended = True
        elif exchange.status:
            self._broken(exchange, error)
        else:
            self._lost(exchange, error)

    def _broken(self, exchange: Exchange, error: Exception | None) -> None:
        """The same within the response."""
        self.was_reset(exchange, ErrorCodes.INTERNAL_ERROR)

    def _end_early(self, exchange: Exchange, status: int, text: str) -> None:
        """End a response that has begun, whose link is forgotten: a gRPC call by a status, any other by a reset."""
        exchange.deadline = NEVER
        if exchange.response_came:
            exchange.request_ended = True  # it has ended, and goes on to a client that takes its time
            return
        if not exchange.head.grpc:
            self._count(exchange, 0, "cut")
            self._client.reset(exchange.client_id, ErrorCodes.INTERNAL_ERROR)
            self._remove(exchange)
            return
        exchange.origin = "timeout" if status == 504 else "cut"
        exchange.grpc_status = grpc_status_of(status)
        exchange.to_client.append(Part(b"", 0, end=True, trailers=grpc_ending(status, text)))
        self._pump_to_client(exchange)

    def flush(self) -> None:
        """Send what all this has made, and see what follows."""
        touched, self._touched = self._touched, set()
        for link in touched:
            link.flush()
        self._client.flush()
        self._settle()

    # Ends

    def _answer(self, exchange: Exchange, status: int, error: str, origin: str) -> None:
        """Answer ourselves and be done with the exchange."""
        exchange.grpc_status = grpc_status_of(status) if exchange.head.grpc else b""
        self._count(exchange, status, origin)
        self._forget_link(exchange, ErrorCodes.CANCEL)
        ended = exchange.request_came
        self._remove(exchange)
        client, stream_id = self._client, exchange.client_id
        is_head = exchange.head.method == b"HEAD"
        room = client.room(stream_id)
        headers, body = local_answer(status, error, grpc=exchange.head.grpc, room=room, head=is_head)
        client.send_headers(stream_id, headers, end=not body)
        if body:
            client.send_data(stream_id, body, end=True)
        if not ended:
            client.reset(stream_id, ErrorCodes.NO_ERROR)

    def _refuse(self, exchange: Exchange) -> None:
        """Nothing was done with it: the client may send it again, on another connection."""
        self._count(exchange, 0, "cut")
        self._forget_link(exchange, ErrorCodes.CANCEL)
        self._client.reset(exchange.client_id, ErrorCodes.REFUSED_STREAM)
        self._remove(exchange)

    def _rewind(self, exchange: Exchange) -> bool:
        """Make ready to send the request again; False when what was sent of it is not at hand any more."""
        replay = exchange.replay
        if replay is None or replay.spent:
            return False
        replay.rewind(exchange.to_link)
        exchange.request_ended = False
        return True

    def _forget_link(self, exchange: Exchange, code: ErrorCodes | int | None) -> None:
        link = exchange.link
        if link is not None:
            self._touched.add(link)
            link.forget(exchange, code)

    def _remove(self, exchange: Exchange) -> None:
        if self._exchanges.pop(exchange.client_id, None) is not None:
            # What is not sent on any more would else be missing from the connection's window for ever.
            for part in exchange.to_link:
                self._client.acknowledge(exchange.client_id, part.flow)
            exchange.to_link.clear()
            exchange.to_client.clear()
            self._side.memory.held -= exchange.held
            exchange.held = 0
            self._over(exchange)

    def _count(self, exchange: Exchange, status: int, origin: str) -> None:
        seconds = self._side.loop.time() - exchange.started
        head = exchange.head
        self._stats.request(head.method_name, status, seconds, origin)
        if head.grpc:
            self._stats.grpc(head.target, exchange.grpc_status if status else b"", origin)
        if self._side.told is not None:
            request, trace = (head.method, head.target, head.fields), exchange.trace
            if trace is not None and head.grpc:
                trace.grpc, trace.grpc_status = True, exchange.grpc_status if status else b""
            self._side.told(self._party(exchange), "h2", request, (status, origin, exchange.sent), seconds, trace)

    def _settle(self) -> None:
        if self._done or self._exchanges:
            return
        if self._leaving:
            self._client.take_leave()
            self._finish()
        else:
            self.deadline = self._idle_deadline()

    def _idle_deadline(self) -> float:
        idle_s = self._options.idle_timeout_s
        return self._side.loop.time() + idle_s if idle_s else NEVER

    def _finish(self) -> None:
        """The client's connection is gone, or is going."""
        if self._done:
            return
        self._done = True
        self.deadline = NEVER
        for exchange in list(self._exchanges.values()):
            self._count(exchange, 0, "cut")
            self._forget_link(exchange, ErrorCodes.CANCEL)
            self._remove(exchange)
        touched, self._touched = self._touched, set()
        for link in touched:
            link.flush()
        self._side.connections.discard(self)
        if self._on_done is not None:
            self._on_done()
