"""The bootstrap of an Envoy: the agent is shown the token, and nobody else is."""

from __future__ import annotations

import asyncio
import json
import urllib.request
from pathlib import Path
from typing import Any

import grpc

from cli.envoy import bootstrap, find_binary
from node.xds.server import METHOD_SERVICE
from tests.e2e.support_envoy import need_envoy
from tests.support.promises import PATIENCE_S
from tests.support.sidecars import until

TOKEN = "11111111-2222-3333-4444-555555555555"
ROW: dict[str, Any] = {"ID": "web-1-sidecar-proxy", "Proxy": {"DestinationServiceName": "web"}}


async def test_an_envoys_admin_endpoint_does_not_show_the_token(tmp_path: Path) -> None:
    """It is open to every user of the host."""
    need_envoy()
    shown: list[object] = []

    async def stream(requests: Any, context: Any) -> None:
        shown.append(dict(context.invocation_metadata()).get("x-consul-token"))
        await context.abort(grpc.StatusCode.UNAVAILABLE, "seen")

    server = grpc.aio.server()
    handler = grpc.stream_stream_rpc_method_handler(stream)
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler(METHOD_SERVICE, {"DeltaAggregatedResources": handler}),)
    )
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    config, admin = tmp_path / "bootstrap.json", tmp_path / "admin"
    config.write_text(json.dumps(bootstrap(ROW, ("127.0.0.1", port), 0, TOKEN)))
    command = [
        find_binary(""), "--config-path", str(config), "--use-dynamic-base-id", "--concurrency", "1",
        "--admin-address-path", str(admin), "--log-level", "error",
    ]  # fmt: skip
    envoy = await asyncio.create_subprocess_exec(*command)
    try:
        await until(lambda: TOKEN in shown and admin.exists(), PATIENCE_S)
        for page in ("config_dump", "config_dump?include_eds", "server_info", "init_dump", "clusters", "stats"):
            text = await asyncio.to_thread(_get, f"http://{admin.read_text()}/{page}")
            assert text
            assert TOKEN not in text, page
    finally:
        envoy.terminate()
        await envoy.wait()
        await server.stop(0)


def _get(url: str) -> str:
    with urllib.request.urlopen(url, timeout=PATIENCE_S) as answer:
        return str(answer.read().decode())
