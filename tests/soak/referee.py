"""Judges a soak: every attempt of the load, every arrival at an app, against what was done to the mesh meanwhile."""

from __future__ import annotations

import statistics
import time
from array import array
from collections import Counter
from dataclasses import dataclass, field

KILL_GRACE_S = 1.0
"""How long after an instance's death a call may still be sent its way: the other side has yet to hear of it."""
SHOWN = 20
OK, DENIED, ERROR, WRONG = "ok", "denied", "error", "wrong"


@dataclass(slots=True)
class Attempt:
    """One request, message or transfer of the load; times in monotonic seconds."""

    kind: str
    service: str
    source: str
    ident: str
    began: float
    ended: float
    outcome: str
    detail: str = ""


@dataclass(slots=True)
class Withdrawal:
    """A time in which a source may not call a destination."""

    source: str
    service: str
    asked: float
    acknowledged: float = float("inf")
    lifting: float = float("inf")
    """When it was asked to be allowed again."""
    lifted: float = float("inf")


@dataclass(slots=True)
class Referee:
    """Takes notes while the load runs; :meth:`verdict` judges them at the end."""

    within_s: float = 1.0
    """How soon a withdrawal must be in force once it is acknowledged, and a permission too."""
    counts: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    """By (kind, source, outcome)."""
    took: dict[tuple[str, str], array[float]] = field(default_factory=dict)
    """(kind, source) -> seconds of each attempt."""
    failed: list[Attempt] = field(default_factory=list)
    kills: list[tuple[str, str, float]] = field(default_factory=list)
    """(service, instance, when)."""
    withdrawals: list[Withdrawal] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    """What is wrong whatever else happened."""
    underway: dict[str, str] = field(default_factory=dict)
    """Identity of a request that has not ended to the instance at which it arrived last."""
    delay_max_s: float = 0.0
    """The latest arrival of a withdrawn source after the acknowledgement."""

    def note(self, attempt: Attempt, since: float = float("inf")) -> None:
        """Take an attempt that has ended; what it failed of may have happened from `since` on."""
        self.counts[attempt.kind, attempt.source, attempt.outcome] += 1
        took_s = attempt.ended - attempt.began
        self.took.setdefault((attempt.kind, attempt.source), array("f")).append(took_s)
        instance = self.underway.pop(attempt.ident, "")
        if attempt.outcome == WRONG:
            self.fault(f"wrong answer: {attempt}")
        elif attempt.outcome in (ERROR, DENIED):
            attempt.began = min(attempt.began, since)
            attempt.detail = f"{attempt.detail} [at {instance or 'no instance'}]"
            self.failed.append(attempt)

    def fault(self, text: str) -> None:
        """Note what may never happen."""
        if len(self.faults) < 1000:
            self.faults.append(text)

    def arrived(self, service: str, instance: str, source: str, ident: str) -> None:
        """An app got a request."""
        now = time.monotonic()
        self.underway[ident] = instance
        for withdrawal in reversed(self.withdrawals):
            if (withdrawal.source, withdrawal.service) == (source, service):
                late = now - withdrawal.acknowledged
                if late > 0 and now < withdrawal.lifting:
                    self.delay_max_s = max(self.delay_max_s, late)
                    if late > self.within_s:
                        self.fault(
                            f"forbidden {source} => {service} ({ident}) served by {instance} {late:.3f} s after"
                        )
                return

    def _killed_under(self, attempt: Attempt) -> tuple[str, float] | None:
        """Return the instance that was killed while an attempt may have been under way there, and when."""
        where = attempt.detail.rpartition("[at ")[2].rstrip("]")
        for service, instance, at in self.kills:
            meanwhile = attempt.began <= at + KILL_GRACE_S and attempt.ended >= at - 0.1
            if service == attempt.service and meanwhile and where in ("no instance", instance):
                return instance, at
        return None

    def around_kills(self) -> str:
        """Say in words how the failures that nothing but a kill excuses lie around it."""
        alone = [attempt for attempt in self.failed if not self._withdrawn(attempt)]
        began = [each.began - killed[1] for each in alone if (killed := self._killed_under(each)) is not None]
        late = [after for after in began if after > 0]
        return (
            f"{len(began)} failed around the kill of an instance; {len(late)} of them began after it, "
            f"the latest {max(late, default=0.0) * 1000:.0f} ms"
        )

    def excuse(self, attempt: Attempt) -> str:
        """Return what excuses a failed attempt, or ``""``."""
        if (killed := self._killed_under(attempt)) is not None:
            return f"{killed[0]} was killed"
        return "withdrawn" if self._withdrawn(attempt) else ""

    def _withdrawn(self, attempt: Attempt) -> bool:
        return any(
            (each.source, each.service) == (attempt.source, attempt.service)
            and attempt.began <= each.lifted + self.within_s
            and attempt.ended >= each.asked
            for each in self.withdrawals
        )

    def verdict(self) -> list[str]:
        """Return everything that is wrong; empty when all is well."""
        wrong = list(self.faults)
        wrong += [f"failed without excuse: {attempt}" for attempt in self.failed if not self.excuse(attempt)]
        return wrong

    def unproven(self) -> list[str]:
        """Return the kinds of calls of which not one went well: they prove nothing."""
        kinds = sorted({(kind, source) for kind, source, _ in self.counts})
        return [f"no {kind} of {source} went well" for kind, source in kinds if not self.counts[kind, source, OK]]

    def table(self) -> list[str]:
        """Return the counts as lines."""
        kinds = sorted({(kind, source) for kind, source, _ in self.counts})
        lines = [f"{'kind':10} {'source':6} {OK:>8} {DENIED:>8} {ERROR:>8} {WRONG:>8} {'p50 ms':>8} {'p99 ms':>8}"]
        for kind, source in kinds:
            cells = [self.counts[kind, source, outcome] for outcome in (OK, DENIED, ERROR, WRONG)]
            took = sorted(self.took[kind, source])
            cells += [round(took[int(len(took) * share)] * 1000) for share in (0.5, 0.99)]
            lines.append(f"{kind:10} {source:6} " + " ".join(f"{cell:8}" for cell in cells))
        return lines


def course_of(samples: list[tuple[float, float]], points: int = 10) -> list[float]:
    """Return the figure at about so many moments, evenly spread, the first and the last among them."""
    return [samples[round(at * (len(samples) - 1) / (points - 1))][1] for at in range(points)]


def growth(samples: list[tuple[float, float]]) -> float:
    """Return by how much a figure grew over the last half of its time, by the straight line nearest to it there."""
    if len(samples) < 8:
        return 0.0
    first, last = samples[0][0], samples[-1][0]
    half = [(at, value) for at, value in samples if at >= (first + last) / 2]
    if len(half) < 2 or half[0][0] == last:
        return 0.0
    slope, at_zero = statistics.linear_regression([at - first for at, _ in half], [value for _, value in half])
    middle = at_zero + slope * (half[0][0] - first)
    return slope * (last - half[0][0]) / middle
