"""What a TLS session that is resumed may not outlive. Each withdrawal is tried twice: before the ticket is shown, and
while a handshake that resumes is under way, so that nothing but the checks after it can stop the call."""

from __future__ import annotations

import asyncio
import datetime
import shutil
import ssl
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec
import pytest

from proxy.resumption import BARREN
from raftstate.model.connect import Leaf, Revocation
from tests.support.certs import TestCA
from tests.support.loops import with_mesh
from tests.support.resuming import Called, Server, call
from tests.support.sidecars import Member, Mesh, until
from tests.support.tls_peers import context

Withdraw = Callable[[Member, Leaf, TestCA], Awaitable[None]]


async def _serial(member: Member, peer: Leaf, ca: TestCA) -> None:
    await member.revoke(Revocation("serial", peer.serial_number))


async def _instance(member: Member, peer: Leaf, ca: TestCA) -> None:
    await member.revoke(Revocation("instance", f"{peer.service}-1", service=peer.service))


async def _service(member: Member, peer: Leaf, ca: TestCA) -> None:
    await member.revoke(Revocation("service", peer.service))


async def _root(member: Member, peer: Leaf, ca: TestCA) -> None:
    """The CA was rotated: our own leaf is the new one's, and the old root has left the bundle."""
    new = TestCA("new root", ca.trust_domain)
    await member.push(leaf=new.leaf(member.service, member.instance), roots=(new.root_pem,))


async def _intention(member: Member, peer: Leaf, ca: TestCA) -> None:
    await member.push(intentions=())


async def _expiry(member: Member, peer: Leaf, ca: TestCA) -> None:
    end = datetime.datetime.fromisoformat(peer.valid_before).timestamp()
    await until(lambda: time.time() > end + 0.01)


WITHDRAWALS: dict[str, Withdraw] = {
    "serial revoked": _serial,
    "instance revoked": _instance,
    "service revoked": _service,
    "root gone": _root,
    "certificate expired": _expiry,
}


def peer_leaf(mesh: Mesh, service: str, kind: str) -> Leaf:
    # Long enough for three calls, and short enough to end within one handshake.
    short = datetime.datetime.now(datetime.UTC).replace(microsecond=0) + datetime.timedelta(seconds=4)
    return mesh.ca.leaf(service, f"{service}-1", not_after=short if kind == "certificate expired" else None)


def handshakes(member: Member, direction: str) -> dict[str, int]:
    return {
        labels["resumed"]: count
        for (name, pairs), count in member.sidecar.metrics.counters.items()
        if name == "lictor_handshakes_total" and (labels := dict(pairs))["direction"] == direction
    }


# A foreign peer calls us


async def stage(mesh: Mesh, kind: str = "") -> tuple[Member, Leaf, ssl.SSLContext, Called]:
    """A sidecar, and a foreign caller that has been let in twice, the second time with its first call's ticket."""
    _, server, _ = await mesh.pair()
    leaf = peer_leaf(mesh, "web", kind)
    caller = context(leaf, mesh.ca.root_pem)
    first = await call(server.ports.public_port, caller)
    assert (first.answer, first.resumed) == (b"hi\n", False)
    second = await call(server.ports.public_port, caller, first.session)
    assert (second.answer, second.resumed) == (b"hi\n", True)
    assert handshakes(server, "inbound") == {"no": 1, "yes": 1}
    return server, leaf, caller, second


@pytest.mark.parametrize("kind", [*WITHDRAWALS, "intention denied"])
@with_mesh
async def test_a_kept_ticket_lets_nobody_in_after(mesh: Mesh, kind: str) -> None:
    server, leaf, caller, kept = await stage(mesh, kind)
    app = mesh.apps[0]
    before = app.connections
    await {**WITHDRAWALS, "intention denied": _intention}[kind](server, leaf, mesh.ca)
    again = await call(server.ports.public_port, caller, kept.session)
    assert again.answer == b""
    if "revoked" in kind or kind == "root gone":
        assert not again.resumed  # nobody remembers the session any more
    else:
        assert again.resumed  # it is remembered, and its bearer not let in
    assert app.connections == before


@pytest.mark.parametrize("kind", [*WITHDRAWALS, "intention denied"])
@with_mesh
async def test_a_handshake_that_resumes_is_checked_as_things_are_at_its_end(mesh: Mesh, kind: str) -> None:
    server, leaf, caller, kept = await stage(mesh, kind)
    app = mesh.apps[0]
    before = app.connections
    withdraw = {**WITHDRAWALS, "intention denied": _intention}[kind]
    again = await call(server.ports.public_port, caller, kept.session, lambda: withdraw(server, leaf, mesh.ca))
    assert (again.answer, again.resumed) == (b"", True)
    assert app.connections == before


@with_mesh
async def test_another_sidecars_ticket_is_no_ticket(mesh: Mesh) -> None:
    server, _, caller, kept = await stage(mesh)
    other = await mesh.member("backend", "backend-2", port=mesh.apps[0].port)
    await other.allow("web")
    again = await call(other.ports.public_port, caller, kept.session)
    assert (again.answer, again.resumed) == (b"hi\n", False)
    assert handshakes(other, "inbound") == {"no": 1}
    assert (await call(server.ports.public_port, caller, kept.session)).resumed


@with_mesh
async def test_a_renewed_leaf_of_ours_ends_all_tickets(mesh: Mesh) -> None:
    server, _, caller, kept = await stage(mesh)
    await server.push(leaf=mesh.ca.leaf("backend", "backend-1"))
    again = await call(server.ports.public_port, caller, kept.session)
    assert (again.answer, again.resumed) == (b"hi\n", False)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs the program openssl")
@with_mesh
async def test_one_ticket_is_given_that_allows_no_early_data(mesh: Mesh, tmp_path: Path) -> None:
    """As another program sees it. Early data (0-RTT) could be sent again by whoever saw it pass."""
    _, server, _ = await mesh.pair()
    leaf = mesh.ca.leaf("web", "web-1")
    (tmp_path / "leaf.pem").write_text(leaf.cert_pem + leaf.private_key_pem)
    (tmp_path / "ca.pem").write_text(mesh.ca.root_pem)

    async def ask(*more: str) -> str:
        files = ("-cert", "leaf.pem", "-key", "leaf.pem", "-CAfile", "ca.pem")
        command = ("openssl", "s_client", "-connect", f"127.0.0.1:{server.ports.public_port}", *files, *more)
        process = await asyncio.create_subprocess_exec(
            *command, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, cwd=tmp_path
        )
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(b"hello\n")
        said = b""
        async with asyncio.timeout(10):
            while not said.endswith(b"hello\n"):
                data = await process.stdout.read(65536)
                assert data, said
                said += data
            process.stdin.write(b"Q\n")
            more_said, _ = await process.communicate()
        return (said + more_said).decode()

    first = await ask("-sess_out", "session")
    assert first.count("New Session Ticket arrived") == 1
    assert "Max Early Data: 0" in first
    again = await ask("-sess_in", "session")
    assert "Reused, TLSv1.3" in again
    assert "Early data was not sent" in again


# We call a foreign peer


async def towards(mesh: Mesh, kind: str = "") -> tuple[Member, Server, Leaf]:
    """A sidecar that has called a foreign one, and has a session to resume."""
    client, server, _ = await mesh.pair()
    leaf = peer_leaf(mesh, "backend", kind)
    foreign = await Server(context(leaf, mesh.ca.root_pem, server=True)).start()
    mesh.apps.append(foreign)  # type: ignore[arg-type]  # stopped with the others, however the test ends
    await client.route("backend", msgspec.structs.replace(server.endpoint, port=foreign.port))
    for _ in range(3):
        assert await client.ask() == b"hi\n"
        await until(lambda: not client.sidecar._pool._foreign)
    # The first dial offered mux, the second is the first of its kind.
    assert foreign.resumed == [False, False, True]
    assert handshakes(client, "outbound") == {"no": 2, "yes": 1}
    foreign.heard.clear()
    return client, foreign, leaf


@with_mesh
async def test_calls_to_a_foreign_peer_resume_its_sessions(mesh: Mesh) -> None:
    client, foreign, _ = await towards(mesh)
    for _ in range(5):
        assert await client.ask() == b"hi\n"
        await until(lambda: not client.sidecar._pool._foreign)
    assert foreign.resumed[3:] == [True] * 5


@with_mesh
async def test_a_live_connection_gives_its_session_too(mesh: Mesh) -> None:
    client, foreign, _ = await towards(mesh)
    held = []
    for _ in range(6):
        _, writer = await client.talk()
        held.append(writer)
    assert foreign.resumed[3:] == [True] * 6
    for writer in held:
        writer.close()


@pytest.mark.parametrize("kind", WITHDRAWALS)
@with_mesh
async def test_no_session_is_resumed_after(mesh: Mesh, kind: str) -> None:
    client, foreign, leaf = await towards(mesh, kind)
    assert len(client.sidecar._pool._resumable) == 1
    await WITHDRAWALS[kind](client, leaf, mesh.ca)
    assert await client.ask() == b""
    assert foreign.heard == b""
    assert not any(foreign.resumed[3:])


@pytest.mark.parametrize("kind", WITHDRAWALS)
@with_mesh
async def test_what_is_resumed_is_checked_as_things_are_at_its_end(mesh: Mesh, kind: str) -> None:
    client, foreign, leaf = await towards(mesh, kind)
    foreign.meanwhile = lambda: WITHDRAWALS[kind](client, leaf, mesh.ca)
    assert await client.ask() == b""
    assert foreign.heard == b""
    assert foreign.resumed[3:4] == [True]


@with_mesh
async def test_an_instance_that_left_the_catalog_and_came_back_is_a_new_one(mesh: Mesh) -> None:
    client, foreign, _ = await towards(mesh)
    upstream = client.sidecar.config.upstreams[0]
    await client.route("backend")
    assert await client.ask() == b""
    await client.route("backend", *upstream.endpoints)
    for _ in range(2):
        assert await client.ask() == b"hi\n"
        await until(lambda: not client.sidecar._pool._foreign)
    assert foreign.resumed[3:] == [False, False]


@with_mesh
async def test_an_instance_in_anothers_place_is_not_shown_its_session(mesh: Mesh) -> None:
    """It answers at the same address, with its own certificate."""
    client, foreign, _ = await towards(mesh)
    upstream = client.sidecar.config.upstreams[0]
    foreign.context = context(mesh.ca.leaf("backend", "backend-2"), mesh.ca.root_pem, server=True)
    await client.route("backend", msgspec.structs.replace(upstream.endpoints[0], service_id="backend-2"))
    assert await client.ask() == b"hi\n"
    assert foreign.resumed[3:] == [False]


@with_mesh
async def test_a_peer_that_forgot_the_session_is_called_with_a_full_handshake(mesh: Mesh) -> None:
    client, foreign, leaf = await towards(mesh)
    foreign.context = context(leaf, mesh.ca.root_pem, server=True)  # as after a restart
    assert await client.ask() == b"hi\n"
    assert foreign.resumed[3:] == [False]


@with_mesh
async def test_a_peer_that_fails_over_an_offered_session_is_called_without_one(mesh: Mesh) -> None:
    """Whatever does not take it: the call goes on, the instance is not blamed, and soon none is offered."""
    client, foreign, _ = await towards(mesh)
    failed = 0

    async def fail() -> None:
        nonlocal failed
        failed += 1
        raise ConnectionResetError("not with a session")

    for _ in range(BARREN):
        foreign.meanwhile = fail
        assert await client.ask() == b"hi\n"
        await until(lambda: not client.sidecar._pool._foreign)
    assert failed == BARREN
    assert not any(foreign.resumed[3:])
    (instance,) = client.sidecar._upstreams["backend"].balancer.instances.values()
    assert (instance.ejections, instance.failures) == (0, 0)
    assert await client.ask() == b"hi\n"
    await until(lambda: not client.sidecar._pool._foreign)
    assert len(client.sidecar._pool._resumable) == 0
