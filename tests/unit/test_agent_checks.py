"""Health checks: what each kind sees, thresholds, bounds, and that runs never overlap."""

from __future__ import annotations

import asyncio
import random
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import h2.config
import h2.connection
import h2.events
import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st

from node.agent.checks.http2 import judge, pack_request
from node.agent.checks.probes import probe_for
from node.agent.checks.runner import Thresholds, Verdict, run_check, run_probe
from node.agent.definitions import CheckDefinition
from raftstate.model.catalog import CRITICAL, PASSING, WARNING
from tests.support.http_api import eventually, serving


async def once(definition: CheckDefinition) -> Verdict:
    probe = probe_for(definition)
    assert probe is not None
    return await run_probe(probe, definition)


@asynccontextmanager
async def web_app(status: int, body: str = "ok", delay_s: float = 0.0) -> AsyncIterator[str]:
    async def handle(request: web.Request) -> web.Response:
        await asyncio.sleep(delay_s)
        return web.Response(status=status, text=body)

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", handle)
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield f"127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


def closed_port() -> int:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return int(held.getsockname()[1])


@pytest.mark.parametrize(
    ("code", "status"), [(200, PASSING), (204, PASSING), (429, WARNING), (500, CRITICAL), (404, CRITICAL)]
)
async def test_http(code: int, status: str) -> None:
    async with web_app(code) as address:
        verdict = await once(CheckDefinition(http=f"http://{address}/health", interval=1))
        assert verdict.status == status
        assert str(code) in verdict.output


async def test_http_bounds_output_and_time() -> None:
    async with web_app(200, "x" * 100_000) as address:
        assert len((await once(CheckDefinition(http=f"http://{address}/", interval=1))).output) <= 4096
    async with web_app(200, delay_s=30) as address:
        verdict = await once(CheckDefinition(http=f"http://{address}/", interval=1, timeout=0.05))
        assert (verdict.status, "0.05 s" in verdict.output) == (CRITICAL, True)


async def test_tcp_and_udp() -> None:
    async with web_app(200) as address:
        assert (await once(CheckDefinition(tcp=address, interval=1))).status == PASSING
    closed = f"127.0.0.1:{closed_port()}"
    assert (await once(CheckDefinition(tcp=closed, interval=1))).status == CRITICAL
    assert (await once(CheckDefinition(udp=closed, interval=1, timeout=0.5))).status == CRITICAL
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as quiet:
        quiet.bind(("127.0.0.1", 0))
        target = f"127.0.0.1:{quiet.getsockname()[1]}"
        assert (await once(CheckDefinition(udp=target, interval=1, timeout=1))).status == PASSING


@pytest.mark.parametrize(("code", "status"), [(0, PASSING), (1, WARNING), (2, CRITICAL)])
async def test_script(code: int, status: str) -> None:
    verdict = await once(CheckDefinition(args=("sh", "-c", f"echo said; exit {code}"), interval=1))
    assert (verdict.status, verdict.output) == (status, "said\n")


async def test_script_is_killed_with_its_children(tmp_path: Path) -> None:
    mark = tmp_path / "pid"
    script = f"sleep 60 & echo $! > {mark}; wait"
    for timeout_s in (0.3, 3.0, 30.0):
        verdict = await once(CheckDefinition(args=("sh", "-c", script), interval=1, timeout=timeout_s))
        assert verdict.status == CRITICAL
        if mark.exists():  # on a crowded machine it may be killed before it has begun
            break
    child = Path(f"/proc/{mark.read_text().strip()}/stat")
    await eventually(lambda: not child.exists() or " Z " in child.read_text())


async def h2_server(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, answer: int) -> None:
    """Answer a gRPC health question with a serving status, and pings."""
    connection = h2.connection.H2Connection(h2.config.H2Configuration(client_side=False))
    connection.initiate_connection()
    writer.write(connection.data_to_send())
    while data := await reader.read(65536):
        for event in connection.receive_data(data):
            if isinstance(event, h2.events.StreamEnded):
                connection.send_headers(event.stream_id, [(":status", "200"), ("content-type", "application/grpc")])
                connection.send_data(event.stream_id, b"\x00\x00\x00\x00\x02\x08" + bytes([answer]))
                connection.send_headers(event.stream_id, [("grpc-status", "0")], end_stream=True)
        writer.write(connection.data_to_send())
    writer.close()


@pytest.mark.parametrize(("answer", "status"), [(1, PASSING), (2, CRITICAL)])
async def test_grpc_and_h2ping(answer: int, status: str) -> None:
    server = await asyncio.start_server(lambda reader, writer: h2_server(reader, writer, answer), "127.0.0.1", 0)
    target = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    verdict = await once(CheckDefinition(grpc=f"{target}/echo", interval=1))
    assert verdict.status == status, verdict
    verdict = await once(CheckDefinition(h2ping=target, h2ping_use_tls=False, interval=1))
    assert verdict.status == PASSING, verdict
    server.close()
    async with web_app(200) as address:
        assert (await once(CheckDefinition(grpc=address, interval=1, timeout=1.0))).status == CRITICAL


def test_grpc_messages() -> None:
    assert pack_request("") == b"\x00\x00\x00\x00\x00"
    assert pack_request("ab") == b"\x00\x00\x00\x00\x04\x0a\x02ab"
    assert judge("t", {"grpc-status": "5"}, b"").status == CRITICAL


@given(
    st.lists(st.sampled_from([PASSING, WARNING, CRITICAL]), max_size=30), st.integers(0, 3), st.integers(0, 3),
)  # fmt: skip
def test_thresholds(results: list[str], successes: int, failures: int) -> None:
    definition = CheckDefinition(success_before_passing=successes, failures_before_critical=failures)
    thresholds = Thresholds(definition, CRITICAL)
    for position, result in enumerate(results):
        state = thresholds.take(result)
        run = 0
        for earlier in reversed(results[: position + 1]):
            if (earlier == PASSING) != (result == PASSING):
                break
            run += 1
        if result == PASSING and run >= max(successes, 1):
            assert state == PASSING
        if result != PASSING and run >= max(failures, 1):
            assert state == result


async def test_runs_never_overlap() -> None:
    running = most = runs = 0
    done = asyncio.Event()

    async def probe() -> Verdict:
        nonlocal running, most, runs
        running += 1
        runs += 1
        most = max(most, running)
        await asyncio.sleep(0.03)
        running -= 1
        if runs >= 2:
            done.set()
        return Verdict(PASSING, "")

    seen: list[str] = []
    definition = CheckDefinition(tcp="x:1", interval=0.001)
    task = asyncio.create_task(
        run_check(definition, probe, lambda: CRITICAL, lambda status, _: seen.append(status), random.Random(0))
    )
    async with asyncio.timeout(10):
        await done.wait()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert most == 1
    assert seen[0] == PASSING


async def test_ttl_expires_and_alias_follows(tmp_path: Path) -> None:
    async with serving(tmp_path) as node:
        await node.put("/v1/agent/service/register", {"Name": "web", "Check": {"TTL": "200ms", "Status": "passing"}})
        body: dict[str, Any] = {"Name": "watcher", "Check": {"AliasService": "web"}}
        await node.put("/v1/agent/service/register", body)

        def status(check_id: str) -> str:
            return node.agent.local.checks[check_id].row.status

        assert status("service:watcher") == PASSING
        await eventually(lambda: status("service:web") == CRITICAL)
        assert status("service:watcher") == CRITICAL
        assert "TTL expired" in node.agent.local.checks["service:web"].row.output
        await node.put("/v1/agent/check/update/service:web", {"Status": "warning", "Output": "so so"})
        assert status("service:watcher") == WARNING
        await node.put("/v1/agent/service/deregister/web")
        assert status("service:watcher") == CRITICAL


async def test_scripts_only_where_they_are_enabled(tmp_path: Path) -> None:
    body = {"Name": "job", "Args": ["true"], "Interval": "1s"}
    async with serving(tmp_path / "off") as node:
        assert "disabled" in await node.put("/v1/agent/check/register", body, status=400)
    async with serving(tmp_path / "on", enable_script_checks=True) as node:
        await node.put("/v1/agent/check/register", body)
        await eventually(lambda: node.agent.local.checks["job"].row.status == PASSING)
