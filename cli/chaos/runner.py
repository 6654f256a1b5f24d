"""Runs clients and faults against a cluster, then judges the history."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Sequence
from typing import Protocol

import msgspec

from cli.chaos.history import Fault, History, LeaderSpan
from cli.chaos.linearizability import Verdict, check, session_violations
from cli.chaos.workload import Client, Recorder, missing

LEADER_POLL_S = 0.1
FAULT_KINDS = ("kill", "pause", "partition", "one-way", "kill-all", "disk-full", "skew")
SKEWS_S = (-120.0, -5.0, 5.0, 120.0)
"""Node certificates tolerate five minutes."""


class ClusterControl(Protocol):
    """What a run needs of the cluster under test."""

    servers: Sequence[str]
    addresses: dict[str, str]
    """HTTP address of every node, servers and clients."""

    async def kill(self, node: str) -> None: ...
    async def start(self, node: str, skew_s: float = 0.0) -> None: ...
    async def pause(self, node: str) -> None: ...
    async def resume(self, node: str) -> None: ...
    async def partition(self, nodes: Sequence[str], *, one_way: bool = False) -> None: ...
    async def fill_disk(self, node: str) -> None: ...
    async def free_disk(self, node: str) -> None: ...
    async def heal(self) -> None: ...
    async def leader(self) -> tuple[str, int]:
        """Return (node name, term) of the leader as the reachable nodes tell, or ``("", 0)``."""


class Options(msgspec.Struct, frozen=True):
    """How long and how hard."""

    seed: int
    duration_s: float
    clients: int = 6
    operation_timeout_s: float = 8.0
    calm_s: tuple[float, float] = (0.8, 2.5)
    """Bounds of the pause between faults."""
    hold_s: tuple[float, float] = (0.5, 3.5)
    """Bounds of a fault's length."""
    faults: tuple[str, ...] = ("kill", "pause", "partition", "one-way", "kill-all", "disk-full")


class Report(msgspec.Struct, frozen=True):
    """The outcome of a run. It passed when nothing was lost, every key is linearizable and no session broke."""

    history: History
    verdicts: list[Verdict]
    sessions: list[str]
    lost: list[str]
    errors: dict[str, int]
    acknowledged: int

    @property
    def passed(self) -> bool:
        return not self.lost and not self.sessions and all(v.linearizable for v in self.verdicts)


class Faults:
    """The seeded sequence of faults. The seed decides what and how long; "the leader" is found when it strikes."""

    def __init__(
        self, cluster: ClusterControl, options: Options, recorder: Recorder, say: Callable[[str], None]
    ) -> None:
        self.cluster = cluster
        self.options = options
        self.recorder = recorder
        self.say = say
        self.rng = random.Random(f"{options.seed}/faults")
        self.done: list[Fault] = []

    async def run(self, until_s: float) -> None:
        """Strike and undo until ``until_s``; every fault is undone before this returns, also when cancelled."""
        while True:
            await asyncio.sleep(self.rng.uniform(*self.options.calm_s))
            kind = self.rng.choice(self.options.faults)
            hold_s = self.rng.uniform(*self.options.hold_s)
            if self.recorder.now_s() + hold_s > until_s:
                return
            nodes = await self._victims(kind)
            begin_s = self.recorder.now_s()
            self.say(f"{begin_s:6.1f} s  {kind} {', '.join(nodes)} for {hold_s:.1f} s")
            try:
                await self._strike(kind, nodes)
                await asyncio.sleep(hold_s)
            finally:
                await self._undo(kind, nodes)
                self.done.append(Fault(kind, tuple(nodes), begin_s, self.recorder.now_s()))

    async def _victims(self, kind: str) -> list[str]:
        servers = list(self.cluster.servers)
        if kind == "kill-all":
            return servers
        minority = (len(servers) - 1) // 2
        chosen = self.rng.sample(servers, self.rng.randint(1, max(1, minority)))
        if self.rng.random() < 0.5:
            leader, _ = await self.cluster.leader()
            if leader and leader not in chosen:
                chosen[0] = leader
        return sorted(chosen)

    async def _strike(self, kind: str, nodes: list[str]) -> None:
        if kind in ("partition", "one-way"):
            await self.cluster.partition(nodes, one_way=kind == "one-way")
        elif kind == "pause":
            await asyncio.gather(*(self.cluster.pause(node) for node in nodes))
        elif kind == "disk-full":
            await asyncio.gather(*(self.cluster.fill_disk(node) for node in nodes))
        elif kind == "skew":
            skew_s = self.rng.choice(SKEWS_S)
            await asyncio.gather(*(self._restart(node, skew_s) for node in nodes))
        else:
            await asyncio.gather(*(self.cluster.kill(node) for node in nodes))

    async def _undo(self, kind: str, nodes: list[str]) -> None:
        if kind in ("partition", "one-way"):
            await self.cluster.heal()
        elif kind == "pause":
            await asyncio.gather(*(self.cluster.resume(node) for node in nodes))
        elif kind == "disk-full":
            await asyncio.gather(*(self.cluster.free_disk(node) for node in nodes))
        elif kind == "skew":
            await asyncio.gather(*(self._restart(node) for node in nodes))
        else:
            await asyncio.gather(*(self.cluster.start(node) for node in nodes))

    async def _restart(self, node: str, skew_s: float = 0.0) -> None:
        await self.cluster.kill(node)
        await self.cluster.start(node, skew_s)


async def _watch_leader(cluster: ClusterControl, recorder: Recorder, spans: list[LeaderSpan]) -> None:
    while True:
        leader, term = await cluster.leader()
        if not spans or (spans[-1].leader, spans[-1].term) != (leader, term):
            spans.append(LeaderSpan(recorder.now_s(), leader, term))
        await asyncio.sleep(LEADER_POLL_S)


async def run(cluster: ClusterControl, options: Options, say: Callable[[str], None]) -> Report:
    """Run clients and faults for the given time, heal everything, then judge what was recorded."""
    recorder = Recorder(time.monotonic())
    spans: list[LeaderSpan] = []
    faults = Faults(cluster, options, recorder, say)
    clients = [
        Client(
            f"c{n}", cluster.addresses, recorder, seed=options.seed, operation_timeout_s=options.operation_timeout_s
        )
        for n in range(options.clients)
    ]
    watcher = asyncio.ensure_future(_watch_leader(cluster, recorder, spans))
    try:
        async with asyncio.TaskGroup() as group:
            group.create_task(faults.run(options.duration_s))
            for client in clients:
                group.create_task(client.run(options.duration_s))
    finally:
        tried_s = recorder.now_s()
        watcher.cancel()
        await asyncio.gather(watcher, return_exceptions=True)
    lost: list[str] = []
    for node in cluster.servers:
        lost += [
            f"{item}, asked at {node}" for item in await missing(cluster.addresses[node], recorder, timeout_s=20)
        ]
    history = History(options.seed, recorder.now_s(), recorder.operations, faults.done, spans, tried_s)
    say(f"checking {len(history.operations)} operations")
    return Report(
        history=history,
        verdicts=check(history.operations),
        sessions=session_violations(history.operations),
        lost=lost,
        errors=recorder.errors,
        acknowledged=len(recorder.services) + len(recorder.intentions),
    )
