"""Go's duration strings; they are read in :mod:`raftstate.model.durations`."""

from __future__ import annotations

from raftstate.model.durations import format_duration, parse_duration_s

__all__ = ["format_duration", "parse_duration_s"]
