"""A server whose disk is full stops and says so, acknowledges nothing it has not stored, and comes back."""

from __future__ import annotations

import http.client
import json
import os
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cli.chaos.harm import SmallDisks
from cli.cluster.processes import DEAD
from cli.cluster.supervisor import Supervisor
from tests.chaos.support_chaos import leader_of, server_processes, until

DISK_BYTES = 48 << 20
VALUE = "v" * (96 << 10)
"""Large, so that the journal soon needs more than the room it has allocated ahead."""

JOURNAL = "raft journal cannot be written"


def _may_mount(directory: Path) -> bool:
    directory.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4096", "lictor-chaos", str(directory)]
    if os.geteuid() != 0 or subprocess.run(command, check=False, capture_output=True).returncode != 0:
        return False
    subprocess.run(["umount", str(directory)], check=True)
    return True


@contextmanager
def _cluster(directory: Path, *, mounts: bool) -> Iterator[tuple[Supervisor, SmallDisks]]:
    made: list[SmallDisks] = []

    def prepare(supervisor: Supervisor) -> None:
        made.append(SmallDisks(supervisor, DISK_BYTES))
        if mounts:
            made[0].make(supervisor.names)

    try:
        with server_processes(directory, prepare=prepare) as supervisor:
            yield supervisor, made[0]
    finally:
        for disks in made:
            disks.unmake()


class _Writer(threading.Thread):
    """Writes large values under keys of their own through the given nodes, until it is stopped."""

    def __init__(self, supervisor: Supervisor, nodes: list[str]) -> None:
        super().__init__(daemon=True)
        self.value = VALUE
        self._addresses = [supervisor.http_addr(node) for node in nodes]
        self.acknowledged: list[str] = []
        self.stopping = threading.Event()

    def run(self) -> None:
        number = 0
        while not self.stopping.is_set():
            number += 1
            address = self._addresses[number % len(self._addresses)]
            connection = http.client.HTTPConnection(address, timeout=15)
            try:
                connection.request("PUT", f"/v1/kv/full/{number}", self.value)
                if connection.getresponse().status == 200:
                    self.acknowledged.append(f"full/{number}")
            except (OSError, http.client.HTTPException):
                self.stopping.wait(0.05)
            finally:
                connection.close()


def _keys(supervisor: Supervisor, node: str, mode: str) -> set[str]:
    connection = http.client.HTTPConnection(supervisor.http_addr(node), timeout=15)
    try:
        connection.request("GET", f"/v1/kv/full/?keys&{mode}")
        answer = connection.getresponse()
        body = answer.read()
        return set(json.loads(body)) if answer.status == 200 else set()
    finally:
        connection.close()


@pytest.mark.timeout(240)
@pytest.mark.parametrize(("means", "role"), [("tmpfs", "leader"), ("rlimit", "follower")])
def test_a_server_with_a_full_disk_stops_and_comes_back(means: str, role: str, tmp_path: Path) -> None:
    if means == "tmpfs" and not _may_mount(tmp_path / "mount"):
        pytest.skip("mounting a small tmpfs needs root and CAP_SYS_ADMIN; the rlimit variant runs anywhere")
    with _cluster(tmp_path / "c", mounts=means == "tmpfs") as (cluster, disks):
        leader = leader_of(cluster)
        others = [name for name in cluster.names if name != leader]
        victim = leader if role == "leader" else others[0]
        well = [name for name in cluster.names if name != victim]
        writer = _Writer(cluster, well)
        writer.start()
        try:
            until(lambda: len(writer.acknowledged) > 5, "writes are acknowledged")
            disks.fill(victim)
            until(lambda: cluster.state(victim) == DEAD, f"{victim}, whose disk is full, stops")
            writer.value = "small"  # the other disks are no larger
            said = cluster.log_end(victim, 4)
            assert f"raft has stopped: {JOURNAL}" in said, said
            assert "stopped: node=" in said, said  # in good order
            if means == "tmpfs":
                cluster.start([victim])
                until(lambda: cluster.state(victim) == DEAD, f"{victim} does not start on a full disk")
                assert f"Error: {JOURNAL}" in cluster.log_end(victim, 1)
            before = len(writer.acknowledged)
            until(lambda: len(writer.acknowledged) > before + 20, "the others go on to take writes")
            disks.free(victim)
            cluster.start([victim])
            cluster.wait_ready([victim], lambda _text: None)
        finally:
            writer.stopping.set()
            writer.join()
        expected = set(writer.acknowledged)
        assert expected <= _keys(cluster, well[0], "consistent")
        until(lambda: expected <= _keys(cluster, victim, "stale"), f"{victim} catches up")
