"""Answers in Consul's form: JSON, an empty 200, and the headers of a query."""

from __future__ import annotations

import json
from typing import Any

from aiohttp import web
from multidict import CIMultiDict

from raftstate.model.wire import to_json

JSON_TYPE = "application/json"


def json_response(
    request: web.Request, value: Any, *, status: int = 200, headers: dict[str, str] | None = None
) -> web.Response:
    """Answer with JSON; ``value`` is builtins, model values, or bytes that are JSON already."""
    body = value if isinstance(value, bytes) else to_json(value)
    if "pretty" in request.query:
        body = json.dumps(json.loads(body), indent=4, ensure_ascii=False).encode() + b"\n"
    return web.Response(body=body, status=status, headers=CIMultiDict(headers or {}), content_type=JSON_TYPE)


def empty(headers: dict[str, str] | None = None) -> web.Response:
    """Answer 200 with an empty body: Consul's success of a write that has no value."""
    return web.Response(body=b"", headers=CIMultiDict(headers or {}))


def query_headers(index: int, known_leader: bool, last_contact_ms: int, consistency: str) -> dict[str, str]:
    """Return the headers of a query's answer. The index is never 0: that would make a client spin."""
    return {
        "X-Consul-Index": str(max(index, 1)),
        "X-Consul-KnownLeader": "true" if known_leader else "false",
        "X-Consul-LastContact": str(last_contact_ms),
        "X-Consul-Effective-Consistency": consistency,
    }
