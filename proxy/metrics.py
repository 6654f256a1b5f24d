"""Counters of a sidecar, cheap to keep (plain integers) and rendered only when asked for.

Text format: Prometheus exposition 0.0.4.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable

import msgspec

from proxy.metric_names import HELP

Labels = tuple[tuple[str, str], ...]


class PairStats:
    """Connections and bytes between one source and one destination service, in one direction of this sidecar."""

    __slots__ = ("active", "bytes_in", "bytes_out", "total")

    def __init__(self) -> None:
        self.total = 0
        self.active = 0
        self.bytes_in = 0
        """From the app, of connections that ended."""
        self.bytes_out = 0
        """To the app, of connections that ended."""


class Metrics:
    """All counters of a sidecar."""

    def __init__(self) -> None:
        self.pairs: dict[tuple[str, str, str], PairStats] = defaultdict(PairStats)
        """By (direction ``inbound`` or ``outbound``, source, destination)."""
        self.counters: dict[tuple[str, Labels], int] = defaultdict(int)
        self.gauges: dict[str, Callable[[], Iterable[tuple[Labels, float]]]] = {}
        """Read when rendered."""

    def count(self, name: str, amount: int = 1, /, **labels: str) -> None:
        """Add to the counter ``name`` with these labels."""
        self.counters[name, tuple(labels.items())] += amount

    def pair(self, direction: str, source: str, destination: str) -> PairStats:
        """Return the counters of a pair, made on first use."""
        return self.pairs[direction, source, destination]

    def snapshot(self) -> Snapshot:
        """Return everything as it is now."""
        return Snapshot(
            pairs=[
                (*key, stats.total, stats.active, stats.bytes_in, stats.bytes_out)
                for key, stats in sorted(self.pairs.items())
                if key[1] or stats.total  # before an upstream knows whose it is, its pair has no source
            ],
            counters=[(name, labels, value) for (name, labels), value in sorted(self.counters.items())],
            gauges=[(name, labels, value) for name, read in sorted(self.gauges.items()) for labels, value in read()],
        )

    def as_dict(self) -> dict[str, object]:
        """Return everything in plain values, for JSON."""
        return self.snapshot().as_dict()

    def render(self) -> str:
        """Return Prometheus text."""
        return self.snapshot().render()


class Snapshot(msgspec.Struct):
    """All counters of a sidecar, or of several of its worker processes, at one moment."""

    pairs: list[tuple[str, str, str, int, int, int, int]] = []
    """Direction, source, destination; then as in :class:`PairStats`: total, active, bytes in, bytes out."""
    counters: list[tuple[str, Labels, float]] = []
    gauges: list[tuple[str, Labels, float]] = []

    def as_dict(self) -> dict[str, object]:
        """Return everything in plain values, for JSON."""
        return {
            "pairs": [
                {
                    "direction": direction, "source": source, "destination": destination,
                    "connections_total": total, "connections_active": active,
                    "bytes_from_app": bytes_in, "bytes_to_app": bytes_out,
                }
                for direction, source, destination, total, active, bytes_in, bytes_out in self.pairs
            ],
            "counters": [_sample(*sample) for sample in self.counters],
            "gauges": [_sample(*sample) for sample in self.gauges],
        }  # fmt: skip

    def render(self) -> str:
        """Return Prometheus text."""
        lines: list[str] = []
        series: dict[str, list[tuple[Labels, float]]] = defaultdict(list)
        for direction, source, destination, total, active, bytes_in, bytes_out in self.pairs:
            labels: Labels = (("direction", direction), ("source", source), ("destination", destination))
            series["lictor_connections_total"].append((labels, total))
            series["lictor_app_received_bytes_total"].append((labels, bytes_in))
            series["lictor_app_sent_bytes_total"].append((labels, bytes_out))
            series["lictor_connections_active"].append((labels, active))
        for name, labels, value in (*self.counters, *self.gauges):
            series[name].append((labels, value))
        family = ""
        for name, samples in sorted(series.items(), key=lambda each: (_family(each[0]), each[0])):
            if _family(name) != family:
                family = _family(name)
                if family in HELP:
                    lines.append(f"# HELP {family} {HELP[family]}")
                lines.append(f"# TYPE {family} {_type(name)}")
            lines.extend(f"{name}{_labels(labels)} {_number(value)}" for labels, value in samples)
        return "\n".join(lines) + "\n"

    def ended(self) -> Snapshot:
        """Return what stays true when the process that counted this is gone: everything that only ever grows."""
        return Snapshot(
            pairs=[(*pair[:4], 0, pair[5], pair[6]) for pair in self.pairs],
            counters=self.counters,
            gauges=[sample for sample in self.gauges if sample[0].endswith(_GROWING)],
        )


_HISTOGRAM = ("_bucket", "_sum", "_count")


def _family(name: str) -> str:
    """Return the metric that a series is part of: a histogram has three."""
    return next((name.removesuffix(end) for end in _HISTOGRAM if name.endswith(end)), name)


def _type(name: str) -> str:
    return "counter" if name.endswith("_total") else "histogram" if name.endswith(_HISTOGRAM) else "gauge"


_GROWING = ("_total", "_bucket", "_sum", "_count")
_LEAST = frozenset({"lictor_certificate_expiry_seconds", "lictor_certificate_issued_seconds", "lictor_ready"})
"""Of these the smallest counts, where of all others the sum does."""


def merged(snapshots: Iterable[Snapshot]) -> Snapshot:
    """Return the counters of several processes as if one had counted."""
    pairs: dict[tuple[str, str, str], tuple[int, int, int, int]] = {}
    counters: dict[tuple[str, Labels], float] = defaultdict(int)
    gauges: dict[tuple[str, Labels], float] = {}
    for each in snapshots:
        for direction, source, destination, *counts in each.pairs:
            before = pairs.get((direction, source, destination), (0, 0, 0, 0))
            total, active, bytes_in, bytes_out = (a + b for a, b in zip(before, counts, strict=True))
            pairs[direction, source, destination] = (total, active, bytes_in, bytes_out)
        for name, labels, value in each.counters:
            counters[name, labels] += value
        for name, labels, value in each.gauges:
            known = gauges.get((name, labels))
            if known is None:
                gauges[name, labels] = value
            else:
                gauges[name, labels] = min(known, value) if name in _LEAST else known + value
    return Snapshot(
        pairs=[(*key, *counts) for key, counts in sorted(pairs.items())],
        counters=[(*key, value) for key, value in sorted(counters.items())],
        gauges=[(*key, value) for key, value in gauges.items()],  # in their order: buckets by bound
    )


def _sample(name: str, labels: Labels, value: float) -> dict[str, object]:
    return {"name": name, "labels": dict(labels), "value": value}


def _labels(labels: Labels) -> str:
    if not labels:
        return ""
    return "{" + ",".join(f'{name}="{_escape(value)}"' for name, value in labels) + "}"


def _escape(value: str) -> str:
    return value.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")


def _number(value: float) -> str:
    return str(int(value)) if value == int(value) else repr(value)
