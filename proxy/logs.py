"""Log lines that a peer or an app can provoke are limited, so that nobody fills the disk by knocking."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable


class LimitedLog:
    """At most one line per key and interval, saying how many like it were left out."""

    def __init__(
        self, logger: logging.Logger, *, interval_s: float = 5.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._logger = logger
        self._interval_s = interval_s
        self._clock = clock
        self._seen: dict[str, tuple[float, int]] = {}

    def warning(self, key: str, text: str) -> None:
        """Log ``text`` unless a line with this key was logged within the interval."""
        now = self._clock()
        last, left_out = self._seen.get(key, (float("-inf"), 0))
        if now - last < self._interval_s:
            self._seen[key] = (last, left_out + 1)
            return
        if len(self._seen) > 1000:
            self._seen.clear()
        self._seen[key] = (now, 0)
        self._logger.warning("%s%s", text, f" (and {left_out} like it before)" if left_out else "")


class BurstLog:
    """Up to ``burst`` lines in a row, then ``per_s``; the next line says how many were left out."""

    def __init__(
        self,
        logger: logging.Logger,
        *,
        burst: int = 100,
        per_s: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._logger = logger
        self._burst = float(burst)
        self._per_s = per_s
        self._clock = clock
        self._tokens = float(burst)
        self._at = clock()
        self._left_out = 0

    def warning(self, text: str) -> None:
        """Log ``text`` while the budget lasts."""
        now = self._clock()
        self._tokens = min(self._burst, self._tokens + (now - self._at) * self._per_s)
        self._at = now
        if self._tokens < 1:
            self._left_out += 1
            return
        self._tokens -= 1
        self._logger.warning("%s%s", text, f" (and {self._left_out} left out before)" if self._left_out else "")
        self._left_out = 0
