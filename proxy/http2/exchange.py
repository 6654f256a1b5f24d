"""An exchange's parts on their way from one HTTP/2 connection to another, at the pace of the receiver."""

from __future__ import annotations

from collections import deque

from proxy.http.head import Field
from proxy.http.side import NEVER
from proxy.http2.half import Half
from proxy.http2.head import RequestHead


class Exchange:
    """One request and its response. ``to_app`` and ``to_client`` hold what could not be sent on yet."""

    __slots__ = (
        "app", "app_id", "client_id", "deadline", "head", "headers", "keep_trailers", "request_ended",
        "sent", "started", "status", "to_app", "to_client",
    )  # fmt: skip

    def __init__(self, client_id: int, head: RequestHead, headers: list[Field], started: float) -> None:
        self.client_id = client_id
        self.head = head
        self.headers = headers
        self.started = started
        self.sent = 0
        """Bytes of the response's body that have come."""
        self.deadline = NEVER
        self.app: Half | None = None
        self.app_id = 0
        self.status = 0
        """Of the response, once it has begun."""
        self.keep_trailers = True
        """False when permissions decided on the headers: what came after the decision is not passed on."""
        self.request_ended = False
        """All of the request was sent to the app."""
        self.to_app: deque[Part] = deque()
        self.to_client: deque[Part] = deque()


class Part:
    """A piece of a message on its way: data, or trailers, the last one with ``end``."""

    __slots__ = ("data", "end", "flow", "trailers")

    def __init__(self, data: bytes, flow: int, *, end: bool, trailers: list[Field] | None = None) -> None:
        self.data = data
        self.flow = flow
        """What it costs of the sender's window."""
        self.end = end
        self.trailers = trailers


def pump(parts: deque[Part], source: tuple[Half, int], target: tuple[Half, int]) -> bool:
    """Send on what the target's windows and channel take; return whether the message's end was sent."""
    half, stream_id = target
    sender, sender_id = source
    while parts:
        part = parts[0]
        if part.trailers is not None:
            parts.popleft()
            return half.send_headers(stream_id, part.trailers, end=True)
        size = len(part.data)
        if size:
            room = half.room(stream_id)
            if half.full or room == 0:
                return False
            if 0 < room < size:
                half.send_data(stream_id, part.data[:room], end=False)
                part.data = part.data[room:]
                part.flow -= room
                sender.acknowledge(sender_id, room)
                continue
        parts.popleft()
        if size or part.end:
            half.send_data(stream_id, part.data, end=part.end)
        sender.acknowledge(sender_id, part.flow)
        if part.end:
            return True
    return False
