"""HAProxy, unmodified, balances over the instances that it finds by SRV records."""

from __future__ import annotations

import asyncio
from collections import Counter
from pathlib import Path

import aiohttp
from aiohttp import web

from cli.demo_stage import free_ports
from node.dns import DnsServer
from tests.e2e.support_e2e import need
from tests.support.http_api import Node, serving

CONFIG = """
global
    log stderr local0 warning
defaults
    mode http
    timeout connect 1s
    timeout client 5s
    timeout server 5s
    retries 2
    option redispatch 1
resolvers lictor
    nameserver agent 127.0.0.1:{dns}
    accepted_payload_size 4096
    timeout resolve 100ms
    timeout retry 200ms
    hold valid 100ms
    hold obsolete 0s
    hold nx 0s
frontend front
    bind 127.0.0.1:{front}
    default_backend web
backend web
    balance roundrobin
    server-template web 4 _web._tcp.service.consul resolvers lictor resolve-prefer ipv4 init-addr none
"""


async def app(name: str) -> tuple[web.AppRunner, int]:
    async def handle(request: web.Request) -> web.Response:
        return web.Response(text=name)

    made = web.Application()
    made.router.add_get("/", handle)
    runner = web.AppRunner(made)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    return runner, runner.addresses[0][1]


async def served_by(url: str) -> str:
    try:
        async with aiohttp.ClientSession() as http, http.get(url) as answer:
            return await answer.text() if answer.status == 200 else f"status {answer.status}"
    except aiohttp.ClientError as error:
        return type(error).__name__


async def until_served_by(url: str, wanted: set[str]) -> None:
    async with asyncio.timeout(20):
        while True:
            seen = Counter([await served_by(url) for _ in range(12)])
            if set(seen) == wanted:
                return
            await asyncio.sleep(0.1)


async def register(node: Node, name: str, port: int) -> None:
    body = {"Name": "web", "ID": name, "Port": port, "Check": {"TTL": "60s", "Status": "passing"}}
    await node.put("/v1/agent/service/register", body)


async def test_haproxy_follows_the_catalog(tmp_path: Path) -> None:
    need("haproxy")
    front = free_ports(23000, 1)[0]
    url = f"http://127.0.0.1:{front}/"
    one, port_one = await app("one")
    two, port_two = await app("two")
    async with serving(tmp_path) as node:
        dns = DnsServer(node.backend, node.agent)
        await dns.start("127.0.0.1", 0)
        (tmp_path / "haproxy.cfg").write_text(CONFIG.format(dns=dns.port, front=front))
        haproxy = await asyncio.create_subprocess_exec("haproxy", "-db", "-f", str(tmp_path / "haproxy.cfg"))
        try:
            await register(node, "one", port_one)
            await until_served_by(url, {"one"})
            await register(node, "two", port_two)
            await until_served_by(url, {"one", "two"})
            await node.put("/v1/agent/check/fail/service:one")
            await until_served_by(url, {"two"})
        finally:
            haproxy.kill()
            await haproxy.wait()
            await dns.stop()
    await one.cleanup()
    await two.cleanup()
