"""Power cuts of all servers at once, under load: a short version of `python -m tests.chaos.kill_all --rounds 100`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.chaos import planted_server
from tests.chaos.kill_all import play
from tests.chaos.support_chaos import server_processes


@pytest.mark.timeout(240)
async def test_power_cuts_of_all_servers_lose_nothing_acknowledged_and_double_nothing(tmp_path: Path) -> None:
    with server_processes(tmp_path / "c", program=planted_server.program()) as cluster:
        ledger, faults = await play(cluster, rounds=3, seed=1)
    assert faults == []
    # A kill that met no write would prove nothing.
    assert len(ledger.acknowledged) >= 100
    assert ledger.retried >= 4


@pytest.mark.timeout(240)
@pytest.mark.parametrize(
    ("bug", "seen"), [("skip the fsync", "is lost"), ("apply a retry twice", "was applied twice")]
)
async def test_the_rounds_notice_a_planted_bug(bug: str, seen: str, tmp_path: Path) -> None:
    with server_processes(tmp_path / "c", program=planted_server.program(bug)) as cluster:
        _, faults = await play(cluster, rounds=6, seed=1)
    assert any(seen in fault for fault in faults), faults
