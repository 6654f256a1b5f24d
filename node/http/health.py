"""``/v1/health``: instances with the checks that bear on them."""

from __future__ import annotations

from typing import Any

from aiohttp import web

from node.http.answers.catalog import CheckRow, HealthRow
from node.http.answers.common import Empty
from node.http.context import Context, Routes
from node.http.errors import BadRequest
from node.http.options import parse_bool
from node.http.reading import Reading, answer, answer_rendered, filtered, near_what, nearest, read, with_meta
from node.http.shapes import check_shape, health_shape
from node.nearness import Place, place_of_instance
from raftstate.model.catalog import PASSING, STATUSES, Check, InstanceHealth

routes = Routes("health")


def _passing(request: web.Request) -> bool:
    """Return whether ``?passing`` asks for healthy instances only; its mere presence does."""
    given = request.query.get("passing")
    if given is None:
        return False
    try:
        return parse_bool(given) if given else True
    except ValueError:
        raise BadRequest("Invalid value for ?passing") from None


async def _instances(ctx: Context, request: web.Request, query: str, params: dict[str, Any]) -> web.Response:
    if not params["service"]:
        raise BadRequest("Missing service name")
    passing = _passing(request)
    reading = await read(ctx, request, query, params)
    here = await near_what(ctx, reading.options)

    def shapes() -> list[Any]:
        rows = reading.decode(list[InstanceHealth])
        if passing:
            rows = [row for row in rows if row.status() == PASSING]
        if reading.options.cached:
            rows.sort(key=lambda row: (row.service.id, row.service.node))
        rows = with_meta(rows, reading.options, lambda row: row.node.meta)
        rows = nearest(rows, here, place_of_instance)
        return filtered([health_shape(row) for row in rows], reading.options)

    return answer_rendered(ctx, request, reading, shapes)


@routes.add("GET", "/v1/health/service/{service:.*}", answer=list[HealthRow])
async def service(ctx: Context, request: web.Request) -> web.StreamResponse:
    """A service's instances with their health."""
    params: dict[str, Any] = {"service": request.match_info["service"]}
    if tags := request.query.getall("tag", []):
        params["tags"] = tags
    return await _instances(ctx, request, "health.service", params)


@routes.add("GET", "/v1/health/connect/{service:.*}", answer=list[HealthRow])
async def connect(ctx: Context, request: web.Request) -> web.StreamResponse:
    """The health of what answers for a service in the mesh."""
    return await _instances(ctx, request, "health.connect", {"service": request.match_info["service"]})


@routes.add("GET", "/v1/health/ingress/{service:.*}", answer=list[Empty])
async def ingress(ctx: Context, request: web.Request) -> web.StreamResponse:
    """Ingress gateways of a service: none, as Lictor has no gateways."""
    reading = await read(ctx, request, "health.connect", {"service": request.match_info["service"]})
    return answer(request, reading, [])


async def _checks(ctx: Context, request: web.Request, reading: Reading) -> web.Response:
    rows = [check_shape(row) for row in reading.decode(list[Check])]
    if reading.options.cached:
        rows.sort(key=lambda row: (row["Node"], row["CheckID"]))
    # A check's row does not say where its node is: that node goes first, and no more is known.
    rows = nearest(rows, await near_what(ctx, reading.options), lambda row: Place(row["Node"]))
    return answer(request, reading, filtered(rows, reading.options))


@routes.add("GET", "/v1/health/node/{node:.*}", answer=list[CheckRow])
async def node(ctx: Context, request: web.Request) -> web.StreamResponse:
    """All checks of a node."""
    if not request.match_info["node"]:
        raise BadRequest("Missing node name")
    return await _checks(ctx, request, await read(ctx, request, "health.node", {"node": request.match_info["node"]}))


@routes.add("GET", "/v1/health/checks/{service:.*}", answer=list[CheckRow])
async def checks(ctx: Context, request: web.Request) -> web.StreamResponse:
    """The checks of a service's instances."""
    if not request.match_info["service"]:
        raise BadRequest("Missing service name")
    reading = await read(ctx, request, "health.checks", {"service": request.match_info["service"]})
    return await _checks(ctx, request, reading)


@routes.add("GET", "/v1/health/state/{state:.*}", answer=list[CheckRow])
async def state(ctx: Context, request: web.Request) -> web.StreamResponse:
    """All checks in a state."""
    wanted = request.match_info["state"]
    if wanted not in (*STATUSES, "any", "unknown"):
        raise BadRequest(f"Invalid health state {wanted!r}: use any, passing, warning, critical or unknown")
    return await _checks(ctx, request, await read(ctx, request, "health.state", {"state": wanted}))
