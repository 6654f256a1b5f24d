"""An HTTP/2 connection on which we ask: to the app, or to an instance. Streams of many clients may share it."""

from __future__ import annotations

from collections.abc import Callable

from h2.errors import ErrorCodes

from proxy.errors import ProxyError
from proxy.http2.errors import StreamError
from proxy.http2.events import (
    DataCame,
    Event,
    GoneAway,
    ResponseCame,
    SettingsCame,
    StreamWasReset,
    TrailersCame,
    WindowOpened,
)
from proxy.http2.exchange import Exchange, Owner, Part, add_data
from proxy.http2.half import GREETING_S, Half
from proxy.http2.head import passed_on, value_of
from proxy.stream import NOBODY, Channel

_STREAMS_BEFORE_SETTINGS = 100
"""Streams that are opened before the other end has said how many it takes (RFC 9113, section 6.5.2)."""


def _nothing_ended(link: Link, error: Exception | None) -> None:
    """What one that has told its end calls."""


class Link:
    """One connection with the exchanges on it. ``on_end`` is called once, when nothing more is asked on it."""

    __slots__ = (
        "_gone",
        "_on_end",
        "_on_known",
        "_on_settled",
        "_settings_came",
        "_widened",
        "exchanges",
        "half",
        "heard",
        "leaving",
    )

    def __init__(
        self,
        *,
        linger_s: float,
        on_end: Callable[[Link, Exception | None], None],
        on_settled: Callable[[Link], None] | None = None,
        on_known: Callable[[], None] | None = None,
        greeting_s: float = GREETING_S,
    ) -> None:
        """``on_settled`` is called when the last exchange has ended; ``on_known`` once, when the other end has said
        how many streams it takes."""
        self.exchanges: dict[int, Exchange] = {}
        """By stream id."""
        self.leaving = False
        """No more streams are opened; the end comes with the last one."""
        self.heard = False
        """Something has come from the other end."""
        self._gone = self._settings_came = False
        self._widened = False
        """All streams may have room now: they are looked at once for all that came together."""
        self._on_end = on_end
        self._on_settled = on_settled
        self._on_known = on_known
        self.half = Half(
            client=True,
            linger_s=linger_s,
            greeting_s=greeting_s,
            on_events=self._events,
            on_end=self._ended,
            on_room=self._room,
        )

    def attach(self, channel: Channel) -> None:
        """Use a channel, and make this its peer."""
        self.half.channel = channel
        channel.peer = self.half
        self.half.flush()

    @property
    def attached(self) -> bool:
        """Whether there is a channel yet."""
        return self.half.channel is not NOBODY

    @property
    def closed(self) -> bool:
        """Whether nothing can be asked any more."""
        return self.half.closed

    @property
    def known(self) -> bool:
        """Whether the other end has said how many streams it takes."""
        return self._settings_came

    @property
    def full(self) -> bool:
        """Whether the other end takes no further stream for now."""
        limit = self.half.core.peer_streams_max
        return len(self.exchanges) >= (limit if self._settings_came else min(limit, _STREAMS_BEFORE_SETTINGS))

    def open(self, exchange: Exchange, *, end: bool) -> bool:
        """Open a stream with the exchange's headers; return False when no stream can be opened any more."""
        stream_id = self.half.core.open()
        if not stream_id:  # the ids are used up
            self.leaving = True
            return False
        exchange.link, exchange.link_id = self, stream_id
        self.exchanges[stream_id] = exchange
        if self.half.send_headers(stream_id, exchange.headers, end=end):
            return True
        self.forget(exchange)
        return False

    def forget(self, exchange: Exchange, code: ErrorCodes | int | None = None) -> None:
        """The exchange has nothing more to do with this link; with ``code`` its stream is cancelled."""
        if self.exchanges.pop(exchange.link_id, None) is None:
            return
        exchange.link = None
        for part in exchange.to_client:
            self.half.acknowledge(exchange.link_id, part.flow)
        if code is not None:
            self.half.reset(exchange.link_id, code)
        if not self.exchanges and self._on_settled is not None:
            self._on_settled(self)

    def flush(self) -> None:
        """Send what is to be sent; end the connection when it is to end."""
        self.half.flush()
        if self.leaving and not self.exchanges and self.attached:
            self.half.close()
            self._tell_end(None)

    def leave(self) -> None:
        """Open no more streams; end with the last one."""
        self.leaving = True
        self.flush()

    def cut(self, error: Exception | None = None) -> None:
        """Drop the connection at once, and tell those whose exchanges are on it."""
        if not self.half.closed:
            self.half.cut(error)
            self._ended(self.half, error)

    # Events

    def _events(self, half: Half, events: list[Event]) -> None:
        self.heard = True
        owners: set[Owner] = set()
        for event in events:
            self._event(event, owners)
        if self._widened:
            self._widened = False
            self._more_room(owners)
        for owner in owners:
            owner.flush()
        self.flush()

    def _event(self, event: Event, owners: set[Owner]) -> None:
        stream_id = event.stream_id
        if not stream_id:
            self._link_event(event, owners)
            return
        exchange = self.exchanges.get(stream_id)
        if exchange is not None:
            owners.add(exchange.owner)
            self._stream_event(exchange, event)
        elif isinstance(event, DataCame):
            self.half.acknowledge(stream_id, event.flow)

    def _link_event(self, event: Event, owners: set[Owner]) -> None:
        if isinstance(event, WindowOpened):
            self._widened = True
        elif isinstance(event, GoneAway):
            self.leaving = True
            for each in [x for id, x in self.exchanges.items() if id > event.last_stream_id]:
                owners.add(each.owner)
                self.forget(each)
                each.owner.not_served(each, leaving=True)
        elif not self.half.controlled():
            self.cut(ProxyError("makes us answer but reads nothing"))
        elif isinstance(event, SettingsCame):
            self._settings_came = True
            if event.windows:
                self._widened = True
            on_known, self._on_known = self._on_known, None
            if on_known is not None:
                on_known()

    def _more_room(self, owners: set[Owner]) -> None:
        for exchange in list(self.exchanges.values()):
            if exchange.to_link:
                owners.add(exchange.owner)
                exchange.owner.room(exchange)

    def _stream_event(self, exchange: Exchange, event: Event) -> None:
        owner = exchange.owner
        if isinstance(event, DataCame):
            exchange.sent += len(event.data)
            add_data(exchange.to_client, event.data, event.flow, end=event.end)
            owner.came(exchange)
        elif isinstance(event, ResponseCame):
            owner.answered(exchange, event)
        elif isinstance(event, WindowOpened):
            owner.room(exchange)
        elif isinstance(event, TrailersCame):
            trailers = passed_on(event.fields, response=False)
            exchange.grpc_status = value_of(trailers, b"grpc-status")
            exchange.to_client.append(Part(b"", 0, end=True, trailers=trailers))
            owner.came(exchange)
        elif isinstance(event, StreamWasReset):
            self.forget(exchange)
            if event.text:
                owner.link_ended(exchange, StreamError(ErrorCodes(event.code), event.text))
            elif event.code == ErrorCodes.REFUSED_STREAM:
                owner.not_served(exchange, leaving=False)
            else:
                owner.was_reset(exchange, event.code)

    def _room(self, half: Half) -> None:
        owners: set[Owner] = set()
        self._more_room(owners)
        for owner in owners:
            owner.flush()
        self.flush()

    def _ended(self, half: Half, error: Exception | None) -> None:
        self.leaving = True
        self._tell_end(error)
        exchanges = list(self.exchanges.values())
        self.exchanges.clear()
        for exchange in exchanges:
            exchange.link = None
            exchange.owner.link_ended(exchange, error)
        for owner in {exchange.owner for exchange in exchanges}:
            owner.flush()

    def _tell_end(self, error: Exception | None) -> None:
        if not self._gone:
            self._gone = True
            self._on_known = None
            on_end, self._on_end = self._on_end, _nothing_ended  # who is told may hold this
            on_end(self, error)
