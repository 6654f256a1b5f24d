"""Limits and timeouts of the HTTP filter, and what it counts."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from typing import Protocol

LIMITED = "limited"
"""Who ended a request that one of its upstream's limits did not let in."""
LATENCY_BOUNDS_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
"""Upper bounds of the latency histogram's buckets; the last bucket has none."""
METHODS = frozenset({
    "ACL", "BASELINE-CONTROL", "BIND", "CHECKIN", "CHECKOUT", "CONNECT", "COPY", "DELETE", "GET", "HEAD", "LABEL",
    "LINK", "LOCK", "MERGE", "MKACTIVITY", "MKCALENDAR", "MKCOL", "MKREDIRECTREF", "MKWORKSPACE", "MOVE", "OPTIONS",
    "ORDERPATCH", "PATCH", "POST", "PROPFIND", "PROPPATCH", "PURGE", "PUT", "QUERY", "REBIND", "REPORT", "SEARCH",
    "TRACE", "UNBIND", "UNCHECKOUT", "UNLINK", "UNLOCK", "UPDATE", "UPDATEREDIRECTREF", "VERSION-CONTROL",
})  # fmt: skip
"""Methods counted by name (IANA's registry, and ``PURGE``): callers choose them, so the rest are ``other``."""
GRPC_METHODS_MAX = 256
"""gRPC methods that are counted by name between two services; callers choose the names, so the rest are ``other``."""
GRPC_METHOD_BYTES_MAX = 256


@dataclass(frozen=True, slots=True)
class HttpOptions:
    """How one side of a sidecar treats HTTP. A timeout of 0 is none."""

    service: str = ""
    """The service in whose name the filter answers (inbound: the app's own)."""
    uri: str = ""
    """The SPIFFE id of that service: ``By=`` of ``x-forwarded-client-cert``."""
    head_bytes_max: int = 64 * 1024
    """Start line and headers of one message, and its trailers, each; more is a 431."""
    header_count_max: int = 128
    head_timeout_s: float = 30.0
    """From the first byte of a request to the end of its headers; then 408."""
    greeting_timeout_s: float = 10.0
    """HTTP/2: until the other end has said its settings and taken ours; then its connection is closed."""
    idle_timeout_s: float = 3600.0
    """Between requests of one connection; then it is closed."""
    response_timeout_s: float = 0.0
    """From a request's end to the end of its response; then 504, or a cut where the response has begun."""
    dial_timeout_s: float = 5.0
    linger_s: float = 2.0
    """How long a connection that is being closed may go on sending what nobody reads."""
    sweep_s: float = 1.0
    """How often the deadlines are looked at, at the least: the precision of the timeouts above but the response's."""
    upgrades: frozenset[str] = frozenset({"websocket"})
    """Protocols to which a connection may be switched, lower case; other ``Upgrade`` headers are not passed on.

    Never ``h2c``: its requests would go past the permissions.
    """


@dataclass(frozen=True, slots=True)
class OutboundOptions:
    """How requests to one upstream are sent. A timeout of 0 is none."""

    http: HttpOptions
    try_timeout_s: float = 0.0
    """From a request's end to the start of the response to one attempt; then another is made where that is safe."""
    attempts_max: int = 3
    requests_max: int = 10_000
    """Requests in flight; more get a 503 at once."""
    pending_max: int = 1_000
    """Requests that await a connection; more get a 503 at once."""
    connections_max: int = 20_000
    """HTTP/1.1: connections to instances in use, one for each request under way; more requests await one."""


class HttpStats(Protocol):
    """Where the filter reports each request."""

    def request(self, method: str, code: int, seconds: float, origin: str) -> None:
        """A request was answered.

        ``origin`` says by whom: ``app``, or the filter itself: ``denied``, ``malformed``, ``app-down``, ``timeout``,
        ``overloaded`` (no memory for a head that does not arrive whole), ``limited`` (a limit of the upstream's was
        reached), ``cut`` (code 0: no full answer was sent).
        """

    def grpc(self, target: bytes, status: bytes, origin: str) -> None:
        """The same request was a gRPC call: its method is the target; ``status`` is empty when none came."""


class HttpCounters:
    """:class:`HttpStats` in plain integers, for an admin endpoint to export."""

    def __init__(self) -> None:
        self.requests: dict[tuple[str, int, str], int] = {}
        """By (method, code, origin)."""
        self.grpc_calls: dict[tuple[str, str, str], int] = {}
        """By (``/package.Service/Method``, gRPC status or ``none``, origin)."""
        self._grpc_methods: set[bytes] = set()
        self.latency_buckets = [0] * (len(LATENCY_BOUNDS_S) + 1)
        self.latency_sum_s = 0.0
        self.latency_count = 0

    def request(self, method: str, code: int, seconds: float, origin: str) -> None:
        key = (method, code, origin)
        count = self.requests.get(key, 0)
        if not count and method and method not in METHODS:
            key = ("other", code, origin)
            count = self.requests.get(key, 0)
        self.requests[key] = count + 1
        self.latency_buckets[bisect_left(LATENCY_BOUNDS_S, seconds)] += 1
        self.latency_sum_s += seconds
        self.latency_count += 1

    def grpc(self, target: bytes, status: bytes, origin: str) -> None:
        methods = self._grpc_methods
        if target not in methods:
            if len(methods) >= GRPC_METHODS_MAX or len(target) > GRPC_METHOD_BYTES_MAX:
                target = b"other"
            else:
                methods.add(target)
        known = status.isdigit() and len(status) <= 2
        key = (target.decode("latin-1"), status.decode() if known else "none", origin)
        self.grpc_calls[key] = self.grpc_calls.get(key, 0) + 1

    def latency_samples(self) -> list[tuple[str, int]]:
        """Return the histogram in Prometheus' form: (upper bound, count up to it), the last bound ``+Inf``."""
        samples, total = [], 0
        for bound, count in zip((*map(str, LATENCY_BOUNDS_S), "+Inf"), self.latency_buckets, strict=True):
            total += count
            samples.append((bound, total))
        return samples
