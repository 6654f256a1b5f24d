"""Planted bugs on real server processes: each is caught by the linearizability checker, which shows that it can fail.

Each scenario is played move by move, not left to chance, and on servers without the bug it finds nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from cli.cluster.supervisor import Supervisor
from tests.chaos import planted_server
from tests.chaos.support_chaos import (
    Witness,
    acknowledged,
    kill_and_restart_all,
    leader_of,
    server_processes,
)

PATIENT = '\n[raft]\nelection_timeout_min = "900ms"\nelection_timeout_max = "1300ms"\n'
"""Time for a move between a leader's isolation and its end."""
MOVES = 3
"""A scenario whose moment passes on a busy machine is played so often."""


def power_fails_everywhere(cluster: Supervisor, witness: Witness) -> None:
    """Write, cut the power of every server at once, read."""
    node = leader_of(cluster)
    for number in range(20):
        assert witness.write(node, f"power/{number}", f"v{number}")
    kill_and_restart_all(cluster)
    for number in range(20):
        witness.surely_read(node, f"power/{number}")


def write_to_a_leader_cut_off(cluster: Supervisor, witness: Witness) -> None:
    """Write to a leader that reaches nobody; read from those who have elected another."""
    old = leader_of(cluster)
    others = [name for name in cluster.names if name != old]
    key = f"cut-off/{len(witness.operations)}"
    assert witness.write(old, key, f"before {key}")
    cluster.partition([old])
    witness.write(old, key, f"after {key}", timeout_s=0.6)
    witness.surely_read(leader_of(cluster, others), key)
    cluster.heal()


def read_from_a_leader_replaced(cluster: Supervisor, witness: Witness) -> None:
    """Cut the leader off, write to its successor, read from the old one."""
    old = leader_of(cluster)
    others = [name for name in cluster.names if name != old]
    key = f"replaced/{len(witness.operations)}"
    assert witness.write(old, key, f"old {key}")
    cluster.partition([old])
    new = leader_of(cluster, others)
    assert witness.write(new, key, f"new {key}")
    witness.read(old, key, "default", timeout_s=0.6)
    cluster.heal()


def retry_after_a_lost_answer(cluster: Supervisor, witness: Witness) -> None:
    """A write's answer is lost, someone else writes, the write is sent again, to another server."""
    leader = leader_of(cluster)
    other = next(name for name in cluster.names if name != leader)
    began_s = witness.lost_answer(leader, "retried", "first", "chaos-retry-1")
    assert witness.surely_read(other, "retried") == "first"
    assert witness.write(other, "retried", "second")
    assert witness.write(other, "retried", "first", request_id="chaos-retry-1", begun_s=began_s)
    witness.surely_read(leader, "retried")


SCENARIOS: dict[str, Callable[[Supervisor, Witness], None]] = {
    "skip the fsync": power_fails_everywhere,
    "acknowledge before a quorum": write_to_a_leader_cut_off,
    "default read from a stale leader": read_from_a_leader_replaced,
    "apply a retry twice": retry_after_a_lost_answer,
}


@pytest.mark.timeout(240)
@pytest.mark.parametrize("bug", SCENARIOS)
def test_a_planted_bug_is_caught_on_real_processes(bug: str, tmp_path: Path) -> None:
    with server_processes(tmp_path / "c", program=planted_server.program(bug), toml=PATIENT) as cluster:
        witness = Witness(cluster)
        for _ in range(MOVES):
            SCENARIOS[bug](cluster, witness)
            if witness.violations():
                return
    pytest.fail(f"nobody noticed that servers {bug}: {witness.operations}")


@pytest.mark.timeout(240)
def test_without_the_bugs_the_same_scenarios_find_nothing(tmp_path: Path) -> None:
    assert set(planted_server.BUGS) == {planted_server.NONE, *SCENARIOS}
    with server_processes(tmp_path / "c", program=planted_server.program(), toml=PATIENT) as cluster:
        for name, scenario in SCENARIOS.items():
            witness = Witness(cluster)
            scenario(cluster, witness)
            assert witness.violations() == [], name
            assert acknowledged(witness), name
