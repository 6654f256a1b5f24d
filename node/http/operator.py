"""``/v1/operator``: the servers that replicate, and faults for local clusters."""

from __future__ import annotations

from typing import Any

from aiohttp import web

from node.errors import NodeError
from node.http.context import Context, Routes
from node.http.errors import BadRequest, HttpError
from node.http.respond import json_response
from node.http.writing import body_as
from raftstate.model.wire import Wire

routes = Routes("operator")


@routes.add("GET", "/v1/operator/raft/configuration")
async def configuration(ctx: Context, request: web.Request) -> web.StreamResponse:
    """The servers of the raft cluster."""
    return json_response(request, await ctx.backend.operator("raft.configuration", {}))


@routes.add("DELETE", "/v1/operator/raft/peer")
async def remove_peer(ctx: Context, request: web.Request) -> web.StreamResponse:
    """Remove a server: ``?id=`` or ``?address=``."""
    given = {name: request.query[name] for name in ("id", "address") if request.query.get(name)}
    if len(given) != 1:
        raise BadRequest("Must specify either ?id with the server's ID or ?address with IP:port of peer to remove")
    await ctx.backend.operator("raft.remove_peer", given)
    return json_response(request, True)


@routes.add("POST PUT", "/v1/operator/raft/transfer-leader")
async def transfer_leader(ctx: Context, request: web.Request) -> web.StreamResponse:
    """Hand the leadership to another server."""
    given = {"id": request.query["id"]} if request.query.get("id") else {}
    await ctx.backend.operator("raft.transfer_leader", given)
    return json_response(request, {"Success": True})


@routes.add("GET", "/v1/operator/autopilot/health")
async def autopilot_health(ctx: Context, request: web.Request) -> web.StreamResponse:
    """How many servers may fail; 429 when the cluster is not healthy."""
    health: dict[str, Any] = await ctx.backend.operator("autopilot.health", {})
    return json_response(request, health, status=200 if health.get("Healthy") else 429)


_AUTOPILOT = {
    "CleanupDeadServers": False,
    "LastContactThreshold": "200ms",
    "MaxTrailingLogs": 250,
    "MinQuorum": 0,
    "ServerStabilizationTime": "10s",
    "RedundancyZoneTag": "",
    "DisableUpgradeMigration": False,
    "UpgradeVersionTag": "",
    "CreateIndex": 1,
    "ModifyIndex": 1,
}


@routes.add("GET", "/v1/operator/autopilot/configuration")
async def autopilot_configuration(ctx: Context, request: web.Request) -> web.StreamResponse:
    """Autopilot's settings: fixed, and dead servers are removed by hand."""
    return json_response(request, _AUTOPILOT)


@routes.add("GET", "/v1/operator/usage")
async def usage(ctx: Context, request: web.Request) -> web.StreamResponse:
    """How many nodes, services and instances there are."""
    nodes = await ctx.backend.query("catalog.nodes", {})
    services = await ctx.backend.query("catalog.services", {})
    entry = {"Services": len(services.value), "Nodes": len(nodes.value)}
    return json_response(request, {"Usage": {ctx.agent.options.datacenter: entry}, "Index": max(nodes.index, 1)})


class Partition(Wire, frozen=True):
    """``PUT /v1/operator/debug/partition``."""

    peers: tuple[str, ...] = ()
    one_way: bool = False


@routes.add("PUT", "/v1/operator/debug/partition")
async def partition(ctx: Context, request: web.Request) -> web.StreamResponse:
    """Drop every frame to and from the named nodes, on this node, with ``OneWay`` only those from them; an empty list
    heals (local clusters only)."""
    if not ctx.options.fault_injection:
        raise HttpError(403, "fault injection is off: set fault_injection = true in cluster.toml")
    body = await body_as(ctx, request, Partition)
    params = {"peers": list(body.peers), "one_way": body.one_way}
    try:
        return json_response(request, await ctx.backend.operator("faults.block", params))
    except NodeError as error:
        raise HttpError(error.http_status, str(error)) from error
