"""``/v1/agent/service…``: what is registered on this node."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable
from typing import Any, cast

import msgspec
from aiohttp import web

from node.agent.agent import SERVER_SERVICE, LocalAgent
from node.agent.definitions import CHECK_ALIASES, CheckDefinition, ConnectDefinition, ServiceDefinition, sidecar_of
from node.agent.local import Item
from node.http.acl_needs import Need, permit, service_write
from node.http.answers.catalog import AgentHealthRow, AgentServiceRow, Status
from node.http.context import Context, Routes
from node.http.errors import BadRequest, NotFound
from node.http.options import parse_bool, read_options, wait_of
from node.http.reading import filtered
from node.http.respond import empty, json_response
from node.http.shapes import agent_service_shape, check_shape
from node.http.writing import read_body
from node.loose_json import BadJson, convert
from raftstate.model.catalog import CRITICAL, KIND_CONNECT_PROXY, PASSING, WARNING
from raftstate.model.wire import to_json

routes = Routes("agent services")


@routes.add("GET", "/v1/agent/services", answer=dict[str, AgentServiceRow])
async def services(ctx: Context, request: web.Request) -> web.StreamResponse:
    """The services registered with this agent, by id."""
    options = read_options(request.query, request.headers, ctx.rng)
    rows = [
        agent_service_shape(service.row, ctx.agent.options.datacenter)
        for service_id, service in sorted(ctx.agent.local.services.items())
        if not (service_id == SERVER_SERVICE and ctx.agent.options.is_server)
    ]
    return json_response(request, {row["ID"]: row for row in filtered(rows, options)})


@routes.add("GET", "/v1/agent/service/{id:.*}", answer=AgentServiceRow)
async def service(ctx: Context, request: web.Request) -> web.StreamResponse:
    """One service of this agent; with ``?hash=`` blocks while it is unchanged."""
    service_id = request.match_info["id"]
    if not service_id:
        raise BadRequest("Missing service ID")

    def shown() -> AgentServiceRow | None:
        found = ctx.agent.local.services.get(service_id)
        if found is None:
            return None
        shape = agent_service_shape(found.row, ctx.agent.options.datacenter)
        shape["ContentHash"] = hashlib.sha256(to_json(shape)).hexdigest()[:16]
        return shape

    shape = shown()
    wanted = request.query.get("hash", "")
    if wanted and shape is not None and shape["ContentHash"] == wanted:
        await _changed(
            ctx, ("service", service_id), wait_of(request.query, ctx.rng), lambda: _hash(shown()) != wanted
        )
        shape = shown()
    if shape is None:
        raise NotFound(f"unknown service ID: {service_id}")
    return json_response(request, shape, headers={"X-Consul-ContentHash": shape["ContentHash"]})


def _hash(shape: AgentServiceRow | None) -> str:
    return "" if shape is None else str(shape["ContentHash"])


async def _changed(ctx: Context, item: Item, timeout_s: float, done: Callable[[], bool]) -> None:
    """Wait until the item has changed so that ``done``, or the time has passed."""
    wake = asyncio.Event()
    stop = ctx.agent.local.listen(lambda changed: wake.set() if changed == item else None)
    try:
        async with asyncio.timeout(timeout_s):
            while not done():
                wake.clear()
                await wake.wait()
    except TimeoutError:
        return
    finally:
        stop()


def registration_needs(agent: LocalAgent, definition: ServiceDefinition) -> list[Need]:
    """Return what registering takes: the service's own name, its sidecar's, and what its id stands for now."""
    names = {definition.name: None}
    if definition.kind == KIND_CONNECT_PROXY and definition.proxy is not None:
        names[definition.proxy.destination_service_name] = None
    held = agent.local.services.get(definition.service_id())
    if held is not None:
        names[held.row.service] = None
    needs = [service_write(name) for name in names]
    sidecar = sidecar_of(definition, 0)
    return needs if sidecar is None else needs + registration_needs(agent, sidecar)


def definition_of(data: bytes) -> ServiceDefinition:
    """Parse a service definition as a request gives it. Raises BadRequest."""
    try:
        value = msgspec.json.decode(data) if data.strip() else {}
        if isinstance(value, dict):
            value = _fold_checks(value)
        definition = convert(value, ServiceDefinition)
    except (BadJson, msgspec.DecodeError, RecursionError) as error:
        raise BadRequest(f"Request decode failed: {error}") from error
    return _without_own_marks(definition)


def _fold_checks(value: dict[str, Any], depth: int = 0) -> dict[str, Any]:
    """Give the checks' alternative spellings (``ScriptArgs``, ``id``) their names, in nested sidecars too."""
    folded: dict[str, Any] = {}
    for key, item in value.items():
        name = key.lower().replace("_", "")
        if name == "check" and isinstance(item, dict):
            item = _check_names(item)
        elif name == "checks" and isinstance(item, list):
            item = [_check_names(one) if isinstance(one, dict) else one for one in item]
        elif name in ("connect", "sidecarservice") and isinstance(item, dict) and depth < 4:
            item = _fold_checks(item, depth + 1)
        folded[key] = item
    return folded


def _check_names(value: dict[str, Any]) -> dict[str, Any]:
    return {CHECK_ALIASES.get(key.lower().replace("_", ""), key): item for key, item in value.items()}


def plain_check(check: CheckDefinition) -> CheckDefinition:
    """Return a request's check without the mark that only the agent may set."""
    return msgspec.structs.replace(check, sidecar=False) if check.sidecar else check


def _without_own_marks(definition: ServiceDefinition) -> ServiceDefinition:
    connect = definition.connect
    if connect is not None and connect.sidecar_service is not None:
        connect = ConnectDefinition(connect.native, _without_own_marks(connect.sidecar_service))
    return msgspec.structs.replace(
        definition,
        check=plain_check(definition.check) if definition.check is not None else None,
        checks=tuple(plain_check(check) for check in definition.checks),
        connect=connect,
    )


@routes.add("PUT", "/v1/agent/service/register", body=ServiceDefinition)
async def register(ctx: Context, request: web.Request) -> web.StreamResponse:
    """Register a service with this agent, its checks and its sidecar with it."""
    definition = definition_of(await read_body(request, ctx.options.body_bytes_max))
    given = request.query.get("replace-existing-checks")
    replace = given is not None and (given == "" or _bool(given, "replace-existing-checks"))
    permit(request, *registration_needs(ctx.agent, definition))
    await ctx.agent.register_service(definition, replace_checks=replace)
    return empty()


@routes.add("PUT", "/v1/agent/service/deregister/{id:.*}")
async def deregister(ctx: Context, request: web.Request) -> web.StreamResponse:
    """Withdraw a service, its checks and its sidecar."""
    if not request.match_info["id"]:
        raise BadRequest("Missing service ID")
    await ctx.agent.deregister_service(request.match_info["id"])
    return empty()


def _bool(text: str, name: str) -> bool:
    try:
        return parse_bool(text)
    except ValueError:
        raise BadRequest(f"Invalid value for ?{name}: {text[:20]!r}") from None


def _enable(request: web.Request) -> bool:
    if "enable" not in request.query:
        raise BadRequest("Missing value for enable")
    return _bool(request.query["enable"], "enable")


@routes.add("PUT", "/v1/agent/service/maintenance/{id:.*}")
async def service_maintenance(ctx: Context, request: web.Request) -> web.StreamResponse:
    """Take a service out of rotation, or back in."""
    if not request.match_info["id"]:
        raise BadRequest("Missing service ID")
    await ctx.agent.set_maintenance(request.match_info["id"], _enable(request), request.query.get("reason", ""))
    return empty()


@routes.add("PUT", "/v1/agent/maintenance")
async def node_maintenance(ctx: Context, request: web.Request) -> web.StreamResponse:
    """Take this node out of rotation, or back in."""
    await ctx.agent.set_maintenance("", _enable(request), request.query.get("reason", ""))
    return empty()


_HEALTH_STATUS = {PASSING: 200, WARNING: 429, CRITICAL: 503}
_STATUSES = tuple(_HEALTH_STATUS.values())


def _health_entry(ctx: Context, service_id: str) -> AgentHealthRow:
    status, checks = ctx.agent.local.health(service_id)
    service = ctx.agent.local.services[service_id]
    return {
        "AggregatedStatus": cast(Status, status),
        "Service": agent_service_shape(service.row, ctx.agent.options.datacenter),
        "Checks": [check_shape(check) for check in checks],
    }


@routes.add(
    "GET", "/v1/agent/health/service/id/{id:.*}", answer=AgentHealthRow, statuses=_STATUSES, text="text/plain"
)
async def health_by_id(ctx: Context, request: web.Request) -> web.StreamResponse:
    """A local service's health; the status code tells it too (200, 429, 503)."""
    service_id = request.match_info["id"]
    if service_id not in ctx.agent.local.services:
        raise NotFound(f"ServiceId {service_id} not found")
    entry = _health_entry(ctx, service_id)
    code = _HEALTH_STATUS[entry["AggregatedStatus"]]
    if request.query.get("format") == "text":
        return web.Response(text=entry["AggregatedStatus"], status=code)
    return json_response(request, entry, status=code)


@routes.add(
    "GET",
    "/v1/agent/health/service/name/{name:.*}",
    answer=list[AgentHealthRow],
    statuses=_STATUSES,
    text="text/plain",
)
async def health_by_name(ctx: Context, request: web.Request) -> web.StreamResponse:
    """The health of all local instances of a service; the status code tells the worst."""
    name = request.match_info["name"]
    entries = [
        _health_entry(ctx, service_id)
        for service_id, service in sorted(ctx.agent.local.services.items())
        if service.row.service == name
    ]
    if not entries:
        raise NotFound(f"ServiceName {name} Not Found")
    code = max(_HEALTH_STATUS[entry["AggregatedStatus"]] for entry in entries)
    if request.query.get("format") == "text":
        return web.Response(text=next(word for word, one in _HEALTH_STATUS.items() if one == code), status=code)
    return json_response(request, entries, status=code)
