"""Which nodes the leader judges: right after each change, and read no oftener than needed."""

from __future__ import annotations

import pytest

from node import roster as module
from node.roster import Roster
from raftstate.model.catalog import CRITICAL, PASSING, SERF_HEALTH, Check, Node
from raftstate.state import commands as c
from tests.unit.support_state import Log


def alive(node: str, status: str = PASSING) -> c.RegisterCheck:
    return c.RegisterCheck(Check(node, SERF_HEALTH, status=status))


def test_it_follows_the_catalog_and_rests_while_that_rests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PAUSE_FACTOR", 0)
    log, roster, now = Log(), Roster(), 0.0

    def look() -> tuple[bool, set[str], set[str]]:
        return roster.look(log.machine.store, now), roster.living, roster.critical

    assert look() == (True, set(), set())
    for name in ("n1", "n2", "external"):
        log.do(c.RegisterNode(Node(name, "10.0.0.1")))
    log.do(alive("n1"))
    log.do(alive("n2"))
    assert look() == (True, {"n1", "n2"}, set()), "a node without the check is not ours to judge"
    assert look() == (False, {"n1", "n2"}, set())
    log.do(c.KVSet("k", b"1"))
    assert not look()[0]
    log.do(alive("n1", CRITICAL))
    assert look() == (True, {"n2"}, {"n1"})
    log.do(c.DeregisterNode("n1"))
    assert look() == (True, {"n2"}, set())
    roster.forget()
    assert look() == (True, {"n2"}, set())


def test_while_all_changes_all_the_time_it_reads_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PAUSE_FACTOR", 1e9)
    log, roster = Log(), Roster()
    log.do(c.RegisterNode(Node("n1", "10.0.0.1")))
    assert roster.look(log.machine.store, 0.0)
    log.do(alive("n1"))
    assert not roster.look(log.machine.store, 0.5)
    assert roster.look(log.machine.store, module.PAUSE_S_MAX)
    assert roster.living == {"n1"}


def test_a_state_that_was_replaced_is_read_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PAUSE_FACTOR", 0)
    one, other, roster = Log(), Log(), Roster()
    for log, name in ((one, "a"), (other, "b")):
        log.do(c.RegisterNode(Node(name, "10.0.0.1")))
        log.do(alive(name))
    assert roster.look(one.machine.store, 0.0)
    assert roster.look(other.machine.store, 0.0)
    assert roster.living == {"b"}
