"""Where tokens are asked for, an Envoy's stream shows one or gets nothing: no certificate, no key, no intention."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import grpc
import pytest

from node import pki
from node.config import parse_config
from node.main import NodeProcess
from node.xds import messages, types
from node.xds.server import METHOD_SERVICE
from tests.support.ports import free_ports
from tests.support.promises import PATIENCE_S

SECRET = "0123456789abcdef0123456789abcdef"
METHOD = f"/{METHOD_SERVICE}/DeltaAggregatedResources"
SIDECAR = {"ID": "web-1", "Name": "web", "Port": 80, "Connect": {"SidecarService": {"Port": 21999}}}


@asynccontextmanager
async def node(directory: Path) -> AsyncIterator[int]:
    """A server that asks for tokens, with a sidecar registered; yields the port of its xDS."""
    rpc, http, xds = free_ports(3)
    secret = directory / "token"
    secret.write_text(SECRET + "\n")
    secret.chmod(0o600)
    config = parse_config(
        '[cluster]\nacl_enabled = true\nacl_token_file = "token"\n[nodes.server-1]\nrole = "server"\n'
        f"rpc_port = {rpc}\nhttp_port = {http}\ndns_port = 0\ngrpc_port = {xds}\n",
        directory / "cluster.toml",
    )
    pki.ensure_local_pki(config)
    process = NodeProcess(config, config.node("server-1"), on_stop=lambda why: None)
    await process.start()
    try:
        async with aiohttp.ClientSession(headers={"X-Consul-Token": SECRET}) as session:
            url = f"http://127.0.0.1:{http}/v1/agent/service/register"
            async with session.put(url, json=SIDECAR) as answer:
                assert answer.status == 200, await answer.text()
        yield xds
    finally:
        await process.stop()


async def ask(port: int, *metadata: tuple[str, str]) -> Any:
    """Ask for the leaf's secret and return the first answer. Raises grpc.aio.AioRpcError when turned away."""
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        method = channel.stream_stream(
            METHOD,
            request_serializer=messages.DeltaRequest.SerializeToString,
            response_deserializer=messages.DeltaResponse.FromString,
        )
        call = method(metadata=metadata, wait_for_ready=True, timeout=PATIENCE_S)
        request = messages.DeltaRequest(type_url=types.SECRET, resource_names_subscribe=[types.LEAF_SECRET])
        request.node.id = "web-1-sidecar-proxy"
        await call.write(request)
        try:
            return await anext(aiter(call))
        finally:
            call.cancel()


async def test_no_secret_is_served_without_a_good_token(tmp_path: Path) -> None:
    async with node(tmp_path) as port:
        for metadata in (
            (),
            (("x-consul-token", ""),),
            (("x-consul-token", "wrong"),),
            (("x-consul-token", SECRET[:-1]),),
            (("authorization", "Bearer wrong"),),
            (("authorization", f"Basic {SECRET}"),),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await ask(port, *metadata)
            assert refused.value.code() == grpc.StatusCode.PERMISSION_DENIED, metadata
            assert SECRET not in str(refused.value)
        for metadata in ((("x-consul-token", SECRET),), (("authorization", f"Bearer {SECRET}"),)):
            answer = await held(port, *metadata)
            assert [one.name for one in answer.resources] == [types.LEAF_SECRET], metadata
            assert b"PRIVATE KEY" in answer.resources[0].resource.value


async def held(port: int, *metadata: tuple[str, str]) -> Any:
    """Ask until the sidecar's stream, which only one can hold, is free again."""
    found: list[Any] = []

    async def tried() -> bool:
        try:
            found.append(await ask(port, *metadata))
        except grpc.aio.AioRpcError as error:
            if error.code() != grpc.StatusCode.ALREADY_EXISTS:
                raise
        return bool(found)

    async with asyncio.timeout(PATIENCE_S):
        while not await tried():  # noqa: ASYNC110  the other stream ends by itself
            await asyncio.sleep(0.05)
    return found[0]
