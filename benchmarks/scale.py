"""Three real servers under many simulated agents: what they cost at rest, and how fast they are when it matters.

    python -m benchmarks.scale [--agents 1000] [--instances-per-agent 10] [--steady 15] [--changes 10]

Each simulated agent has a certificate, a connection and a link of its own, all in this one process: it heartbeats,
registers itself and its instances, each with a check, and follows what a real agent follows (its rows in the catalog
and in health, roots) and the instances of three services, one of which all agents follow. Figures: registrations per
second, memory and CPU of each server, the time from one change to the last agent that follows it, and the time until
all agents are served again after all connections broke at once; of each phase the CPU seconds of each server and of
the simulation, which shares the cores with them, and the agents that were ever taken for dead. Every agent needs a
file descriptor here and on one server: see `ulimit -n`.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import gc
import json
import random
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import aclosing, contextmanager
from pathlib import Path
from typing import Any

import psutil
import uvloop

from node import pki
from node.client import RpcBackend
from node.config import ClusterConfig
from node.errors import NodeError
from node.faults import FaultFilter
from node.pki import ALPN_RPC, TlsFiles, client_context, issue_node_cert
from node.rpc.client import ClientConnection
from node.server_link import ServerLink
from raftstate.model.catalog import PASSING, Check, Node, ServiceInstance
from raftstate.state import commands
from tests.e2e.support_e2e import Mesh, mesh

WRITES_AT_ONCE = 256
STARTS_AT_ONCE = 64
FOLLOWED = 2
EVERYWHERE = "everywhere"
MIB = 1 << 20


class Link(ServerLink):
    """A link whose dial waits for a place in this process: one process cannot shake thousands of hands at once, as
    thousands of hosts can, and the time until it comes to it is not the servers'."""

    places: asyncio.Semaphore
    patience = 4.0
    """Nor is the time that a handshake takes here among a thousand others."""

    async def _dial(
        self, name: str, address: str, timeout_s: float, on_reached: Callable[[], None] = lambda: None
    ) -> ClientConnection:
        async with self.places:
            return await super()._dial(name, address, timeout_s * self.patience, on_reached)


class Agent:
    """One simulated agent. ``seen`` is the port that the service everyone follows has here."""

    def __init__(self, number: int, config: ClusterConfig, instances: int, services: int) -> None:
        self.node = f"sim-{number}"
        self.number, self.instances, self.services = number, instances, services
        issue_node_cert(config.tls_dir, self.node, "client", config.datacenter)
        context = client_context(TlsFiles(config.tls_dir), self.node, ALPN_RPC)
        servers = [(server.name, server.rpc_endpoint) for server in config.servers()]
        rng = random.Random(number)
        self.link = Link(servers, context, config.datacenter, config.liveness, rng=rng)
        self.backend = RpcBackend(self.link, node=self.node, faults=FaultFilter(enabled=False), rng=rng)
        self.seen = 0
        self.on_seen: Callable[[], None] = lambda: None
        self.rows: dict[str, int] = {}
        self.tasks: list[asyncio.Task[None]] = []

    def follow(self) -> None:
        loop = asyncio.get_running_loop()
        own = {"node": self.node}
        followed: list[tuple[str, dict[str, Any]]] = [
            ("catalog.node_rows", own),
            ("health.node", own),
            ("connect.roots", {}),
            ("health.service", {"service": EVERYWHERE}),
        ]
        rng = random.Random(-self.number)
        followed += [("health.service", {"service": f"s-{rng.randrange(self.services)}"}) for _ in range(FOLLOWED)]
        self.tasks = [loop.create_task(self._follow(name, params)) for name, params in followed]

    async def _follow(self, name: str, params: dict[str, Any]) -> None:
        key = f"{name} {params}"
        self.rows[key] = 0
        stream: Any = self.backend.subscribe(name, params)
        async with aclosing(stream):
            async for event in stream:
                self.rows[key] += 1
                if params.get("service") == EVERYWHERE:
                    for row in event.upserts.values():
                        self.seen = row["Service"]["Port"]
                    self.on_seen()

    def registrations(self) -> Iterator[commands.CatalogRegister]:
        """What a real agent writes: itself with its liveness, then each service with its check."""
        node = Node(node=self.node, address="127.0.0.1", id=f"{self.number:032x}", meta={"zone": "a"})
        alive = Check(node=self.node, check_id="serfHealth", name="Serf Health Status", status=PASSING)
        yield commands.CatalogRegister(node=node, checks=(alive,))
        for index in range(self.instances):
            name = f"s-{(self.number * self.instances + index) % self.services}"
            instance = f"{name}-{self.number}-{index}"
            service = ServiceInstance(
                node=self.node,
                id=instance,
                service=name,
                port=20000 + index,
                tags=("v1", "blue"),
                meta={"version": "1.2.3"},
            )
            check = Check(
                node=self.node, check_id=f"service:{instance}", name=f"Service '{name}' check", status=PASSING,
                service_id=instance, service_name=name, output="HTTP GET http://127.0.0.1/health: 200 OK",
            )  # fmt: skip
            yield commands.CatalogRegister(node=node, service=service, checks=(check,), skip_node_update=True)

    async def stop(self) -> None:
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)
        await self.backend.close()
        await self.link.stop()


async def for_all(agents: list[Agent], at_once: int, work: Callable[[Agent], Any]) -> None:
    places = asyncio.Semaphore(at_once)

    async def one(agent: Agent) -> None:
        async with places:
            await work(agent)

    await asyncio.gather(*(one(agent) for agent in agents))


async def start(agent: Agent) -> None:
    agent.link.start()
    await agent.link.connection(120.0)
    agent.follow()


async def register(agent: Agent) -> None:
    for command in agent.registrations():
        while True:
            try:
                (await agent.backend.apply(command, timeout_s=60.0)).unwrap()
                break
            except NodeError as error:
                print(f"  {agent.node}: {error}; trying again")
                await asyncio.sleep(0.5)


async def change(agents: list[Agent], port: int, *, timeout_s: float = 120.0) -> float:
    """Change the service that all follow; return how long it took until the last has seen it, seconds."""
    left = {agent.node for agent in agents if agent.seen != port}
    over = asyncio.Event()

    def seen(agent: Agent) -> None:
        if agent.seen == port:
            left.discard(agent.node)
            if not left:
                over.set()

    for agent in agents:
        agent.on_seen = lambda agent=agent: seen(agent)  # type: ignore[misc]  # mypy does not infer the default's type
    began = time.perf_counter()
    row = ServiceInstance(node=agents[0].node, id=EVERYWHERE, service=EVERYWHERE, port=port)
    node = Node(node=agents[0].node, address="127.0.0.1")
    command = commands.CatalogRegister(node=node, service=row, skip_node_update=True)
    (await agents[0].backend.apply(command, timeout_s=60.0)).unwrap()
    async with asyncio.timeout(timeout_s):
        await over.wait()
    return time.perf_counter() - began


class Stopwatch:
    """What each phase took: time, CPU seconds of each server and of the simulation, and leaders lost."""

    def __init__(self, stage: Mesh, servers: list[psutil.Process], found: dict[str, Any]) -> None:
        self._stage, self._processes, self._found = stage, [*servers, psutil.Process()], found

    def _cpu(self) -> list[float]:
        return [sum(one.cpu_times()[:2]) for one in self._processes]

    def _term(self) -> int:
        return max(one.term for one in self._stage.supervisor.status())

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        term, began, cpu = self._term(), time.perf_counter(), self._cpu()
        yield
        took_s = time.perf_counter() - began
        *servers, simulation = (round(b - a, 2) for a, b in zip(cpu, self._cpu(), strict=True))
        phase = {"s": round(took_s, 2), "cpu_s_servers": servers, "cpu_s_simulation": simulation}
        if lost := self._term() - term:
            phase["terms_lost"] = lost
        self._found[name] = phase
        print(f"{name}: {json.dumps(phase)}", flush=True)


def rss_mib(servers: list[psutil.Process]) -> list[int]:
    return [one.memory_info().rss // MIB for one in servers]


def per_core(phase: dict[str, Any]) -> list[float]:
    """Return what share of a core each server used, in percent."""
    return [round(cpu_s / phase["s"] * 100, 1) for cpu_s in phase["cpu_s_servers"]]


async def measure(stage: Mesh, options: argparse.Namespace) -> dict[str, Any]:
    config = stage.supervisor.config
    servers = [
        psutil.Process(one.pid) for one in stage.supervisor.status() if one.role == "server" and one.pid
    ]  # the client agents of this cluster idle
    count, instances = options.agents, options.agents * options.instances_per_agent
    found: dict[str, Any] = {"agents": count, "instances": instances, "rss_mib_empty": rss_mib(servers)}
    watch = Stopwatch(stage, servers, found)
    Link.places = asyncio.Semaphore(STARTS_AT_ONCE)
    agents = [Agent(number, config, options.instances_per_agent, max(1, instances // 10)) for number in range(count)]
    dead = Dead(agents[0])
    try:
        with watch.phase("connect"):
            await for_all(agents, STARTS_AT_ONCE, start)
        found["rss_mib_connected"] = rss_mib(servers)
        dead.start()
        with watch.phase("register"):
            await for_all(agents, WRITES_AT_ONCE, register)
        found["writes_per_s"] = round((instances + count) / found["register"]["s"])
        await change(agents, 1)
        found["rss_mib_full"] = rss_mib(servers)
        grown = [b - a for a, b in zip(found["rss_mib_empty"], found["rss_mib_full"], strict=True)]
        found["bytes_per_instance"] = round(max(grown) * MIB / instances)
        await asyncio.sleep(options.settle)
        with watch.phase("rest"):
            await asyncio.sleep(options.steady)
        found["cpu_percent_at_rest"] = per_core(found["rest"])
        with watch.phase("changes"):
            times = [await change(agents, port) for port in range(2, 2 + options.changes)]
        found["change_to_all_ms"] = {
            "p50": round(statistics.median(times) * 1000), "max": round(max(times) * 1000)
        }  # fmt: skip
        found["dead_before"] = len(dead.ever)
        Link.places = asyncio.Semaphore(options.dials_at_once)
        with watch.phase("heal"):
            for agent in agents:
                agent.link.replace(await agent.link.connection(10.0), "everyone at once")
            await change(agents, 1000, timeout_s=options.heal_timeout)
        found["rss_mib_healed"] = rss_mib(servers)
        await asyncio.sleep(options.settle)
        found["dead_ever"] = len(dead.ever)
    finally:
        await dead.stop()
        await asyncio.gather(*(agent.stop() for agent in agents))
    return found


class Dead:
    """Which of the simulated nodes the servers ever took for dead: none should be. It asks as an agent does."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent
        self.ever: set[str] = set()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._watch())

    async def _watch(self) -> None:
        stream: Any = self._agent.backend.subscribe("health.state", {"state": "critical"})
        async with aclosing(stream):
            async for event in stream:
                nodes = (row["Node"] for row in event.upserts.values())
                self.ever.update(node for node in nodes if node.startswith("sim-"))

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--agents", type=int, default=1000)
    parser.add_argument("--instances-per-agent", type=int, default=10)
    parser.add_argument("--steady", type=float, default=15.0, help="seconds at rest that are measured")
    parser.add_argument("--settle", type=float, default=5.0, help="seconds at rest before")
    parser.add_argument("--changes", type=int, default=10)
    parser.add_argument("--dials-at-once", type=int, default=1000, help="of all that were lost at once")
    parser.add_argument("--heal-timeout", type=float, default=180.0)
    options = parser.parse_args()
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    needed = max(hard, options.agents + 1000)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, needed))
    except (ValueError, PermissionError):
        raise SystemExit(f"{options.agents} agents need more file descriptors than {hard}: ulimit -Hn") from None
    gc.set_threshold(50_000, 20, 100)  # millions of objects live for as long as the run
    # Thousands of certificates of one CA, which nobody will need after a crash.
    pki._load_ca = functools.cache(pki._load_ca)
    pki.os.fsync = lambda fd: None
    with tempfile.TemporaryDirectory() as directory, mesh(Path(directory)) as stage:
        found = uvloop.run(measure(stage, options))
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
