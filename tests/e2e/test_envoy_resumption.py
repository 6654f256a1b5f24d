"""The real Envoy, without xDS, as any foreign peer: TLS sessions are resumed both ways."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from benchmarks import data_plane_envoy as envoy
from tests.e2e.support_e2e import a_free_port
from tests.e2e.support_envoy import need_envoy
from tests.support.sidecars import Member, Mesh, hang_up, until


@contextmanager
def running(directory: Path, config: dict[str, Any], plain: tuple[str, ...]) -> Iterator[None]:
    """Run an Envoy without these settings of its TLS context, which the benchmark sets: as it is by default."""

    def strip(part: Any) -> Any:
        if isinstance(part, dict):
            return {name: strip(value) for name, value in part.items() if name not in plain}
        return [strip(each) for each in part] if isinstance(part, list) else part

    process = envoy.start(directory, "envoy", json.loads(json.dumps(strip(config))))
    try:
        yield
    finally:
        process.terminate()
        process.wait(10)


def handshakes(member: Member, direction: str) -> dict[str, int]:
    return {
        labels["resumed"]: count
        for (name, pairs), count in member.sidecar.metrics.counters.items()
        if name == "lictor_handshakes_total" and (labels := dict(pairs))["direction"] == direction
    }


async def test_we_resume_sessions_that_envoy_gave_us(tmp_path: Path) -> None:
    need_envoy()
    async with Mesh() as mesh:
        app = await mesh.app()
        client = await mesh.member("web", "web-1", upstreams=("backend",))
        port = a_free_port()
        config = envoy.inbound(mesh.ca, port, app.port, http=False)
        tickets = ("disable_stateless_session_resumption", "disable_stateful_session_resumption")
        with running(tmp_path, config, tickets):
            server = await mesh.member("backend", "backend-1", port=app.port)  # for its endpoint alone
            await until(lambda: _listens(port))
            await client.route("backend", msgspec.structs.replace(server.endpoint, port=port))
            for _ in range(12):
                assert await client.ask() == b"hi\n"
                await until(lambda: not client.sidecar._pool._foreign)
        assert handshakes(client, "outbound") == {"no": 2, "yes": 10}


async def test_envoy_resumes_sessions_that_we_gave_it(tmp_path: Path) -> None:
    need_envoy()
    async with Mesh() as mesh:
        _, server, _ = await mesh.pair()
        port = a_free_port()
        config = envoy.outbound(mesh.ca, port, server.ports.public_port, http=False)
        with running(tmp_path, config, ("max_session_keys",)):
            await until(lambda: _listens(port))
            for _ in range(12):
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.write(b"hi\n")
                assert await asyncio.wait_for(reader.readline(), 10) == b"hi\n"
                await hang_up(writer)
                await until(lambda: not server.sidecar._desk.calls)
        counts = handshakes(server, "inbound")
        assert counts["yes"] >= 10
        assert counts["no"] <= 3  # the check whether it listens was a call, too


def _listens(port: int) -> bool:
    with socket.socket() as sock:
        return sock.connect_ex(("127.0.0.1", port)) == 0
