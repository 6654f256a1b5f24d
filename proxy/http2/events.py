"""What comes in on an HTTP/2 connection, as :meth:`proxy.http2.core.Core.receive` tells it."""

from __future__ import annotations

from proxy.http.head import Field


class Event:
    """Something came. ``stream_id`` is 0 where it concerns the connection."""

    def __init__(self, stream_id: int) -> None:
        self.stream_id = stream_id


class RequestCame(Event):
    """A request's fields; ``end``: it has no body."""

    def __init__(self, stream_id: int, fields: list[Field], *, end: bool) -> None:
        super().__init__(stream_id)
        self.fields = fields
        self.end = end


class ResponseCame(Event):
    """A response's fields, with its status; one below 200 is informational, and another one follows."""

    def __init__(self, stream_id: int, fields: list[Field], status: int, *, end: bool) -> None:
        super().__init__(stream_id)
        self.fields = fields
        self.status = status
        self.end = end


class DataCame(Event):
    """Some of a body. ``flow`` is what it costs of our window, its padding included."""

    def __init__(self, stream_id: int, data: bytes, flow: int, *, end: bool) -> None:
        super().__init__(stream_id)
        self.data = data
        self.flow = flow
        self.end = end


class TrailersCame(Event):
    """Trailers, which end a message."""

    def __init__(self, stream_id: int, fields: list[Field]) -> None:
        super().__init__(stream_id)
        self.fields = fields


class WindowOpened(Event):
    """The other end takes more data, on one stream or, with 0, on the whole connection."""


class StreamWasReset(Event):
    """A stream was cancelled: by the other end or, where there is a ``text``, by us for what came on it; it may have
    been the request itself."""

    def __init__(self, stream_id: int, code: int, text: str = "") -> None:
        super().__init__(stream_id)
        self.code = code
        self.text = text


class SettingsCame(Event):
    """The other end's settings; ``windows``: those of its streams may have changed."""

    def __init__(self, *, windows: bool) -> None:
        super().__init__(0)
        self.windows = windows


class Pinged(Event):
    """The other end asked for an answer, which is ready to be sent."""


class GoneAway(Event):
    """The other end takes no more streams, and does not look at those above ``last_stream_id``."""

    def __init__(self, last_stream_id: int) -> None:
        super().__init__(0)
        self.last_stream_id = last_stream_id
