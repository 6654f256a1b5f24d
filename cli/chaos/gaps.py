"""The times of a chaos run in which no write was acknowledged, and what was being done to the cluster then.

Pure: a history in, rows out. A gap that ends soon after its faults were undone is the fault's own length; what the
cluster took by itself is the rest, and that is the figure worth watching.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from cli.chaos.history import READ, Fault, History


@dataclass(frozen=True)
class WriteGap:
    """From `begin_s` to `end_s` no write was acknowledged, although clients tried all the time."""

    begin_s: float
    end_s: float
    faults: tuple[Fault, ...]
    """Those that were in force at some time of the gap, in the order in which they came."""

    @property
    def length_s(self) -> float:
        """Return how long it was."""
        return self.end_s - self.begin_s

    @property
    def unharmed_s(self) -> float:
        """Return the longest part of the gap in which no fault was in force: what the cluster took by itself."""
        free, at = 0.0, self.begin_s
        for fault in sorted(self.faults, key=lambda one: one.begin_s):
            free = max(free, fault.begin_s - at)
            at = max(at, fault.end_s)
        return max(free, self.end_s - at)


def write_gaps(history: History) -> list[WriteGap]:
    """Return the times between two acknowledged writes, longest first; the first begins with the run, and the last
    ends when the clients did: what they tried last may have got no answer."""
    moments = sorted(op.returned_s for op in history.operations if op.kind != READ and op.known)
    tried_s = history.tried_s or max((op.invoked_s for op in history.operations), default=history.duration_s)
    pairs = itertools.pairwise([0.0, *moments, max([tried_s, *moments])])
    gaps = [WriteGap(begin_s, end_s, _during(history.faults, begin_s, end_s)) for begin_s, end_s in pairs]
    return sorted(gaps, key=lambda gap: -gap.length_s)


def _during(faults: list[Fault], begin_s: float, end_s: float) -> tuple[Fault, ...]:
    return tuple(fault for fault in faults if fault.begin_s < end_s and fault.end_s > begin_s)


def told(gap: WriteGap) -> str:
    """Return one line about a gap."""
    faults = "; ".join(
        f"{fault.kind} {', '.join(fault.nodes)} {fault.begin_s:.1f}-{fault.end_s:.1f} s" for fault in gap.faults
    )
    return (
        f"{gap.length_s:.2f} s from {gap.begin_s:.1f} to {gap.end_s:.1f} s, {gap.unharmed_s:.2f} s of it on end with "
        f"no fault in force ({faults or 'no fault'})"
    )
