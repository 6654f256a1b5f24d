"""One run of ``lictor connect`` against a scripted agent: ports, registration, child, signals, and taking leave."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from cli.client import Api
from cli.errors import CliError, Refused
from cli.sidecar_run import FIRST_OWN_PORT, Runner, SidecarPlan, environment
from cli.upstreams import UpstreamSpec, parse_upstreams
from proxy.sidecar import BoundPorts
from proxy.workers import WorkerGroup
from raftstate.model.sidecar import SidecarSelf, SidecarUpdate, SidecarUpstream
from raftstate.model.wire import to_json
from tests.support.certs import TRUST_DOMAIN, TestCA


class ScriptedAgent:
    """Takes one sidecar's registration and sends it a whole configuration; remembers what it was asked."""

    def __init__(self) -> None:
        self.ca = TestCA()
        self.definition: dict[str, Any] = {}
        self.deregistered: list[str] = []
        self.refuse = ""
        self.address = ""
        self.end = asyncio.Event()

    async def stream(self, request: web.Request) -> web.StreamResponse:
        """Answer as the agent does."""
        if self.refuse:
            return web.Response(status=409, text=self.refuse)
        self.definition = await request.json()
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(to_json(self.update()) + b"\n")
        await self.end.wait()
        return response

    def update(self) -> SidecarUpdate:
        """Return the first line, made from the registration."""
        proxy = self.definition["Proxy"]
        name, instance = proxy["DestinationServiceName"], proxy["DestinationServiceID"]
        return SidecarUpdate(
            version=1,
            self=SidecarSelf(
                proxy_id=self.definition["ID"], service=name, service_id=instance, node="n", datacenter="dc1",
                trust_domain=TRUST_DOMAIN, public_address="127.0.0.1", public_port=self.definition["Port"],
                local_address="127.0.0.1", local_port=proxy["LocalServicePort"],
            ),
            leaf=self.ca.leaf(name, instance),
            roots=(self.ca.root_pem,),
            intentions=(),
            default_allow=False,
            revocations=(),
            upstreams=tuple(
                SidecarUpstream(
                    name=one["UpstreamName"], service="", bind_address="127.0.0.1", bind_port=one["LocalBindPort"],
                    error="nothing is called so",
                )
                for one in proxy["Upstreams"]
            ),
        )  # fmt: skip

    async def deregister(self, request: web.Request) -> web.Response:
        """Note it."""
        self.deregistered.append(request.match_info["id"])
        return web.Response()


@asynccontextmanager
async def scripted() -> AsyncIterator[ScriptedAgent]:
    """Serve a scripted agent."""
    agent = ScriptedAgent()
    app = web.Application()
    app.router.add_post("/v1/agent/connect/proxy/{id}/stream", agent.stream)
    app.router.add_put("/v1/agent/service/deregister/{id}", agent.deregister)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    agent.address = f"127.0.0.1:{runner.addresses[0][1]}"
    try:
        yield agent
    finally:
        agent.end.set()
        await runner.cleanup()


def _plan(*command: str, upstreams: str = "", port: int = 0) -> SidecarPlan:
    return SidecarPlan("web", "web-1", port, upstreams=parse_upstreams(upstreams), drain_s=0.2, command=command)


async def test_the_child_gets_the_variables_after_the_sidecar_is_ready(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    async with scripted() as agent:
        runner = Runner(
            _plan("sh", "-c", "echo CHILD $USER_DB_ADDR $USER_DB_PORT; exit 7", upstreams="user-db=postgres:5432"),
            Api(agent.address),
        )
        async with asyncio.timeout(20):
            assert await runner.run() == 7
        port = agent.definition["Proxy"]["Upstreams"][0]["LocalBindPort"]
    printed = capfd.readouterr().out
    assert f"CHILD localhost:{port} {port}" in printed
    assert printed.index("is ready") < printed.index("CHILD")
    assert f"spiffe://{TRUST_DOMAIN}/ns/default/dc/dc1/svc/web" in printed
    assert "upstream user-db: nothing is called so" in printed
    assert agent.deregistered == ["web-1-sidecar-proxy"]


def test_a_protocol_that_nobody_named_is_left_to_service_defaults() -> None:
    ports = BoundPorts(20000)
    assert SidecarPlan("web", "web-1", 80).definition(ports)["Proxy"]["Config"] == {}
    assert SidecarPlan("web", "web-1", 80, protocol="http").definition(ports)["Proxy"]["Config"] == {
        "protocol": "http"
    }


async def test_signals_go_to_the_child(tmp_path: Path) -> None:
    started = tmp_path / "started"
    program = f"import time, pathlib; pathlib.Path({str(started)!r}).touch(); time.sleep(60)"
    async with scripted() as agent:
        running = asyncio.ensure_future(Runner(_plan(sys.executable, "-c", program), Api(agent.address)).run())
        async with asyncio.timeout(20):
            while not started.exists():  # noqa: ASYNC110 - another process makes it
                await asyncio.sleep(0.01)
            os.kill(os.getpid(), signal.SIGTERM)
            assert await running == 128 + signal.SIGTERM
    assert agent.deregistered == ["web-1-sidecar-proxy"]


async def test_a_signal_that_comes_while_the_child_is_born_reaches_it(monkeypatch: pytest.MonkeyPatch) -> None:
    create = asyncio.create_subprocess_exec

    async def slow(*command: str, **more: Any) -> asyncio.subprocess.Process:
        child = await create(*command, **more)
        os.kill(os.getpid(), signal.SIGHUP)
        await asyncio.sleep(0.05)
        return child

    monkeypatch.setattr(asyncio, "create_subprocess_exec", slow)
    async with scripted() as agent:
        async with asyncio.timeout(20):
            assert await Runner(_plan("sleep", "60"), Api(agent.address)).run() == 128 + signal.SIGHUP


async def test_a_signal_ends_a_sidecar_without_a_child() -> None:
    async with scripted() as agent:
        runner = Runner(_plan(port=9), Api(agent.address))
        running = asyncio.ensure_future(runner.run())
        async with asyncio.timeout(20):
            await runner.ready.wait()
            os.kill(os.getpid(), signal.SIGTERM)
            assert await running == 0
    assert agent.deregistered == ["web-1-sidecar-proxy"]


async def test_a_sidecar_of_workers_is_ready_when_all_are_and_leaves_none_behind(
    capfd: pytest.CaptureFixture[str],
) -> None:
    async with scripted() as agent:
        runner = Runner(SidecarPlan("web", "web-1", 9, workers=2), Api(agent.address))
        running = asyncio.ensure_future(runner.run())
        async with asyncio.timeout(60):
            await runner.ready.wait()
            assert isinstance(runner.sidecar, WorkerGroup)
            pids = runner.sidecar.pids
            os.kill(os.getpid(), signal.SIGTERM)
            assert await running == 0
    assert len(pids) == 2
    assert [pid for pid in pids if os.path.exists(f"/proc/{pid}")] == []  # noqa: ASYNC240
    assert "2 workers" in capfd.readouterr().out
    assert agent.deregistered == ["web-1-sidecar-proxy"]


async def test_a_second_sidecar_leaves_the_first_ones_registration_alone() -> None:
    async with scripted() as agent:
        agent.refuse = "web-1 has a sidecar: pid 42"
        with pytest.raises(Refused, match="pid 42"):
            await Runner(_plan(), Api(agent.address)).run()
    assert agent.deregistered == []


async def test_a_program_that_is_not_there_is_one_error_and_the_sidecar_leaves() -> None:
    async with scripted() as agent:
        with pytest.raises(CliError, match="can't run /nowhere/app"):
            await Runner(_plan("/nowhere/app"), Api(agent.address)).run()
    assert agent.deregistered == ["web-1-sidecar-proxy"]


async def test_a_taken_port_is_one_error_before_anything_is_registered() -> None:
    async with scripted() as agent:
        taken = int(agent.address.rpartition(":")[2])
        plan = SidecarPlan("web", "web-1", 0, public_port=taken)
        with pytest.raises(CliError, match=f"127.0.0.1:{taken}"):
            await Runner(plan, Api(agent.address)).run()
    assert agent.definition == {}


def test_the_registration_says_what_is_listened_on() -> None:
    plan = SidecarPlan(
        "web", "web-1", 80, "http", "10.0.0.5", upstreams=parse_upstreams("backend:8080,db=postgres,cache")
    )
    definition = plan.definition(BoundPorts(20003, {"backend": 21000, "db": 21001, "cache": 21002}))
    assert (definition["ID"], definition["Port"], definition["Address"]) == ("web-1-sidecar-proxy", 20003, "10.0.0.5")
    assert definition["Kind"] == "connect-proxy"
    assert definition["Proxy"]["Config"] == {"protocol": "http"}
    found = [
        (one["UpstreamName"], one["DestinationName"], one["DestinationPort"], one["LocalBindPort"])
        for one in definition["Proxy"]["Upstreams"]
    ]
    assert found == [("backend", "", 8080, 21000), ("db", "postgres", 0, 21001), ("cache", "cache", 0, 21002)]


def test_an_upstream_on_the_apps_own_port_keeps_out_of_the_clients_way() -> None:
    plan = SidecarPlan("web", "web-1", 8080, upstreams=parse_upstreams("backend:8080,api=api:8080,other:9090"))
    ports = {name: port for name, _, port in plan.options().upstreams}
    assert ports["backend"] >= FIRST_OWN_PORT
    assert (ports["api"], ports["other"]) == (0, 0)
    fixed = SidecarPlan("web", "web-1", 8080, upstreams=(UpstreamSpec("backend", port=8080, bind_port=23456),))
    assert fixed.options().upstreams == (("backend", "127.0.0.1", 23456),)


def test_environment() -> None:
    assert environment({"user-db": 21000}) == {"USER_DB_ADDR": "localhost:21000", "USER_DB_PORT": "21000"}
