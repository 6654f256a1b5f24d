"""Autopilot's settings in the state: checked, replaced whole, kept by snapshots."""

from __future__ import annotations

from raftstate.model.autopilot import AutopilotConfig
from raftstate.state import commands as c
from raftstate.state.machine import StateMachine
from raftstate.state.refusal import INVALID
from tests.unit.support_state import Log


def test_settings_are_defaults_until_they_are_set() -> None:
    log = Log()
    assert log.ask("operator.autopilot").value == AutopilotConfig()
    config = AutopilotConfig(cleanup_dead_servers=False, min_quorum=5)
    assert log.do(c.SetAutopilot(config, cas_index=0)) is True
    found = log.ask("operator.autopilot")
    assert (found.value.cleanup_dead_servers, found.value.min_quorum) == (False, 5)
    assert found.index == found.value.modify_index > 0
    assert log.do(c.SetAutopilot(AutopilotConfig(), cas_index=0)) is False
    assert log.do(c.SetAutopilot(AutopilotConfig(max_trailing_logs=9), cas_index=found.index)) is True


def test_settings_out_of_bounds_are_refused() -> None:
    log = Log()
    for config in (AutopilotConfig(min_quorum=-1), AutopilotConfig(max_trailing_logs=0)):
        assert log.refused(c.SetAutopilot(config))[0] == INVALID


def test_settings_outlive_a_snapshot() -> None:
    log = Log()
    log.do(c.SetAutopilot(AutopilotConfig(min_quorum=4)))
    with log.machine.snapshot() as snapshot:
        chunks = list(snapshot)
    fresh = StateMachine()
    fresh.restore(chunks)
    assert fresh.store.autopilot.rows[""].min_quorum == 4
    assert fresh.digest() == log.machine.digest()
