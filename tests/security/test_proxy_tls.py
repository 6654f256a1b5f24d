"""Who gets through a sidecar's handshake, and who does not: each bad peer is closed, logged once and counted."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import ssl
from collections import Counter
from collections.abc import Callable

import msgspec
import pytest

from proxy import listeners
from proxy.mux import ALPN, frames
from raftstate.model.connect import Leaf, Revocation
from tests.support.certs import TestCA
from tests.support.loops import with_mesh
from tests.support.promises import PATIENCE_S, promptly
from tests.support.sidecars import Member, Mesh, until
from tests.support.tls_peers import context


async def knock(port: int, tls: ssl.SSLContext | None, data: bytes = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n") -> bytes:
    """Connect, send, and return what comes back until the end; ``b""`` when there is no entry."""
    try:
        async with asyncio.timeout(PATIENCE_S):
            reader, writer = await asyncio.open_connection(
                "127.0.0.1", port, ssl=tls, server_hostname=None if tls is None else ""
            )
            try:
                writer.write(data)
                return await reader.read(100)
            finally:
                writer.close()
                with contextlib.suppress(OSError):
                    await writer.wait_closed()
    except (ssl.SSLError, ConnectionError):
        return b""


def failures(member: Member, direction: str = "inbound") -> dict[str, int]:
    """Failed handshakes by their cause."""
    found: Counter[str] = Counter()
    for (source, destination, cause), count in failures_of_pairs(member, direction).items():
        assert destination == "backend"
        assert source == "web" if direction == "outbound" else source in ("", "web")
        found[cause] += count
    return dict(found)


def failures_of_pairs(member: Member, direction: str = "inbound") -> dict[tuple[str, str, str], int]:
    """Failed handshakes by source, destination and cause."""
    return {
        (has["source"], has["destination"], has["cause"]): count
        for (name, labels), count in member.sidecar.metrics.counters.items()
        if name == "lictor_handshake_failures_total" and (has := dict(labels))["direction"] == direction
    }


def closed_lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if "public listener closed a connection" in r.getMessage()]


@with_mesh
async def test_plain_text_client_is_closed_with_one_line(mesh: Mesh, caplog: pytest.LogCaptureFixture) -> None:
    _, server, app = await mesh.pair()
    assert await knock(server.ports.public_port, None) == b""
    await until(lambda: sum(failures(server).values()) == 1)
    assert failures(server) == {"plain-text": 1}
    assert len(closed_lines(caplog)) == 1
    assert app.connections == 0


@with_mesh
async def test_garbage_is_closed_with_one_line(mesh: Mesh, caplog: pytest.LogCaptureFixture) -> None:
    _, server, _ = await mesh.pair()
    assert await knock(server.ports.public_port, None, b"\x00\xff" * 200) == b""
    await until(lambda: sum(failures(server).values()) == 1)
    assert len(closed_lines(caplog)) == 1


def spiffe(ca: TestCA, service: str) -> str:
    return f"spiffe://{ca.trust_domain}/ns/default/dc/dc1/svc/{service}"


def just_now() -> datetime.datetime:
    """A minute ago, when it is asked and not when the tests began."""
    return datetime.datetime.now(datetime.UTC) - datetime.timedelta(minutes=1)


BAD_CLIENTS: dict[str, tuple[str, Callable[[TestCA], Leaf | None]]] = {
    "another CA": ("untrusted-certificate", lambda ca: TestCA("evil").leaf("web", "web-1")),
    "expired": (
        "expired-certificate",
        lambda ca: ca.leaf("web", "web-1", not_after=just_now()),
    ),
    "no certificate": ("no-certificate", lambda ca: None),
    "another trust domain": ("trust-domain", lambda ca: ca.leaf("web", "web-1", trust_domain="other.consul")),
    "no SPIFFE id": ("no-spiffe-id", lambda ca: ca.leaf("web", "web-1", uris=[])),
    "two SPIFFE ids": (
        "no-spiffe-id",
        lambda ca: ca.leaf("web", "web-1", uris=[spiffe(ca, "a"), spiffe(ca, "b")]),
    ),
    "not a service's SPIFFE id": (
        "no-spiffe-id",
        lambda ca: ca.leaf("web", "web-1", uris=[f"spiffe://{ca.trust_domain}/agent/client/dc/dc1/id/x"]),
    ),
    "a CA's certificate": ("not-a-leaf", lambda ca: ca.leaf("web", "web-1", ca=True)),
}  # fmt: skip


@pytest.mark.parametrize("alpn", [(), (ALPN,)], ids=["foreign", "mux"])
@pytest.mark.parametrize("kind", BAD_CLIENTS)
@with_mesh
async def test_bad_client_is_closed(
    mesh: Mesh, kind: str, alpn: tuple[str, ...], caplog: pytest.LogCaptureFixture
) -> None:
    cause, make = BAD_CLIENTS[kind]
    _, server, app = await mesh.pair()
    leaf: Leaf | None = make(mesh.ca)
    tls = context(leaf, mesh.ca.root_pem, alpn=alpn)
    assert await knock(server.ports.public_port, tls) == b""
    await until(lambda: sum(failures(server).values()) == 1)
    assert failures(server) == {cause: 1}
    assert len(closed_lines(caplog)) == 1
    assert app.connections == 0


@with_mesh
async def test_revoked_client_is_closed_in_the_handshake(mesh: Mesh) -> None:
    _, server, app = await mesh.pair()
    leaf = mesh.ca.leaf("web", "web-1")
    await server.revoke(Revocation("serial", leaf.serial_number))
    tls = context(leaf, mesh.ca.root_pem)
    assert await knock(server.ports.public_port, tls) == b""
    await until(lambda: failures_of_pairs(server) == {("web", "backend", "revoked"): 1})
    assert app.connections == 0


@with_mesh
async def test_who_can_make_certificates_for_any_name_fills_no_memory_with_names(
    mesh: Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listeners, "SOURCES_MAX", 2)
    _, server, _ = await mesh.pair()
    names = ("one", "two", "three", "four", "one")
    await server.revoke(*(Revocation("service", name) for name in set(names)))
    for name in names:
        assert await knock(server.ports.public_port, context(mesh.ca.leaf(name, "x"), mesh.ca.root_pem)) == b""
    await until(lambda: sum(failures_of_pairs(server).values()) == 5)
    assert failures_of_pairs(server) == {
        ("one", "backend", "revoked"): 2,
        ("two", "backend", "revoked"): 1,
        ("other", "backend", "revoked"): 2,
    }


@with_mesh
async def test_whom_no_authority_of_ours_has_named_is_counted_without_a_name(mesh: Mesh) -> None:
    _, server, _ = await mesh.pair()
    stranger = TestCA("evil").leaf("web", "web-1")
    assert await knock(server.ports.public_port, context(stranger, mesh.ca.root_pem)) == b""
    await until(lambda: bool(failures_of_pairs(server)))
    assert failures_of_pairs(server) == {("", "backend", "untrusted-certificate"): 1}


@pytest.mark.parametrize("peer", ["hangs up", "says nothing"])
@with_mesh
async def test_a_peer_that_does_not_shake_hands_is_counted_for_its_service(mesh: Mesh, peer: str) -> None:
    async def no_peer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if peer == "says nothing":
            await reader.read()
        writer.close()

    client, server, _ = await mesh.pair()
    listener = await asyncio.start_server(no_peer, "127.0.0.1", 0)
    endpoint = msgspec.structs.replace(server.endpoint, port=listener.sockets[0].getsockname()[1])
    await client.route("backend", endpoint, config={"connect_timeout_ms": 200})
    assert await client.ask(b"secret\n") == b""
    cause = "closed" if peer == "hangs up" else "timeout"
    assert set(failures_of_pairs(client, "outbound")) == {("web", "backend", cause)}
    listener.close()


@with_mesh
async def test_tls_1_2_is_refused(mesh: Mesh) -> None:
    _, server, _ = await mesh.pair()
    tls = context(mesh.ca.leaf("web", "web-1"), mesh.ca.root_pem)
    tls.maximum_version = ssl.TLSVersion.TLSv1_2
    assert await knock(server.ports.public_port, tls) == b""
    await until(lambda: failures(server) == {"tls-version": 1})


@with_mesh
async def test_good_foreign_client_reaches_the_app_and_is_cut_with_its_intention(mesh: Mesh) -> None:
    _, server, _ = await mesh.pair()
    tls = context(mesh.ca.leaf("web", "web-1"), mesh.ca.root_pem)
    reader, writer = await asyncio.open_connection("127.0.0.1", server.ports.public_port, ssl=tls, server_hostname="")
    writer.write(b"hello\n")
    assert await asyncio.wait_for(reader.readline(), PATIENCE_S) == b"hello\n"
    session = tls.session_stats()
    assert session["hits"] == 0
    await server.push(intentions=())
    with contextlib.suppress(ConnectionError):
        async with promptly():
            assert await reader.read() == b""
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()
    await until(lambda: not server.sidecar._desk.calls)


@with_mesh
async def test_foreign_client_without_intention_is_closed(mesh: Mesh) -> None:
    _, server, app = await mesh.pair()
    tls = context(mesh.ca.leaf("other", "other-1"), mesh.ca.root_pem)
    assert await knock(server.ports.public_port, tls) == b""
    assert app.connections == 0


@pytest.mark.parametrize("wrong", ["service", "instance", "ca", "revoked"])
@with_mesh
async def test_dialing_side_demands_the_instance_it_wanted(mesh: Mesh, wrong: str) -> None:
    """An impostor at the endpoint's address, with a certificate that is good for something else, gets no byte."""
    seen = bytearray()

    async def impostor(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            seen.extend(await reader.read())
        writer.close()

    leaf = {
        "service": mesh.ca.leaf("other", "backend-1"),
        "instance": mesh.ca.leaf("backend", "backend-2"),
        "ca": TestCA("evil").leaf("backend", "backend-1"),
        "revoked": mesh.ca.leaf("backend", "backend-1"),
    }[wrong]
    client, server, _ = await mesh.pair()
    tls = context(leaf, mesh.ca.root_pem, server=True)
    listener = await asyncio.start_server(impostor, "127.0.0.1", 0, ssl=tls)
    port = listener.sockets[0].getsockname()[1]
    if wrong == "revoked":
        await client.revoke(Revocation("instance", "backend-1", service="backend"))
    await client.route("backend", msgspec.structs.replace(server.endpoint, port=port))
    assert await client.ask(b"secret\n") == b""
    cause = {"ca": "untrusted-certificate", "revoked": "revoked"}.get(wrong, "wrong-identity")
    assert set(failures(client, "outbound")) == {cause}
    listener.close()
    assert bytes(seen) == b""


@with_mesh
async def test_root_that_left_the_bundle_ends_its_sessions(mesh: Mesh) -> None:
    client, server, _ = await mesh.pair()
    reader, writer = await client.talk()
    new = TestCA("new root")
    await server.push(roots=(new.root_pem, mesh.ca.root_pem))
    writer.write(b"two\n")
    assert await reader.readline() == b"two\n"
    await server.push(roots=(new.root_pem,))
    with pytest.raises(ConnectionError):
        async with promptly():
            await reader.read()
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()


@with_mesh
async def test_cross_signed_rotation_drops_nothing(mesh: Mesh) -> None:
    """New leaf from the new root, with the new root certified by the old: both old and new bundles accept it."""
    client, server, _ = await mesh.pair()
    new = TestCA("new root")
    crossed = mesh.ca.cross_sign(new)
    reader, writer = await client.talk()
    await client.push(roots=(new.root_pem, mesh.ca.root_pem))
    await client.push(leaf=new.leaf("web", "web-1", intermediates=crossed))
    assert await client.ask() == b"hi\n"  # the server still has the old bundle only
    await server.push(roots=(new.root_pem, mesh.ca.root_pem))
    await server.push(leaf=new.leaf("backend", "backend-1", intermediates=crossed))
    writer.write(b"two\n")
    assert await reader.readline() == b"two\n"
    writer.close()
    await writer.wait_closed()
    for member in (client, server):
        await member.push(roots=(new.root_pem,))
    assert await client.ask() == b"hi\n"


@pytest.mark.parametrize(
    "attack",
    [
        b"\xff" * 64,
        frames.header(frames.PING, 0, 2000) + bytes(2000),
        frames.header(frames.DATA, 1, 10) + bytes(10),
        frames.frame(frames.OPEN, 2, b"backend"),
        frames.frame(frames.OPEN, 1, b"backend") + frames.frame(frames.OPEN, 1, b"backend"),
        frames.frame(frames.OPEN, 1, b"backend") + frames.frame(frames.ACCEPT, 1),
        frames.frame(frames.OPEN, 1, b"backend")
        + frames.header(frames.DATA, 1, frames.MAX_DATA_BYTES)
        + bytes(frames.MAX_DATA_BYTES),
        frames.frame(frames.OPEN, 1, b"backend") + frames.window(1, 1 << 31) * 2,
        frames.frame(frames.OPEN, 1, b"backend") + frames.frame(frames.FIN, 1) * 2,
    ],
    ids=["noise", "long", "unopened", "even", "reopen", "accept", "overrun", "credit", "end-twice"],
)
@with_mesh
async def test_peer_that_breaks_the_protocol_loses_its_session_and_nobody_else_does(
    mesh: Mesh, attack: bytes
) -> None:
    client, server, _ = await mesh.pair()
    reader, writer = await client.talk()
    tls = context(mesh.ca.leaf("web", "web-2"), mesh.ca.root_pem, alpn=(ALPN,))
    bad_reader, bad_writer = await asyncio.open_connection(
        "127.0.0.1", server.ports.public_port, ssl=tls, server_hostname=""
    )
    bad_writer.write(attack)
    with contextlib.suppress(ConnectionError):
        await asyncio.wait_for(bad_reader.read(), PATIENCE_S)
    bad_writer.close()
    with contextlib.suppress(OSError):
        await bad_writer.wait_closed()
    writer.write(b"two\n")
    assert await reader.readline() == b"two\n"
    assert len(server.sidecar._public.sessions) == 1  # type: ignore[union-attr]
    writer.close()
    await writer.wait_closed()


@with_mesh
async def test_unknown_policy_denies(mesh: Mesh) -> None:
    """A sidecar that knows its certificate but no intentions yet takes no call, whatever the default is to be."""
    app = await mesh.app()
    server = await mesh.member("backend", "backend-1", port=app.port)
    server.sidecar.config.intentions = None
    server.sidecar.config._recompile()
    client = await mesh.member("web", "web-1", upstreams=("backend",))
    await client.route("backend", server.endpoint)
    assert await client.ask() == b""
    assert app.connections == 0
