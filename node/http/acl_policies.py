"""``/v1/acl/policy…`` and ``/v1/acl/role…``: what may be granted, under names."""

from __future__ import annotations

import functools
import uuid
from collections.abc import Sequence
from typing import Any

from aiohttp import web

from node.acl_writes import AclCommand, write_acl
from node.http.acl_guard import shown_token
from node.http.acl_shapes import (
    Link,
    PolicyBody,
    RoleBody,
    policy_shape,
    require_no_templates,
    require_rules,
    role_shape,
)
from node.http.answers.acl import PolicyListRow, PolicyRow, RoleRow
from node.http.context import Context, Handler, Routes
from node.http.errors import BadRequest, HttpError, NotFound
from node.http.ids import new_id
from node.http.reading import answer, read
from node.http.respond import json_response
from node.http.writing import body_as, request_id
from raftstate.model.acl import Policy, Role
from raftstate.state import commands as c

routes = Routes("acl policies")
DISABLED = "ACL support disabled"
CHANGED = "it was changed by someone else meanwhile: read it again, and repeat the change"


def when_enabled(handler: Handler) -> Handler:
    """Return a handler that answers as Consul's agent does where access control is off."""

    @functools.wraps(handler)
    async def guarded(ctx: Context, request: web.Request) -> web.StreamResponse:
        if ctx.access is None:
            raise HttpError(401, DISABLED)
        return await handler(ctx, request)

    return guarded


async def write(ctx: Context, request: web.Request, command: AclCommand) -> Any:
    """Write on a server, which checks the request's token itself."""
    return await write_acl(ctx.backend, shown_token(request), command, request_id(request))


async def ask(ctx: Context, query: str, **params: str) -> Any:
    """Return what the leader knows, undecoded."""
    return await ctx.backend.query(query, params)


async def policy_names(ctx: Context) -> dict[str, str]:
    """Return the names of all policies by id."""
    return {row.id: row.name for row in (await ask(ctx, "acl.policies")).decode(list[Policy])}


async def role_names(ctx: Context) -> dict[str, str]:
    """Return the names of all roles by id."""
    return {row.id: row.name for row in (await ask(ctx, "acl.roles")).decode(list[Role])}


def linked(what: str, links: Sequence[Link] | None, names: dict[str, str]) -> tuple[str, ...]:
    """Return the ids that links mean. Raises BadRequest for one that means nothing."""
    by_name = {name: id for id, name in names.items()}
    ids: dict[str, None] = {}
    for link in links or ():
        id = link.id or by_name.get(link.name, "")
        if id not in names:
            raise BadRequest(f"{what}: No such ACL {what.lower()} with {'ID' if link.id else 'name'} "
                             f'"{(link.id or link.name)[:80]}"')  # fmt: skip
        ids[id] = None
    return tuple(ids)


def given_id(request: web.Request, what: str) -> str:
    """Return the UUID in the path. Raises BadRequest."""
    given: str = request.match_info["id"]
    try:
        return str(uuid.UUID(given))
    except ValueError:
        raise BadRequest(f"Invalid {what} ID {given[:80]!r}: it must be a UUID") from None


# Policies


@routes.add("GET", "/v1/acl/policies", answer=list[PolicyListRow])
@when_enabled
async def policies(ctx: Context, request: web.Request) -> web.StreamResponse:
    """All policies, without their rules."""
    reading = await read(ctx, request, "acl.policies", rows=False)
    return answer(request, reading, [policy_shape(row, listed=True) for row in reading.decode(list[Policy])])


@routes.add("PUT", "/v1/acl/policy", body=PolicyBody, answer=PolicyRow)
@when_enabled
async def create_policy(ctx: Context, request: web.Request) -> web.StreamResponse:
    """Create a policy."""
    body = await body_as(ctx, request, PolicyBody)
    if body.id:
        raise BadRequest("Cannot specify the ID when creating a new policy")
    return await _put_policy(ctx, request, body, new_id(request, "acl policy"), None)


async def _put_policy(
    ctx: Context, request: web.Request, body: PolicyBody, id: str, old: Policy | None
) -> web.Response:
    if not body.name:
        raise BadRequest("Invalid Policy: no Name is set")
    require_rules(body.rules)
    row = Policy(id, body.name, body.description, body.rules, body.datacenters or ())
    # By index, so that nothing that was deleted meanwhile comes back; a repeated creation finds its own row.
    if not await write(ctx, request, c.UpsertPolicy(row, cas_index=old.modify_index if old else 0)):
        raise HttpError(409, f"Policy {id}: {CHANGED}")
    return json_response(request, policy_shape((await ask(ctx, "acl.policy", id=id)).decode(Policy)))


async def _policy(ctx: Context, **params: str) -> Policy:
    found = await ask(ctx, "acl.policy", **params)
    if found.raw is None:
        raise NotFound("Requested policy does not exist: ACL not found")
    row: Policy = found.decode(Policy)
    return row


@routes.add("GET", "/v1/acl/policy/name/{name:.+}", answer=PolicyRow)
@when_enabled
async def policy_by_name(ctx: Context, request: web.Request) -> web.StreamResponse:
    """A policy by name."""
    return json_response(request, policy_shape(await _policy(ctx, name=request.match_info["name"])))


@routes.add("GET", "/v1/acl/policy/{id}", answer=PolicyRow)
@when_enabled
async def policy(ctx: Context, request: web.Request) -> web.StreamResponse:
    """A policy by id."""
    return json_response(request, policy_shape(await _policy(ctx, id=given_id(request, "policy"))))


@routes.add("PUT", "/v1/acl/policy/{id}", body=PolicyBody, answer=PolicyRow)
@when_enabled
async def update_policy(ctx: Context, request: web.Request) -> web.StreamResponse:
    """Replace a policy."""
    id = given_id(request, "policy")
    body = await body_as(ctx, request, PolicyBody)
    if body.id and body.id != id:
        raise BadRequest("Policy ID in URL and payload do not match")
    return await _put_policy(ctx, request, body, id, await _policy(ctx, id=id))


@routes.add("DELETE", "/v1/acl/policy/{id}", answer=bool)
@when_enabled
async def delete_policy(ctx: Context, request: web.Request) -> web.StreamResponse:
    """Delete a policy: whoever had it loses what it granted."""
    await write(ctx, request, c.DeletePolicy(given_id(request, "policy")))
    return json_response(request, True)


# Roles


@routes.add("GET", "/v1/acl/roles", answer=list[RoleRow])
@when_enabled
async def roles(ctx: Context, request: web.Request) -> web.StreamResponse:
    """All roles; ``?policy=`` only those with that policy."""
    reading = await read(ctx, request, "acl.roles", rows=False)
    names, wanted = await policy_names(ctx), request.query.get("policy", "")
    rows = [row for row in reading.decode(list[Role]) if not wanted or wanted in row.policies]
    return answer(request, reading, [role_shape(row, names) for row in rows])


@routes.add("PUT", "/v1/acl/role", body=RoleBody, answer=RoleRow)
@when_enabled
async def create_role(ctx: Context, request: web.Request) -> web.StreamResponse:
    """Create a role."""
    body = await body_as(ctx, request, RoleBody)
    if body.id:
        raise BadRequest("Cannot specify the ID when creating a new role")
    return await _put_role(ctx, request, body, new_id(request, "acl role"), None)


async def _put_role(ctx: Context, request: web.Request, body: RoleBody, id: str, old: Role | None) -> web.Response:
    if not body.name:
        raise BadRequest("Invalid Role: no Name is set")
    require_no_templates(body.templated_policies)
    names = await policy_names(ctx)
    row = Role(
        id,
        body.name,
        body.description,
        linked("Policy", body.policies, names),
        body.service_identities or (),
        body.node_identities or (),
    )
    if not (row.policies or row.service_identities or row.node_identities):
        raise BadRequest("Invalid Role: it must have at least one of Policies, ServiceIdentities, NodeIdentities")
    if not await write(ctx, request, c.UpsertRole(row, cas_index=old.modify_index if old else 0)):
        raise HttpError(409, f"Role {id}: {CHANGED}")
    return json_response(request, role_shape((await ask(ctx, "acl.role", id=id)).decode(Role), names))


async def _role(ctx: Context, **params: str) -> Role:
    found = await ask(ctx, "acl.role", **params)
    if found.raw is None:
        raise NotFound("Requested role does not exist: ACL not found")
    row: Role = found.decode(Role)
    return row


@routes.add("GET", "/v1/acl/role/name/{name:.+}", answer=RoleRow)
@when_enabled
async def role_by_name(ctx: Context, request: web.Request) -> web.StreamResponse:
    """A role by name."""
    row = await _role(ctx, name=request.match_info["name"])
    return json_response(request, role_shape(row, await policy_names(ctx)))


@routes.add("GET", "/v1/acl/role/{id}", answer=RoleRow)
@when_enabled
async def role(ctx: Context, request: web.Request) -> web.StreamResponse:
    """A role by id."""
    row = await _role(ctx, id=given_id(request, "role"))
    return json_response(request, role_shape(row, await policy_names(ctx)))


@routes.add("PUT", "/v1/acl/role/{id}", body=RoleBody, answer=RoleRow)
@when_enabled
async def update_role(ctx: Context, request: web.Request) -> web.StreamResponse:
    """Replace a role."""
    id = given_id(request, "role")
    body = await body_as(ctx, request, RoleBody)
    if body.id and body.id != id:
        raise BadRequest("Role ID in URL and payload do not match")
    return await _put_role(ctx, request, body, id, await _role(ctx, id=id))


@routes.add("DELETE", "/v1/acl/role/{id}", answer=bool)
@when_enabled
async def delete_role(ctx: Context, request: web.Request) -> web.StreamResponse:
    """Delete a role: whoever had it loses what it granted."""
    await write(ctx, request, c.DeleteRole(given_id(request, "role")))
    return json_response(request, True)
