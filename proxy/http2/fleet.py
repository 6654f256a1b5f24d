"""What the caller's side of HTTP/2 asks of whoever knows the instances: :mod:`proxy.outbound_http2`."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Protocol

from proxy.errors import StreamRefused
from proxy.http.head import Field
from proxy.http2.head import RequestHead
from proxy.http2.link import Link
from proxy.stream import Channel


class Lease(Protocol):
    """The right to send one request to one instance. ``done`` ends it."""

    key: Hashable

    def link(self) -> Link | None:
        """Return a link that takes a stream now, or None: then :meth:`connect`."""
        ...

    async def connect(self) -> Link:
        """Make a link that takes a stream. Raises :class:`~proxy.errors.ConnectFailed` or OSError."""
        ...

    def failed(self, reason: str) -> None:
        """The instance could not be reached."""
        ...

    def silent(self, reason: str) -> None:
        """The instance took the request and did not answer it."""
        ...

    def answered(self, status: int) -> None:
        """The instance gave an answer with this HTTP status, or one that says the same."""
        ...

    def refusal(self, refused: StreamRefused) -> tuple[int, str] | None:
        """The instance's sidecar did not take the link: return the answer if no other one would, else None."""
        ...

    def done(self) -> None:
        """The request has ended. Idempotent."""
        ...


class Aim(Protocol):
    """What a plan says of one request; see :class:`proxy.balancing.routing.Way`."""

    request_timeout_s: float
    idle_timeout_s: float
    attempts_max: int
    """0: as the upstream's options say."""
    retry_statuses: frozenset[int]
    retry_grpc: frozenset[bytes]
    retry_resets: bool

    def target(self, target: bytes) -> bytes:
        """Return the target to ask for."""
        ...

    def asked(self, fields: list[Field]) -> list[Field]:
        """Return the request's fields as they are sent on."""
        ...

    def answered(self, fields: list[Field]) -> list[Field]:
        """Return the response's fields as they are sent on."""
        ...


class Fleet(Protocol):
    """The instances of one upstream."""

    def aim(self, head: RequestHead, client: Channel) -> Aim | None:
        """Return what the plan says of a request; None when there is no plan."""
        ...

    def unavailable(self) -> str:
        """Return why nothing can be sent now, or ``""``."""
        ...

    def pick(self, tried: set[Hashable], aim: Aim | None) -> Lease | None:
        """Choose the instance for a request, outside ``tried``."""
        ...

    def may_retry(self) -> bool:
        """Take leave for one retry."""
        ...
