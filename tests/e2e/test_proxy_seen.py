"""What a sidecar shows of the calls between two services, and the sessions that it opens ahead of them."""

from __future__ import annotations

import asyncio
import re
import time

import msgspec
import pytest

from proxy import pool
from proxy.metrics import Snapshot, merged
from tests.support.http_filter import App
from tests.support.loops import with_mesh
from tests.support.sidecars import Member, Mesh, hang_up, naming, until

_SAMPLE = re.compile(r"([a-z_]+)(?:\{(.*)\})? ([0-9.e+-]+)")
_LABEL = re.compile(r'([a-z_]+)="([^"]*)"')


def samples(member: Member) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """What Prometheus reads: by name and labels."""
    found = {}
    for line in member.sidecar.metrics.render().splitlines():
        if not line.startswith("#"):
            match = _SAMPLE.fullmatch(line)
            assert match is not None, line
            found[match[1], frozenset(_LABEL.findall(match[2] or ""))] = float(match[3])
    return found


def value(member: Member, name: str, **labels: str) -> float:
    """The sum of a metric's samples that have these labels; -1 when there is none."""
    found = [each for (key, has), each in samples(member).items() if key == name and has >= set(labels.items())]
    return sum(found) if found else -1.0


@with_mesh
async def test_connections_and_bytes_are_counted_for_each_pair_of_services(mesh: Mesh) -> None:
    client, server, _ = await mesh.pair(naming("b1"))
    assert await client.ask(b"hello\n") == b"b1\n"
    await until(lambda: server.sidecar.live_calls() == 0)
    pair = {"source": "web", "destination": "backend"}
    for member, direction, sent, received in ((client, "outbound", 3, 6), (server, "inbound", 6, 3)):
        about = {"direction": direction, **pair}
        assert value(member, "lictor_connections_total", **about) == 1
        await until(lambda: value(member, "lictor_connections_active", **about) == 0)  # noqa: B023
        await until(lambda: value(member, "lictor_app_sent_bytes_total", **about) == sent)  # noqa: B023
        assert value(member, "lictor_app_received_bytes_total", **about) == received


@with_mesh
async def test_a_retry_an_ejection_and_a_refusal_are_counted_for_the_pair(mesh: Mesh) -> None:
    client, server, app = await mesh.pair(naming("b1"))
    dead = msgspec.structs.replace(server.endpoint, port=1, service_id="backend-0")
    await client.route("backend", server.endpoint, dead)
    for _ in range(40):
        assert await client.ask() == b"b1\n"
    pair = {"source": "web", "destination": "backend", "upstream": "backend"}
    assert value(client, "lictor_retries_total", **pair) >= 1
    assert value(client, "lictor_ejections_total", **pair) >= 1
    await server.push(intentions=())
    assert await client.ask() == b""
    assert value(client, "lictor_refusals_received_total", reason="denied", **pair) >= 1
    assert value(server, "lictor_refused_total", direction="inbound", reason="denied") >= 1
    assert app.connections == 40


@with_mesh
async def test_a_request_without_another_instance_to_try_is_no_retry(mesh: Mesh) -> None:
    client, server, _ = await mesh.pair(App().handle)
    dead = msgspec.structs.replace(server.endpoint, port=1)
    await client.route("backend", dead, protocol="http")
    reader, writer = await client.dial()
    writer.write(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
    async with asyncio.timeout(10):
        assert b" 503 " in await reader.readline()
    await hang_up(writer)
    assert value(client, "lictor_retries_total") == -1


@with_mesh
async def test_latencies_are_a_histogram_to_prometheus(mesh: Mesh) -> None:
    client, server, _ = await mesh.pair(App().handle)
    me = server.sidecar.config.self
    assert me is not None
    await server.push(self=msgspec.structs.replace(me, protocol="http"))
    reader, writer = await client.dial()
    writer.write(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
    async with asyncio.timeout(10):
        await reader.readuntil(b"ok")
    await hang_up(writer)
    text = server.sidecar.metrics.render()
    types = dict(line.split()[2:] for line in text.splitlines() if line.startswith("# TYPE "))
    assert types["lictor_http_request_seconds"] == "histogram"
    assert types["lictor_http_requests_total"] == "counter"
    assert types["lictor_ready"] == "gauge"
    # What belongs to one metric stands together, behind its type.
    (latency,) = [part for part in text.split("# HELP ") if part.startswith("lictor_http_request_seconds ")]
    names = [line.partition("{")[0].removeprefix("lictor_http_request_seconds_") for line in latency.splitlines()[2:]]
    assert names == ["bucket"] * 15 + ["count", "sum"]
    assert text.count("lictor_http_request_seconds_") == 17


@with_mesh
async def test_the_certificates_age_and_what_is_left_of_it(mesh: Mesh) -> None:
    client, server, _ = await mesh.pair()
    assert value(client, "lictor_certificate_issued_seconds") <= time.time()
    assert value(client, "lictor_certificate_expiry_seconds") > time.time()
    await client.push(leaf=mesh.ca.leaf("web", "web-1"))
    assert value(client, "lictor_certificate_issued_seconds") > 0
    assert value(server, "lictor_handshake_failures_total") == -1


def test_of_several_workers_the_oldest_certificate_counts() -> None:
    one, two = (Snapshot(gauges=[("lictor_certificate_issued_seconds", (), at)]) for at in (200.0, 100.0))
    assert merged([one, two]).gauges == [("lictor_certificate_issued_seconds", (), 100.0)]


@with_mesh
async def test_a_renewed_certificates_sessions_are_opened_before_calls_need_them(mesh: Mesh) -> None:
    client, _, _ = await mesh.pair()
    assert await client.ask() == b"hi\n"
    opened = value(client, "lictor_sessions_opened_total", direction="outbound")
    await client.push(leaf=mesh.ca.leaf("web", "web-1"))
    await until(lambda: value(client, "lictor_sessions_opened_total", direction="outbound") == opened + 1)
    assert await client.ask() == b"hi\n"
    assert value(client, "lictor_sessions_opened_total", direction="outbound") == opened + 1
    await until(lambda: len(client.sidecar._pool.describe()) == 1)


@with_mesh
async def test_only_those_to_where_calls_went_lately(mesh: Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    client, _, _ = await mesh.pair()
    assert await client.ask() == b"hi\n"
    monkeypatch.setattr(pool, "HOT_S", -1.0)
    await client.push(leaf=mesh.ca.leaf("web", "web-1"))
    await until(lambda: not client.sidecar._pool.describe())
    assert value(client, "lictor_sessions_opened_total", direction="outbound") == 1
