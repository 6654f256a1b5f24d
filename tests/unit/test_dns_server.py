"""DNS: what names mean, what is left out, how replies are cut, and that junk ends nothing."""

from __future__ import annotations

import asyncio
import random
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from dnslib import EDNS0, QTYPE, RCODE, DNSRecord
from hypothesis import given, settings
from hypothesis import strategies as st

from node.dns import DnsServer
from node.dns_zone import Zone
from node.nearness import Place
from tests.support.http_api import Node, eventually, serving
from tests.support.promises import PATIENCE_S


@asynccontextmanager
async def resolving(directory: Path) -> AsyncIterator[tuple[Node, DnsServer]]:
    async with serving(directory) as node:
        dns = DnsServer(node.backend, node.agent, rng=random.Random(1))
        await dns.start("127.0.0.1", 0)
        try:
            yield node, dns
        finally:
            await dns.stop()


async def ask(dns: DnsServer, name: str, kind: str = "A", *, udp: bool = True, edns: int = 0) -> DNSRecord:
    question = DNSRecord.question(name, kind)
    if edns:
        question.add_ar(EDNS0(udp_len=edns))
    loop = asyncio.get_running_loop()
    if udp:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
            client.setblocking(False)
            await loop.sock_connect(client, ("127.0.0.1", dns.port))
            await loop.sock_sendall(client, bytes(question.pack()))
            async with asyncio.timeout(PATIENCE_S):
                return DNSRecord.parse(await loop.sock_recv(client, 65535))
    reader, writer = await asyncio.open_connection("127.0.0.1", dns.port)
    data = bytes(question.pack())
    writer.write(struct.pack("!H", len(data)) + data)
    (length,) = struct.unpack("!H", await reader.readexactly(2))
    reply = DNSRecord.parse(await reader.readexactly(length))
    writer.close()
    await writer.wait_closed()
    return reply


def values(reply: DNSRecord) -> list[str]:
    return sorted(str(record.rdata) for record in reply.rr)


async def settle(node: Node, dns: DnsServer, name: str, count: int) -> DNSRecord:
    """Ask until the view shows what was registered."""
    async with asyncio.timeout(PATIENCE_S):
        while len((reply := await ask(dns, name, edns=4096)).rr) != count:
            pass
        return reply


async def test_services_nodes_and_negatives(tmp_path: Path) -> None:
    async with resolving(tmp_path) as (node, dns):
        await node.put(
            "/v1/agent/service/register",
            {
                "Name": "web",
                "ID": "w1",
                "Port": 80,
                "Address": "10.0.0.1",
                "Tags": ["v1"],
                "Weights": {"Passing": 7, "Warning": 1},
            },
        )
        await node.put("/v1/agent/service/register", {"Name": "web", "ID": "w2", "Port": 81})
        await settle(node, dns, "web.service.consul", 2)
        assert values(await ask(dns, "WEB.Service.dc1.lictor")) == ["10.0.0.1", "127.0.0.1"]
        assert values(await ask(dns, "v1.web.service.consul")) == ["10.0.0.1"]
        assert values(await ask(dns, "n1.node.consul")) == ["127.0.0.1"]
        srv = await ask(dns, "_web._v1.service.consul", "SRV")
        assert values(srv) == ["1 7 80 0a000001.addr.dc1.consul."]
        assert [str(record.rdata) for record in srv.ar] == ["10.0.0.1"]
        assert values(await ask(dns, "0a000001.addr.dc1.consul")) == ["10.0.0.1"]
        assert values(await ask(dns, "_web._tcp.service.consul", "SRV")) == [
            "1 1 81 n1.node.dc1.consul.",
            "1 7 80 0a000001.addr.dc1.consul.",
        ]
        assert values(await ask(dns, "1.0.0.127.in-addr.arpa", "PTR")) == ["n1.node.dc1.consul."]
        assert values(await ask(dns, "consul", "NS")) == ["n1.node.dc1.consul."]

        empty = await ask(dns, "web.service.consul", "AAAA")
        assert (empty.header.rcode, empty.rr, empty.auth[0].rtype) == (RCODE.NOERROR, [], QTYPE.SOA)
        for absent in (
            "no.service.consul",
            "web.service.dc9.consul",
            "no.node.consul",
            "web.query.consul",
            "x.consul",
        ):
            reply = await ask(dns, absent)
            assert (reply.header.rcode, reply.auth[0].rtype) == (RCODE.NXDOMAIN, QTYPE.SOA), absent
        foreign = await ask(dns, "example.com")
        assert (foreign.header.rcode, foreign.header.ra) == (RCODE.REFUSED, 0)


async def test_failing_instances_are_left_out(tmp_path: Path) -> None:
    async with resolving(tmp_path) as (node, dns):
        await node.put("/v1/agent/service/register", {"Name": "web", "Port": 80, "Check": {"TTL": "60s"}})
        await eventually(lambda: node.agent.sync.pending == 0)
        assert (await ask(dns, "web.service.consul")).header.rcode == RCODE.NXDOMAIN
        await node.put("/v1/agent/check/pass/service:web")
        await settle(node, dns, "web.service.consul", 1)


async def test_connect_gives_the_sidecars(tmp_path: Path) -> None:
    async with resolving(tmp_path) as (node, dns):
        await node.put(
            "/v1/agent/service/register",
            {
                "Name": "web",
                "Port": 80,
                "Connect": {"SidecarService": {"Checks": [{"TTL": "9s", "Status": "passing"}]}},
            },
        )
        await settle(node, dns, "web.connect.consul", 1)
        assert values(await ask(dns, "web.connect.consul", "SRV")) == ["1 1 21000 n1.node.dc1.consul."]


async def test_large_answers_are_cut_on_udp_and_whole_on_tcp(tmp_path: Path) -> None:
    async with resolving(tmp_path) as (node, dns):
        for number in range(60):
            body = {
                "Node": f"ext-{number}", "Address": f"10.1.0.{number}",
                "Service": {"Service": "big", "ID": f"b{number}", "Port": 1000 + number},
            }  # fmt: skip
            await node.put("/v1/catalog/register", body)
        await settle(node, dns, "big.service.consul", 60)
        assert len((await ask(dns, "big.service.consul")).rr) == 3
        cut = await ask(dns, "big.service.consul", "SRV")
        assert cut.header.tc == 1
        assert 0 < len(cut.rr) < 60
        assert len(cut.pack()) <= 512
        whole = await ask(dns, "big.service.consul", "SRV", udp=False)
        assert (whole.header.tc, len(whole.rr)) == (0, 60)
        assert len((await ask(dns, "big.service.consul", edns=1232)).pack()) <= 1232


async def test_junk_is_answered_or_dropped(tmp_path: Path) -> None:
    async with resolving(tmp_path) as (_, dns):
        assert await dns.respond(b"", udp=True) is None
        assert await dns.respond(b"\x00" * 5, udp=True) is None
        reply = await dns.respond(b"\x12\x34" + b"\x00\x00" + b"\xff\xff" * 4, udp=True)
        assert reply is not None
        assert DNSRecord.parse(reply).header.rcode == RCODE.FORMERR


class _Nobody:
    async def service_name(self, name: str) -> str | None:
        return None

    async def instances(self, service: str, *, connect: bool) -> list[Any]:
        return []

    async def node(self, name: str) -> None:
        return None

    async def node_at(self, address: str) -> None:
        return None


@given(st.text("abc_-.0123\u00fc", max_size=60), st.sampled_from(["A", "SRV", "ANY", "TXT"]))
@settings(max_examples=60, deadline=None)
def test_any_name_gets_a_reply(name: str, kind: str) -> None:
    zone = Zone(_Nobody(), "dc1", ["consul"], here=Place("n1"), rng=random.Random(0))
    try:
        request = DNSRecord.parse(DNSRecord.question(f"{name}.consul", kind).pack())
    except (UnicodeError, ValueError):
        return
    reply = asyncio.run(zone.answer(request, udp=True))
    assert reply.header.rcode in (RCODE.NXDOMAIN, RCODE.NOERROR, RCODE.REFUSED)
    assert len(reply.pack()) <= 512


@pytest.mark.parametrize("kind", ["A", "SRV", "ANY"])
async def test_domain_of_ones_own(tmp_path: Path, kind: str) -> None:
    zone = Zone(_Nobody(), "dc1", ["mesh.example"], here=Place("n1"), rng=random.Random(0))
    reply = await zone.answer(DNSRecord.question("x.service.mesh.example", kind), udp=True)
    assert str(reply.auth[0].rname) == "mesh.example."
