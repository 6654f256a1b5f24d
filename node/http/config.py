"""``/v1/config``: configuration entries, and the discovery chain that they make of a service."""

from __future__ import annotations

from typing import Any

import msgspec
from aiohttp import web

from node.http.answers.chain import ChainAnswer
from node.http.answers.common import Empty
from node.http.chain import shown_chain
from node.http.context import Context, Routes
from node.http.errors import BadRequest, NotFound
from node.http.reading import answer, filtered, read
from node.http.respond import json_response
from node.http.writing import read_body, write
from proxy.authz import check_permission
from raftstate.chain import (
    INTENTIONS,
    KINDS,
    BadEntry,
    check_entry,
    check_expressions,
    check_intentions,
    check_served,
)
from raftstate.model.plan import Plan
from raftstate.state import commands, config_entries

routes = Routes("config")
_OTHER_KINDS = frozenset(
    (
        "api-gateway", "bound-api-gateway", "control-plane-request-limit", "exported-services",
        "file-system-certificate", "http-route", "ingress-gateway", "inline-certificate", "jwt-provider", "mesh",
        "sameness-group", "tcp-route", "terminating-gateway",
    )
)  # fmt: skip
"""Of Consul's. Clients look whether there are any; here there are none."""


@routes.add("PUT", "/v1/config", body=dict[str, Any], answer=bool)
async def put(ctx: Context, request: web.Request) -> web.StreamResponse:
    """Write an entry; with ``?cas=`` only if it is as old as that."""
    try:
        body = msgspec.json.decode(await read_body(request, ctx.options.body_bytes_max), type=dict[str, Any])
    except (msgspec.DecodeError, RecursionError) as error:
        raise BadRequest(f"Request decoding failed: {error}") from error
    kind, name = _take(body, "kind"), _take(body, "name")
    if not kind:
        raise BadRequest("Payload does not contain a Kind key at the top level")
    if kind in KINDS:
        entry = {key: value for key, value in body.items() if key not in ("CreateIndex", "ModifyIndex")}
        try:
            spelt = check_entry(kind, name, entry)
            check_expressions(kind, name, spelt)
            check_served(kind, name, spelt)
        except BadEntry as error:
            raise BadRequest(str(error)) from error
    elif kind == INTENTIONS:
        body = _checked_intentions(name, body)
    command = commands.SetConfigEntry(kind=kind, name=name, entry=body, cas_index=cas_index(request))
    return json_response(request, await write(ctx, request, command))


def _checked_intentions(name: str, body: dict[str, Any]) -> dict[str, Any]:
    """Return a service-intentions entry as Consul's API spells it. Raises BadRequest."""
    entry = {key: value for key, value in body.items() if key not in ("CreateIndex", "ModifyIndex")}
    try:
        spelt, permissions = check_intentions(name, entry)
    except BadEntry as error:
        raise BadRequest(str(error)) from error
    for at, permission in permissions:
        if problem := check_permission(permission):
            raise BadRequest(f"{INTENTIONS} {name!r}: {at}: {problem}")
    return spelt


def _known_kind(request: web.Request) -> str:
    kind = request.match_info["kind"]
    if kind not in config_entries.KINDS and kind not in _OTHER_KINDS:
        known = ", ".join(config_entries.KINDS)
        raise BadRequest(f"invalid config entry kind: {kind[:80]} (known: {known})")
    return kind


def _take(body: dict[str, Any], name: str) -> str:
    for key in tuple(body):
        if key.lower() == name:
            value = body.pop(key)
            if not isinstance(value, str):
                raise BadRequest(f"{key} must be a string")
            return value
    return ""


def cas_index(request: web.Request) -> int | None:
    given = request.query.get("cas")
    if given is None:
        return None
    if not (given.isascii() and given.isdigit()) or len(given) > 19:
        raise BadRequest(f"Invalid value for ?cas: {given[:30]!r}")
    return int(given)


@routes.add("GET", "/v1/config/{kind}/{name:.+}", answer=dict[str, Any])
async def get(ctx: Context, request: web.Request) -> web.StreamResponse:
    """An entry."""
    kind, name = _known_kind(request), request.match_info["name"]
    reading = await read(ctx, request, "config.get", {"kind": kind, "name": name}, rows=False)
    if reading.raw is None:
        error = NotFound(f'Config entry not found for "{kind}" / "{name}"')
        error.headers = reading.headers
        raise error
    return answer(request, reading, reading.value)


@routes.add("GET", "/v1/config/{kind}", answer=list[dict[str, Any]])
async def list_kind(ctx: Context, request: web.Request) -> web.StreamResponse:
    """All entries of a kind."""
    reading = await read(ctx, request, "config.list", {"kind": _known_kind(request)}, rows=False)
    return answer(request, reading, filtered(list(reading.value), reading.options))


@routes.add("DELETE", "/v1/config/{kind}/{name:.+}", answer=bool | Empty)
async def delete(ctx: Context, request: web.Request) -> web.StreamResponse:
    """Delete an entry; with ``?cas=`` only if it is as old as that."""
    cas = cas_index(request)
    command = commands.DeleteConfigEntry(request.match_info["kind"], request.match_info["name"], cas)
    done = await write(ctx, request, command)
    return json_response(request, done if cas is not None else {})


@routes.add("GET POST", "/v1/discovery-chain/{service}", answer=ChainAnswer)
async def discovery_chain(ctx: Context, request: web.Request) -> web.StreamResponse:
    """The way that a call to a service takes, as its configuration entries make it."""
    params = {"service": request.match_info["service"], "datacenter": ctx.agent.options.datacenter}
    reading = await read(ctx, request, "discovery.chain", params, rows=False)
    plan = msgspec.convert(reading.value, Plan)
    return answer(request, reading, {"Chain": shown_chain(plan, ctx.agent.options.datacenter)})
