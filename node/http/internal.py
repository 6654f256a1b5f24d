"""``/v1/internal``: what Consul's web page asks: service summaries and who stands around a service."""

from __future__ import annotations

from typing import Any

from aiohttp import web

from node.http.answers.topology import Neighbour, ServiceSummary, Topology
from node.http.context import Context, Routes
from node.http.errors import BadRequest
from node.http.reading import answer, read
from node.http.shapes import health_shape
from proxy.authz import compile_policy
from raftstate.model.catalog import CRITICAL, KIND_CONNECT_PROXY, PASSING, WARNING, InstanceHealth
from raftstate.model.identity import Identity
from raftstate.model.intention import Intention

routes = Routes("internal")
SERVICES_MAX = 1000
"""Services of which a topology tells whether they may call; a larger catalog is cut, and says so."""


def _summary(name: str, rows: list[InstanceHealth]) -> ServiceSummary:
    statuses = [row.status() for row in rows]
    return {
        "Kind": rows[0].service.kind if rows else "",
        "Name": name,
        "Datacenter": rows[0].node.datacenter if rows else "",
        "Tags": sorted({tag for row in rows for tag in row.service.tags}),
        "Nodes": sorted({row.node.node for row in rows}),
        "InstanceCount": len(rows),
        "ChecksPassing": statuses.count(PASSING),
        "ChecksWarning": statuses.count(WARNING),
        "ChecksCritical": statuses.count(CRITICAL),
        "ConnectedWithProxy": False,
    }


async def _instances(ctx: Context, name: str) -> list[InstanceHealth]:
    found = await ctx.backend.query("health.service", {"service": name}, mode="stale")
    return found.decode(list[InstanceHealth])


@routes.add("GET", "/v1/internal/ui/services", answer=list[ServiceSummary])
async def services(ctx: Context, request: web.Request) -> web.StreamResponse:
    """All services with how many instances are well."""
    reading = await read(ctx, request, "catalog.services", {}, rows=False)
    found = []
    for name in reading.value:
        rows = (await ctx.backend.query("health.service", {"service": name}, mode="stale")).decode(
            list[InstanceHealth]
        )
        found.append(_summary(name, rows))
    return answer(request, reading, found)


@routes.add("GET", "/v1/internal/ui/service-topology/{service:.*}", answer=Topology)
async def topology(ctx: Context, request: web.Request) -> web.StreamResponse:
    """Who calls a service and whom it calls: by its proxies' upstreams and by the intentions."""
    name = request.match_info["service"]
    if not name:
        raise BadRequest("Missing service name")
    reading = await read(ctx, request, "health.connect", {"service": name})
    own = reading.decode(list[InstanceHealth])
    intentions = (await ctx.backend.query("intentions.list", {}, mode="stale")).decode(list[Intention])
    policy = compile_policy(intentions, ctx.agent.options.default_allow)
    names = list((await ctx.backend.query("catalog.services", {}, mode="stale")).value)[:SERVICES_MAX]
    dialled = {
        upstream.destination_name
        for row in own
        if row.service.proxy is not None
        for upstream in row.service.proxy.upstreams
        if upstream.destination_name
    }
    upstreams, downstreams = [], []
    for other in sorted(set(names) | dialled):
        rows = (await ctx.backend.query("health.service", {"service": other}, mode="stale")).decode(
            list[InstanceHealth]
        )
        if other == name or (rows and rows[0].service.kind == KIND_CONNECT_PROXY):
            continue
        outward = policy.decide(Identity(service=name), other, "")
        inward = policy.decide(Identity(service=other), name, "")
        if other in dialled or (outward.allowed and outward.intention is not None):
            source = "proxy-registration" if other in dialled else "specific-intention"
            upstreams.append(_neighbour(other, rows, outward, source))
        if inward.allowed and inward.intention is not None:
            downstreams.append(_neighbour(other, rows, inward, "specific-intention"))
    body = {
        "Protocol": "tcp",
        "TransparentProxy": False,
        "Upstreams": upstreams,
        "Downstreams": downstreams,
        "FilteredByACLs": False,
        "Instances": [health_shape(row) for row in own],
    }
    return answer(request, reading, body)


def _neighbour(name: str, rows: list[InstanceHealth], decision: Any, source: str) -> Neighbour:
    return {
        **_summary(name, rows),
        "Source": source,
        "Intention": {
            "DefaultAllow": False,
            "Allowed": decision.allowed,
            "HasPermissions": bool(decision.permissions),
            "ExternalSource": "",
            "HasExact": decision.intention is not None,
        },
    }
