"""Go's duration strings, as Consul's API writes and reads them.

Source: Go's ``time.ParseDuration`` and ``Duration.String``. A bare number means nanoseconds.
"""

from __future__ import annotations

import re

_UNIT_S = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "μs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_WHOLE = re.compile(r"[+-]?(?:(?:\d+\.?\d*|\.\d+)(?:ns|us|µs|μs|ms|s|m|h))+", re.ASCII)
_PART = re.compile(r"(\d+\.?\d*|\.\d+)(ns|us|µs|μs|ms|s|m|h)", re.ASCII)
_MAX_TEXT = 64


def parse_duration_s(value: str | int | float) -> float:
    """Return seconds. A string is Go's form (``1h30m``, ``15.0s``, ``0``); a number is nanoseconds.

    Raises :class:`ValueError` whose text repeats what was given.
    """
    if isinstance(value, bool):
        raise ValueError(f"invalid duration {value!r}")
    if isinstance(value, int | float):
        seconds = value / 1e9
        if seconds != seconds or seconds in (float("inf"), float("-inf")):
            raise ValueError(f"invalid duration {value!r}")
        return seconds
    text = value.strip()
    if text in ("", "0", "+0", "-0"):
        return 0.0
    if len(text) > _MAX_TEXT or not _WHOLE.fullmatch(text):
        raise ValueError(f"invalid duration {value[:_MAX_TEXT]!r}: write it as 10s, 1m30s or 500ms")
    total = sum(float(number) * _UNIT_S[unit] for number, unit in _PART.findall(text))
    return -total if text[0] == "-" else total


def format_duration(seconds: float) -> str:
    """Return Go's form of a duration: ``72h0m0s``, ``10s``, ``1.5s``, ``250ms``, ``0s``."""
    nanos = round(abs(seconds) * 1e9)
    sign = "-" if seconds < 0 else ""
    if nanos == 0:
        return "0s"
    if nanos < 1_000:
        return f"{sign}{nanos}ns"
    if nanos < 1_000_000:
        return f"{sign}{_trim(nanos, 1_000)}µs"
    if nanos < 1_000_000_000:
        return f"{sign}{_trim(nanos, 1_000_000)}ms"
    minutes, rest = divmod(nanos, 60_000_000_000)
    hours, minutes = divmod(minutes, 60)
    tail = f"{_trim(rest, 1_000_000_000)}s"
    if hours:
        return f"{sign}{hours}h{minutes}m{tail}"
    return f"{sign}{minutes}m{tail}" if minutes else f"{sign}{tail}"


def _trim(nanos: int, unit: int) -> str:
    whole, rest = divmod(nanos, unit)
    digits = f"{rest:0{len(str(unit)) - 1}d}".rstrip("0")
    return f"{whole}.{digits}" if digits else str(whole)
