"""Clusters of real server processes for directed chaos tests, and a witness who records what it is answered."""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cli.chaos.history import CAS, FOREVER, READ, WRITE, Operation
from cli.chaos.linearizability import check
from cli.cluster.layout import Layout, Plan, write_plan
from cli.cluster.processes import DEAD, LICTOR
from cli.cluster.supervisor import Supervisor
from cli.demo_stage import free_offset

SETTLE_S = 60.0
REQUEST_ID_HEADER = "X-Lictor-Request-Id"


@contextlib.contextmanager
def server_processes(
    directory: Path,
    *,
    servers: int = 3,
    program: Sequence[str] = LICTOR,
    toml: str = "",
    prefixes: Mapping[str, Sequence[str]] | None = None,
    prepare: Callable[[Supervisor], None] | None = None,
) -> Iterator[Supervisor]:
    """Run servers as processes of their own, without clients, and kill whatever of them is left at the end.

    `toml` is added to the cluster's file; `prefixes` stand before the commands of some nodes; `prepare` is called
    before anything starts.
    """
    layout = Layout(directory)
    write_plan(layout, Plan(servers, 0, free_offset(servers, 0)))
    with layout.config.open("a") as file:
        file.write(toml)
    supervisor = Supervisor(layout, program)
    if prepare is not None:
        prepare(supervisor)
    try:
        for name in supervisor.names:
            supervisor.start([name], (prefixes or {}).get(name, ()))
        supervisor.wait_ready(supervisor.names, lambda _text: None)
        yield supervisor
    finally:
        supervisor.kill_at_once([name for name in supervisor.names if supervisor.state(name) != DEAD])


def until(condition: Callable[[], Any], what: str, timeout_s: float = SETTLE_S) -> Any:
    """Return what `condition` returns once it is true; fail with `what` was awaited after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while not (found := condition()):
        assert time.monotonic() < deadline, f"still not after {timeout_s:g} s: {what}"
        time.sleep(0.02)
    return found


def leader_of(supervisor: Supervisor, among: Sequence[str] = ()) -> str:
    """Return the leader; with `among`, wait until one of these leads."""

    def leading() -> str:
        found = [one for one in supervisor.status() if one.raft == "leader" and (not among or one.name in among)]
        return max(found, key=lambda one: one.term).name if found else ""

    return str(until(leading, f"one of {', '.join(among) or 'the servers'} leads"))


class Witness:
    """One client: it asks, waits as long as it is told, and records the answer as an :class:`Operation`."""

    def __init__(self, supervisor: Supervisor) -> None:
        self._supervisor = supervisor
        self._began = time.monotonic()
        self.operations: list[Operation] = []

    def _ask(
        self, node: str, method: str, path: str, body: str | None, timeout_s: float, headers: dict[str, str]
    ) -> tuple[int, bytes]:
        """Return (status, body); (0, why) when no answer came."""
        connection = http.client.HTTPConnection(self._supervisor.http_addr(node), timeout=timeout_s)
        try:
            connection.request(method, path, body, headers)
            answer = connection.getresponse()
            return answer.status, answer.read()
        except (OSError, http.client.HTTPException) as error:
            return 0, str(error).encode()
        finally:
            connection.close()

    def now_s(self) -> float:
        """Seconds since this witness began."""
        return time.monotonic() - self._began

    def write(
        self, node: str, key: str, value: str, *, timeout_s: float = 30.0, request_id: str = "", begun_s: float = -1.0
    ) -> bool:
        """Write; return whether it was acknowledged. With `begun_s` this is the retry of a write begun then."""
        began_s = self.now_s() if begun_s < 0 else begun_s
        headers = {REQUEST_ID_HEADER: request_id} if request_id else {}
        status, body = self._ask(node, "PUT", f"/v1/kv/{key}", value, timeout_s, headers)
        done = status == 200 and body.strip() == b"true"
        returned_s = self.now_s() if done else FOREVER
        self.operations.append(Operation("witness", key, WRITE, began_s, returned_s, value=value, node=node))
        return done

    def lost_answer(self, node: str, key: str, value: str, request_id: str) -> float:
        """Write so that it takes effect, and forget the answer, as when the network lost it; return when it began."""
        began_s = self.now_s()
        status, body = self._ask(node, "PUT", f"/v1/kv/{key}", value, 30.0, {REQUEST_ID_HEADER: request_id})
        assert status == 200, body
        return began_s

    def read(self, node: str, key: str, mode: str = "default", *, timeout_s: float = 5.0) -> str | None:
        """Read; return the value, None when there is none or no answer came (then nothing is recorded)."""
        began_s = self.now_s()
        flag = "" if mode == "default" else f"?{mode}"
        status, body = self._ask(node, "GET", f"/v1/kv/{key}{flag}", None, timeout_s, {})
        if status not in (200, 404):
            return None
        value = base64.b64decode(json.loads(body)[0]["Value"] or "").decode() if status == 200 else None
        self.operations.append(
            Operation("witness", key, READ, began_s, self.now_s(), value=value, mode=mode, node=node)
        )
        return value

    def surely_read(self, node: str, key: str, mode: str = "consistent") -> str | None:
        """Read, again and again until it is answered."""
        count = len(self.operations)

        def answered() -> bool:
            self.read(node, key, mode)
            return len(self.operations) > count

        until(answered, f"{node} answers a {mode} read of {key}")
        return self.operations[-1].value

    def violations(self) -> list[str]:
        """Return the keys of which no order of the operations explains every answer, with what is stuck."""
        return [
            f"{verdict.key}: {[(op.kind, op.value, op.node) for op in verdict.stuck]}"
            for verdict in check(self.operations)
            if not verdict.linearizable
        ]


def acknowledged(witness: Witness) -> list[Operation]:
    """Return the writes that were acknowledged."""
    return [op for op in witness.operations if op.kind in (WRITE, CAS) and op.known]


def kill_and_restart_all(supervisor: Supervisor, on_killed: Callable[[], None] = lambda: None) -> None:
    """Kill -9 every node at once, then start all of them and wait until they serve."""
    supervisor.kill_at_once(supervisor.names)
    on_killed()
    supervisor.start(supervisor.names)
    supervisor.wait_ready(supervisor.names, lambda _text: None)


def term_of(supervisor: Supervisor) -> int:
    """Return the greatest term that any node tells."""
    return max(one.term for one in supervisor.status())
