"""An Envoy is told its sidecar's configuration, keys included, only by a token that may be that service."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from node.tokens import AccessControl, AgentTokens, Tokens, hash_of
from raftstate.model.acl import ServiceIdentity
from raftstate.state.commands import DeleteToken
from tests.support.acl import ROOT, ask, guarded, token_with
from tests.support.promises import PATIENCE_S

grpc = pytest.importorskip("grpc")


async def test_an_envoy_stands_on_its_token(tmp_path: Path) -> None:
    from node.xds import messages
    from node.xds.server import XdsServer

    definition = {
        "Name": "web-sidecar-proxy", "ID": "web-sidecar-proxy", "Kind": "connect-proxy", "Port": 21000,
        "Proxy": {"DestinationServiceName": "web", "DestinationServiceID": "web"},
    }  # fmt: skip
    async with guarded(tmp_path) as node:
        web = {"Name": "web", "Port": 80}
        assert (await ask(node, "PUT", "/v1/agent/service/register", ROOT, json=web))[0] == 200
        right = await token_with(node.backend, "", service_identities=(ServiceIdentity("web"),))
        wrong = await token_with(node.backend, "", service_identities=(ServiceIdentity("db"),))
        server = XdsServer(node.agent, AccessControl(Tokens(node.backend), AgentTokens()))
        port = await server.start("127.0.0.1", 0)
        channel = grpc.aio.insecure_channel(f"127.0.0.1:{port}")
        delta = channel.stream_stream(
            "/envoy.service.discovery.v3.AggregatedDiscoveryService/DeltaAggregatedResources",
            request_serializer=messages.DeltaRequest.SerializeToString,
            response_deserializer=messages.DeltaResponse.FromString,
        )

        async def follow(token: str) -> Any:
            call = delta(metadata=[("x-consul-token", token)] if token else [])
            first = messages.DeltaRequest(type_url="type.googleapis.com/envoy.config.cluster.v3.Cluster")
            first.node.id = "web-sidecar-proxy"
            first.node.metadata.update({"lictor.definition": json.dumps(definition)})
            await call.write(first)
            return call

        try:
            for token, told in (
                ("", "anonymous token lacks permission 'service:write'"),
                ("no-such-token", "ACL not found"),
                (wrong, "lacks permission 'service:write' on \"web"),
            ):
                call = await follow(token)
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await asyncio.wait_for(call.read(), PATIENCE_S)
                assert caught.value.code() == grpc.StatusCode.PERMISSION_DENIED
                assert told in caught.value.details()
            call = await follow(right)
            assert (await asyncio.wait_for(call.read(), PATIENCE_S)).type_url.endswith("Cluster")
            row = node.backend.machine.store.tokens.by_secret_hash[hash_of(right)]
            await node.backend.apply(DeleteToken(row.accessor_id))
            async with asyncio.timeout(PATIENCE_S):
                assert await call.read() is grpc.aio.EOF
        finally:
            await channel.close()
            await server.stop()
