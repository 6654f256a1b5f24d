"""``/v1/coordinate``: network coordinates. Lictor measures none; every node stands at the origin."""

from __future__ import annotations

from aiohttp import web

from node.http.answers.agent import CoordRow, DatacenterCoords, NodeCoord
from node.http.context import Context, Routes
from node.http.errors import BadRequest, NotFound
from node.http.reading import answer, read
from node.http.respond import empty, json_response
from raftstate.model.catalog import CatalogNode, Node

routes = Routes("coordinate")
_ORIGIN: CoordRow = {"Vec": [0.0] * 8, "Error": 1.5, "Adjustment": 0.0, "Height": 0.00001}


def _entry(name: str) -> NodeCoord:
    return {"Node": name, "Segment": "", "Coord": _ORIGIN}


@routes.add("GET", "/v1/coordinate/datacenters", answer=list[DatacenterCoords])
async def datacenters(ctx: Context, request: web.Request) -> web.StreamResponse:
    """The servers' coordinates by datacenter."""
    datacenter = ctx.agent.options.datacenter
    return json_response(request, [{"Datacenter": datacenter, "AreaID": "wan", "Coordinates": []}])


@routes.add("GET", "/v1/coordinate/nodes", answer=list[NodeCoord])
async def nodes(ctx: Context, request: web.Request) -> web.StreamResponse:
    """All nodes' coordinates."""
    reading = await read(ctx, request, "catalog.nodes")
    return answer(request, reading, [_entry(row.node) for row in reading.decode(list[Node])])


@routes.add("GET", "/v1/coordinate/node/{node:.*}", answer=list[NodeCoord])
async def node(ctx: Context, request: web.Request) -> web.StreamResponse:
    """One node's coordinates."""
    name = request.match_info["node"]
    if not name:
        raise BadRequest("Missing node name")
    reading = await read(ctx, request, "catalog.node", {"node": name}, rows=False)
    if reading.optional(CatalogNode) is None:
        raise NotFound("")
    return answer(request, reading, [_entry(name)])


@routes.add("PUT", "/v1/coordinate/update")
async def update(ctx: Context, request: web.Request) -> web.StreamResponse:
    """Accepted and not kept: there is nothing here that would use it."""
    return empty()
