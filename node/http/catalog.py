"""``/v1/catalog``: what is registered, cluster-wide."""

from __future__ import annotations

import operator
from typing import Any

from aiohttp import web

from node.http.answers.catalog import CatalogServiceRow, NodeRow, NodeServiceList, NodeServices
from node.http.answers.common import Empty
from node.http.context import Context, Routes
from node.http.errors import BadRequest
from node.http.reading import answer, answer_rendered, filtered, near_what, nearest, read, with_meta
from node.http.respond import json_response
from node.http.shapes import catalog_service_shape, node_shape, service_shape
from node.http.writing import body_as, write
from node.nearness import Place, place_of
from raftstate.model.catalog import STATUSES, CatalogNode, CatalogService, Check, Node, ServiceInstance
from raftstate.model.wire import Wire
from raftstate.state import commands

routes = Routes("catalog")


@routes.add("GET", "/v1/catalog/datacenters", answer=list[str])
async def datacenters(ctx: Context, request: web.Request) -> web.StreamResponse:
    """The datacenters: this one."""
    return json_response(request, [ctx.agent.options.datacenter])


@routes.add("GET", "/v1/catalog/nodes", answer=list[NodeRow])
async def nodes(ctx: Context, request: web.Request) -> web.StreamResponse:
    """All nodes by name."""
    reading = await read(ctx, request, "catalog.nodes")
    found = [node_shape(row) for row in reading.decode(list[Node])]
    found = with_meta(found, reading.options, lambda row: row["Meta"])
    found = filtered(found, reading.options)
    here = await near_what(ctx, reading.options)
    return answer(request, reading, nearest(found, here, lambda row: place_of(row["Node"], row["Meta"])))


@routes.add("GET", "/v1/catalog/services", answer=dict[str, list[str]])
async def services(ctx: Context, request: web.Request) -> web.StreamResponse:
    """All service names with their tags."""
    meta = dict(part.partition(":")[::2] for part in request.query.getall("node-meta", []))
    reading = await read(ctx, request, "catalog.services", {"node_meta": meta} if meta else {}, rows=False)
    found: dict[str, Any] = reading.value
    if reading.options.filter:
        rows = [{"ServiceName": name, "ServiceTags": tags} for name, tags in found.items()]
        found = {row["ServiceName"]: row["ServiceTags"] for row in filtered(rows, reading.options)}
    return answer(request, reading, found)


async def _instances(ctx: Context, request: web.Request, query: str, params: dict[str, Any]) -> web.Response:
    reading = await read(ctx, request, query, params)
    here = await near_what(ctx, reading.options)

    def place(row: CatalogServiceRow) -> Place:
        return place_of(row["Node"], row["NodeMeta"], row.get("ServiceLocality"))

    def shapes() -> list[Any]:
        found = [catalog_service_shape(row) for row in reading.decode(list[CatalogService])]
        found = with_meta(found, reading.options, lambda row: row["NodeMeta"])
        found = filtered(found, reading.options)
        return nearest(found, here, place)

    return answer_rendered(ctx, request, reading, shapes)


@routes.add("GET", "/v1/catalog/service/{service:.*}", answer=list[CatalogServiceRow])
async def service(ctx: Context, request: web.Request) -> web.StreamResponse:
    """The instances of a service."""
    name = _required(request, "service", "Missing service name")
    tags = request.query.getall("tag", [])
    return await _instances(ctx, request, "catalog.service", {"service": name} | ({"tags": tags} if tags else {}))


@routes.add("GET", "/v1/catalog/connect/{service:.*}", answer=list[CatalogServiceRow])
async def connect(ctx: Context, request: web.Request) -> web.StreamResponse:
    """The proxies and mesh-native instances that answer for a service."""
    name = _required(request, "service", "Missing service name")
    return await _instances(ctx, request, "catalog.connect", {"service": name})


@routes.add("GET", "/v1/catalog/node/{node:.*}", answer=NodeServices | None)
async def node(ctx: Context, request: web.Request) -> web.StreamResponse:
    """A node and its services by id; null for an unknown one."""
    name = _required(request, "node", "Missing node name")
    reading = await read(ctx, request, "catalog.node", {"node": name}, rows=False)
    found = reading.optional(CatalogNode)
    if found is None:
        return answer(request, reading, None)
    rows = filtered([service_shape(row) for row in found.services.values()], reading.options)
    return answer(request, reading, {"Node": node_shape(found.node), "Services": {row["ID"]: row for row in rows}})


@routes.add("GET", "/v1/catalog/node-services/{node:.*}", answer=NodeServiceList)
async def node_services(ctx: Context, request: web.Request) -> web.StreamResponse:
    """A node and the list of its services."""
    name = _required(request, "node", "Missing node name")
    reading = await read(ctx, request, "catalog.node", {"node": name}, rows=False)
    found = reading.optional(CatalogNode)
    if found is None:
        return answer(request, reading, {"Node": None, "Services": []})
    rows = filtered([service_shape(row) for row in found.services.values()], reading.options)
    return answer(request, reading, {"Node": node_shape(found.node), "Services": rows})


@routes.add("GET", "/v1/catalog/gateway-services/{gateway:.*}", answer=list[Empty])
async def gateway_services(ctx: Context, request: web.Request) -> web.StreamResponse:
    """Services behind a gateway: none, as Lictor has no gateways."""
    reading = await read(ctx, request, "catalog.services", {}, rows=False)
    return answer(request, reading, [])


class CatalogCheck(Wire, frozen=True):
    """A check in a catalog registration."""

    check_id: str = ""
    name: str = ""
    status: str = ""
    notes: str = ""
    output: str = ""
    service_id: str = ""
    node: str = ""
    type: str = ""
    definition: dict[str, Any] = {}


class CatalogServiceBody(ServiceInstance, frozen=True, kw_only=True):
    """A service in a catalog registration: a row whose node is named elsewhere."""

    node: str = ""
    id: str = ""
    service: str = ""


class Registration(Wire, frozen=True):
    """``PUT /v1/catalog/register``."""

    node: str = ""
    address: str = ""
    id: str = ""
    datacenter: str = ""
    tagged_addresses: dict[str, str] = {}
    node_meta: dict[str, str] = {}
    service: CatalogServiceBody | None = None
    check: CatalogCheck | None = None
    checks: tuple[CatalogCheck, ...] = ()
    skip_node_update: bool = False


@routes.add("PUT", "/v1/catalog/register", body=Registration, answer=bool)
async def register(ctx: Context, request: web.Request) -> web.StreamResponse:
    """Register a node, a service and checks, past any agent."""
    command = registration(ctx, await body_as(ctx, request, Registration))
    return json_response(request, await write(ctx, request, command))


def registration(ctx: Context, body: Registration) -> commands.CatalogRegister:
    """Return the command of a registration. Raises BadRequest."""
    if not body.node or not (body.address or body.skip_node_update):
        raise BadRequest("Must provide node and address")
    given, row = body.service, None
    if given is not None:
        if not given.service:
            raise BadRequest("Must provide service name (Service.Service) when service is provided")
        row = ServiceInstance(body.node, given.id or given.service, given.service, *_rest(given))
    given_checks = ((body.check,) if body.check is not None else ()) + body.checks
    return commands.CatalogRegister(
        node=Node(
            node=body.node,
            address=body.address,
            id=body.id,
            datacenter=ctx.agent.options.datacenter,
            tagged_addresses=body.tagged_addresses,
            meta=body.node_meta,
        ),
        service=row,
        checks=tuple([_check_row(check, body.node, row) for check in given_checks]),
        skip_node_update=body.skip_node_update,
    )


_NAMING = ("node", "id", "service")
assert ServiceInstance.__struct_fields__[: len(_NAMING)] == _NAMING
_rest = operator.attrgetter(*ServiceInstance.__struct_fields__[len(_NAMING) :])
"""All of an instance but what names it, in order."""


def _check_row(check: CatalogCheck, node: str, service: ServiceInstance | None) -> Check:
    service_id = check.service_id
    name = service.service if service is not None and service.id == service_id else ""
    check_id = check.check_id or check.name
    if not check_id:
        raise BadRequest("Must provide CheckID or Name of a check")
    if check.status and check.status not in STATUSES:
        raise BadRequest(f"Invalid check status: {check.status!r}")
    return Check(
        node=node,
        check_id=check_id,
        name=check.name or check_id,
        status=check.status or "critical",
        notes=check.notes,
        output=check.output,
        service_id=service_id,
        service_name=name,
        service_tags=service.tags if service is not None and name else (),
        type=check.type,
        definition=check.definition,
    )


class Deregistration(Wire, frozen=True):
    """``PUT /v1/catalog/deregister``."""

    node: str = ""
    service_id: str = ""
    check_id: str = ""
    datacenter: str = ""


@routes.add("PUT", "/v1/catalog/deregister", body=Deregistration, answer=bool)
async def deregister(ctx: Context, request: web.Request) -> web.StreamResponse:
    """Remove a node, or one service or check of it."""
    body = await body_as(ctx, request, Deregistration)
    if not body.node:
        raise BadRequest("Must provide node")
    command: Any
    if body.service_id:
        command = commands.DeregisterService(node=body.node, service_id=body.service_id)
    elif body.check_id:
        command = commands.DeregisterCheck(node=body.node, check_id=body.check_id)
    else:
        command = commands.DeregisterNode(node=body.node)
    await write(ctx, request, command)
    return json_response(request, True)


def _required(request: web.Request, name: str, text: str) -> str:
    value: str = request.match_info[name]
    if not value:
        raise BadRequest(text)
    return value
