"""One soak: a real cluster of processes, sidecars, load, and what is done to them all meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import psutil

from tests.e2e.support_e2e import Mesh, mesh
from tests.soak.apps import BOTH, METHOD, STREAM, GrpcApp, HttpApp, L4App
from tests.soak.load import Load
from tests.soak.referee import Referee, Withdrawal, course_of, growth

SERVICES: dict[str, Callable[[Referee, str, str], L4App | HttpApp | GrpcApp]] = {
    "l4": L4App, "http": HttpApp, "grpc": GrpcApp,
}  # fmt: skip
INSTANCES = 2
STEADY, FLAPPED = "web", "flap"
READY_TIMEOUT_S = 60.0
QUIET_TIMEOUT_S = 30.0
FEW_DESCRIPTORS = FEW_TASKS = 4
"""How many more than before a process may hold at the end: sessions come and go by themselves."""
GROWTH_MAX = 0.05
MEMORY_MINUTES = 3.0
"""A shorter run says nothing of memory: it is still filling its caches. A longer one has to harm everything."""
EXTRA_S = 120.0
"""How much longer a run may take on a slow machine, until each kind of harm was done once."""
FLAPS, KILLS, RESTARTS, ROTATIONS = HARMS = (
    "intentions flapped", "instances killed", "servers restarted", "CA rotated",
)  # fmt: skip


@dataclass
class Plan:
    """How long and how hard."""

    minutes: float = 10.0
    seed: int = 0
    within_s: float = 1.0
    pause_s: float = 0.1
    """Between two calls of one worker of the load."""
    say: Callable[[str], None] = print


@dataclass
class Report:
    """What came of it."""

    faults: list[str]
    lines: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Held:
    """What a process holds: calls of the load, descriptors, tasks of its event loop."""

    live_calls: int
    descriptors: int
    tasks: int

    def exceeds(self, before: Held) -> bool:
        """Tell whether something of the load was left behind."""
        return (
            self.live_calls > 0
            or self.descriptors > before.descriptors + FEW_DESCRIPTORS
            or self.tasks > before.tasks + FEW_TASKS
        )


class Soak:
    """The stage, the harm and the measuring of one run."""

    def __init__(self, stage: Mesh, plan: Plan) -> None:
        self.stage = stage
        self.plan = plan
        self.rng = random.Random(plan.seed)
        self.referee = Referee(within_s=plan.within_s)
        self.apps: dict[str, L4App | HttpApp | GrpcApp] = {}
        self.sidecars: dict[str, subprocess.Popen[bytes]] = {}
        self.memory: dict[str, list[tuple[float, float]]] = {}
        self.harmed: dict[str, Counter[str]] = {harm: Counter() for harm in HARMS}
        """Kind of harm -> to whom it was done, and how often."""
        self._calm = asyncio.Lock()
        """Held while something is done to the mesh that the next thing must not meet half done."""

    # Setting up

    async def set_up(self) -> None:
        """Register services, allow the calls, stand the sidecars."""
        for service, make in SERVICES.items():
            for number in range(1, INSTANCES + 1):
                instance = f"soak-{service}-{number}"
                app = self.apps[instance] = make(self.referee, service, instance)
                await app.start()
                await self.stand(instance)
            for source in (STEADY, FLAPPED):
                await self.allow(source, service)
        for source in (STEADY, FLAPPED):
            await self.stand(f"soak-{source}-1", upstreams=",".join(f"{name}=soak-{name}" for name in SERVICES))

    async def stand(self, instance: str, upstreams: str = "") -> None:
        """Start an instance's sidecar and wait until it is ready."""
        name, number = instance.rsplit("-", 1)
        service = name.removeprefix("soak-")
        protocol = service if service in ("http", "grpc") else "tcp"
        port = self.apps[instance].port if instance in self.apps else 0
        home = self.stage.home(instance, [{"name": name, "port": port, "id": instance, "protocol": protocol}])
        command = ["connect", "-proxy", "proxy.json", "-register", "-admin-port", "0"]
        command += ["-upstreams", upstreams] if upstreams else []
        command += ["-http-addr", self.stage.hosts[int(number) % 2]]
        log = home / "sidecar.log"
        with log.open("wb") as output:
            process = subprocess.Popen(  # noqa: ASYNC220 - a fork
                [sys.executable, "-P", "-m", "cli", *command],
                stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, cwd=home,
                env=self.stage.environment(), start_new_session=True,
            )  # fmt: skip
        self.sidecars[instance] = process
        async with asyncio.timeout(READY_TIMEOUT_S):
            while b"is ready" not in log.read_bytes():
                if process.poll() is not None:
                    raise RuntimeError(f"the sidecar of {instance} ended:\n{log.read_text()}")
                await asyncio.sleep(0.05)

    async def said(self, source: str, what: str, timeout_s: float = READY_TIMEOUT_S) -> str:
        """Return what a client's sidecar says of itself: it goes on line by line after it has said that it is ready.

        `what` has to reach beyond what it catches: the last line there is may be half of one.
        """
        log = self.stage.directory / f"soak-{source}-1" / "sidecar.log"
        async with asyncio.timeout(timeout_s):
            while (found := re.search(what, log.read_text())) is None:  # noqa: ASYNC110 - another process writes it
                await asyncio.sleep(0.02)
        return found[1]

    async def ports(self, source: str) -> dict[str, int]:
        """Return the upstreams' ports of a source."""
        return {name: int(await self.said(source, rf"upstream  {name} -> localhost:(\d+) ")) for name in SERVICES}

    # Intentions

    async def allow(self, source: str, service: str) -> None:
        """Let a source call a service; of HTTP and gRPC, all but what is secret."""
        permissions: dict[str, list[dict[str, Any]]] = {
            "http": [
                {"Action": "deny", "HTTP": {"PathPrefix": "/secret"}},
                {"Action": "allow", "HTTP": {"PathPrefix": "/"}},
            ],
            "grpc": [{"Action": "allow", "HTTP": {"PathExact": path}} for path in (METHOD, STREAM, BOTH)],
        }
        body = {"Permissions": permissions[service]} if service in permissions else {"Action": "allow"}
        await self._write(source, service, body)

    async def deny(self, source: str, service: str) -> None:
        await self._write(source, service, {"Action": "deny"})

    async def _write(self, source: str, service: str, body: dict[str, Any]) -> None:
        pair = {"source": f"soak-{source}", "destination": f"soak-{service}"}
        api = self.stage.api(wait_s=30.0)
        await asyncio.to_thread(api.put, "/v1/connect/intentions/exact", body, pair)

    # Harm, each for ever

    async def flap(self) -> None:
        """Withdraw what the flapped source may do, and give it back."""
        referee = self.referee
        for service in self._cycle(SERVICES):
            await asyncio.sleep(self.rng.uniform(1.0, 2.0))
            withdrawal = Withdrawal(FLAPPED, service, asked=time.monotonic())
            referee.withdrawals.append(withdrawal)
            await self.deny(FLAPPED, service)
            withdrawal.acknowledged = time.monotonic()
            await asyncio.sleep(self.plan.within_s)
            alive = [i for i, app in self.apps.items() if service in i and FLAPPED in app.live.values()]
            if alive:
                referee.fault(f"live connections of {FLAPPED} to {alive} outlived their intention")
            await asyncio.sleep(self.rng.uniform(0.5, 1.5))
            withdrawal.lifting = time.monotonic()
            await self.allow(FLAPPED, service)
            withdrawal.lifted = time.monotonic()
            self.harmed[FLAPS][service] += 1

    async def kill(self) -> None:
        """Kill an instance's sidecar, and stand it again."""
        for instance in self._cycle(self.apps):
            await asyncio.sleep(self.rng.uniform(4.0, 6.0))
            self.referee.kills.append((instance.split("-")[1], instance, time.monotonic()))
            os.killpg(self.sidecars[instance].pid, signal.SIGKILL)
            await asyncio.to_thread(self.sidecars[instance].wait)
            self.harmed[KILLS][instance] += 1
            await asyncio.sleep(self.rng.uniform(0.5, 2.0))
            async with self._calm:
                await self.stand(instance)

    async def restart_servers(self) -> None:
        """Stop and start every server in turn."""
        supervisor = self.stage.supervisor
        servers = [name for name in supervisor.names if supervisor.config.nodes[name].is_server]
        for server in self._cycle(servers):
            await asyncio.sleep(self.rng.uniform(5.0, 8.0))
            async with self._calm:
                await asyncio.to_thread(supervisor.stop, [server])
                await asyncio.to_thread(supervisor.start, [server])
                await asyncio.to_thread(supervisor.wait_ready, [server], lambda _: None)
                await asyncio.to_thread(self.stage.wait_caught_up)
            self.harmed[RESTARTS][server] += 1

    async def rotate(self) -> None:
        """Rotate the certificate authority."""
        pause_s = min(60.0, self.plan.minutes * 60 / 3)
        while True:
            await asyncio.sleep(pause_s)
            async with self._calm:
                await asyncio.to_thread(self.stage.api(wait_s=30.0).put, "/v1/connect/ca/rotate")
            self.harmed[ROTATIONS]["CA"] += 1

    def _cycle(self, names: Any) -> Any:
        while True:
            shuffled = list(names)
            self.rng.shuffle(shuffled)
            yield from shuffled

    # Measuring

    def watched(self) -> dict[str, psutil.Process]:
        """Return the processes that live through it all."""
        found = {f"soak-{s}-1": psutil.Process(self.sidecars[f"soak-{s}-1"].pid) for s in (STEADY, FLAPPED)}
        for name in ("client-1", "client-2"):
            process = self.stage.supervisor.process(name)
            assert process is not None
            found[name] = psutil.Process(process.pid)
        return found

    async def measure(self) -> None:
        """Sample the memory of what lives through it all."""
        watched = self.watched()
        while True:
            now = time.monotonic()
            for name, process in watched.items():
                self.memory.setdefault(name, []).append((now, float(process.memory_info().rss)))
            await asyncio.sleep(1.0)

    async def held(self) -> dict[str, Held]:
        """Return what each process that lives through it all holds at present."""
        found = {}
        async with aiohttp.ClientSession() as session:
            for name, process in self.watched().items():
                if name.startswith("client-"):
                    host = self.stage.hosts[int(name.removeprefix("client-")) - 1]
                    async with session.get(f"http://{host}/v1/agent/metrics") as answer:
                        gauges = {row["Name"]: row["Value"] for row in (await answer.json())["Gauges"]}
                    found[name] = Held(0, process.num_fds(), int(gauges["lictor.process.tasks"]))
                else:
                    url = await self.said(name.split("-")[1], r"admin     (\S+)/stats")
                    async with session.get(f"{url}/stats") as answer:
                        stats = await answer.json()
                    found[name] = Held(stats["live_calls"], process.num_fds(), stats["tasks"])
        return found

    async def check_quiet(self, before: dict[str, Held]) -> None:
        """Once the load is gone nothing may be left of it."""
        left: dict[str, str] = {}
        deadline = time.monotonic() + QUIET_TIMEOUT_S
        while time.monotonic() < deadline:
            held = await self.held()
            left = {name: f"{now}, before {before[name]}" for name, now in held.items() if now.exceeds(before[name])}
            if not left:
                return
            await asyncio.sleep(0.2)
        for name, what in left.items():
            self.referee.fault(f"left over in {name}: {what}")

    # The run

    async def run(self) -> Report:
        """Play it to its end."""
        plan, referee = self.plan, self.referee
        await self.set_up()
        plan.say(f"{len(self.sidecars)} sidecars are up; {plan.minutes:g} minutes of load begin")
        loads = [Load(referee, source, await self.ports(source), plan.pause_s) for source in (STEADY, FLAPPED)]
        for load in loads:
            load.start()
        await asyncio.sleep(3.0)  # one connection of each kind is there
        before = await self.held()
        began = time.monotonic()
        works = [self.flap(), self.kill(), self.restart_servers(), self.rotate(), self.measure(), self._tell(began)]
        tasks = [asyncio.ensure_future(work) for work in works]
        until = began + plan.minutes * 60
        while True:
            left_s = until - time.monotonic()
            done, _ = await asyncio.wait(tasks, timeout=max(0.5, left_s), return_when=asyncio.FIRST_EXCEPTION)
            if done or (time.monotonic() >= until and (all(self.harmed.values()) or left_s < -EXTRA_S)):
                break
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for task in done:
            task.result()  # a step that could not be done is an error of the run
        for withdrawal in referee.withdrawals[-1:]:
            if withdrawal.lifted == float("inf"):
                withdrawal.lifting = min(withdrawal.lifting, time.monotonic())
        for load in loads:
            await load.stop()
        await self.check_quiet(before)
        return self._report()

    async def _tell(self, began: float) -> None:
        while True:
            await asyncio.sleep(30.0)
            total = sum(self.referee.counts.values())
            self.plan.say(f"{time.monotonic() - began:5.0f} s: {total} calls, {self._harm_done()}")

    def _harm_done(self) -> str:
        return ", ".join(f"{to_whom.total()} {harm}" for harm, to_whom in self.harmed.items())

    def _spared(self) -> list[str]:
        """Return whom no harm was done to, by each kind: what was never tried proves nothing."""
        servers = [name for name, node in self.stage.supervisor.config.nodes.items() if node.is_server]
        whom = {FLAPS: [*SERVICES], KILLS: [*self.apps], RESTARTS: servers, ROTATIONS: ["CA"]}
        if self.plan.minutes < MEMORY_MINUTES:
            return [f"none of: {harm}" for harm, to_whom in self.harmed.items() if not to_whom]
        return [f"{name} never: {harm}" for harm in HARMS for name in whom[harm] if not self.harmed[harm][name]]

    def _report(self) -> Report:
        referee = self.referee
        report = Report(referee.verdict(), referee.table())
        report.faults += [*referee.unproven(), *self._spared()]
        report.lines.append(self._harm_done())
        report.lines.append(
            f"{len(referee.failed)} failed attempts, latest forbidden arrival {referee.delay_max_s * 1000:.0f} ms"
        )
        report.lines.append(referee.around_kills())
        for name, samples in self.memory.items():
            grown = growth(samples)
            course = " ".join(f"{size / 1e6:.1f}" for size in course_of(samples))
            report.lines.append(f"memory of {name}: {course} MB, {grown:+.1%} over the last half")
            if self.plan.minutes >= MEMORY_MINUTES and grown > GROWTH_MAX:
                report.faults.append(f"memory of {name} grew by {grown:.1%} over the last half")
        return report

    async def clear(self) -> None:
        """End what was started."""
        for process in self.sidecars.values():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        for app in self.apps.values():
            await app.stop()


def soak(directory: Path, plan: Plan) -> Report:
    """Run a soak in a directory of its own."""
    with mesh(directory) as stage:

        async def play() -> Report:
            run = Soak(stage, plan)
            try:
                return await run.run()
            finally:
                await run.clear()

        return asyncio.run(play())
