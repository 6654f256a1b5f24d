"""A real cluster of processes for the end-to-end tests, driven by the ``lictor`` command alone."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from cli.client import Api
from cli.cluster.layout import Layout
from cli.cluster.processes import PAUSED
from cli.cluster.supervisor import NodeStatus, Supervisor
from cli.demo_stage import Stage, free_offset, free_ports, wait_until
from cli.errors import CliError
from tests.support.promises import PATIENCE_S

ROOT = Path(__file__).resolve().parents[2]
SERVERS, CLIENTS = 3, 2


def need(*programs: str) -> None:
    """Skip, with a reason that pytest prints, where a program is missing; in CI that is a failure."""
    missing = [name for name in programs if shutil.which(name) is None]
    if missing and os.environ.get("CI"):
        pytest.fail(f"CI must have {', '.join(missing)}; see .ci/run")
    if missing:
        pytest.skip(f"needs {', '.join(missing)}")


class Mesh(Stage):
    """The demo's stage with a cluster on it, and what tests ask of one."""

    ready_timeout_s = PATIENCE_S

    @property
    def layout(self) -> Layout:
        return Layout(self.directory / "cluster")

    @property
    def supervisor(self) -> Supervisor:
        return Supervisor(self.layout)

    def up(self) -> None:
        """Start the cluster."""
        self.cluster_up = True
        self.cluster("up", "-servers", str(SERVERS), "-clients", str(CLIENTS), "-port-offset", str(self.offset))

    def cluster(self, verb: str, *arguments: str) -> str:
        """Run a ``lictor cluster`` command."""
        return self.lictor("cluster", verb, *arguments, "-dir", str(self.layout.directory)).stdout

    def api(self, host: int = 0, wait_s: float = 10.0) -> Api:
        """Return a client of a host's agent."""
        return Api(self.hosts[host], wait_s=wait_s)

    def status(self) -> dict[str, NodeStatus]:
        """Return what every node tells of itself."""
        return {one.name: one for one in self.supervisor.status()}

    def revive(self) -> None:
        """Have all nodes run, as the next test expects it; one that failed may have left some dead or paused."""
        supervisor = self.supervisor
        for name in supervisor.names:
            if supervisor.state(name) == PAUSED:
                supervisor.resume(name)
        if started := supervisor.start(supervisor.names):
            supervisor.wait_ready(started, print)

    def wait_leader(self, other_than: str = "") -> str:
        """Wait for a leader."""
        leader = wait_until(lambda: (name := self.supervisor.leader()) != other_than and name, PATIENCE_S)
        assert leader, "no leader was elected"
        return leader

    def wait_caught_up(self) -> None:
        """Wait until every server has applied as much as the one that has applied most."""

        def level() -> bool:
            applied = [one.applied for one in self.status().values() if one.role == "server"]
            return min(applied) == max(applied) > 0

        assert wait_until(level, PATIENCE_S), self.status()

    def environment(self, more: Mapping[str, str] | None = None) -> dict[str, str]:
        """Return the environment of a shell in which ``lictor`` is typed on host A."""
        inherited = super().environment(more)
        path = f"{Path(sys.executable).parent}:{inherited.get('PATH', '')}"
        return {"LICTOR_HTTP_ADDR": self.hosts[0], **inherited, "PATH": path}

    def home(self, name: str, services: Sequence[Mapping[str, Any]] = ()) -> Path:
        """Make a directory to stand in, with a ``proxy.json``."""
        home = self.directory / name
        home.mkdir(exist_ok=True)
        if services:
            (home / "proxy.json").write_text(json.dumps({"services": list(services)}))
        return home

    def stand(
        self,
        name: str,
        instance: str,
        *,
        port: int = 0,
        upstreams: str = "",
        host: int = 0,
        command: Sequence[str] = (),
        **more: Any,
    ) -> None:
        """Register a service and stand its sidecar before it, by one command."""
        self.home(instance, [{"name": name, "port": port, **more}])
        arguments = ["-proxy", "./proxy.json", "-register", "-name", name, "-service-id", instance]
        if upstreams:
            arguments += ["-upstreams", upstreams]
        if command:
            arguments += ["--", *command]
        self.sidecar(instance, host, arguments, {})

    def upstream(self, instance: str, name: str = "BACKEND", host: int = 0) -> str:
        """Return ``localhost:port`` of a sidecar's upstream."""
        printed = self.lictor("connect", "env", "-service-id", instance, host=host).stdout
        variables = dict(line.removeprefix("export ").split("=", 1) for line in printed.splitlines())
        return variables[f"{name}_ADDR"]

    def end_background(self, name: str) -> None:
        """End one of the processes that the test started."""
        for one in [one for one in self.backgrounds if one.name == name]:
            one.end()
            self.backgrounds.remove(one)


@contextmanager
def mesh(directory: Path) -> Iterator[Mesh]:
    """Run a cluster on ports of its own; everything is ended by pid when the test is over, however it ends."""
    stage = Mesh(directory, free_offset(SERVERS, CLIENTS))
    try:
        stage.up()
        yield stage
    except BaseException:
        for name in stage.supervisor.names if stage.layout.config.exists() else ():
            print(f"--- the end of {name}'s log\n{stage.supervisor.log_end(name, 40)}")
        for one in stage.backgrounds:
            print(f"--- {one.name} said\n{one.text()[-3000:]}")
        raise
    finally:
        stage.clear()


class Writer:
    """Writes without end through one agent, in a thread, and remembers what was acknowledged."""

    def __init__(self, api: Api, name: str) -> None:
        self.api = api
        self.name = name
        self.services: list[str] = []
        self.intentions: list[tuple[str, str]] = []
        self.failures: list[str] = []
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Writer:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._end.set()
        self._thread.join(30)
        assert not self._thread.is_alive()

    def _run(self) -> None:
        number = 0
        while not self._end.is_set():
            number += 1
            service = f"{self.name}-{number}"
            row = {"Node": f"{service}-node", "Address": "127.0.0.1", "Service": {"Service": service, "Port": 9}}
            try:
                self.api.put("/v1/catalog/register", row)
                self.services.append(service)
                pair = {"source": service, "destination": "anything"}
                self.api.put("/v1/connect/intentions/exact", {"Action": "allow"}, pair)
                self.intentions.append((service, "anything"))
            except CliError as error:
                self.failures.append(str(error))
            time.sleep(0.005)

    def lost(self, api: Api) -> list[str]:
        """Return what was acknowledged and is not there."""
        services = api.get("/v1/catalog/services", {"consistent": ""}).json()
        rows = api.get("/v1/connect/intentions", {"consistent": ""}).json()
        pairs = {(row["SourceName"], row["DestinationName"]) for row in rows}
        return [s for s in self.services if s not in services] + [str(p) for p in self.intentions if p not in pairs]


@contextmanager
def running(command: Sequence[str], **more: Any) -> Iterator[subprocess.Popen[bytes]]:
    """Run a program; its whole process group is killed at the end."""
    quiet = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
    process = subprocess.Popen(command, start_new_session=True, **{**quiet, **more})
    try:
        yield process
    finally:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        process.wait()


def a_free_port() -> int:
    """Return a port that was free a moment ago."""
    return free_ports(24000, 1)[0]
