"""Times that the product promises, measured on a machine that others may load too.

A promise such as "a withdrawal takes less than a second" is about Lictor, not about how long its processes wait for a
processor. The kernel counts how long some task that could have run had to wait for one (pressure stall information,
docs.kernel.org/accounting/psi.html). That much is allowed beside what is promised, within bounds: on a quiet machine
the promise is measured as it stands, on a crowded one what takes several times as long is still a failure.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

PATIENCE_S = 60.0
"""How long a test awaits what has no promised time. It costs nothing where all is well."""
STRETCH_MAX = 5
"""A crowded machine makes a promise at most so many times as long."""
PRESSURE = Path("/proc/pressure/cpu")


def waited_s() -> float:
    """Return for how many seconds since the machine's start some task waited for a processor; 0 where none tells."""
    try:
        some = PRESSURE.read_text().splitlines()[0]
    except (OSError, IndexError):
        return 0.0
    return int(some.rpartition("total=")[2]) / 1e6


class Since:
    """A moment from which a promise is measured: made just before the act that it is about."""

    def __init__(self) -> None:
        self.at = time.monotonic()
        self._waited_s = waited_s()

    def took(self, promised_s: float, what: str = "it", *, at: float = 0.0) -> float:
        """Assert that what ended now, or ``at`` that moment of the monotonic clock, kept its promise.

        Returns how long it took, in seconds.
        """
        took_s = (at or time.monotonic()) - self.at
        waited = min(waited_s() - self._waited_s, promised_s * (STRETCH_MAX - 1))
        assert took_s <= promised_s + waited, (
            f"{what} took {took_s:.3f} s, promised are {promised_s} s; tasks waited {waited:.3f} s for a processor"
        )
        return took_s


@asynccontextmanager
async def promptly(promised_s: float = 1.0, what: str = "it") -> AsyncIterator[None]:
    """Fail unless the body ends as soon as promised, by an error or without one."""
    since = Since()
    async with asyncio.timeout(promised_s * STRETCH_MAX):
        try:
            yield
        finally:
            since.took(promised_s, what)
