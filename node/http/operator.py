"""``/v1/operator``: the servers that replicate, and faults for local clusters."""

from __future__ import annotations

from typing import Any

from aiohttp import web

from node.autopilot import DEFAULTS, state
from node.errors import NodeError
from node.http.answers.operator import (
    AutopilotHealth,
    AutopilotSettings,
    AutopilotState,
    Blocked,
    RaftConfiguration,
    TransferAnswer,
    Usage,
)
from node.http.config import cas_index
from node.http.context import Context, Routes
from node.http.errors import BadRequest, HttpError
from node.http.respond import json_response
from node.http.writing import body_as, write
from raftstate.model.autopilot import AutopilotConfig
from raftstate.model.wire import Wire
from raftstate.state.commands import SetAutopilot

routes = Routes("operator")


@routes.add("GET", "/v1/operator/raft/configuration", answer=RaftConfiguration)
async def configuration(ctx: Context, request: web.Request) -> web.StreamResponse:
    """The servers of the raft cluster."""
    return json_response(request, await ctx.backend.operator("raft.configuration", {}))


@routes.add("DELETE", "/v1/operator/raft/peer", answer=bool)
async def remove_peer(ctx: Context, request: web.Request) -> web.StreamResponse:
    """Remove a server: ``?id=`` or ``?address=``."""
    given = {name: request.query[name] for name in ("id", "address") if request.query.get(name)}
    if len(given) != 1:
        raise BadRequest("Must specify either ?id with the server's ID or ?address with IP:port of peer to remove")
    await ctx.backend.operator("raft.remove_peer", given)
    return json_response(request, True)


@routes.add("PUT", "/v1/operator/raft/peer", answer=bool)
async def add_peer(ctx: Context, request: web.Request) -> web.StreamResponse:
    """Add a running server: ``?id=`` (its node name) and ``?address=``; a non-voter until it has caught up.

    Lictor's own endpoint, to be asked of a server. A server with ``join = true`` asks for this by itself.
    """
    given = {name: request.query.get(name, "") for name in ("id", "address")}
    if not all(given.values()):
        raise BadRequest("Must specify ?id with the server's node name and ?address with host:port of its RPC")
    await ctx.backend.operator("raft.add_peer", given)
    return json_response(request, True)


@routes.add("POST PUT", "/v1/operator/raft/transfer-leader", answer=TransferAnswer)
async def transfer_leader(ctx: Context, request: web.Request) -> web.StreamResponse:
    """Hand the leadership to another server."""
    given = {"id": request.query["id"]} if request.query.get("id") else {}
    await ctx.backend.operator("raft.transfer_leader", given)
    return json_response(request, {"Success": True})


@routes.add("GET", "/v1/operator/autopilot/health", answer=AutopilotHealth, statuses=(200, 429))
async def autopilot_health(ctx: Context, request: web.Request) -> web.StreamResponse:
    """How many servers may fail; 429 when the cluster is not healthy."""
    health: dict[str, Any] = await ctx.backend.operator("autopilot.health", {})
    return json_response(request, health, status=200 if health.get("Healthy") else 429)


@routes.add("GET", "/v1/operator/autopilot/state", answer=AutopilotState)
async def autopilot_state(ctx: Context, request: web.Request) -> web.StreamResponse:
    """The same by server: who votes, who leads, who is well."""
    return json_response(request, state(await ctx.backend.operator("autopilot.health", {})))


@routes.add("GET", "/v1/operator/autopilot/configuration", answer=AutopilotSettings)
async def autopilot_configuration(ctx: Context, request: web.Request) -> web.StreamResponse:
    """How dead servers are cleaned up, and when a server is well."""
    return json_response(request, await ctx.backend.operator("autopilot.configuration", {}))


class AutopilotBody(Wire, frozen=True):
    """``PUT /v1/operator/autopilot/configuration``: what is left out gets its default."""

    cleanup_dead_servers: bool = DEFAULTS.cleanup_dead_servers
    max_trailing_logs: int = DEFAULTS.max_trailing_logs
    min_quorum: int = DEFAULTS.min_quorum
    last_contact_threshold: str | None = None
    server_stabilization_time: str | None = None
    redundancy_zone_tag: str | None = None
    disable_upgrade_migration: bool | None = None
    upgrade_version_tag: str | None = None


_FIXED = {
    "LastContactThreshold": "it is liveness.node_ttl of cluster.toml",
    "ServerStabilizationTime": "a server gets its vote once it has caught up",
    "RedundancyZoneTag": "there are no redundancy zones",
    "DisableUpgradeMigration": "there is no upgrade migration",
    "UpgradeVersionTag": "there is no upgrade migration",
}


@routes.add("PUT", "/v1/operator/autopilot/configuration", body=AutopilotBody, answer=bool)
async def set_autopilot_configuration(ctx: Context, request: web.Request) -> web.StreamResponse:
    """Set them; with ``?cas=`` only if they are as old as that. What is not acted on may only be given as it is."""
    body = await body_as(ctx, request, AutopilotBody)
    present = await ctx.backend.operator("autopilot.configuration", {})
    for (name, why), given in zip(
        _FIXED.items(),
        (
            body.last_contact_threshold,
            body.server_stabilization_time,
            body.redundancy_zone_tag,
            body.disable_upgrade_migration,
            body.upgrade_version_tag,
        ),
        strict=True,
    ):
        if given is not None and given != present[name]:
            raise BadRequest(f"{name} can only be {present[name]!r} here, not {given!r}: {why}")
    config = AutopilotConfig(body.cleanup_dead_servers, body.max_trailing_logs, body.min_quorum)
    done = await write(ctx, request, SetAutopilot(config, cas_index(request)))
    return json_response(request, done)


@routes.add("GET", "/v1/operator/usage", answer=Usage)
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


@routes.add("PUT", "/v1/operator/debug/partition", answer=Blocked)
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
