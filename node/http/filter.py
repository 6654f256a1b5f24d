"""Consul's filter expressions, as the API takes them; they are compiled in :mod:`raftstate.filter`."""

from __future__ import annotations

from raftstate.filter import BadFilter, Predicate, apply_filter, compile_filter

__all__ = ["BadFilter", "Predicate", "apply_filter", "compile_filter"]
