"""Runs one sidecar in the foreground: ports, registration, configuration, the app as a child, signals, the end."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import Any

from cli.client import Api, quote
from cli.cluster.layout import is_free
from cli.errors import CliError, Refused
from cli.sidecar_stream import UpdateStream
from cli.upstreams import UpstreamSpec
from proxy.descriptors import lower_limit, raise_limit
from proxy.errors import ProxyError
from proxy.event_loop import SidecarLoop
from proxy.otlp_headers import Headers
from proxy.sidecar import OFF, BoundPorts, Sidecar, SidecarOptions
from proxy.workers import WorkerGroup
from raftstate.model.sidecar import Endpoint, SidecarUpstream, key_of

FIRST_OWN_PORT = 22000
"""Listeners of upstreams that may mean the app's own port. They stay out of the way of those that a client's program
expects at 21000 and up: on one host, the server's sidecar of the walkthrough must not take the client's port."""
DEREGISTER_WAIT_S = 3.0
_LOOPBACK = "127.0.0.1"


@dataclass(frozen=True)
class SidecarPlan:
    """What to run, all contradictions resolved."""

    service: str
    service_id: str
    app_port: int
    protocol: str = ""
    """What the app speaks; empty: what ``service-defaults`` or ``proxy-defaults`` says, else TCP."""
    public_host: str = _LOOPBACK
    public_port: int = 0
    upstreams: tuple[UpstreamSpec, ...] = ()
    admin_port: int = OFF
    drain_s: float = 5.0
    workers: int = 1
    """Processes that serve."""
    access_log: str = ""
    """File, or ``-``: a line of JSON for each call. SIGHUP opens it anew."""
    otlp_endpoint: str = ""
    otlp_headers: Headers = field(default=(), repr=False)
    otlp_sample: float = 0.0
    config: dict[str, Any] = field(default_factory=dict)
    """What its registration says beside the protocol."""
    registered: dict[str, Any] | None = None
    """What else a registration says that was there before. It is its owner's, and stays when the sidecar ends."""
    command: tuple[str, ...] = ()

    @property
    def sidecar_id(self) -> str:
        """Return the id under which the sidecar itself is registered."""
        return f"{self.service_id}-sidecar-proxy"

    def options(self) -> SidecarOptions:
        """Return what the sidecar binds."""
        return SidecarOptions(
            public_host=self.public_host,
            public_port=self.public_port,
            upstreams=tuple((spec.name, _LOOPBACK, self._bind_port(spec)) for spec in self.upstreams),
            admin_port=self.admin_port,
            access_log=self.access_log,
            otlp_endpoint=self.otlp_endpoint,
            otlp_headers=self.otlp_headers,
            otlp_sample=self.otlp_sample,
        )

    def _bind_port(self, spec: UpstreamSpec) -> int:
        if spec.bind_port or spec.service or not spec.port or spec.port != self.app_port:
            return spec.bind_port
        return next((port for port in range(FIRST_OWN_PORT, FIRST_OWN_PORT + 1000) if is_free(_LOOPBACK, port)), 0)

    def definition(self, ports: BoundPorts) -> dict[str, Any]:
        """Return the sidecar's registration, a service definition of kind connect-proxy."""
        upstreams = [
            {
                "DestinationName": spec.service or ("" if spec.port else spec.name),
                "DestinationPort": spec.port,
                "UpstreamName": spec.name,
                "LocalBindAddress": _LOOPBACK,
                "LocalBindPort": ports.upstreams[spec.name],
                **({"Config": spec.config} if spec.config else {}),
            }
            for spec in self.upstreams
        ]
        definition: dict[str, Any] = {
            **(self.registered or {}),
            "ID": self.sidecar_id,
            "Name": f"{self.service}-sidecar-proxy",
            "Kind": "connect-proxy",
            "Port": ports.public_port,
            "Proxy": {
                "DestinationServiceName": self.service,
                "DestinationServiceID": self.service_id,
                "LocalServiceAddress": _LOOPBACK,
                "LocalServicePort": self.app_port,
                "Config": {**self.config, **({"protocol": self.protocol} if self.protocol else {})},
                "Upstreams": upstreams,
            },
        }
        if self.public_host not in (_LOOPBACK, "0.0.0.0", "::"):
            definition["Address"] = self.public_host
        return definition


def environment(upstreams: dict[str, int]) -> dict[str, str]:
    """Return the variables that tell an app its upstreams: ``BACKEND_ADDR`` and ``BACKEND_PORT``."""
    variables = {}
    for name, port in upstreams.items():
        stem = UpstreamSpec(name).variable
        variables[f"{stem}_ADDR"] = f"localhost:{port}"
        variables[f"{stem}_PORT"] = str(port)
    return variables


def say(text: str) -> None:
    """Print a line for the user."""
    print(text, flush=True)


class Runner:
    """One run of ``lictor connect``."""

    def __init__(self, plan: SidecarPlan, api: Api, *, files: int = 0) -> None:
        """``files``: how many descriptors the child may have; 0: as many as this process."""
        self.plan = plan
        self.api = api
        options = plan.options()
        try:
            self.sidecar = Sidecar(options) if plan.workers == 1 else WorkerGroup(options, plan.workers)
        except ProxyError as error:
            raise CliError(str(error)) from None
        self.ready = asyncio.Event()
        self.stopping = asyncio.Event()
        self.ports = BoundPorts(0)
        self._upstream_lines: dict[str, str] = {}
        self._registered = True
        self._child: asyncio.subprocess.Process | None = None
        self._files = files
        self._signals: list[signal.Signals] = []
        """Signals that came while there was no child to pass them to."""

    async def run(self) -> int:
        """Run until a signal comes or the child ends. Returns the exit code; raises :class:`CliError`."""
        try:
            self.ports = await self.sidecar.bind()
        except ProxyError as error:
            raise CliError(str(error)) from None
        stream = UpdateStream(
            self.api, self.plan.sidecar_id, self.plan.definition(self.ports), say=say, applied=self._applied
        )
        self._handle_signals()
        running: asyncio.Task[None] | None = None
        try:
            await stream.open(self.api.wait_s)
            running = asyncio.ensure_future(self.sidecar.run(stream.updates()))
            return await self._until_end(running)
        finally:
            if running is not None and not running.done():
                await self.sidecar.drain(self.plan.drain_s if len(self._signals) < 2 else 0.0)
            await self.sidecar.close()
            if running is not None:
                with suppress(asyncio.CancelledError, ProxyError):
                    await running
            await stream.close()
            if running is not None and self.plan.registered is None:
                await asyncio.to_thread(self._deregister)

    async def _until_end(self, running: asyncio.Task[None]) -> int:
        stopped = asyncio.ensure_future(self.stopping.wait())
        ready = asyncio.ensure_future(self.ready.wait())
        waits: set[asyncio.Future[Any]] = {running, stopped, ready}
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            if running.done():
                await running
                return 0  # drained through the admin endpoint
            if stopped.done() and not ready.done():
                return 128 + self._signals[0] if self.plan.command else 0
            if not self.plan.command:
                await asyncio.wait({running, stopped}, return_when=asyncio.FIRST_COMPLETED)
                return 0
            return await self._run_child(running)
        finally:
            stopped.cancel()
            ready.cancel()

    async def _run_child(self, running: asyncio.Task[None]) -> int:
        variables = {**os.environ, **environment(self.ports.upstreams)}
        command = self.plan.command
        try:
            self._child = await asyncio.create_subprocess_exec(
                *command, env=variables, preexec_fn=partial(lower_limit, self._files) if self._files else None
            )
        except OSError as error:
            raise CliError(f"can't run {command[0]}: {error.strerror}") from None
        for number in self._signals:  # they came while the child was being born
            with suppress(ProcessLookupError):
                self._child.send_signal(number)
        code = await self._child.wait()
        self._child = None
        return code if code >= 0 else 128 - code

    def _handle_signals(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(number, self._on_signal, number)

    def _on_signal(self, number: signal.Signals) -> None:
        if number == signal.SIGHUP and self.plan.access_log:
            self.sidecar.reopen_log()
            if self._child is None:
                return
        if self._child is not None:
            # At a terminal Ctrl-C reaches the whole foreground group, the child included; once is enough.
            if number != signal.SIGINT or not sys.stdin.isatty():
                with suppress(ProcessLookupError):
                    self._child.send_signal(number)
            return
        self._signals.append(number)
        self.stopping.set()
        if len(self._signals) == 2:
            self.sidecar.start_drain(0.0)

    def _applied(self) -> None:
        """The sidecar has taken an update: tell what it means."""
        config = self.sidecar.config
        if not self.ready.is_set() and self.sidecar.ready:
            self._introduce()
            self.ready.set()
        if config.registered != self._registered:
            self._registered = config.registered
            gone = f"{self.plan.service_id} was deregistered: the calls to it have ended, and none is taken"
            say(gone if not config.registered else f"{self.plan.service_id} is registered again, and takes calls")
        for spec in config.upstreams:
            if spec.error:
                line = f"upstream {spec.name}: {spec.error}"
            elif spec.loopback_port:
                line = f"upstream {spec.name} is this service's own port {spec.loopback_port}"
            else:
                count = len({key_of(endpoint) for endpoint in _instances(spec)})
                line = f"upstream {spec.name} leads to {spec.service}, {count} instance{'' if count == 1 else 's'}"
            if self._upstream_lines.get(spec.name) != line:
                self._upstream_lines[spec.name] = line
                say(line)

    def _introduce(self) -> None:
        leaf = self.sidecar.config.leaf
        plan = self.plan
        workers = f", {plan.workers} workers" if plan.workers > 1 else ""
        say(f"Sidecar of {plan.service} ({plan.service_id}) is ready, pid {os.getpid()}{workers}")
        say(f"  identity  {leaf.service_uri if leaf else '?'}")
        taken = (
            f"for the app at {_LOOPBACK}:{plan.app_port}" if plan.app_port else "takes no calls: the app has no port"
        )
        say(f"  public    {plan.public_host}:{self.ports.public_port}  {taken}")
        for name, port in self.ports.upstreams.items():
            say(f"  upstream  {name} -> localhost:{port}  ({UpstreamSpec(name).variable}_ADDR)")
        if self.ports.admin_port:
            say(f"  admin     http://{_LOOPBACK}:{self.ports.admin_port}/stats")

    def _deregister(self) -> None:
        try:
            Api(self.api.address, wait_s=DEREGISTER_WAIT_S, token=self.api.token, ca_file=self.api.ca_file).put(
                f"/v1/agent/service/deregister/{quote(self.plan.sidecar_id)}"
            )
        except CliError as error:
            if isinstance(error, Refused) and error.status == 404:
                return  # it is gone already, perhaps with its service
            say(f"the sidecar stays registered as {self.plan.sidecar_id}, critical: {error}")


def _instances(upstream: SidecarUpstream) -> Iterable[Endpoint]:
    """Return those that calls may be led to, by a plan or without one."""
    if upstream.plan is None:
        return upstream.endpoints
    return chain.from_iterable(upstream.targets.values())


def run_sidecar(plan: SidecarPlan, api: Api, *, verbose: bool = False) -> int:
    """Run one sidecar to its end. Returns the exit code; raises :class:`CliError`."""
    logging.basicConfig(
        level=logging.DEBUG if verbose else logging.INFO, format="%(asctime)s %(levelname)s %(message)s"
    )
    files = raise_limit()

    async def main() -> int:
        return await Runner(plan, api, files=files).run()

    with asyncio.Runner(loop_factory=SidecarLoop) as runner:
        return runner.run(main())


def shell_exports(variables: dict[str, str]) -> Sequence[str]:
    """Return the lines that a shell evaluates."""
    return [f"export {name}={value}" for name, value in variables.items()]
