"""The page that Prometheus reads, judged by Prometheus' own tool, and what no page of the admin endpoint may show."""

from __future__ import annotations

import asyncio
import base64
import re
import subprocess
from pathlib import Path

import aiohttp
import msgspec
import pytest
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from proxy.metric_names import HELP
from raftstate.model.connect import Revocation
from tests.e2e.support_e2e import need
from tests.e2e.test_http_outbound import ask
from tests.e2e.test_proxy_seen import value
from tests.support.http_filter import App, simple
from tests.support.loops import with_mesh
from tests.support.sidecars import Member, Mesh, naming, until

PROXY = Path(__file__).parents[2] / "proxy"
PATHS = ("/ready", "/stats", "/metrics", "/config_dump", "/clusters", "/nothing")
PAIR = {"source": "web", "destination": "backend"}


def test_every_metric_is_explained_and_nothing_else_is() -> None:
    text = "".join(path.read_text() for path in PROXY.rglob("*.py") if path.name != "metric_names.py")
    names = {re.sub(r"_(bucket|sum|count)$", "", name) for name in re.findall(r'"(lictor_[a-z_]+)"', text)}
    assert names <= set(HELP), "each has a line in proxy/metric_names.py"


async def page(member: Member, path: str = "/metrics") -> str:
    async with aiohttp.ClientSession() as http:
        async with http.get(f"http://127.0.0.1:{member.ports.admin_port}{path}") as answer:
            return await answer.text()


async def judge(text: str) -> None:
    """Fail where ``promtool`` finds anything wrong with a page, or only unusual."""
    run = subprocess.run
    done = await asyncio.to_thread(
        run, ["promtool", "check", "metrics"], input=text.encode(), capture_output=True, check=False, timeout=30
    )
    assert (done.returncode, (done.stdout + done.stderr).decode()) == (0, "")


async def pair_of_http(mesh: Mesh) -> tuple[Member, Member]:
    app = await mesh.app(App(answer=simple(b"hello")).handle)
    server = await mesh.member("backend", "backend-1", port=app.port)
    client = await mesh.member("web", "web-1", upstreams=("backend",))
    await server.allow("web")
    me = server.sidecar.config.self
    assert me is not None
    await server.push(self=msgspec.structs.replace(me, protocol="http"))
    await client.route("backend", server.endpoint, protocol="http")
    return client, server


@with_mesh
async def test_the_whole_page_of_both_sidecars_reads_as_prometheus_wants_it(mesh: Mesh) -> None:
    need("promtool")
    client, server = await pair_of_http(mesh)
    assert (await ask(client, b"GET /a HTTP/1.1\r\nHost: b\r\n\r\n"))[0][0] == 200
    dead = msgspec.structs.replace(server.endpoint, port=1, service_id="backend-0")
    await client.route("backend", server.endpoint, dead, protocol="http")
    for _ in range(20):
        assert (await ask(client, b"GET /a HTTP/1.1\r\nHost: b\r\n\r\n"))[0][0] == 200
    await server.revoke(Revocation("service", "web"))  # ends the session; the next handshake is refused
    await until(lambda: not client.sidecar._pool.describe())
    await ask(client, b"GET /a HTTP/1.1\r\nHost: b\r\n\r\n")
    await until(lambda: value(server, "lictor_handshake_failures_total", **PAIR, cause="revoked") >= 1)
    for member, direction in ((client, "outbound"), (server, "inbound")):
        text = await page(member)
        await judge(text)
        assert text.count("# HELP ") == text.count("# TYPE ")
        assert 'source=""' not in text
        listed = [line.split()[1].partition("?")[0] for line in (await page(member, "/")).splitlines()]
        assert {*listed, "/nothing"} == {*PATHS, "/drain"}
        about = {"direction": direction, **PAIR}
        assert value(member, "lictor_connections_total", **about) >= 1
        assert value(member, "lictor_http_requests_total", **about, method="GET", code="200", origin="app") == 21
        assert value(member, "lictor_http_request_seconds_count", **about) >= 21
        assert value(member, "lictor_http_request_seconds_bucket", **about, le="+Inf") >= 21
        assert value(member, "lictor_certificate_issued_seconds") > 0
    assert value(client, "lictor_app_received_bytes_total", direction="outbound", **PAIR) > 0
    assert value(client, "lictor_retries_total", **PAIR) >= 1
    assert value(client, "lictor_ejections_total", **PAIR) >= 1


@with_mesh
async def test_the_page_of_several_workers_reads_as_prometheus_wants_it(mesh: Mesh) -> None:
    need("promtool")
    app = await mesh.app(naming("b1"))
    server = await mesh.member("backend", "backend-1", port=app.port, workers=2)
    client = await mesh.member("web", "web-1", upstreams=("backend",))
    await server.allow("web")
    await client.route("backend", server.endpoint)
    assert await client.ask() == b"b1\n"
    text = await page(server)
    await judge(text)
    assert text.count("# HELP ") == text.count("# TYPE ")
    assert re.search(r"(?m)^lictor_workers 2$", text)


@with_mesh
async def test_no_answer_of_the_admin_endpoint_has_anything_of_a_private_key(mesh: Mesh) -> None:
    client, server = await pair_of_http(mesh)
    assert (await ask(client, b"GET /a HTTP/1.1\r\nHost: b\r\nAuthorization: Bearer tok-5ecret\r\n\r\n"))[0][0] == 200
    for member in (client, server):
        leaf = member.sidecar.config.leaf
        assert leaf is not None
        secrets = parts_of_key(leaf.private_key_pem)
        everything = "".join([await page(member, path) for path in PATHS])
        assert leaf.cert_pem.splitlines()[1] in everything, "what may be shown is found by the same search"
        for secret in [*secrets, "tok-5ecret", "PRIVATE KEY"]:
            assert secret.lower() not in everything.lower()


def parts_of_key(pem: str) -> list[str]:
    """Ways in which a key, or part of it, might be written down."""
    number = load_pem_private_key(pem.encode(), None).private_numbers().private_value  # type: ignore[union-attr]
    raw = number.to_bytes(32, "big")
    first, second = [line for line in pem.splitlines() if "-----" not in line][:2]
    # PKCS #8 of a P-256 key: 36 bytes that all such keys share, 32 bytes of secret, then the public key.
    pieces = [first[48:64], second[:26]]
    assert base64.b64decode(first)[36:48] == raw[:12]
    return [raw.hex(), base64.b64encode(raw).decode()[:40], str(number), *pieces]


@with_mesh
async def test_what_is_no_request_for_the_admin_endpoint_fills_no_log(
    mesh: Mesh, caplog: pytest.LogCaptureFixture
) -> None:
    """Whoever is on the host may send it anything, as often as they like."""
    client, _, _ = await mesh.pair()
    for junk in (
        b"GET / HTTP/1D.1\r\n\r\n",
        b"GET /ready HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
        b"\x16\x03\x01\r\n\r\n",
    ):
        reader, writer = await asyncio.open_connection("127.0.0.1", client.ports.admin_port)
        writer.write(junk)
        assert (await reader.readline()).split()[1] == b"400"
        writer.close()
    assert await page(client, "/ready") == "ready\n"
    assert [record.getMessage() for record in caplog.records if "handling request" in record.getMessage()] == []
