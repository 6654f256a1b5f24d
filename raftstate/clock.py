"""The clock that leases, promises and deadlines of raft are measured by."""

from __future__ import annotations

import time


def boot_clock() -> float:
    """Seconds on a clock that never jumps and also counts while the machine is suspended: a lease must run out."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()
