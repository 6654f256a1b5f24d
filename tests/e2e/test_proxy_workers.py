"""A sidecar made of worker processes: they share ports, one configuration, and are replaced when they die."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from proxy.errors import PortUnavailable, ProxyError
from proxy.listeners import bind, bind_shared
from proxy.metrics import Metrics, merged
from proxy.sidecar import SidecarOptions
from proxy.workers import WorkerGroup
from tests.support.loops import with_mesh
from tests.support.sidecars import Member, Mesh, echo, hang_up, naming, until


async def is_let_in(port: int) -> bool:
    """Whether a connection to the port is taken, by the kernel at least."""
    try:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
    except OSError:
        return False
    await hang_up(writer)
    return True


async def group_pair(mesh: Mesh, *, client_workers: int = 0, server_workers: int = 0) -> tuple[Member, Member]:
    """A client and a server, each in this process or of so many workers."""
    app = await mesh.app(echo)
    server = await mesh.member("backend", "backend-1", port=app.port, workers=server_workers)
    client = await mesh.member("web", "web-1", upstreams=("backend",), workers=client_workers)
    await server.allow("web")
    await client.route("backend", server.endpoint)
    return client, server


async def stats(member: Member, path: str = "stats") -> str:
    async with aiohttp.ClientSession() as http:
        async with http.get(f"http://127.0.0.1:{member.ports.admin_port}/{path}") as answer:
            assert answer.status == 200
            return await answer.text()


@with_mesh
async def test_workers_share_an_upstreams_port_and_are_counted_as_one(mesh: Mesh) -> None:
    client, server = await group_pair(mesh, client_workers=2)
    held = [await client.dial() for _ in range(40)]
    for reader, writer in held:
        writer.write(b"hi\n")
        assert await asyncio.wait_for(reader.readline(), 10) == b"hi\n"
    group = client.group
    assert group is not None
    await group.snapshot()
    assert group.live_calls() == 40
    assert all(worker.report.live_calls for worker in group._workers.values())
    text = await stats(client, "metrics")
    assert 'lictor_connections_total{direction="outbound",source="web",destination="backend"} 40' in text
    assert "lictor_workers 2" in text
    assert "lictor_ready 1" in text
    leaf = group.config.leaf
    assert leaf is not None
    secret = leaf.private_key_pem.splitlines()[1]
    seen = [Path(f"/proc/{pid}/{name}").read_text() for pid in group.pids for name in ("cmdline", "environ")]  # noqa: ASYNC240
    assert [text for text in (*seen, await stats(client, "config_dump")) if secret in text] == []
    await server.push(intentions=())
    for reader, writer in held:
        with pytest.raises(ConnectionError):
            await asyncio.wait_for(reader.read(), 10)
        await hang_up(writer)


@with_mesh
async def test_workers_that_die_are_replaced_by_ones_that_know_all_and_drain_ends_them(mesh: Mesh) -> None:
    client, server = await group_pair(mesh, server_workers=2)
    group = server.group
    assert group is not None
    assert [await client.ask() for _ in range(20)] == [b"hi\n"] * 20
    await group.snapshot()
    before = group.pids
    for pid in before:
        os.kill(pid, signal.SIGKILL)
    # The listening sockets outlive them: who comes now waits, and is served by those started in their place.
    waiting = asyncio.get_running_loop().create_task(client.ask())
    await until(lambda: group.ready and not set(before) & set(group.pids), 60)
    assert group.restarts == 2
    await waiting
    assert [await client.ask() for _ in range(20)] == [b"hi\n"] * 20
    figures = await group.snapshot()
    assert next(pair[3] for pair in figures.pairs if pair[0] == "inbound") >= 40
    await server.push(intentions=())
    assert await client.ask() == b""
    await server.allow("web")

    await server.push(registered=False)
    for pid in (known := group.pids):
        os.kill(pid, signal.SIGKILL)  # the next ones must know of it too
    await until(
        lambda: len(set(group.pids) - set(known)) == 2 == sum(w.applied >= 0 for w in group._workers.values()), 60
    )
    assert (await client.ask(), group.ready) == (b"", False)
    await server.push(registered=True)
    assert group.ready
    async with asyncio.timeout(20):
        while await client.ask() != b"hi\n":
            pass

    reader, writer = await client.talk()
    pids = group.pids
    draining = asyncio.get_running_loop().create_task(group.drain(30))
    await until(lambda: group.draining)
    writer.write(b"two\n")
    assert await reader.readline() == b"two\n"
    # Each worker closes its sockets when it has heard of it: until then one may still be let in.
    async with asyncio.timeout(20):
        while await is_let_in(server.ports.public_port):
            assert not draining.done(), "a call is live, which drains no further"
    await hang_up(writer)
    await asyncio.wait_for(draining, 20)
    assert pids
    assert [pid for pid in pids if os.path.exists(f"/proc/{pid}")] == []  # noqa: ASYNC240


async def test_a_worker_that_dies_takes_its_own_connections_alone_and_the_next_one_knows_what_changed_meanwhile() -> (
    None
):
    async with Mesh() as mesh:
        client, server = await group_pair(mesh, client_workers=2)
        group = client.group
        assert group is not None
        held = [await client.dial() for _ in range(40)]
        for reader, writer in held:
            writer.write(b"one\n")
            assert await asyncio.wait_for(reader.readline(), 10) == b"one\n"
        await group.snapshot()
        victim = group._workers[0]
        lost = victim.report.live_calls
        assert 0 < lost < 40
        kept_pid = group.pids[1]
        os.kill(victim.process.pid, signal.SIGKILL)
        await until(lambda: victim.gone)
        other = await mesh.app(naming("other"))
        moved = await mesh.member("backend", "backend-2", port=other.port)
        await moved.allow("web")
        dropped = 0
        for reader, writer in held:
            try:
                writer.write(b"two\n")
                dropped += await asyncio.wait_for(reader.readline(), 10) != b"two\n"
            except ConnectionError:
                dropped += 1
        assert dropped == lost
        await client.route("backend", server.endpoint, moved.endpoint)
        await until(lambda: group.ready, 60)
        assert (group.restarts, group.pids[1]) == (1, kept_pid)
        await client.route("backend", moved.endpoint)  # which ends what still goes to the other instance
        assert {await client.ask() for _ in range(20)} == {b"other\n"}
        for _, writer in held:
            writer.close()


@with_mesh
async def test_a_worker_that_is_started_as_a_drain_begins_does_not_hold_it_up(
    mesh: Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, _ = await group_pair(mesh, client_workers=2)
    group = client.group
    assert group is not None
    connect = asyncio.open_connection

    async def as_the_drain_begins(*arguments: Any, **named: Any) -> Any:
        group.start_drain(60.0)
        await until(lambda: group.draining)
        return await connect(*arguments, **named)

    monkeypatch.setattr(asyncio, "open_connection", as_the_drain_begins)
    os.kill(group.pids[0], signal.SIGKILL)
    await until(group._drained.is_set, 30)


@with_mesh
async def test_a_worker_ends_with_its_parent(mesh: Mesh) -> None:
    server = await mesh.member("backend", "backend-1", workers=1)
    group = server.group
    assert group is not None
    (worker,) = group._workers.values()
    group.draining = True  # no replacement
    worker.link.close()
    await until(lambda: worker.process.poll() is not None, 20)
    assert worker.process.returncode == 0


def test_a_shared_port_is_spread_and_closed_to_strangers() -> None:
    ours = bind_shared("127.0.0.1", 0, 0, 2)
    port = ours[0].getsockname()[1]
    with pytest.raises(PortUnavailable):
        bind("127.0.0.1", port)
    clients = [socket.create_connection(("127.0.0.1", port), 5) for _ in range(60)]
    taken = []
    for sock in ours:
        sock.setblocking(False)
        accepted = []
        try:
            while True:
                accepted.append(sock.accept()[0])
        except BlockingIOError:
            taken.append(len(accepted))
        for each in accepted:
            each.close()
    for each in (*clients, *ours):
        each.close()
    assert sum(taken) == 60
    assert all(taken)
    # A port that somebody else shares is not free either.
    with socket.socket() as stranger:
        stranger.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        stranger.bind(("127.0.0.1", 0))
        stranger.listen()
        with pytest.raises(PortUnavailable):
            bind_shared("127.0.0.1", stranger.getsockname()[1], 0, 2)


def test_counters_of_processes_are_added_and_survive_them() -> None:
    first, second = Metrics(), Metrics()
    for metrics, calls in ((first, 2), (second, 3)):
        metrics.count("lictor_refused_total", calls, reason="denied")
        pair = metrics.pair("inbound", "web", "api")
        pair.total, pair.active = calls, 1
        metrics.gauges["lictor_ready"] = lambda calls=calls: [((), calls - 2)]  # type: ignore[misc]
        metrics.gauges["lictor_sessions"] = lambda: [((("direction", "inbound"),), 4)]
    both = merged([first.snapshot(), second.snapshot()])
    assert both.pairs == [("inbound", "web", "api", 5, 2, 0, 0)]
    assert both.counters == [("lictor_refused_total", (("reason", "denied"),), 5)]
    assert {name: value for name, _, value in both.gauges} == {"lictor_ready": 0, "lictor_sessions": 8}
    after = merged([first.snapshot().ended(), second.snapshot()])
    assert after.pairs == [("inbound", "web", "api", 5, 1, 0, 0)]
    assert {name: value for name, _, value in after.gauges} == {"lictor_ready": 1, "lictor_sessions": 4}


def test_a_number_of_workers_that_cannot_be_is_refused() -> None:
    with pytest.raises(ProxyError, match="from 1 to"):
        WorkerGroup(SidecarOptions(), 0)
