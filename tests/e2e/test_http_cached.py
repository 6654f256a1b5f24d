"""``?cached`` says how old its answers may be, by headers that stay true while the servers are away."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import aiohttp

from node.backend import Contact, QueryResult
from node.errors import NoLeader
from node.main import NodeProcess
from tests.e2e.test_node_process import config_of, leader_of
from tests.support.http_api import SigningBackend, TestCa, serving
from tests.support.promises import PATIENCE_S


async def test_an_agent_cut_off_from_its_servers_says_so(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    server, client = (NodeProcess(config, node, on_stop=lambda why: None) for node in config.nodes.values())
    await server.start()
    await client.start()
    url = f"http://127.0.0.1:{client.node.http_port}/v1/health/service/web"

    async def ask(http: aiohttp.ClientSession, path: str = "?cached", **more: Any) -> tuple[int, Any, list[Any]]:
        async with http.get(url + path, **more) as answer:
            rows = await answer.json() if answer.status == 200 else []
            return answer.status, answer.headers, [row["Service"]["Port"] for row in rows]

    try:
        async with asyncio.timeout(PATIENCE_S), aiohttp.ClientSession() as http:
            while await leader_of(client.node.http_port) != config.node("server-1").rpc_endpoint:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
            register = url.replace("/health/service/web", "/agent/service/register")
            async with http.put(register, json={"Name": "web", "Port": 80}) as answer:
                assert answer.status == 200, await answer.text()
            _, first, ports = await ask(http)
            assert (first["X-Cache"], ports) == ("MISS", [80])
            _, second, ports = await ask(http)
            assert (second["X-Cache"], second["X-Consul-KnownLeader"]) == ("HIT", "true")
            assert int(second["Age"]) == int(second["X-Consul-LastContact"]) // 1000
            status, fresh, _ = await ask(http, headers={"Cache-Control": "must-revalidate"})
            assert (status, fresh["X-Cache"], fresh["Age"]) == (200, "MISS", "0")
            await server.stop()
            contacts = []
            while not contacts or contacts[-1] < 1000:
                status, lost, ports = await ask(http)
                assert (status, lost["X-Cache"], ports) == (200, "HIT", [80])
                if lost["X-Consul-KnownLeader"] == "false":
                    contacts.append(int(lost["X-Consul-LastContact"]))
                    assert int(lost["Age"]) == contacts[-1] // 1000
                await asyncio.sleep(0.05)
            assert contacts == sorted(contacts)
    finally:
        await client.stop()
        await server.stop()


class Aging(SigningBackend):
    """A cluster that was last heard of a while ago."""

    age_ms = 0
    lost = False

    def contact(self) -> Contact:
        return Contact(not self.lost, self.age_ms)

    async def query(self, name: str, *args: Any, **kwargs: Any) -> QueryResult:
        if self.lost:
            raise NoLeader()
        return await super().query(name, *args, **kwargs)


async def test_cache_control_bounds_the_age(tmp_path: Path) -> None:
    backend = Aging(TestCa())
    await backend.use_root()
    async with serving(tmp_path, backend=backend) as node:
        await node.put("/v1/agent/service/register", {"Name": "web", "Port": 80})

        async def ask(control: str = "") -> tuple[int, str, str]:
            headers = {"Cache-Control": control} if control else {}
            async with node.http.get(node.url + "/v1/catalog/service/web?cached", headers=headers) as answer:
                return answer.status, answer.headers.get("X-Cache", ""), answer.headers.get("Age", "")

        assert await ask() == (200, "MISS", "0")
        backend.age_ms = 7900
        assert await ask() == (200, "HIT", "7")
        assert await ask("max-age=10") == (200, "HIT", "7")
        assert await ask("max-age=5") == (200, "MISS", "0")
        assert await ask("max-age=0") == (200, "MISS", "0")
        backend.lost = True
        assert await ask("max-age=10") == (200, "HIT", "7")
        assert (await ask("max-age=5"))[0] == 500
        assert (await ask("max-age=5, stale-if-error=6"))[0] == 500
        assert await ask("max-age=5, stale-if-error=60") == (200, "HIT", "7")
        assert (await ask("must-revalidate"))[0] == 500
        assert (await ask("max-age=never"))[0] == 400
    await backend.close()
