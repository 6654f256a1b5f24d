"""``lictor lock`` and ``lictor session`` on a cluster whose leader goes away."""

from __future__ import annotations

import base64
import json
import signal
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any

from cli.demo_stage import wait_until
from tests.e2e.support_e2e import Mesh
from tests.e2e.support_foreign import Lines, leader_killed
from tests.support.promises import PATIENCE_S

WORKER = """
import sys, time
print('began', sys.argv[1], flush=True)
sys.stdin.readline()
print('done', flush=True)
"""


def lock(cluster: Mesh, host: int, *arguments: str, script: str = WORKER) -> Lines:
    """Start ``lictor lock`` on a host; its program begins, and ends when a line comes."""
    command = [
        sys.executable, "-P", "-m", "cli", "lock", *arguments, "-http-addr", cluster.hosts[host],
        "--", sys.executable, "-c", script, str(host),
    ]  # fmt: skip
    return Lines(command, env=cluster.environment(), cwd=cluster.directory)


def key(cluster: Mesh, name: str) -> dict[str, Any] | None:
    answer = cluster.api(0).get(f"/v1/kv/{name}/.lock", {"consistent": ""}, allow_404=True)
    return answer.json()[0] if answer.status == 200 else None


def test_one_runs_and_the_next_follows_through_a_killed_leader(cluster: Mesh) -> None:
    with lock(cluster, 0, "jobs/one") as first:
        assert first.next("began") == "0"
        with lock(cluster, 1, "jobs/one") as second:
            assert (
                cluster.lictor("lock", "jobs/one", "-timeout", "300ms", "--", "true", may_fail=True).returncode == 1
            )
            with leader_killed(cluster):
                row = key(cluster, "jobs/one")
                assert row is not None
                assert row["Session"]
                assert second.said == []
                first.tell("")
                first.next("done")
                assert first.process.wait(15) == 0
                assert second.next("began") == "1"
            second.tell("")
            assert second.process.wait(15) == 0
    assert key(cluster, "jobs/one") is None
    assert all(row["Name"] != "lictor lock for jobs/one" for row in cluster.api(0).get("/v1/session/list").json())


def test_the_exit_code_is_the_programs_and_a_lost_lock_ends_it(cluster: Mesh) -> None:
    done = cluster.lictor(
        "lock", "jobs/code", "--", "sh", "-c", "test $LICTOR_LOCK_HELD = true && exit 7", may_fail=True
    )
    assert done.returncode == 7
    assert cluster.lictor("lock", "jobs/code", "--", "/no/such", may_fail=True).returncode == 1
    assert cluster.lictor("lock", "jobs/code", may_fail=True).returncode == 2
    with lock(cluster, 0, "jobs/lost") as held:
        held.next("began")
        row = key(cluster, "jobs/lost")
        assert row is not None
        cluster.lictor("session", "destroy", row["Session"])
        assert held.process.wait(20) == 1
        assert held.next("Error:").startswith("the lock jobs/lost/.lock was lost")
    cluster.api(0).put("/v1/kv/jobs/data/.lock", b"somebody's value")
    refused = cluster.lictor("lock", "jobs/data", "--", "true", may_fail=True)
    assert (refused.returncode, "something else" in refused.stderr) == (1, True)


def test_a_signal_goes_to_the_program_and_the_lock_is_given_back(cluster: Mesh) -> None:
    with lock(cluster, 0, "jobs/signal") as held:
        held.next("began")
        with lock(cluster, 1, "jobs/signal", "-name", "waiting") as waiting:
            sessions = cluster.api(0)
            assert wait_until(lambda: "waiting" in sessions.get("/v1/session/list").text, PATIENCE_S)
            waiting.process.send_signal(signal.SIGTERM)
            assert waiting.process.wait(15) == 128 + signal.SIGTERM
            assert "waiting" not in sessions.get("/v1/session/list").text
        held.process.send_signal(signal.SIGTERM)
        assert held.process.wait(15) == 128 + signal.SIGTERM
    assert key(cluster, "jobs/signal") is None


def test_locks_of_consuls_library_are_respected(cluster: Mesh) -> None:
    session = cluster.api(0).put("/v1/session/create", {"TTL": "20s"}).json()["ID"]
    params = {"acquire": session, "flags": "3304740253564472344"}
    assert cluster.api(0).put("/v1/kv/jobs/theirs/.lock", b"", params).json() is True
    assert cluster.lictor("lock", "jobs/theirs", "-timeout", "200ms", "--", "true", may_fail=True).returncode == 1
    params["release"] = params.pop("acquire")
    assert cluster.api(0).put("/v1/kv/jobs/theirs/.lock", b"", params).json() is True
    assert cluster.lictor("lock", "jobs/theirs", "--", "true").returncode == 0


def test_sessions_by_hand(cluster: Mesh, tmp_path: Path) -> None:
    def say(*arguments: str) -> subprocess.CompletedProcess[str]:
        return cluster.lictor("session", *arguments, may_fail=True)

    made = say("create", "-name", "hand", "-ttl", "20s", "-behavior", "delete", "-lock-delay", "2s").stdout.strip()
    assert str(uuid.UUID(made)) == made
    told = say("info", made).stdout
    for part in ("hand", "20s", "delete", "2s", "serfHealth"):
        assert part in told
    assert made in say("list").stdout
    (row,) = [one for one in json.loads(say("list", "-json").stdout) if one["ID"] == made]
    assert row["LockDelay"] == 2_000_000_000
    assert made in say("list", "-node", row["Node"]).stdout
    assert say("renew", made).returncode == 0
    api = cluster.api(0)
    assert api.put("/v1/kv/by/hand", b"x", {"acquire": made}).json() is True
    assert base64.b64decode(api.get("/v1/kv/by/hand").json()[0]["Value"]) == b"x"
    assert say("destroy", made).returncode == 0
    assert api.get("/v1/kv/by/hand", allow_404=True).status == 404
    for verb in ("info", "renew", "destroy"):
        gone = say(verb, made)
        assert (gone.returncode, "no session" in gone.stderr) == (1, True)
    assert say("create", "-ttl", "1s").returncode == 1
    bare = say("create", "-check", "").stdout.strip()
    assert json.loads(say("info", bare, "-json").stdout)["NodeChecks"] in ([], None)
    assert say("destroy", bare).returncode == 0
