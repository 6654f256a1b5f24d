"""Blocking queries through changes of leader: every version is seen once, in order, and nothing else wakes one."""

from __future__ import annotations

import itertools
import json
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.client import HTTPConnection
from typing import Any

from cli.demo_stage import wait_until
from tests.e2e.support_e2e import Mesh
from tests.e2e.support_foreign import leader_killed
from tests.support.promises import PATIENCE_S

Version = Callable[[Any], int]
BY_KEY: Version = lambda rows: int(rows[0]["Flags"]) if rows else 0  # noqa: E731
BY_PORT: Version = lambda rows: int(rows[0]["Service"]["Port"]) if rows else 0  # noqa: E731
BY_CATALOG: Version = lambda rows: int(rows[0]["ServicePort"]) if rows else 0  # noqa: E731
PATHS: dict[str, Version] = {
    "/v1/kv/versions/a?": BY_KEY,
    "/v1/kv/versions/a?consistent&": BY_KEY,
    "/v1/kv/versions/?recurse&": BY_KEY,
    "/v1/health/service/versions?": BY_PORT,
    "/v1/health/service/versions?stale&": BY_PORT,
    "/v1/health/service/versions?cached&": BY_PORT,
    "/v1/catalog/service/versions?": BY_CATALOG,
}
QUIET = (
    "/v1/kv/quiet?", "/v1/kv/quiet/?keys&", "/v1/health/service/quiet?", "/v1/health/service/quiet?stale&",
    "/v1/health/service/quiet?cached&", "/v1/catalog/service/quiet?", "/v1/connect/intentions?", "/v1/session/list?",
    "/v1/connect/ca/roots?",
)  # fmt: skip


@dataclass
class Watcher:
    """One client that blocks on a path as Consul's documentation says, and counts the versions that it sees."""

    address: str
    path: str
    version: Version | None
    seen: list[int] = field(default_factory=list)
    indexes: list[int] = field(default_factory=list)
    answers: int = 0
    faults: list[str] = field(default_factory=list)
    over: bool = False

    def __post_init__(self) -> None:
        self.http = HTTPConnection(self.address, timeout=120)
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        index = 0
        try:
            while not self.over:
                self.http.request("GET", f"{self.path}index={index}&wait=90s")
                answer = self.http.getresponse()
                body = answer.read()
                self.answers += 1
                if answer.status not in (200, 404):
                    self.faults.append(f"{answer.status} {body!r}")
                    return
                new = int(answer.headers["X-Consul-Index"])
                if self.version is not None:
                    self.seen.append(self.version(json.loads(body or b"[]")))
                self.indexes.append(new)
                index = new
        except OSError as error:
            if not self.over:
                self.faults.append(repr(error))

    def end(self) -> None:
        """Hang up in the middle of the wait."""
        self.over = True
        if self.http.sock is not None:
            self.http.sock.shutdown(2)
        self.thread.join(10)
        assert not self.thread.is_alive()
        self.http.close()


def test_leader_changes_wake_none_falsely_and_lose_no_change(cluster: Mesh) -> None:
    api = cluster.api(0, wait_s=20.0)
    watchers = [Watcher(host, path, version) for host in cluster.hosts for path, version in PATHS.items()]
    quiet = [Watcher(host, path, None) for host in cluster.hosts for path in QUIET]
    everyone = [*watchers, *quiet]
    versions = iter(range(1, 1000))
    last = 0

    def late() -> list[tuple[str, list[int], list[str]]]:
        return [(one.path, one.seen, one.faults) for one in watchers if one.seen[-1:] != [last]]

    def write(count: int) -> None:
        """Write versions one by one, each when everyone has seen the one before."""
        nonlocal last
        for number in itertools.islice(versions, count):
            last = number
            api.put("/v1/kv/versions/a", b"", {"flags": str(number)})
            api.put("/v1/agent/service/register", {"Name": "versions", "Port": number})
            assert wait_until(lambda: not late(), PATIENCE_S), late()

    try:
        assert wait_until(lambda: all(one.answers == 1 for one in everyone), PATIENCE_S), [
            (one.path, one.answers, one.faults) for one in everyone if one.answers != 1
        ]
        write(5)
        for _ in range(2):
            leader = cluster.wait_leader()
            cluster.lictor("operator", "raft", "transfer-leader")
            cluster.wait_leader(other_than=leader)
            write(5)
        with leader_killed(cluster):
            write(5)
        write(5)
        # A server that starts again catches up; that is no change either.
        for one in everyone:
            assert one.faults == [], one.path
        for one in watchers:
            assert one.seen == list(range(last + 1)), (one.address, one.path)
            assert one.indexes == sorted(set(one.indexes)), (one.address, one.path)
        for one in quiet:
            assert one.answers == 1, (one.address, one.path, one.indexes)
    finally:
        for one in everyone:
            one.end()
