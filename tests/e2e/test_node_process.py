"""A node as a process: starts, answers, stops in order, and refuses what would hurt it."""

from __future__ import annotations

import asyncio
import signal
import sys
from pathlib import Path
from unittest.mock import AsyncMock

import aiohttp
import pytest

from node import pki
from node.config import ClusterConfig, parse_config
from node.main import NodeProcess
from raftstate.errors import RaftError
from raftstate.replica import Replica
from tests.support.ports import free_ports
from tests.support.promises import PATIENCE_S

ROOT = Path(__file__).resolve().parents[2]


def config_of(directory: Path) -> ClusterConfig:
    rpc, http, dns, client_http = free_ports(4)
    text = (
        f'[nodes.server-1]\nrole = "server"\nrpc_port = {rpc}\nhttp_port = {http}\ndns_port = {dns}\n'
        f'[nodes.client-1]\nrole = "client"\nhttp_port = {client_http}\ndns_port = 0\n'
    )
    path = directory / "cluster.toml"
    path.write_text(text)
    config = parse_config(text, path)
    pki.ensure_local_pki(config)
    return config


async def leader_of(port: int) -> str:
    async with aiohttp.ClientSession() as session:
        try:
            async with session.get(f"http://127.0.0.1:{port}/v1/status/leader") as response:
                return str(await response.json())
        except aiohttp.ClientError:
            return ""


async def test_a_server_and_a_client_are_put_together_and_taken_down(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    stops: list[str] = []
    nodes = [NodeProcess(config, node, on_stop=stops.append) for node in config.nodes.values()]
    for node in nodes:
        await node.start()
    try:
        async with asyncio.timeout(PATIENCE_S):
            for node in nodes:
                while await leader_of(node.node.http_port) != config.node("server-1").rpc_endpoint:  # noqa: ASYNC110
                    await asyncio.sleep(0.05)
    finally:
        for node in reversed(nodes):
            await node.stop()
    assert stops == []
    assert await leader_of(config.node("server-1").http_port) == ""


async def test_a_start_that_fails_leaves_nothing_open(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    server = config.node("server-1")
    taken = await asyncio.start_server(lambda reader, writer: None, "127.0.0.1", server.http_port)
    with pytest.raises(OSError, match="in use"):
        await NodeProcess(config, server, on_stop=lambda why: None).start()
    taken.close()
    again = NodeProcess(config, server, on_stop=lambda why: None)
    await again.start()
    await again.stop()


async def test_a_server_whose_raft_does_not_start_leaves_its_port(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(tmp_path)
    server = config.node("server-1")
    with monkeypatch.context() as patched:
        patched.setattr(Replica, "start", AsyncMock(side_effect=RaftError("what is on disk is damaged")))
        with pytest.raises(RaftError, match="damaged"):
            await NodeProcess(config, server, on_stop=lambda why: None).start()
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection("127.0.0.1", server.rpc_port)
    again = NodeProcess(config, server, on_stop=lambda why: None)
    await again.start()
    await again.stop()


async def spawn(config: ClusterConfig, node: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        sys.executable, "-m", "cli", "agent", "-config", str(config.path), "-node", node,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE, cwd=ROOT,
    )  # fmt: skip


async def test_a_process_says_ready_ends_on_sigterm_and_shares_its_data_with_no_one(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    process = await spawn(config, "server-1")
    assert process.stderr is not None
    lines: list[str] = []

    async def until(text: str) -> None:
        assert process.stderr is not None
        async with asyncio.timeout(60):
            while text not in (lines[-1] if lines else ""):
                line = (await process.stderr.readline()).decode()
                assert line, f"the process ended: {lines}"
                lines.append(line)

    try:
        await until("ready: node=server-1")
        assert int((config.node("server-1").data_dir / "agent.pid").read_text()) == process.pid
        second = await spawn(config, "server-1")
        _, complaint = await second.communicate()
        assert second.returncode == 1
        assert f"pid {process.pid}" in complaint.decode()
        process.send_signal(signal.SIGTERM)
        await until("stopped: node=server-1")
        assert await process.wait() == 0
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert all(line.startswith("time=") and " level=" in line for line in lines)
    assert "PRIVATE" not in "".join(lines)


async def test_an_unknown_node_and_a_missing_certificate_are_clear_errors(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    pki.TlsFiles(config.tls_dir).key("client-1").unlink()
    for node, text in (
        ("nobody", "it has server-1, client-1"),
        ("client-1", "lictor tls cert create -node client-1"),
    ):
        process = await spawn(config, node)
        _, complaint = await process.communicate()
        assert process.returncode == 1
        assert text in complaint.decode()
        assert "Traceback" not in complaint.decode()
