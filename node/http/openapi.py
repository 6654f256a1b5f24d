"""``/v1/openapi.json``: a description of this API, made from the route table it is served by."""

from __future__ import annotations

import re
from functools import cache
from typing import Any, Never, is_typeddict

import msgspec
from aiohttp import web

from node.http.answers import acl, agent, catalog, chain, common, connect, operator, topology, txn
from node.http.context import Context, Route, Routes
from node.http.respond import json_response

routes = Routes("openapi")
_PARAMETER = re.compile(r"\{(\w+)(?::[^{}]*(?:\{[^{}]*\}[^{}]*)*)?\}")

_QUERY = {
    "index": "Block until the index exceeds this one.",
    "wait": "How long to block at most, as 30s or 5m; at most 10m.",
    "stale": "Any node may answer; present or not.",
    "consistent": "The leader confirms with a quorum first; present or not.",
    "cached": "Answer from this agent's local view; present or not.",
    "filter": "Consul's filter expression.",
    "near": "Sort this node first, then its zone and region; _agent means the agent's own.",
    "pretty": "Indent the JSON; present or not.",
}
_MEANINGS = {
    409: "Nothing was done; the errors say why.",
    429: "A warning: not all is well.",
    503: "Critical.",
}
_ANSWERS = (acl, agent, catalog, chain, common, connect, operator, topology, txn)
_BLOCKING = (
    "/v1/catalog/", "/v1/health/", "/v1/kv/", "/v1/session/", "/v1/connect/", "/v1/config",
    "/v1/agent/connect/ca",
)  # fmt: skip


def describe(table: list[Route], version: str) -> dict[str, Any]:
    """Return the OpenAPI 3.1 document of a route table."""
    types = {route.body: None for route in table} | {route.answer: None for route in table}
    kinds = [kind for kind in types if kind not in (None, bytes, Never)]
    shapes, components = msgspec.json.schema_components(kinds, ref_template="#/components/schemas/{name}")
    for name, kind in (pair for module in _ANSWERS for pair in vars(module).items()):
        if is_typeddict(kind) and name in components:
            components[name]["additionalProperties"] = False  # nothing is sent that is not said
    schemas = dict(zip(kinds, shapes, strict=True))
    paths: dict[str, dict[str, Any]] = {}
    for route in table:
        path = _PARAMETER.sub(r"{\1}", route.path)
        names = _PARAMETER.findall(route.path)
        for method in route.methods:
            paths.setdefault(path, {})[method.lower()] = _operation(route, method, path, names, schemas)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Lictor: Consul's HTTP API v1",
            "version": version,
            "description": "Errors are plain text. Query answers carry X-Consul-Index, KnownLeader and LastContact.",
        },
        "paths": dict(sorted(paths.items())),
        "components": {"schemas": dict(sorted(components.items()))},
    }


def _operation(
    route: Route, method: str, path: str, names: list[str], schemas: dict[Any, dict[str, Any]]
) -> dict[str, Any]:
    parameters: list[dict[str, Any]] = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in names
    ]
    if method == "GET" and path.startswith(_BLOCKING):
        parameters += [
            {"name": name, "in": "query", "description": text, "schema": {"type": "string"}}
            for name, text in _QUERY.items()
        ]
    family = route.handler.__module__.rpartition(".")[2]
    operation: dict[str, Any] = {
        "summary": route.summary,
        "operationId": f"{family}.{route.handler.__name__}.{method.lower()}",
        "tags": [family],
        "responses": _responses(route, schemas),
    }
    if parameters:
        operation["parameters"] = parameters
    if method in ("PUT", "POST"):
        body = schemas.get(route.body, {})
        operation["requestBody"] = {"required": bool(body), "content": {_media(route.body): {"schema": body}}}
    return operation


def _responses(route: Route, schemas: dict[Any, dict[str, Any]]) -> dict[str, Any]:
    responses: dict[str, Any] = {}
    for status in () if route.answer is Never else route.statuses:
        response: dict[str, Any] = {"description": _MEANINGS.get(status, "Done.")}
        if route.answer is not None:
            content = {_media(route.answer): {"schema": schemas.get(route.answer, {})}}
            response["content"] = content | ({route.text: {"schema": {}}} if route.text else {})
        responses[str(status)] = response
    responses["default"] = {
        "description": "An error, as a text.",
        "content": {"text/plain": {"schema": {"type": "string"}}},
    }
    return responses


def _media(kind: Any) -> str:
    """Return the media type of a body: bytes are a snapshot, a value or a stream, everything else is JSON."""
    return "application/octet-stream" if kind is bytes else "application/json"


@cache
def _document(version: str) -> dict[str, Any]:
    from node.http.app import all_routes

    return describe(all_routes(), version)


@routes.add("GET", "/v1/openapi.json", answer=dict[str, Any])
async def openapi(ctx: Context, request: web.Request) -> web.StreamResponse:
    """This description."""
    return json_response(request, _document(ctx.options.lictor_version))
