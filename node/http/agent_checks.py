"""``/v1/agent/check…``: the checks of this node."""

from __future__ import annotations

from aiohttp import web

from node.agent.definitions import CHECK_ALIASES, CheckDefinition
from node.http.acl_needs import Need, node_write, permit, service_write
from node.http.agent_services import plain_check
from node.http.answers.catalog import AgentCheckRow
from node.http.context import Context, Routes
from node.http.errors import BadRequest
from node.http.options import read_options
from node.http.reading import filtered
from node.http.respond import empty, json_response
from node.http.shapes import check_shape
from node.http.writing import body_as
from raftstate.model.catalog import CRITICAL, PASSING, WARNING
from raftstate.model.wire import Wire

routes = Routes("agent checks")
_HIDDEN = ("CreateIndex", "ModifyIndex")


@routes.add("GET", "/v1/agent/checks", answer=dict[str, AgentCheckRow])
async def checks(ctx: Context, request: web.Request) -> web.StreamResponse:
    """The checks registered with this agent, by id."""
    options = read_options(request.query, request.headers, ctx.rng)
    rows = [
        {name: value for name, value in check_shape(check.row).items() if name not in _HIDDEN}
        for _, check in sorted(ctx.agent.local.checks.items())
    ]
    return json_response(request, {row["CheckID"]: row for row in filtered(rows, options)})


@routes.add("PUT", "/v1/agent/check/register", body=CheckDefinition)
async def register(ctx: Context, request: web.Request) -> web.StreamResponse:
    """Register a check on this node or one of its services."""
    definition = plain_check(await body_as(ctx, request, CheckDefinition, aliases=CHECK_ALIASES))
    permit(request, *_registration_needs(ctx, definition))
    await ctx.agent.register_check(definition)
    return empty()


def _registration_needs(ctx: Context, definition: CheckDefinition) -> list[Need]:
    """A check of a service takes the service, one of the node the node; so does the check that it replaces."""
    held = ctx.agent.local.checks.get(definition.check_id or definition.name)
    services = ctx.agent.local.services
    names = [services[definition.service_id].row.service] if definition.service_id in services else []
    if held is not None and held.row.service_name:
        names.append(held.row.service_name)
    needs = [service_write(name) for name in names]
    if not definition.service_id or (held is not None and not held.row.service_name):
        needs.append(node_write(ctx.agent.options.node))
    return needs


def _id(request: web.Request) -> str:
    check_id: str = request.match_info["id"]
    if not check_id:
        raise BadRequest("Missing check ID")
    return check_id


@routes.add("PUT", "/v1/agent/check/deregister/{id:.*}")
async def deregister(ctx: Context, request: web.Request) -> web.StreamResponse:
    """Withdraw a check."""
    await ctx.agent.deregister_check(_id(request))
    return empty()


async def _note(ctx: Context, request: web.Request, status: str) -> web.Response:
    await ctx.agent.update_ttl(_id(request), status, request.query.get("note", ""))
    return empty()


@routes.add("PUT", "/v1/agent/check/pass/{id:.*}")
async def set_passing(ctx: Context, request: web.Request) -> web.StreamResponse:
    """Set a TTL check passing."""
    return await _note(ctx, request, PASSING)


@routes.add("PUT", "/v1/agent/check/warn/{id:.*}")
async def set_warning(ctx: Context, request: web.Request) -> web.StreamResponse:
    """Set a TTL check to warning."""
    return await _note(ctx, request, WARNING)


@routes.add("PUT", "/v1/agent/check/fail/{id:.*}")
async def set_critical(ctx: Context, request: web.Request) -> web.StreamResponse:
    """Set a TTL check critical."""
    return await _note(ctx, request, CRITICAL)


class Update(Wire, frozen=True):
    """``PUT /v1/agent/check/update/:id``."""

    status: str = ""
    output: str = ""


@routes.add("PUT", "/v1/agent/check/update/{id:.*}", body=Update)
async def update(ctx: Context, request: web.Request) -> web.StreamResponse:
    """Set a TTL check's status and output."""
    body = await body_as(ctx, request, Update)
    if body.status not in (PASSING, WARNING, CRITICAL):
        raise BadRequest(f"Invalid check status: '{body.status[:40]}'")
    await ctx.agent.update_ttl(_id(request), body.status, body.output)
    return empty()
