"""A leader that is stopped in good order hands over: nobody waits for an election timeout, no write fails.

Election timeouts are made so long that what happens in good order and what happens by timeout cannot be confused,
however busy the machine is.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from datetime import datetime
from functools import partial
from pathlib import Path

import pytest

from benchmarks.hand_over import Loop
from cli.cluster.processes import DEAD
from cli.cluster.supervisor import Supervisor
from tests.chaos.support_chaos import leader_of, server_processes, term_of, until

TIMEOUT_S = 8.0
SLOW_ELECTIONS = f'\n[raft]\nelection_timeout_min = "{TIMEOUT_S:g}s"\nelection_timeout_max = "{TIMEOUT_S + 2:g}s"\n'
_LINE = re.compile(r"^time=(\S+) .*msg=\"([^\"]*)\"", re.MULTILINE)


def _sigterm(cluster: Supervisor, leader: str) -> None:
    assert cluster.stop([leader], timeout_s=30.0) == []


def _leave(cluster: Supervisor, leader: str) -> None:
    command = [sys.executable, "-m", "cli", "leave", "-http-addr", cluster.http_addr(leader)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def _said_at(cluster: Supervisor, node: str, text: str) -> datetime:
    """Return when a node last logged something that begins like this."""
    found = [moment for moment, said in _LINE.findall(cluster.layout.log(node).read_text()) if said.startswith(text)]
    assert found, f"{node} never said {text!r}"
    return datetime.fromisoformat(found[-1].replace("Z", "+00:00"))


def _has_ended(cluster: Supervisor, node: str) -> bool:
    return cluster.state(node) == DEAD


def _writes_go_on(loops: Sequence[Loop], what: str) -> None:
    counts = [len(loop.done_at) for loop in loops]
    until(lambda: all(len(loop.done_at) >= count + 20 for loop, count in zip(loops, counts, strict=True)), what)


@pytest.mark.parametrize("stop", [_sigterm, _leave], ids=["SIGTERM", "lictor leave"])
def test_leader_stopped_in_good_order_hands_over_first(
    tmp_path: Path, stop: Callable[[Supervisor, str], None]
) -> None:
    with server_processes(tmp_path / "c", toml=SLOW_ELECTIONS) as cluster:
        for _ in range(2):
            old, term = leader_of(cluster), term_of(cluster)
            others = [name for name in cluster.names if name != old]
            loops = [Loop(cluster.http_addr(name), name) for name in others]
            for loop in loops:
                loop.start()
            _writes_go_on(loops, "both write")
            stop(cluster, old)
            until(partial(_has_ended, cluster, old), f"{old} ends")
            _writes_go_on(loops, "both write without the old leader")
            for loop in loops:
                loop.end()

            new = leader_of(cluster, others)
            assert term_of(cluster) == term + 1, "one election, and nobody stood a second time"
            elected = _said_at(cluster, new, f"raft: leader of term {term + 1} is {new}")
            assert elected < _said_at(cluster, old, "stopped: "), "the next one leads before the old one has ended"
            assert [failure for loop in loops for failure in loop.failures] == []
            for loop in loops:
                pauses = [after - before for before, after in zip(loop.done_at, loop.done_at[1:], strict=False)]
                assert max(pauses) < TIMEOUT_S, "a write waited for an election timeout"
            cluster.start([old])
            cluster.wait_ready([old], lambda _text: None)
