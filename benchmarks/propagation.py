"""How long a change in the catalog takes to reach a sidecar on another node: a real cluster, one change at a time.

    python -m benchmarks.propagation [-changes 200]

Measured from the moment before the request that makes the change is sent to one agent, to the line that carries it on
a sidecar's stream from another agent: registration, raft with its fsyncs, view, stream.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import aiohttp

from tests.e2e.support_e2e import Mesh, mesh

FIRST_PORT = 20000


def proxy(port: int) -> dict[str, Any]:
    target = {"DestinationServiceName": "app", "DestinationServiceID": "app-1"}
    named = {"Name": "app-sidecar-proxy", "ID": "app-1-sidecar-proxy"}
    return {**named, "Kind": "connect-proxy", "Port": port, "Proxy": target}


CLIENT = {
    "Name": "client-sidecar-proxy",
    "Kind": "connect-proxy",
    "Port": 20001,
    "Proxy": {
        "DestinationServiceName": "client",
        "DestinationServiceID": "client-1",
        "Upstreams": [{"DestinationName": "app", "LocalBindPort": 21000}],
    },
}


async def put(http: aiohttp.ClientSession, url: str, body: dict[str, Any]) -> None:
    async with http.put(url, json=body) as answer:
        assert answer.status == 200, await answer.text()


async def port_seen(stream: aiohttp.ClientResponse, port: int) -> float:
    """Return when the stream first showed the app's sidecar on this port."""
    while True:
        line = json.loads(await stream.content.readline())
        for upstream in line.get("Upstreams") or ():
            if [endpoint["Port"] for endpoint in upstream["Endpoints"]] == [port]:
                return time.perf_counter()


async def measure(stage: Mesh, changes: int) -> tuple[list[float], list[float]]:
    """Return the times of the requests and of the arrivals, seconds."""
    near, far = (f"http://{host}" for host in stage.hosts)
    register = near + "/v1/agent/service/register"
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=None)) as http:
        await put(http, register, {"Name": "app", "ID": "app-1", "Port": 80})
        await put(http, register, proxy(FIRST_PORT))
        await put(http, far + "/v1/agent/service/register", {"Name": "client", "ID": "client-1"})
        async with http.post(far + "/v1/agent/connect/proxy/client-1-sidecar-proxy/stream", json=CLIENT) as stream:
            await port_seen(stream, FIRST_PORT)
            requests, arrivals = [], []
            for number in range(1, changes + 1):
                began = time.perf_counter()
                arrival = asyncio.ensure_future(port_seen(stream, FIRST_PORT + number))
                await put(http, register, proxy(FIRST_PORT + number))
                requests.append(time.perf_counter() - began)
                arrivals.append(await arrival - began)
    return requests, arrivals


def told(what: str, seconds: list[float]) -> str:
    ordered = sorted(seconds)
    p50, p99 = (ordered[int(len(ordered) * share)] * 1000 for share in (0.50, 0.99))
    return f"{what}: p50 {p50:.1f} ms, p99 {p99:.1f} ms, worst {ordered[-1] * 1000:.1f} ms ({len(ordered)} changes)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-changes", type=int, default=200)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory, mesh(Path(directory)) as stage:
        requests, arrivals = asyncio.run(measure(stage, arguments.changes))
    print(told("acknowledged to the one who changed it", requests))
    print(told("seen by a sidecar on another node     ", arrivals))


if __name__ == "__main__":
    main()
