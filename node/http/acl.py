"""``/v1/acl``: the first token, tokens, and what of Consul's access control is left out."""

from __future__ import annotations

import datetime
import ipaddress
import uuid
from typing import Any, Never

import msgspec
from aiohttp import web

from node.durations import parse_duration_s
from node.http.acl_guard import shown_token
from node.http.acl_policies import (
    CHANGED,
    ask,
    given_id,
    linked,
    policy_names,
    role_names,
    when_enabled,
    write,
)
from node.http.acl_shapes import TokenBody, policy_shape, require_no_templates, token_shape
from node.http.answers.acl import Replication, TokenRow
from node.http.answers.common import Empty
from node.http.context import Context, Routes
from node.http.errors import BadRequest, HttpError, NotFound, NotSupported
from node.http.ids import new_id
from node.http.reading import answer, read
from node.http.respond import json_response
from node.http.writing import body_as
from node.tokens import NOT_FOUND, hash_of
from raftstate.model.acl import ANONYMOUS_ID, MANAGEMENT_ID, Bootstrap, Policy, Role, Token, expired
from raftstate.model.wire import Wire
from raftstate.state import commands as c

routes = Routes("acl")
TTL_MIN_S, TTL_MAX_S = 60.0, 24 * 3600.0
"""Consul's bounds of a token's time (``acl.token_ttl`` cannot be set here)."""


class BootstrapBody(Wire, frozen=True):
    """``PUT /v1/acl/bootstrap``."""

    bootstrap_secret: str = ""


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)


@routes.add("PUT", "/v1/acl/bootstrap", body=BootstrapBody, answer=TokenRow)
@when_enabled
async def bootstrap(ctx: Context, request: web.Request) -> web.StreamResponse:
    """Make the first token, which may do everything; once, and from an agent's own host only."""
    if not _from_this_host(request):
        raise HttpError(403, "Permission denied: the first token is made on the host of an agent, over loopback")
    body = await body_as(ctx, request, BootstrapBody)
    secret = _uuid(body.bootstrap_secret, "BootstrapSecret") if body.bootstrap_secret else str(uuid.uuid4())
    row = Token(
        new_id(request, "acl token"),
        hash_of(secret),
        description="Bootstrap Token (Global Management)",
        policies=(MANAGEMENT_ID,),
    )
    if not await write(ctx, request, c.BootstrapACL(row)):
        held = (await ask(ctx, "acl.bootstrap")).decode(Bootstrap)
        raise HttpError(403, f"Permission denied: ACL bootstrap no longer allowed (reset index: {held.modify_index})")
    return await _shown(ctx, request, row.accessor_id, secret)


def _from_this_host(request: web.Request) -> bool:
    try:
        return ipaddress.ip_address(request.remote or "").is_loopback
    except ValueError:
        return False


def _uuid(given: str, what: str) -> str:
    try:
        return str(uuid.UUID(given))
    except ValueError:
        raise BadRequest(f"{what} must be a UUID: leave it out to have one made") from None


async def _shown(ctx: Context, request: web.Request, accessor_id: str, secret: str = "") -> web.Response:
    row = await _token(ctx, accessor_id)
    shown = token_shape(row, await policy_names(ctx), await role_names(ctx), secret)
    if "expanded" in request.query:
        shown |= await _expanded(ctx, row)
    return json_response(request, shown)


async def _expanded(ctx: Context, row: Token) -> dict[str, Any]:
    """What a token comes to: its policies and roles in full."""
    policies = {one.id: one for one in (await ask(ctx, "acl.policies")).decode(list[Policy])}
    roles = {one.id: one for one in (await ask(ctx, "acl.roles")).decode(list[Role])}
    held = [roles[id] for id in row.roles if id in roles]
    ids = dict.fromkeys([*row.policies, *(id for one in held for id in one.policies)])
    assert ctx.access is not None
    return {
        "ExpandedPolicies": [policy_shape(policies[id]) for id in ids if id in policies],
        "ExpandedRoles": [msgspec.to_builtins(one) for one in held],
        "AgentACLDefaultPolicy": "allow" if ctx.access.tokens.default else "deny",
        "AgentACLDownPolicy": "extend-cache",
    }


async def _token(ctx: Context, accessor_id: str) -> Token:
    found = await ask(ctx, "acl.token", accessor_id=accessor_id)
    row: Token | None = found.decode(Token) if found.raw is not None else None
    if row is None or (row.expiration_time and expired(row.expiration_time, _now())):
        raise HttpError(403, NOT_FOUND)  # in these words and with this status in Consul too
    return row


@routes.add("GET", "/v1/acl/tokens", answer=list[TokenRow])
@when_enabled
async def tokens(ctx: Context, request: web.Request) -> web.StreamResponse:
    """All tokens; ``?policy=``, ``?role=`` and ``?servicename=`` narrow them."""
    reading = await read(ctx, request, "acl.list", rows=False)
    policies, roles, now = await policy_names(ctx), await role_names(ctx), _now()
    wanted = {name: request.query.get(name, "") for name in ("policy", "role", "servicename")}
    rows = [
        row
        for row in reading.decode(list[Token])
        if not (row.expiration_time and expired(row.expiration_time, now))
        and wanted["policy"] in ("", *row.policies)
        and wanted["role"] in ("", *row.roles)
        and wanted["servicename"] in ("", *(one.service_name for one in row.service_identities))
    ]
    return answer(request, reading, [token_shape(row, policies, roles, _listed(row)) for row in rows])


def _listed(row: Token) -> str:
    return "anonymous" if row.accessor_id == ANONYMOUS_ID else "<hidden>"


@routes.add("PUT", "/v1/acl/token", body=TokenBody, answer=TokenRow)
@when_enabled
async def create(ctx: Context, request: web.Request) -> web.StreamResponse:
    """Create a token. Its secret is shown now and never again."""
    body = await body_as(ctx, request, TokenBody)
    accessor = _uuid(body.accessor_id, "AccessorID") if body.accessor_id else new_id(request, "acl token")
    secret = _uuid(body.secret_id, "SecretID") if body.secret_id else str(uuid.uuid4())
    row = await _row(ctx, body, accessor, hash_of(secret), description=body.description or "", local=body.local)
    row = msgspec.structs.replace(row, expiration_time=_expiration(body))
    if not await write(ctx, request, c.UpsertToken(row, cas_index=0)):
        raise HttpError(400, f"Invalid Token: AccessorID {accessor} is already in use")
    return await _shown(ctx, request, accessor, secret)


async def _row(
    ctx: Context, body: TokenBody, accessor: str, secret_hash: str, *, description: str, local: bool
) -> Token:
    require_no_templates(body.templated_policies)
    if body.auth_method:
        raise NotSupported("AuthMethod", "tokens are made with PUT /v1/acl/token")
    return Token(
        accessor,
        secret_hash,
        description=description,
        policies=linked("Policy", body.policies, await policy_names(ctx)),
        roles=linked("Role", body.roles, await role_names(ctx)),
        service_identities=body.service_identities or (),
        node_identities=body.node_identities or (),
        local=local,
    )


def _expiration(body: TokenBody) -> str:
    """Return when a token ends, RFC 3339, or an empty text. Raises BadRequest."""
    if body.expiration_time and body.expiration_ttl:
        raise BadRequest("Token Expiration TTL and Expiration Time cannot both be set")
    if body.expiration_ttl:
        try:
            given = body.expiration_ttl
            ttl_s = parse_duration_s(given) if isinstance(given, str) else given / 1e9
        except ValueError as error:
            raise BadRequest(f"ExpirationTTL: {error}") from None
    elif body.expiration_time and not body.expiration_time.startswith("0001-"):
        try:
            ttl_s = (datetime.datetime.fromisoformat(body.expiration_time) - _now()).total_seconds()
        except (ValueError, TypeError):
            raise BadRequest("ExpirationTime must be an RFC 3339 time, such as 2030-01-01T00:00:00Z") from None
    else:
        return ""
    if not TTL_MIN_S <= ttl_s <= TTL_MAX_S:
        raise BadRequest("a token's time (ExpirationTTL, ExpirationTime) must be between 1m and 24h from now")
    return (_now() + datetime.timedelta(seconds=ttl_s)).isoformat().replace("+00:00", "Z")


@routes.add("GET", "/v1/acl/token/self", answer=TokenRow)
@when_enabled
async def own(ctx: Context, request: web.Request) -> web.StreamResponse:
    """The token that this request shows."""
    assert ctx.access is not None
    secret = shown_token(request)
    bearer = await ctx.access.bearer(secret)
    if not bearer.accessor_id:
        raise NotFound("this secret is of acl_token_file of this host, and no token of the cluster yet: try again")
    return await _shown(ctx, request, bearer.accessor_id, secret)


@routes.add("PUT", "/v1/acl/token/{id}/clone", body=TokenBody, answer=TokenRow)
@when_enabled
async def clone(ctx: Context, request: web.Request) -> web.StreamResponse:
    """A new token that may do what another one may; a description may be given."""
    old = await _token(ctx, given_id(request, "token"))
    if old.accessor_id == ANONYMOUS_ID:
        raise BadRequest("Cannot clone the anonymous token")
    body = await body_as(ctx, request, TokenBody)
    secret = str(uuid.uuid4())
    row = msgspec.structs.replace(
        old,
        accessor_id=new_id(request, "acl token"),
        secret_hash=hash_of(secret),
        description=old.description if body.description is None else body.description,
        create_time="",
        create_index=0,
        modify_index=0,
    )
    if not await write(ctx, request, c.UpsertToken(row, cas_index=0)):
        raise HttpError(409, f"Token {row.accessor_id}: {CHANGED}")
    return await _shown(ctx, request, row.accessor_id, secret)


@routes.add("GET", "/v1/acl/token/{id}", answer=TokenRow)
@when_enabled
async def get(ctx: Context, request: web.Request) -> web.StreamResponse:
    """A token by its accessor id, without its secret; ``?expanded`` shows what it comes to."""
    return await _shown(ctx, request, given_id(request, "token"))


@routes.add("PUT", "/v1/acl/token/{id}", body=TokenBody, answer=TokenRow)
@when_enabled
async def update(ctx: Context, request: web.Request) -> web.StreamResponse:
    """Replace what a token may do. Its secret and its end stay."""
    accessor = given_id(request, "token")
    body = await body_as(ctx, request, TokenBody)
    if body.accessor_id and body.accessor_id != accessor:
        raise BadRequest("Token Accessor ID in URL and payload do not match")
    old = await _token(ctx, accessor)
    if (
        body.secret_id
        and body.secret_id not in ("<hidden>", "anonymous")
        and hash_of(body.secret_id) != old.secret_hash
    ):
        raise BadRequest("Changing a token's SecretID is not permitted")
    row = await _row(ctx, body, accessor, old.secret_hash, description=body.description or "", local=old.local)
    row = msgspec.structs.replace(row, expiration_time=old.expiration_time, create_time=old.create_time)
    stored = accessor != ANONYMOUS_ID or old.create_index > 1
    if not await write(ctx, request, c.UpsertToken(row, cas_index=old.modify_index if stored else 0)):
        raise HttpError(409, f"Token {accessor}: {CHANGED}")
    return await _shown(ctx, request, accessor)


@routes.add("DELETE", "/v1/acl/token/{id}", answer=bool)
@when_enabled
async def delete(ctx: Context, request: web.Request) -> web.StreamResponse:
    """Delete a token: from then on it is good for nothing, at any node."""
    if not await write(ctx, request, c.DeleteToken(given_id(request, "token"))):
        raise NotFound("Cannot find token to delete")
    return json_response(request, True)


@routes.add("GET", "/v1/acl/replication", answer=Replication)
@when_enabled
async def replication(ctx: Context, request: web.Request) -> web.StreamResponse:
    """Between datacenters, of which there is one: none."""
    return json_response(request, {"Enabled": False, "Running": False, "SourceDatacenter": ""})


@routes.add("GET", "/v1/acl/auth-methods", answer=list[Empty])
@when_enabled
async def auth_methods(ctx: Context, request: web.Request) -> web.StreamResponse:
    """Ways to log in: none."""
    return json_response(request, [])


@routes.add("GET", "/v1/acl/binding-rules", answer=list[Empty])
@when_enabled
async def binding_rules(ctx: Context, request: web.Request) -> web.StreamResponse:
    """What logging in grants: nothing."""
    return json_response(request, [])


@routes.add("GET", "/v1/acl/templated-policies", answer=Empty)
@when_enabled
async def templated_policies(ctx: Context, request: web.Request) -> web.StreamResponse:
    """Policies with parameters: none."""
    return json_response(request, {})


@routes.add("GET PUT POST DELETE", "/v1/acl/{path:.*}", answer=Never)
@when_enabled
async def left_out(ctx: Context, request: web.Request) -> web.StreamResponse:
    """Not supported, with what to use instead."""
    raise NotSupported(
        f"/v1/acl/{request.match_info['path'][:80]}",
        "there are bootstrap, token, policy and role; logging in by auth methods is not there: make tokens with"
        " PUT /v1/acl/token",
    )
