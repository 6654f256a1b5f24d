"""HTTP counters of a sidecar, both directions, as Prometheus series."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from proxy.http import HttpCounters
from proxy.metrics import Labels, Metrics

Counters = Callable[[], Iterable[tuple[Labels, HttpCounters]]]
"""The counters there are now, each with the labels of its pair."""


def export(metrics: Metrics, counters: Counters) -> None:
    """Add the series of ``counters`` to what ``metrics`` renders."""

    def requests() -> Iterable[tuple[Labels, float]]:
        for pair, each in counters():
            for (method, code, origin), count in each.requests.items():
                yield (*pair, ("method", method), ("code", str(code)), ("origin", origin)), count

    def calls() -> Iterable[tuple[Labels, float]]:
        for pair, each in counters():
            for (method, status, origin), count in each.grpc_calls.items():
                yield (*pair, ("method", method), ("grpc_status", status), ("origin", origin)), count

    def buckets() -> Iterable[tuple[Labels, float]]:
        for pair, each in counters():
            for bound, count in each.latency_samples():
                yield (*pair, ("le", bound)), count

    metrics.gauges["lictor_http_requests_total"] = requests
    metrics.gauges["lictor_grpc_calls_total"] = calls
    metrics.gauges["lictor_http_request_seconds_bucket"] = buckets
    metrics.gauges["lictor_http_request_seconds_sum"] = lambda: [(pair, c.latency_sum_s) for pair, c in counters()]
    metrics.gauges["lictor_http_request_seconds_count"] = lambda: [(pair, c.latency_count) for pair, c in counters()]
