"""``/v1/session``: claims on locks that end with their node, their checks or their time."""

from __future__ import annotations

from aiohttp import web

from node.durations import parse_duration_s
from node.http.answers.common import Created
from node.http.context import Context, Routes
from node.http.errors import BadRequest, HttpError, NotFound
from node.http.ids import new_id
from node.http.reading import answer, read
from node.http.respond import json_response
from node.http.writing import body_as, write
from raftstate.model.kv import BEHAVIOR_DELETE, BEHAVIOR_RELEASE, DEFAULT_LOCK_DELAY_NS, ServiceCheck, Session
from raftstate.model.wire import Wire
from raftstate.state import commands

routes = Routes("session")

TTL_MIN_S, TTL_MAX_S = 10.0, 86400.0
SERF = "serfHealth"


class SessionBody(Wire, frozen=True):
    """``PUT /v1/session/create``."""

    name: str = ""
    node: str = ""
    lock_delay: str | int | float | None = None
    behavior: str = BEHAVIOR_RELEASE
    ttl: str = ""
    checks: tuple[str, ...] | None = None
    node_checks: tuple[str, ...] | None = None
    service_checks: tuple[ServiceCheck, ...] = ()


def _lock_delay_ns(given: str | int | float | None) -> int:
    """Consul's rule: a text is a duration; a number under 1000 means seconds, any other nanoseconds."""
    if given is None:
        return DEFAULT_LOCK_DELAY_NS
    try:
        if isinstance(given, str):
            return max(round(parse_duration_s(given) * 1e9), 0)
        return max(round(given * 1e9 if given < 1000 else given), 0)
    except (ValueError, OverflowError) as error:
        raise BadRequest(f"Request decode failed: LockDelay: {error}") from error


def _require_ttl(ttl: str) -> None:
    if not ttl:
        return
    try:
        seconds = parse_duration_s(ttl)
    except ValueError:
        raise HttpError(500, f"Request decode failed: Session TTL '{ttl[:40]}' invalid: not a duration") from None
    if seconds != 0 and not TTL_MIN_S <= seconds <= TTL_MAX_S:
        raise HttpError(500, f"Invalid Session TTL '{ttl[:40]}', must be between [10s=24h0m0s]")


@routes.add("PUT", "/v1/session/create", body=SessionBody, answer=Created)
async def create(ctx: Context, request: web.Request) -> web.StreamResponse:
    """Create a session; with an empty body on this node, by its liveness."""
    body = await body_as(ctx, request, SessionBody)
    if body.behavior not in (BEHAVIOR_RELEASE, BEHAVIOR_DELETE):
        raise BadRequest(f"Invalid Behavior {body.behavior[:40]!r}: use release or delete")
    _require_ttl(body.ttl)
    checks = body.node_checks if body.node_checks is not None else body.checks
    session = Session(
        id=new_id(request, "session"),
        node=body.node or ctx.agent.options.node,
        name=body.name,
        lock_delay=_lock_delay_ns(body.lock_delay),
        behavior=body.behavior,
        ttl=body.ttl,
        node_checks=(SERF,) if checks is None else checks,
        service_checks=body.service_checks,
    )
    return json_response(request, {"ID": await write(ctx, request, commands.SessionCreate(session))})


def _id(request: web.Request) -> str:
    session_id: str = request.match_info["id"]
    if not session_id:
        raise BadRequest("Missing session")
    return session_id


@routes.add("PUT", "/v1/session/destroy/{id:.*}", answer=bool)
async def destroy(ctx: Context, request: web.Request) -> web.StreamResponse:
    """End a session."""
    await write(ctx, request, commands.SessionDestroy(id=_id(request)))
    return json_response(request, True)


@routes.add("PUT", "/v1/session/renew/{id:.*}", answer=list[Session])
async def renew(ctx: Context, request: web.Request) -> web.StreamResponse:
    """Start a session's time again."""
    session_id = _id(request)
    session = await write(ctx, request, commands.SessionRenew(id=session_id))
    if session is None:
        raise NotFound(f"Session id '{session_id}' not found")
    return json_response(request, [session])


@routes.add("GET", "/v1/session/info/{id:.*}", answer=list[Session])
async def info(ctx: Context, request: web.Request) -> web.StreamResponse:
    """A session, in a list; an empty list for an unknown one."""
    reading = await read(ctx, request, "session.info", {"id": _id(request)}, rows=False)
    return answer(request, reading, reading.raw or [])


@routes.add("GET", "/v1/session/list", answer=list[Session])
async def list_all(ctx: Context, request: web.Request) -> web.StreamResponse:
    """All sessions."""
    reading = await read(ctx, request, "session.list", rows=False)
    return answer(request, reading, reading.raw)


@routes.add("GET", "/v1/session/node/{node:.*}", answer=list[Session])
async def list_node(ctx: Context, request: web.Request) -> web.StreamResponse:
    """The sessions of a node."""
    node = request.match_info["node"]
    if not node:
        raise BadRequest("Missing node name")
    reading = await read(ctx, request, "session.node", {"node": node}, rows=False)
    return answer(request, reading, reading.raw)
