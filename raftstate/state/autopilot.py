"""Autopilot's settings: one row or none, and then the defaults count."""

from __future__ import annotations

from raftstate.model.autopilot import AutopilotConfig
from raftstate.state.answer import Answer, answer
from raftstate.state.commands import SetAutopilot
from raftstate.state.refusal import INVALID, Refused
from raftstate.state.step import Step
from raftstate.state.store import Store

TRAILING_LOGS_MAX = 1_000_000_000
SERVERS_MAX = 99


def put(step: Step, command: SetAutopilot) -> bool:
    """Set them; with ``cas_index`` only if they are as old as that."""
    old = step.store.autopilot.rows.get("")
    if command.cas_index is not None and command.cas_index != (old.modify_index if old else 0):
        return False
    config = command.config
    if not 1 <= config.max_trailing_logs <= TRAILING_LOGS_MAX:
        raise Refused(INVALID, f"MaxTrailingLogs must be from 1 to {TRAILING_LOGS_MAX}")
    if not 0 <= config.min_quorum <= SERVERS_MAX:
        raise Refused(INVALID, f"MinQuorum must be from 0 to {SERVERS_MAX}")
    row = step.stamp(config, old)
    if row is not None:
        step.store.autopilot.put("", row)
        step.touch("autopilot")
    return True


def get(store: Store) -> Answer:
    """The settings in force."""
    return answer(store, store.autopilot.rows.get("", AutopilotConfig()), ("autopilot",))
