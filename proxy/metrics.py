"""Counters of a sidecar, cheap to keep (plain integers) and rendered only when asked for.

Text format: Prometheus exposition 0.0.4.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable

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
        self.help: dict[str, str] = {}

    def count(self, name: str, amount: int = 1, /, **labels: str) -> None:
        """Add to the counter ``name`` with these labels."""
        self.counters[name, tuple(labels.items())] += amount

    def pair(self, direction: str, source: str, destination: str) -> PairStats:
        """Return the counters of a pair, made on first use."""
        return self.pairs[direction, source, destination]

    def as_dict(self) -> dict[str, object]:
        """Return everything in plain values, for JSON."""
        return {
            "pairs": [
                {
                    "direction": direction, "source": source, "destination": destination,
                    "connections_total": stats.total, "connections_active": stats.active,
                    "bytes_from_app": stats.bytes_in, "bytes_to_app": stats.bytes_out,
                }
                for (direction, source, destination), stats in sorted(self.pairs.items())
            ],
            "counters": [
                {"name": name, "labels": dict(labels), "value": value}
                for (name, labels), value in sorted(self.counters.items())
            ],
            "gauges": [
                {"name": name, "labels": dict(labels), "value": value}
                for name, read in sorted(self.gauges.items())
                for labels, value in read()
            ],
        }  # fmt: skip

    def render(self) -> str:
        """Return Prometheus text."""
        lines: list[str] = []
        series: dict[str, list[tuple[Labels, float]]] = defaultdict(list)
        for (direction, source, destination), stats in sorted(self.pairs.items()):
            labels: Labels = (("direction", direction), ("source", source), ("destination", destination))
            series["lictor_connections_total"].append((labels, stats.total))
            series["lictor_app_received_bytes_total"].append((labels, stats.bytes_in))
            series["lictor_app_sent_bytes_total"].append((labels, stats.bytes_out))
            series["lictor_connections_active"].append((labels, stats.active))
        for (name, labels), value in sorted(self.counters.items()):
            series[name].append((labels, value))
        for name, read in self.gauges.items():
            series[name].extend(read())
        for name, samples in sorted(series.items()):
            if name in self.help:
                lines.append(f"# HELP {name} {self.help[name]}")
            lines.append(f"# TYPE {name} {'counter' if name.endswith('_total') else 'gauge'}")
            lines.extend(f"{name}{_labels(labels)} {_number(value)}" for labels, value in samples)
        return "\n".join(lines) + "\n"


def _labels(labels: Labels) -> str:
    if not labels:
        return ""
    return "{" + ",".join(f'{name}="{_escape(value)}"' for name, value in labels) + "}"


def _escape(value: str) -> str:
    return value.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")


def _number(value: float) -> str:
    return str(int(value)) if value == int(value) else repr(value)
