"""Servers whose clocks are minutes apart: leases, sessions and linearizability do not rest on the time of day."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import time
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

import pytest

from cli.chaos.harm import skewed
from cli.chaos.linearizability import check, session_violations
from cli.chaos.workload import Client, Recorder
from cli.cluster.supervisor import Supervisor
from cli.errors import CliError
from tests.chaos.support_chaos import leader_of, server_processes, until

SKEWS_S = {"server-1": -120.0, "server-2": 120.0}
SESSION_TTL_S = 60
"""Less than the clocks differ: whoever compares times of day of two servers finds it expired."""
LOAD_S = 1.0
OPERATIONS_MIN, RUN_S_MAX = 300, 120.0


def _ask(cluster: Supervisor, node: str, method: str, path: str, body: object = None) -> Any:
    connection = http.client.HTTPConnection(cluster.http_addr(node), timeout=15)
    try:
        connection.request(method, path, None if body is None else json.dumps(body))
        answer = connection.getresponse()
        content = answer.read()
        assert answer.status == 200, content
        return json.loads(content)
    finally:
        connection.close()


def _ahead_s(cluster: Supervisor, node: str) -> float:
    """How far a node's clock is ahead of this machine's, by the date of an answer."""
    connection = http.client.HTTPConnection(cluster.http_addr(node), timeout=15)
    try:
        connection.request("GET", "/v1/status/leader")
        date = connection.getresponse().getheader("Date")
        assert date is not None
        return parsedate_to_datetime(date).timestamp() - time.time()
    finally:
        connection.close()


def _transfer(cluster: Supervisor, successor: str) -> None:
    """Ask the leader to hand over; that it is refused, or too late, is no failure of the test."""
    connection = http.client.HTTPConnection(cluster.http_addr(successor), timeout=15)
    try:
        connection.request("POST", f"/v1/operator/raft/transfer-leader?id={successor}")
        connection.getresponse().read()
    finally:
        connection.close()


def _prefixes() -> dict[str, tuple[str, ...]]:
    try:
        return {name: skewed(skew_s) for name, skew_s in SKEWS_S.items()}
    except CliError as error:
        if os.environ.get("CI"):
            pytest.fail(f"CI must have it, see .ci/run: {error}")
        pytest.skip(str(error))


@pytest.mark.timeout(240)
async def test_clocks_that_are_minutes_apart_break_no_promise(tmp_path: Path) -> None:
    with server_processes(tmp_path / "c", prefixes=_prefixes()) as cluster:
        for name, skew_s in SKEWS_S.items():
            assert abs(_ahead_s(cluster, name) - skew_s) < 30
        session = _ask(cluster, "server-3", "PUT", "/v1/session/create", {"TTL": f"{SESSION_TTL_S}s"})["ID"]
        assert _ask(cluster, "server-3", "PUT", f"/v1/kv/locked?acquire={session}") is True
        recorder = Recorder(time.monotonic())
        addresses = {name: cluster.http_addr(name) for name in cluster.names}
        async with asyncio.TaskGroup() as group:
            clients = [Client(f"c{n}", addresses, recorder, seed=4, operation_timeout_s=8) for n in range(6)]
            for client in clients:
                group.create_task(client.run(RUN_S_MAX))
            led = {await asyncio.to_thread(leader_of, cluster)}
            while led != set(cluster.names):  # on a busy machine another than the one that was asked may win
                await asyncio.to_thread(_transfer, cluster, min(set(cluster.names) - led))
                led.add(await asyncio.to_thread(leader_of, cluster))
                await asyncio.sleep(LOAD_S)
            await asyncio.to_thread(until, lambda: len(recorder.operations) > OPERATIONS_MIN, "enough was answered")
            for client in clients:
                client.stopping = True
        assert [verdict for verdict in check(recorder.operations) if not verdict.linearizable] == []
        assert session_violations(recorder.operations) == []
        assert [row["ID"] for row in _ask(cluster, "server-3", "GET", f"/v1/session/info/{session}")] == [session]
        assert _ask(cluster, "server-3", "GET", "/v1/kv/locked")[0]["Session"] == session
