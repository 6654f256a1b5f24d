"""What operators do to a running cluster of real processes: servers come, go, lead, and the dead are cleaned up."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from cli.client import Api
from cli.cluster.layout import Layout, Plan, write_plan
from cli.cluster.supervisor import Supervisor
from cli.demo_stage import free_offset, wait_until
from cli.errors import CliError
from tests.support.promises import PATIENCE_S

LIVENESS = '\n[liveness]\nheartbeat = "200ms"\nnode_ttl = "3s"\nremove_server_after = "4s"\n'


@contextmanager
def five(directory: Path) -> Iterator[Supervisor]:
    """A file that names five servers, of which three found the cluster and run."""
    layout = Layout(directory / "cluster")
    write_plan(layout, Plan(5, 0, free_offset(5, 0)))
    text = layout.config.read_text()
    for late in ("server-4", "server-5"):
        text = text.replace(f"[nodes.{late}]", f"[nodes.{late}]\njoin = true")
    layout.config.write_text(text + LIVENESS)
    supervisor = Supervisor(layout)
    try:
        supervisor.start(supervisor.names[:3])
        supervisor.wait_ready(supervisor.names[:3], print)
        yield supervisor
    except BaseException:
        for name in supervisor.names:
            print(f"--- {name}\n{supervisor.log_end(name, 40)}")
        raise
    finally:
        supervisor.stop(supervisor.names)


def lictor(supervisor: Supervisor, at: str, *words: str) -> str:
    command = [sys.executable, "-m", "cli", "operator", *words, "-http-addr", supervisor.http_addr(at)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def voters(supervisor: Supervisor, at: str) -> dict[str, bool]:
    rows = Api(supervisor.http_addr(at)).get("/v1/operator/raft/configuration").json()["Servers"]
    return {row["ID"]: row["Voter"] for row in rows}


def test_servers_are_added_removed_moved_and_cleaned_up_while_it_runs(tmp_path: Path) -> None:
    with five(tmp_path) as supervisor:
        leader = supervisor.leader()
        other, third = [name for name in supervisor.names[:3] if name != leader]
        api = Api(supervisor.http_addr(other))
        for number in range(50):
            api.put(f"/v1/kv/k/{number}", b"x")

        # Added before it runs: no vote until it has caught up, and the others need no quorum with it.
        address = supervisor.config.node("server-4").rpc_endpoint
        words = ["operator", "raft", "add-peer", "-id", "server-4", "-address", address]
        words += ["-http-addr", supervisor.http_addr(other)]
        with subprocess.Popen([sys.executable, "-m", "cli", *words], stdout=subprocess.PIPE, text=True) as adding:
            assert wait_until(lambda: voters(supervisor, third).get("server-4") is False, PATIENCE_S)
            api.put("/v1/kv/k/50", b"x")
            supervisor.start(["server-4"])
            said, _ = adding.communicate(timeout=60)
        assert adding.returncode == 0
        assert "it votes" in said
        assert voters(supervisor, third)["server-4"] is True

        # What is no address, or another server's, would be in the log for good: refused, and nothing stops.
        for wrong, why in (("somewhere", "host:port"), (address, "is the address of server-4")):
            with pytest.raises(CliError, match=why):
                api.put("/v1/operator/raft/peer", None, {"id": "server-9", "address": wrong})
        assert "server-9" not in voters(supervisor, third)

        supervisor.start(["server-5"])  # this one asks by itself
        assert wait_until(lambda: voters(supervisor, other).get("server-5") is True, PATIENCE_S)
        assert lictor(supervisor, "server-5", "raft", "list-peers").count("true") == 5
        late = Api(supervisor.http_addr("server-5"))
        assert len(late.get("/v1/kv/k/", {"keys": "", "stale": ""}).json()) == 51

        lictor(supervisor, "server-4", "raft", "transfer-leader", "-id", third)
        assert wait_until(lambda: supervisor.leader() == third, PATIENCE_S)
        # Else autopilot may take out the dead one before the operator does, 7 s after it stopped.
        assert "CleanupDeadServers = true" in lictor(supervisor, other, "autopilot", "get-config")
        lictor(supervisor, other, "autopilot", "set-config", "-cleanup-dead-servers=false")
        supervisor.stop(["server-5"])
        lictor(supervisor, other, "raft", "remove-peer", "-id", "server-5")
        assert sorted(voters(supervisor, other)) == supervisor.names[:4]

        # Autopilot: what is set is replicated, what is shown is what is done.
        found = json.loads(lictor(supervisor, third, "autopilot", "get-config", "-json"))
        assert (found["CleanupDeadServers"], found["MinQuorum"], found["RemoveServerAfter"]) == (False, 3, "4s")
        supervisor.kill("server-4")

        def report() -> dict[str, Any]:
            answer: dict[str, Any] = api.get("/v1/operator/autopilot/state").json()
            return answer

        assert wait_until(lambda: report()["Servers"]["server-4"]["NodeStatus"] == "failed", PATIENCE_S)
        assert (report()["Healthy"], report()["Leader"], report()["FailureTolerance"]) == (False, third, 0)
        assert "failed" in lictor(supervisor, other, "autopilot", "state")
        assert len(voters(supervisor, other)) == 4
        lictor(supervisor, leader, "autopilot", "set-config", "-cleanup-dead-servers=true")
        assert wait_until(lambda: len(voters(supervisor, other)) == 3, PATIENCE_S), "the dead one leaves by itself"
        assert report()["Healthy"]
        assert report()["FailureTolerance"] == 1

        stale = {**found, "MinQuorum": 5}
        assert (
            api.put("/v1/operator/autopilot/configuration", stale, {"cas": str(found["ModifyIndex"])}).json() is False
        )
        with pytest.raises(CliError, match="ServerStabilizationTime can only be '0s'"):
            api.put("/v1/operator/autopilot/configuration", {**stale, "ServerStabilizationTime": "10s"})
        assert len(api.get("/v1/kv/k/", {"keys": ""}).json()) == 51
