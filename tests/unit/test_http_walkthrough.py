"""The walkthrough's requests, in its order, against one node."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import aiohttp

from tests.support.http_api import Node, serving
from tests.support.promises import PATIENCE_S

SERVER_SIDECAR = {
    "Name": "echo-server-sidecar-proxy",
    "Kind": "connect-proxy",
    "Port": 20000,
    "Address": "127.0.0.1",
    "Proxy": {
        "DestinationServiceName": "echo-server",
        "DestinationServiceID": "echo-server-1",
        "LocalServicePort": 8080,
        "Upstreams": [
            {"UpstreamName": "backend", "DestinationName": "", "DestinationPort": 8080, "LocalBindPort": 21900}
        ],
    },
}
CLIENT_SIDECAR = {
    "Name": "echo-client-sidecar-proxy",
    "Kind": "connect-proxy",
    "Port": 20001,
    "Proxy": {
        "DestinationServiceName": "echo-client",
        "DestinationServiceID": "echo-client-1",
        "Upstreams": [
            {"UpstreamName": "backend", "DestinationName": "", "DestinationPort": 8080, "LocalBindPort": 21000}
        ],
    },
}
INTENTION = {
    "SourceName": "echo-client-1",
    "DestinationName": "echo-server-1",
    "Permissions": [{"Action": "allow", "HTTP": {"PathPrefix": "/"}}],
}


class Stream:
    """A sidecar's end of its stream: the sections as they stand."""

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self.response = response
        self.known: dict[str, Any] = {}
        self.versions: list[int] = []

    async def until(self, condition: Any) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while not condition(self.known):
                line = json.loads(await self.response.content.readline())
                self.versions.append(line.pop("Version"))
                self.known.update(line)


async def open_stream(node: Node, sidecar_id: str, body: dict[str, Any], pid: str = "4711") -> Stream:
    response = await node.http.post(
        f"{node.url}/v1/agent/connect/proxy/{sidecar_id}/stream", json=body, headers={"X-Lictor-Pid": pid}
    )
    assert response.status == 200, await response.text()
    return Stream(response)


async def register(node: Node) -> None:
    assert (
        await node.put("/v1/agent/service/register", {"Name": "echo-server", "Port": 8080, "ID": "echo-server-1"})
        == ""
    )
    assert (
        await node.put("/v1/agent/service/register", {"Name": "echo-client", "Port": 0, "ID": "echo-client-1"}) == ""
    )


async def test_walkthrough_by_requests(tmp_path: Path) -> None:
    async with serving(tmp_path) as node:
        await register(node)
        rows = await node.get("/v1/catalog/service/echo-server")
        assert [(row["ServiceID"], row["ServicePort"]) for row in rows] == [("echo-server-1", 8080)]

        client = await open_stream(node, "echo-client-1-sidecar-proxy", CLIENT_SIDECAR)
        await client.until(lambda known: "Upstreams" in known and "Leaf" in known and "Roots" in known)
        upstream = client.known["Upstreams"][0]
        assert upstream["Service"] == ""
        assert "echo-server" in upstream["Error"]

        async with node.http.post(node.url + "/v1/connect/intentions", json=INTENTION) as answer:
            assert answer.status == 200, await answer.text()
            assert set(await answer.json()) == {"ID"}
        await client.until(lambda known: known["Upstreams"][0]["Service"] == "echo-server")
        assert client.known["Upstreams"][0]["Endpoints"] == []

        server = await open_stream(node, "echo-server-1-sidecar-proxy", SERVER_SIDECAR)
        await server.until(lambda known: known.get("Intentions"))
        rule = server.known["Intentions"][0]
        assert (rule["SourceService"], rule["SourceName"]) == ("echo-client", "echo-client-1")
        assert (rule["DestinationService"], rule["DestinationName"]) == ("echo-server", "echo-server-1")
        assert server.known["Upstreams"][0]["LoopbackPort"] == 8080
        assert server.known["Self"]["ServiceID"] == "echo-server-1"
        assert server.known["DefaultAllow"] is False

        await client.until(lambda known: known["Upstreams"][0]["Endpoints"])
        endpoint = client.known["Upstreams"][0]["Endpoints"][0]
        assert (endpoint["ServiceID"], endpoint["Port"], endpoint["Healthy"]) == ("echo-server-1", 20000, True)

        assert (server.known["Self"]["Protocol"], client.known["Upstreams"][0]["Protocol"]) == ("tcp", "tcp")
        await node.put("/v1/config", {"Kind": "service-defaults", "Name": "echo-server", "Protocol": "http"})
        await server.until(lambda known: known["Self"]["Protocol"] == "http")
        await client.until(lambda known: known["Upstreams"][0]["Protocol"] == "http")

        await node.put("/v1/connect/revocations", {"Kind": "instance", "Value": "echo-client-1"})
        await server.until(lambda known: known["Revocations"])
        assert server.known["Revocations"][0]["Value"] == "echo-client-1"

        server.response.close()
        await client.until(lambda known: not known["Upstreams"][0]["Endpoints"][0]["Healthy"])
        client.response.close()
