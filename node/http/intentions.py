"""``/v1/connect/intentions``, both generations of it: by id, and by source and destination."""

from __future__ import annotations

import uuid
from typing import Any, cast

import msgspec
from aiohttp import web

from node.http.answers.common import Created
from node.http.answers.connect import HttpMatchRow, IntentionCheck, IntentionRow, PermissionRow
from node.http.context import Context, Routes
from node.http.errors import BadRequest, HttpError, NotFound
from node.http.ids import new_id
from node.http.reading import Reading, answer, filtered, read
from node.http.respond import json_response
from node.http.writing import body_as, write
from proxy.authz import check_permission, compile_policy
from raftstate.model.identity import Identity
from raftstate.model.intention import ALLOW, WILDCARD, HeaderMatch, HTTPMatch, Intention, Permission
from raftstate.state import commands

routes = Routes("intentions")


def shape(row: Intention) -> IntentionRow:
    """An intention as Consul shows it; Lictor's service of an instance is added where there is one."""
    built: dict[str, Any] = msgspec.to_builtins(row)
    for field in ("SourceService", "DestinationService"):
        if not built[field]:
            del built[field]
    if not built["Permissions"]:
        del built["Permissions"]
    else:
        del built["Action"]
        built["Permissions"] = [_permission(one) for one in built["Permissions"]]
    return cast(IntentionRow, built)


def _permission(permission: dict[str, Any]) -> PermissionRow:
    http = {name: value for name, value in permission["HTTP"].items() if value}
    if "Header" in http:
        http["Header"] = [{name: value for name, value in one.items() if value} for one in http["Header"]]
    return {"Action": permission["Action"], "HTTP": cast(HttpMatchRow, http)}


def name_of(reference: str, what: str) -> str:
    """Return the name in ``name``, ``ns/name`` or ``partition/ns/name``. Raises BadRequest."""
    *spaces, name = reference.split("/")
    if not name or len(spaces) > 2 or any(space not in ("", "default") for space in spaces):
        raise BadRequest(f"{what} must be NAME or default/NAME: there is one namespace, not {reference[:80]!r}")
    return name


def _pair(request: web.Request) -> tuple[str, str]:
    values = []
    for what in ("source", "destination"):
        reference = request.query.get(what, "")
        if not reference:
            raise HttpError(500, f"required query parameter '{what}' not set")
        values.append(name_of(reference, what))
    return values[0], values[1]


def _id(request: web.Request) -> str:
    given = request.match_info["id"]
    try:
        return str(uuid.UUID(given))
    except ValueError:
        raise BadRequest(f"Invalid intention ID {given[:80]!r}: it must be a UUID") from None


def _prepared(body: Intention, **changes: Any) -> Intention:
    """Return a body's intention without what only the state may say."""
    if body.permissions and body.action:
        raise BadRequest("Action must be omitted if Permissions are specified")
    for number, permission in enumerate(body.permissions):
        # A sidecar would take it for a denial; whoever wrote it should hear of it now.
        if problem := check_permission(permission):
            raise BadRequest(f"Permissions[{number}]: {problem}")
        if permission.http == HTTPMatch():
            raise BadRequest(f'Permissions[{number}].HTTP must say what is meant; for every request: PathPrefix "/"')
    return msgspec.structs.replace(
        body,
        source_ns=body.source_ns or "default",
        destination_ns=body.destination_ns or "default",
        source_type=body.source_type or "consul",
        precedence=0,
        created_at="",
        updated_at="",
        create_index=0,
        modify_index=0,
        **changes,
    )


class HeaderBody(HeaderMatch, frozen=True, forbid_unknown_fields=True):
    """A condition as a request gives it. What is misspelt in it is refused: without it more would be allowed."""


class HTTPBody(HTTPMatch, frozen=True, forbid_unknown_fields=True):
    """The same for what a permission covers."""

    header: tuple[HeaderBody, ...] = ()


class PermissionBody(Permission, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A permission as a request gives it, with what would be a condition of it and can't be had."""

    http: HTTPBody = HTTPBody()
    jwt: dict[str, Any] | None = msgspec.field(default=None, name="JWT")


class IntentionBody(Intention, frozen=True, kw_only=True):
    """An intention as a request gives it: on the exact endpoint the names stand in the query."""

    source_name: str = ""
    destination_name: str = ""
    permissions: tuple[PermissionBody, ...] = ()

    def intention(self) -> Intention:
        """Return it as the model's type. Raises BadRequest where a permission asks for a JWT."""
        for number, one in enumerate(self.permissions):
            if one.jwt:
                raise BadRequest(
                    f"Permissions[{number}].JWT: there are no JWTs here: who calls is known by certificate"
                )
        plain = tuple(msgspec.convert(msgspec.to_builtins(one), Permission) for one in self.permissions)
        return Intention(**{**msgspec.structs.asdict(self), "permissions": plain})


@routes.add("GET", "/v1/connect/intentions", answer=list[IntentionRow])
async def list_all(ctx: Context, request: web.Request) -> web.StreamResponse:
    """All intentions by falling precedence."""
    reading = await read(ctx, request, "intentions.list")
    return answer(request, reading, filtered([shape(row) for row in _rows(reading)], reading.options))


def _rows(reading: Reading) -> list[Intention]:
    rows = reading.decode(list[Intention])
    if reading.options.cached:
        rows.sort(key=lambda row: (-row.precedence, row.destination_name, row.source_name))
    return rows


@routes.add("POST", "/v1/connect/intentions", body=IntentionBody, answer=Created)
async def create(ctx: Context, request: web.Request) -> web.StreamResponse:
    """Create an intention; one that exists for the pair is an error."""
    body = (await body_as(ctx, request, IntentionBody)).intention()
    if body.id:
        raise HttpError(500, "ID must be empty when creating a new intention")
    if not body.source_name or not body.destination_name:
        raise BadRequest("SourceName and DestinationName must be set")
    source, destination = name_of(body.source_name, "SourceName"), name_of(body.destination_name, "DestinationName")
    row = _prepared(body, id=new_id(request, "intention"), source_name=source, destination_name=destination)
    stored = await write(ctx, request, commands.UpsertIntention(row, replace=False))
    return json_response(request, {"ID": stored["ID"]})


@routes.add("GET", "/v1/connect/intentions/exact", answer=IntentionRow)
async def get_exact(ctx: Context, request: web.Request) -> web.StreamResponse:
    """The intention of a source and a destination."""
    source, destination = _pair(request)
    params = {"source": source, "destination": destination}
    return _one(request, await read(ctx, request, "intentions.exact", params, rows=False))


@routes.add("PUT", "/v1/connect/intentions/exact", body=IntentionBody, answer=bool)
async def put_exact(ctx: Context, request: web.Request) -> web.StreamResponse:
    """Create or replace the intention of a source and a destination."""
    source, destination = _pair(request)
    body = (await body_as(ctx, request, IntentionBody)).intention()
    if body.id:
        raise BadRequest("ID must not be set: the query names the intention")
    for what, told, given in (
        ("SourceName", source, body.source_name),
        ("DestinationName", destination, body.destination_name),
    ):
        if given and name_of(given, what) != told:
            raise BadRequest(f"{what} {given!r} contradicts the query's {told!r}")
    row = _prepared(body, id=new_id(request, "intention"), source_name=source, destination_name=destination)
    await write(ctx, request, commands.UpsertIntention(row))
    return json_response(request, True)


@routes.add("DELETE", "/v1/connect/intentions/exact", answer=bool)
async def delete_exact(ctx: Context, request: web.Request) -> web.StreamResponse:
    """Delete the intention of a source and a destination; one that is gone is deleted."""
    source, destination = _pair(request)
    await write(ctx, request, commands.DeleteIntention(source=source, destination=destination))
    return json_response(request, True)


@routes.add("GET", "/v1/connect/intentions/match", answer=dict[str, list[IntentionRow]])
async def match(ctx: Context, request: web.Request) -> web.StreamResponse:
    """The intentions that may bear on a source or destination, by falling precedence."""
    by = request.query.get("by", "")
    if by not in ("source", "destination"):
        raise HttpError(500, "required query parameter 'by' not set: it must be one of source or destination")
    names = request.query.getall("name", [])
    if not names:
        raise HttpError(500, "required query parameter 'name' not set")
    found: dict[str, Any] = {}
    reading: Reading | None = None
    for reference in names:
        service, instance = await _meaning(ctx, name_of(reference, "name"))
        reading = await read(
            ctx, request, "intentions.match", {"by": by, "name": service, "instance": instance or WILDCARD}
        )
        found[reference] = [shape(row) for row in _rows(reading)]
    assert reading is not None
    return answer(request, reading, found)


@routes.add("GET", "/v1/connect/intentions/check", answer=IntentionCheck)
async def check(ctx: Context, request: web.Request) -> web.StreamResponse:
    """Whether a source may connect to a destination; intentions on requests (L7) count as deny, as in Consul."""
    source, destination = _pair(request)
    (source_service, source_instance), (service, instance) = (
        await _meaning(ctx, source),
        await _meaning(ctx, destination),
    )
    reading = await read(
        ctx, request, "intentions.match", {"by": "destination", "name": service, "instance": instance}
    )
    policy = compile_policy(reading.decode(list[Intention]), ctx.agent.options.default_allow)
    decision = policy.decide_l4(Identity(service=source_service, instance=source_instance), service, instance)
    # Beyond Consul's one field: why, in the words that log and sidecar use.
    return answer(request, reading, {"Allowed": decision.allowed, "Reason": decision.reason})


async def _meaning(ctx: Context, reference: str) -> tuple[str, str]:
    """Return (service, instance) that a reference means now. Raises HttpError when it is ambiguous."""
    found = (await ctx.backend.query("intentions.resolve", {"reference": reference})).value
    if "Error" in found:
        raise HttpError(409, str(found["Error"]))
    return str(found["Service"]), str(found["Instance"])


@routes.add("GET", "/v1/connect/intentions/{id}", answer=IntentionRow)
async def get(ctx: Context, request: web.Request) -> web.StreamResponse:
    """An intention by id."""
    return _one(request, await read(ctx, request, "intentions.get", {"id": _id(request)}, rows=False))


def _one(request: web.Request, reading: Reading) -> web.Response:
    row = reading.optional(Intention)
    if row is None:
        error = NotFound("Intention not found")
        error.headers = reading.headers
        raise error
    return answer(request, reading, shape(row))


@routes.add("PUT", "/v1/connect/intentions/{id}", body=IntentionBody, answer=Created)
async def update(ctx: Context, request: web.Request) -> web.StreamResponse:
    """Change an intention by id."""
    intention_id = _id(request)
    body = (await body_as(ctx, request, IntentionBody)).intention()
    if body.id and body.id != intention_id:
        raise BadRequest("ID in the body contradicts the path")
    held = await ctx.backend.query("intentions.get", {"id": intention_id})
    old = held.decode(Intention) if held.raw is not None else None
    if old is None:
        raise HttpError(500, f"Cannot modify non-existent intention: '{intention_id}'")
    row = _prepared(
        body,
        id=intention_id,
        source_name=name_of(body.source_name or old.source_name, "SourceName"),
        destination_name=name_of(body.destination_name or old.destination_name, "DestinationName"),
        source_service=body.source_service or (old.source_service if not body.source_name else ""),
        destination_service=body.destination_service
        or (old.destination_service if not body.destination_name else ""),
        action=body.action or ("" if body.permissions else old.action or ALLOW),
    )
    stored = await write(ctx, request, commands.UpsertIntention(row))
    return json_response(request, {"ID": stored["ID"]})


@routes.add("DELETE", "/v1/connect/intentions/{id}", answer=bool)
async def delete(ctx: Context, request: web.Request) -> web.StreamResponse:
    """Delete an intention by id."""
    await write(ctx, request, commands.DeleteIntention(id=_id(request)))
    return json_response(request, True)
