"""An exchange's parts on their way from one HTTP/2 connection to another, at the pace of the receiver."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import TYPE_CHECKING, Protocol

from h2.errors import ErrorCodes

from proxy.http.head import Field
from proxy.http.side import NEVER
from proxy.http2.events import ResponseCame
from proxy.http2.half import Half
from proxy.http2.head import RequestHead
from proxy.tracing import RequestTrace

if TYPE_CHECKING:
    from proxy.http2.link import Link


JOINED_BYTES = 16 * 1024
"""Up to this size, pieces that wait are put together: thousands of single bytes would else be as many objects."""
FIELD_BYTES = 32
"""What a field costs beside its bytes (RFC 9113, section 6.5.2)."""


class Owner(Protocol):
    """Who serves an exchange's client. Its link tells it what becomes of the exchange there."""

    def answered(self, exchange: Exchange, event: ResponseCame) -> None:
        """The response has begun; an informational one comes before it."""

    def came(self, exchange: Exchange) -> None:
        """There is more in ``to_client``."""

    def room(self, exchange: Exchange) -> None:
        """The link may take more of ``to_link``."""

    def was_reset(self, exchange: Exchange, code: ErrorCodes | int) -> None:
        """The other end cancelled the stream; the link has forgotten it."""

    def not_served(self, exchange: Exchange, *, leaving: bool) -> None:
        """The other end said that it has not looked at the request, be it because it is leaving; the link has
        forgotten the exchange."""

    def link_ended(self, exchange: Exchange, error: Exception | None) -> None:
        """The link is gone, with the stream on it; or the stream alone, for what came on it."""

    def flush(self) -> None:
        """A batch of the above is over: send what it made."""


class Exchange:
    """One request and its response. ``to_link`` and ``to_client`` hold what could not be sent on yet."""

    __slots__ = (
        "active_at", "asked_at", "client_id", "deadline", "grpc_status", "head", "head_bytes", "headers", "held",
        "keep_trailers", "link", "link_id", "origin", "owner", "replay", "request_ended", "sent", "started", "status",
        "to_client", "to_link", "trace", "turned_away",
    )  # fmt: skip

    def __init__(self, owner: Owner, client_id: int, head: RequestHead, started: float) -> None:
        self.owner = owner
        self.client_id = client_id
        self.head = head
        self.headers: list[Field] = []
        """As they are sent on."""
        self.head_bytes = self.held = 0
        """What the head takes of memory; what of the whole exchange is counted in the memory budget."""
        self.started = self.active_at = started
        self.asked_at = NEVER
        """When the request had come whole."""
        self.sent = 0
        """Bytes of the response's body that have come."""
        self.deadline = NEVER
        self.link: Link | None = None
        self.link_id = 0
        self.status = 0
        """Of the response, once it has begun."""
        self.grpc_status = b""
        self.origin = "app"
        """Who ends the response, as :class:`proxy.http.options.HttpStats` counts it."""
        self.keep_trailers = True
        """False when permissions decided on the headers: what came after the decision is not passed on."""
        self.request_ended = False
        """All of the request was sent on."""
        self.replay: Replay | None = None
        """What was sent of the request's body, while the request may have to be sent again."""
        self.turned_away = 0
        """How often it was sent to somebody who was leaving."""
        self.trace: RequestTrace | None = None
        """What is made of the request's trace context; None: nothing."""
        self.to_link: deque[Part] = deque()
        self.to_client: deque[Part] = deque()

    @property
    def response_came(self) -> bool:
        """Whether the other end has sent all of its response."""
        return bool(self.to_client and self.to_client[-1].end)

    @property
    def request_came(self) -> bool:
        """Whether the client has sent all of its request."""
        return self.request_ended or bool(self.to_link and self.to_link[-1].end)

    def holds(self) -> int:
        """Return how many bytes are held for it now."""
        size = self.head_bytes
        if self.to_link:
            size += sum(map(len, self.to_link))
        if self.to_client:
            size += sum(map(len, self.to_client))
        return size if self.replay is None else size + self.replay.size


class Part:
    """A piece of a message on its way: data, or trailers, the last one with ``end``."""

    __slots__ = ("data", "end", "flow", "trailers")

    def __init__(self, data: bytes | bytearray, flow: int, *, end: bool, trailers: list[Field] | None = None) -> None:
        self.data = data
        self.flow = flow
        """What it costs of the sender's window."""
        self.end = end
        self.trailers = trailers

    def __len__(self) -> int:
        return len(self.data) + (fields_size(self.trailers) if self.trailers else 0)

    @property
    def only_ends(self) -> bool:
        """Whether it says nothing but that the message is over."""
        return self.end and not self.data and self.trailers is None and not self.flow


def fields_size(fields: Iterable[Field]) -> int:
    """Return what a header list takes of memory, in bytes, as RFC 9113 reckons it."""
    return sum(len(name) + len(value) + FIELD_BYTES for name, value in fields)


def add_data(parts: deque[Part], data: bytes | bytearray, flow: int, *, end: bool) -> None:
    """Put data behind what waits already."""
    last = parts[-1] if parts else None
    if last is None or last.end or (data and len(last.data) + len(data) > JOINED_BYTES):
        parts.append(Part(data, flow, end=end))
        return
    if data:
        if not isinstance(last.data, bytearray):
            last.data = bytearray(last.data)
        last.data += data
    last.flow += flow
    last.end = end


class Replay:
    """What was sent of a request, to be sent again, up to a limit."""

    __slots__ = ("_limit", "parts", "size", "spent")

    def __init__(self, limit: int) -> None:
        self.parts: deque[Part] = deque()
        self.spent = False
        """More was sent than is kept, or the answer has begun: the request can't be sent again."""
        self.size = 0
        """Bytes that are kept."""
        self._limit = limit

    def add(self, data: bytes | bytearray, *, end: bool, trailers: list[Field] | None = None) -> None:
        """Note what was sent."""
        if self.spent:
            return
        self.size += len(data)
        if self.size > self._limit:
            self.drop()
        elif trailers is not None:
            self.parts.append(Part(data, 0, end=end, trailers=trailers))
        else:
            add_data(self.parts, data, 0, end=end)  # its window was given back already

    def drop(self) -> None:
        """The request is not to be sent again."""
        self.spent = True
        self.parts.clear()
        self.size = 0

    def rewind(self, waiting: deque[Part]) -> None:
        """Put what was sent before what waits to be sent."""
        waiting.extendleft(reversed(self.parts))
        self.parts.clear()
        self.size = 0


def pump(
    parts: deque[Part], source: tuple[Half | None, int], target: tuple[Half, int], replay: Replay | None = None
) -> bool:
    """Send on what the target's windows and channel take; return whether the message's end was sent.

    The source, unless it is gone, gets back of its window what was sent.
    """
    half, stream_id = target
    sender, sender_id = source
    while parts:
        part = parts[0]
        if part.trailers is not None:
            parts.popleft()
            if replay is not None:
                replay.add(b"", end=True, trailers=part.trailers)
            return half.send_headers(stream_id, part.trailers, end=True)
        size = len(part.data)
        if size:
            room = half.room(stream_id)
            if half.full or room == 0:
                return False
            if 0 < room < size:
                piece = part.data[:room]
                half.send_data(stream_id, piece, end=False)
                if replay is not None:
                    replay.add(piece, end=False)
                part.data = part.data[room:]
                given = min(room, part.flow)
                part.flow -= given
                if sender is not None:
                    sender.acknowledge(sender_id, given)
                continue
        parts.popleft()
        if size or part.end:
            half.send_data(stream_id, part.data, end=part.end)
            if replay is not None:
                replay.add(part.data, end=part.end)
        if sender is not None:
            sender.acknowledge(sender_id, part.flow)
        if part.end:
            return True
    return False
