"""HTTP through two sidecars: requests decided by the destination's intentions, live ones cut when these change."""

from __future__ import annotations

import asyncio
import hashlib
import ssl

import msgspec

from proxy.tls import make_material
from raftstate.model.intention import HTTPMatch, Intention, Permission
from tests.support.http_filter import App, Seen
from tests.support.loops import with_mesh
from tests.support.promises import promptly
from tests.support.sidecars import Member, Mesh, hang_up, until


def http_only(*permissions: Permission) -> Intention:
    return Intention(source_name="web", destination_name="backend", permissions=permissions)


READ_API = http_only(Permission("allow", HTTPMatch(path_prefix="/api", methods=("GET",))))


async def pair(mesh: Mesh, app: App) -> tuple[Member, Member]:
    client, server, _ = await mesh.pair(app.handle)
    await server.push(intentions=(READ_API,))
    return client, server


async def ask(client: Member, *requests: str) -> list[str]:
    """Send requests (``METHOD target``) on one connection; return the status codes."""
    reader, writer = await client.dial()
    codes = []
    async with asyncio.timeout(10):
        for request in requests:
            writer.write(f"{request} HTTP/1.1\r\nHost: backend\r\nX-Forwarded-Client-Cert: forged\r\n\r\n".encode())
            head = await reader.readuntil(b"\r\n\r\n")
            codes.append(head.split()[1].decode())
            size = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
            await reader.readexactly(size)
    await hang_up(writer)
    return codes


@with_mesh
async def test_requests_are_decided_one_by_one(mesh: Mesh) -> None:
    app = App()
    client, server = await pair(mesh, app)
    assert await ask(client, "GET /api/x", "GET /admin", "POST /api/x", "GET /api/../admin", "GET /api") == [
        "200", "403", "403", "403", "200",
    ]  # fmt: skip
    assert [seen.target for seen in app.seen] == ["/api/x", "/api"]
    domain = mesh.ca.trust_domain
    leaf = client.sidecar.config.leaf
    assert leaf is not None
    digest = hashlib.sha256(ssl.PEM_cert_to_DER_cert(leaf.cert_pem)).hexdigest()
    uri = f"spiffe://{domain}/ns/default/dc/dc1/svc"
    assert app.seen[0].header("x-forwarded-client-cert") == [f"By={uri}/backend;Hash={digest};URI={uri}/web"]
    metrics = server.sidecar.metrics.render()
    labels = 'direction="inbound",source="web",destination="backend",method="GET",code="200",origin="app"'
    assert f"lictor_http_requests_total{{{labels}}} 2" in metrics
    assert 'code="403",origin="denied"' in metrics
    assert (
        'lictor_http_request_seconds_bucket{direction="inbound",source="web",destination="backend",le="+Inf"} 5'
        in metrics
    )
    await until(lambda: server.sidecar.live_calls() == 0)


@with_mesh
async def test_a_protocol_of_http_needs_no_permissions(mesh: Mesh) -> None:
    app = App()
    client, server = await pair(mesh, app)
    await server.allow("web")
    assert await ask(client, "DELETE /anything") == ["200"]
    assert app.seen[0].header("x-forwarded-client-cert") == ["forged"], (
        "an L4 call of a tcp service is not looked into"
    )
    me = server.sidecar.config.self
    assert me is not None
    await server.push(self=msgspec.structs.replace(me, protocol="http"))
    assert await ask(client, "DELETE /anything") == ["200"]
    assert app.seen[1].header("x-forwarded-client-cert") != ["forged"]


@with_mesh
async def test_what_is_under_way_is_cut_when_the_permission_goes(mesh: Mesh) -> None:
    gone = asyncio.Event()

    async def hang(app: App, seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await reader.read(1)
        finally:
            gone.set()

    app = App(answer=hang)
    client, server = await pair(mesh, app)
    reader, writer = await client.dial()
    writer.write(b"GET /api/slow HTTP/1.1\r\nHost: a\r\n\r\n")
    await until(lambda: bool(app.seen))
    await server.push(intentions=())
    async with promptly():
        try:
            assert await reader.read() == b""
        except ConnectionError:
            pass
        await gone.wait()
    await hang_up(writer)
    await until(lambda: server.sidecar.live_calls() == 0)


@with_mesh
async def test_bytes_that_are_not_http_get_a_400_where_permissions_hold(mesh: Mesh) -> None:
    app = App()
    client, _ = await pair(mesh, app)
    reader, writer = await client.dial()
    writer.write(b"\x16\x03\x01 not http at all\r\n\r\n")
    async with asyncio.timeout(10):
        assert (await reader.read()).startswith(b"HTTP/1.1 400 ")
    await hang_up(writer)
    assert app.seen == []


@with_mesh
async def test_draining_ends_idle_http_connections(mesh: Mesh) -> None:
    app = App()
    client, server = await pair(mesh, app)
    reader, writer = await client.dial()
    writer.write(b"GET /api HTTP/1.1\r\nHost: a\r\n\r\n")
    assert b"content-length: 2" in await reader.readuntil(b"\r\n\r\n")
    await reader.readexactly(2)
    async with asyncio.timeout(30):
        await server.sidecar.drain(60)
    assert await reader.read() == b""
    await hang_up(writer)


@with_mesh
async def test_a_foreign_peer_is_decided_request_by_request_too(mesh: Mesh) -> None:
    """One TLS connection without mux, as Envoy makes them."""
    app = App()
    _, server = await pair(mesh, app)
    material = make_material(mesh.ca.leaf("web", "web-9"), (mesh.ca.root_pem,))
    reader, writer = await asyncio.open_connection(
        "127.0.0.1", server.ports.public_port, ssl=material.client_plain, server_hostname=""
    )
    async with asyncio.timeout(10):
        for request, status in ((b"GET /api", b"200"), (b"GET /other", b"403"), (b"GET /api/2", b"200")):
            writer.write(request + b" HTTP/1.1\r\nHost: backend\r\n\r\n")
            head = await reader.readuntil(b"\r\n\r\n")
            assert head.split()[1] == status
            await reader.readexactly(int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0]))
        writer.write(b"GET /api/3 HTTP/1.1\r\nHost: backend\r\nConnection: close\r\n\r\n")
        assert (await reader.read()).endswith(b"\r\n\r\nok")
    await hang_up(writer)
    assert [seen.target for seen in app.seen] == ["/api", "/api/2", "/api/3"]
    await until(lambda: server.sidecar.live_calls() == 0)
