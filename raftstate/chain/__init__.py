"""Configuration entries that manage traffic: their forms, and their compilation into one plan for a service. Pure."""

from __future__ import annotations

from raftstate.chain.checks import check_entry, check_expressions
from raftstate.chain.compiler import Lookup, compile_plan
from raftstate.chain.entries import KINDS, BadEntry
from raftstate.chain.intentions import INTENTIONS, check_intentions
from raftstate.chain.unserved import check_served

__all__ = [
    "INTENTIONS",
    "KINDS",
    "BadEntry",
    "Lookup",
    "check_entry",
    "check_expressions",
    "check_intentions",
    "check_served",
    "compile_plan",
]
