"""Judges a soak: every attempt of the load, every arrival at an app, against what was done to the mesh meanwhile."""

from __future__ import annotations

import time
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
    done: Counter[str] = field(default_factory=Counter)
    """What was done to the mesh."""

    def note(self, attempt: Attempt) -> None:
        """Take an attempt that has ended."""
        self.counts[attempt.kind, attempt.source, attempt.outcome] += 1
        instance = self.underway.pop(attempt.ident, "")
        if attempt.outcome == WRONG:
            self.fault(f"wrong answer: {attempt}")
        elif attempt.outcome in (ERROR, DENIED):
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

    def excuse(self, attempt: Attempt) -> str:
        """Return what excuses a failed attempt, or ``""``."""
        for service, instance, at in self.kills:
            if service == attempt.service and attempt.began <= at + KILL_GRACE_S and attempt.ended >= at - 0.1:
                where = attempt.detail.rpartition("[at ")[2].rstrip("]")
                if where in ("no instance", instance):
                    return f"{instance} was killed"
        for each in self.withdrawals:
            if (each.source, each.service) == (attempt.source, attempt.service) and (
                attempt.began <= each.lifted + self.within_s and attempt.ended >= each.asked
            ):
                return "withdrawn"
        return ""

    def verdict(self) -> list[str]:
        """Return everything that is wrong; empty when all is well."""
        wrong = list(self.faults)
        wrong += [f"failed without excuse: {attempt}" for attempt in self.failed if not self.excuse(attempt)]
        return wrong

    def table(self) -> list[str]:
        """Return the counts as lines."""
        kinds = sorted({(kind, source) for kind, source, _ in self.counts})
        lines = [f"{'kind':10} {'source':6} {OK:>8} {DENIED:>8} {ERROR:>8} {WRONG:>8}"]
        for kind, source in kinds:
            cells = [self.counts[kind, source, outcome] for outcome in (OK, DENIED, ERROR, WRONG)]
            lines.append(f"{kind:10} {source:6} " + " ".join(f"{cell:8}" for cell in cells))
        return lines


def growth(samples: list[tuple[float, float]]) -> float:
    """Return by how much a figure grew over the last half of its time: the last quarter's mean over the third's."""
    if len(samples) < 8:
        return 0.0
    first, last = samples[0][0], samples[-1][0]
    span = last - first
    third = [value for at, value in samples if first + span / 2 <= at < first + span * 3 / 4]
    fourth = [value for at, value in samples if at >= first + span * 3 / 4]
    return (sum(fourth) / len(fourth)) / (sum(third) / len(third)) - 1 if third and fourth else 0.0
