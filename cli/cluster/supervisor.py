"""Starts, stops and harms the nodes of a local cluster, and asks them how they are."""

from __future__ import annotations

import shutil
import signal
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cli.client import Api
from cli.cluster.layout import Layout, refuse_taken_ports
from cli.cluster.processes import DEAD, LICTOR, PAUSED, RUNNING, Process, spawn
from cli.errors import CliError, NoAgent, UsageError

if TYPE_CHECKING:
    from node.config import ClusterConfig, NodeConfig

READY_TIMEOUT_S = 40.0
STOP_TIMEOUT_S = 10.0
PROBE_WAIT_S = 0.8
START_LISTENING_S = 15.0
_POLL_S = 0.1
_LOG_LINES_SHOWN = 12

Say = Callable[[str], None]


@dataclass(frozen=True)
class NodeStatus:
    """What is known of one node right now."""

    name: str
    role: str
    state: str
    pid: int = 0
    raft: str = "-"
    """``leader``, ``follower``, ``candidate``; ``-`` for a client or when it does not answer."""
    term: int = 0
    applied: int = 0
    http: str = ""
    leader: str = ""
    """The RPC address of the leader as this node knows it."""


class Supervisor:
    """The processes of one local cluster. Its nodes run ``program``, which takes lictor's arguments."""

    def __init__(self, layout: Layout, program: Sequence[str] = LICTOR) -> None:
        self.layout = layout
        self.program = tuple(program)
        self.config: ClusterConfig = layout.load()

    @property
    def names(self) -> list[str]:
        """Return the node names in the file's order."""
        return list(self.config.nodes)

    def http_addr(self, name: str) -> str:
        """Return ``host:port`` of a node's HTTP API."""
        node = self.config.nodes[name]
        return f"{node.http_address}:{node.http_port}"

    def process(self, name: str) -> Process | None:
        """Return the node's process as its pid file tells, dead or not."""
        return Process.read(self.layout.pid(name))

    def state(self, name: str) -> str:
        """Return ``running``, ``paused`` or ``dead``."""
        process = self.process(name)
        return process.state() if process else DEAD

    def find(self, typed: str) -> str:
        """Return the node that was typed: its name, the beginning of it if only one fits, or ``leader``."""
        if typed in self.config.nodes:
            return typed
        if typed == "leader":
            leader = self.leader()
            if not leader:
                raise CliError("no node says who leads at the moment; see: lictor cluster status")
            return leader
        fitting = [name for name in self.names if name.startswith(typed)]
        if len(fitting) == 1:
            return fitting[0]
        known = ", ".join(fitting or self.names)
        raise UsageError(f"{typed!r} {'could be' if fitting else 'is no node of this cluster, which has'} {known}")

    # -- starting and ending ------------------------------------------------------------------------------------

    def start(self, names: Iterable[str], prefix: Sequence[str] = ()) -> list[str]:
        """Start those of the nodes that do not run; return their names. Raises when a port is taken.

        ``prefix`` stands before their command, such as ``env NAME=VALUE``.
        """
        from node.errors import NodeError
        from node.pki import ensure_local_pki

        starting = [name for name in names if self.state(name) == DEAD]
        refuse_taken_ports(self._node(name) for name in starting)
        try:
            ensure_local_pki(self.config)
        except NodeError as error:
            raise CliError(str(error)) from None
        for name in starting:
            arguments = ["agent", "-config", str(self.layout.config.absolute()), "-node", name]
            spawn(arguments, self.layout.log(name), self.layout.pid(name), (*prefix, *self.program))
        return starting

    def wait_ready(self, names: Sequence[str], say: Say, timeout_s: float = READY_TIMEOUT_S) -> None:
        """Wait until each node serves its API and knows a leader. Raises :class:`CliError` with the log's end."""
        began = time.monotonic()
        waiting = list(names)
        while True:
            for name in list(waiting):
                if self.state(name) == DEAD:
                    raise CliError(f"{name} ended while it started. The end of its log:\n{self.log_end(name)}")
                if self._knows_leader(name):
                    waiting.remove(name)
                    say(f"{name} is ready ({time.monotonic() - began:.1f} s)")
            if not waiting:
                return
            if time.monotonic() - began > timeout_s:
                raise CliError(
                    f"{', '.join(waiting)} not ready after {timeout_s:.0f} s. The end of {waiting[0]}'s log:\n"
                    f"{self.log_end(waiting[0])}"
                )
            time.sleep(_POLL_S)

    def stop(self, names: Sequence[str], timeout_s: float = STOP_TIMEOUT_S) -> list[str]:
        """End nodes gracefully, those that do not end in time by force. Return the names that had to be forced."""
        running = {name: process for name in names if (process := self.process(name)) and process.state() != DEAD}
        for process in running.values():
            process.send(signal.SIGTERM)
            process.send(signal.SIGCONT)
        deadline = time.monotonic() + timeout_s
        forced = []
        for name, process in running.items():
            if not process.wait_for(DEAD, max(deadline - time.monotonic(), 0.0)):
                process.send(signal.SIGKILL)
                process.wait_for(DEAD, 5.0)
                forced.append(name)
        for name in names:
            self.layout.pid(name).unlink(missing_ok=True)
        return forced

    def kill(self, name: str) -> None:
        """Kill a node as a power failure would (SIGKILL). Raises when it does not run."""
        process = self._alive(name)
        process.send(signal.SIGKILL)
        process.wait_for(DEAD, 5.0)

    def kill_at_once(self, names: Iterable[str]) -> None:
        """Kill nodes as a power failure of the whole room would: all are struck before any is waited for."""
        processes = [self._alive(name) for name in names]
        for process in processes:
            process.send(signal.SIGKILL)
        for process in processes:
            process.wait_for(DEAD, 5.0)

    def pause(self, name: str) -> None:
        """Stop a node's process (SIGSTOP)."""
        process = self._alive(name)
        process.send(signal.SIGSTOP)
        process.wait_for(PAUSED, 2.0)

    def resume(self, name: str) -> None:
        """Let a paused node go on (SIGCONT)."""
        process = self._alive(name)
        process.send(signal.SIGCONT)
        process.wait_for(RUNNING, 2.0)

    def _alive(self, name: str) -> Process:
        process = self.process(name)
        if process is None or process.state() == DEAD:
            raise CliError(f"{name} does not run. Start it: lictor cluster start {name}")
        return process

    # -- cutting off --------------------------------------------------------------------------------------------

    def partition(self, names: Sequence[str], *, one_way: bool = False) -> None:
        """Cut the nodes off from all others, in both directions; among themselves they still talk.

        With ``one_way`` they are deaf to the others, who still hear them.
        """
        inside, outside = set(names), [name for name in self.names if name not in names]
        if not outside:
            raise UsageError("lictor cluster partition: at least one node must stay on the other side")
        for name in self.names:
            if self.state(name) == RUNNING and (name in inside or not one_way):
                self._block(name, outside if name in inside else sorted(inside), one_way=one_way)

    def heal(self) -> None:
        """Undo every partition."""
        for name in self.names:
            if self.state(name) == RUNNING:
                self._block(name, [])

    def _block(self, name: str, peers: Sequence[str], *, one_way: bool = False) -> None:
        """Tell one node; a process that has just been started may not listen yet."""
        deadline = time.monotonic() + START_LISTENING_S
        while True:
            try:
                body = {"Peers": list(peers), "OneWay": one_way}
                Api(self.http_addr(name), wait_s=3.0).put("/v1/operator/debug/partition", body)
                return
            except NoAgent:
                if self.state(name) != RUNNING or time.monotonic() > deadline:
                    raise
                time.sleep(_POLL_S)

    # -- asking -------------------------------------------------------------------------------------------------

    def leader(self) -> str:
        """Return the node that most recent word says leads, or an empty text."""
        leading = [one for one in self.status() if one.raft == "leader"]
        return max(leading, key=lambda one: one.term).name if leading else ""

    def status(self) -> list[NodeStatus]:
        """Ask every node, at once, how it is."""
        with ThreadPoolExecutor(max_workers=16) as pool:
            return list(pool.map(self._status, self.names))

    def _status(self, name: str) -> NodeStatus:
        node, process = self._node(name), self.process(name)
        state = process.state() if process else DEAD
        pid = process.pid if process and state != DEAD else 0
        raft: dict[str, Any] = {}
        leader = ""
        if state == RUNNING:
            try:
                stats = Api(self.http_addr(name), wait_s=PROBE_WAIT_S).get("/v1/agent/self").json().get("Stats") or {}
                raft, leader = stats.get("raft") or {}, (stats.get("consul") or {}).get("leader_addr") or ""
            except CliError:
                pass  # it does not answer: the table shows that it runs and says nothing of itself
        return NodeStatus(
            name,
            node.role,
            state,
            pid,
            str(raft.get("state", "-")).lower() if node.is_server else "-",
            int(raft.get("term", 0)),
            int(raft.get("applied_index", 0)),
            self.http_addr(name),
            leader,
        )

    def _knows_leader(self, name: str) -> bool:
        try:
            api = Api(self.http_addr(name), wait_s=0.0)
            return bool(api.get("/v1/status/leader").json()) and bool(api.get("/v1/agent/self").json())
        except CliError:
            return False

    def _node(self, name: str) -> NodeConfig:
        return self.config.nodes[name]

    def log_end(self, name: str, lines: int = _LOG_LINES_SHOWN) -> str:
        """Return the last lines of a node's log."""
        return log_end(self.layout.log(name), lines)


def log_end(path: Path, lines: int) -> str:
    """Return a file's last lines; only its last 64 KiB are read."""
    try:
        with path.open("rb") as file:
            file.seek(max(path.stat().st_size - 65536, 0))
            text = file.read().decode("utf-8", "replace")
    except OSError:
        return "(no log yet)"
    return "\n".join(text.splitlines()[-lines:] if lines else ())


def remove(layout: Layout) -> None:
    """Delete everything a local cluster wrote, but nothing that it did not."""
    for part in ("data", "tls", "logs", "run"):
        shutil.rmtree(layout.directory / part, ignore_errors=True)
    layout.config.unlink(missing_ok=True)
    try:
        layout.directory.rmdir()
    except OSError:
        pass  # the user keeps something of his own there
