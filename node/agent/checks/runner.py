"""Runs one probe again and again: jitter, a deadline, no overlap, and thresholds before the state turns."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from node.agent.definitions import MIN_INTERVAL_S, CheckDefinition
from raftstate.model.catalog import CRITICAL, PASSING, WARNING

OUTPUT_BYTES_MAX = 4096
DEFAULT_TIMEOUT_S = 10.0
JITTER = 0.1
FIRST_RUN_MAX_S = 1.0
"""The first run comes within this time of the registration, so that a fresh instance is soon judged."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What one run of a probe found."""

    status: str
    output: str


Probe = Callable[[], Awaitable[Verdict]]
Report = Callable[[str, str], None]
"""Told (status, output) after each run, thresholds applied."""


def bounded(text: str, limit: int = OUTPUT_BYTES_MAX) -> str:
    """Return at most ``limit`` bytes of a text; the end is kept for scripts' last words, the beginning otherwise."""
    limit = min(limit, OUTPUT_BYTES_MAX)
    data = text.encode(errors="replace")
    return text if len(data) <= limit else data[:limit].decode(errors="ignore")


class Thresholds:
    """Turns single results into a state: so many in a row before it changes. Pure."""

    def __init__(self, definition: CheckDefinition, status: str) -> None:
        self._to_passing = max(definition.success_before_passing, 1)
        critical = max(definition.failures_before_critical, 1)
        self._to_critical = critical
        # Consul: without its own threshold a warning comes with the one of critical.
        self._to_warning = max(definition.failures_before_warning, 0) or critical
        self.status = status
        self._successes = self._failures = 0

    def take(self, status: str) -> str:
        """Count one result; return the state now."""
        if status == PASSING:
            self._successes, self._failures = self._successes + 1, 0
            if self._successes >= self._to_passing:
                self.status = PASSING
            return self.status
        self._successes, self._failures = 0, self._failures + 1
        if self._failures >= self._to_critical:
            self.status = status if status == WARNING else CRITICAL
        elif self._failures >= self._to_warning:
            self.status = WARNING
        return self.status


async def run_probe(probe: Probe, definition: CheckDefinition) -> Verdict:
    """Run once within the check's timeout. Whatever a probe raises is a failed check."""
    timeout_s = definition.timeout or DEFAULT_TIMEOUT_S
    try:
        async with asyncio.timeout(timeout_s):
            verdict = await probe()
    except TimeoutError:
        return Verdict(CRITICAL, f"no answer within {timeout_s:g} s")
    except Exception as error:  # noqa: BLE001 - a probe that fails in any way is a critical check, not a dead runner
        return Verdict(CRITICAL, bounded(f"{type(error).__name__}: {error}"))
    return Verdict(verdict.status, bounded(verdict.output, definition.output_max_size))


async def run_check(
    definition: CheckDefinition, probe: Probe, status: Callable[[], str], report: Report, rng: random.Random
) -> None:
    """Probe for ever. One run ends before the next pause begins, so runs never overlap.

    ``status`` gives the state that the thresholds start from; it is asked just before the first run.
    """
    interval_s = max(definition.interval, MIN_INTERVAL_S)
    await asyncio.sleep(rng.uniform(0.0, min(FIRST_RUN_MAX_S, interval_s)))
    thresholds = Thresholds(definition, status())
    while True:
        verdict = await run_probe(probe, definition)
        state = thresholds.take(verdict.status)
        report(state, verdict.output)
        await asyncio.sleep(interval_s * rng.uniform(1.0 - JITTER, 1.0 + JITTER))
