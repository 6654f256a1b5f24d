"""``/v1/agent/connect``: roots, leaves, authorization, and the sidecars' configuration streams."""

from __future__ import annotations

import asyncio
import contextlib

import msgspec
from aiohttp import web

from node.agent.sidecars import SidecarFeed
from node.http.acl_needs import permit, service_write
from node.http.agent_services import definition_of, registration_needs
from node.http.answers.connect import Authorization, Roots
from node.http.connect import answer_roots
from node.http.context import Context, Routes
from node.http.errors import BadRequest, NotFound
from node.http.options import read_options
from node.http.respond import empty, json_response, query_headers
from node.http.writing import body_as, read_body
from proxy.authz import compile_policy
from raftstate.model.connect import Leaf, Revocation
from raftstate.model.identity import Identity, InvalidSpiffeId, SpiffeId
from raftstate.model.intention import Intention
from raftstate.model.sidecar import SidecarAnswer
from raftstate.model.wire import Wire, to_json

routes = Routes("agent connect")
LEAF_WAIT_S = 10.0
PID_HEADER = "X-Lictor-Pid"
ANSWERS_HEADER = "X-Lictor-Answers"
"""``1``: the sidecar will answer each line, by ``PUT /v1/agent/connect/answer/<sidecar-id>``."""


@routes.add("GET", "/v1/agent/connect/ca/roots", answer=Roots, text="application/pem-certificate-chain")
async def roots(ctx: Context, request: web.Request) -> web.StreamResponse:
    """The trust bundle."""
    return await answer_roots(ctx, request)


@routes.add("GET", "/v1/agent/connect/ca/leaf/{service:.*}", answer=Leaf)
async def leaf(ctx: Context, request: web.Request) -> web.StreamResponse:
    """A service's certificate with its key, made on this host; blocks until it is renewed."""
    service = request.match_info["service"]
    if not service:
        raise BadRequest("Missing service name")
    options = read_options(request.query, request.headers, ctx.rng)
    entry = ctx.agent.leaves.entry(service)
    hit = entry.leaf is not None
    found = await entry.wait(options.min_index, options.wait_s if options.min_index and hit else LEAF_WAIT_S)
    headers = query_headers(found.modify_index, True, 0, "leader") | {"X-Cache": "HIT" if hit else "MISS"}
    return json_response(request, found, headers=headers)


class Authorize(Wire, frozen=True):
    """``POST /v1/agent/connect/authorize``."""

    target: str = ""
    client_cert_uri: str = ""
    client_cert_serial: str = ""


@routes.add("POST PUT", "/v1/agent/connect/authorize", body=Authorize, answer=Authorization)
async def authorize(ctx: Context, request: web.Request) -> web.StreamResponse:
    """Whether a connection is to be admitted; intentions on requests (L7) count as deny, as in Consul."""
    body = await body_as(ctx, request, Authorize)
    if not body.target:
        raise BadRequest("Target service must be specified")
    permit(request, service_write(body.target))
    try:
        source = SpiffeId.parse(body.client_cert_uri)
    except InvalidSpiffeId as error:
        raise BadRequest(f"ClientCertURI: {error}") from error
    allowed, reason = await _decide(ctx, source, body)
    return json_response(request, {"Authorized": allowed, "Reason": reason})


async def _decide(ctx: Context, source: SpiffeId, body: Authorize) -> tuple[bool, str]:
    """Decide from this node's own views: no round trip, and the last known answer when the servers are away."""
    views = ctx.agent.views
    trust = ctx.agent.leaves.roots()
    if trust is not None and trust.trust_domain and source.trust_domain != trust.trust_domain.lower():
        return False, f"Identity from an external trust domain: {source.trust_domain}"
    params = {"by": "destination", "name": body.target}
    async with views.holding("intentions.match", params) as intentions, views.holding("connect.revocations") as gone:
        serial = body.client_cert_serial.replace("-", ":").lower()
        for row in gone.typed(Revocation):
            if (row.kind, row.value) in (("service", source.service), ("serial", serial)):
                return False, f"the {row.kind} {row.value} is revoked" + (f": {row.reason}" if row.reason else "")
        default = ctx.agent.options.default_allow
        policy = intentions.memo("policy", lambda: compile_policy(intentions.typed(Intention), default))
        decision = policy.decide_l4(Identity(service=source.service, serial=serial), body.target, "")
        return decision.allowed, decision.reason


@routes.add("POST", "/v1/agent/connect/proxy/{id}/stream", answer=bytes, streams=True)
async def stream(ctx: Context, request: web.Request) -> web.StreamResponse:
    """A sidecar's registration and, in answer, its configuration as a stream of JSON lines (Lictor's own)."""
    definition = definition_of(await read_body(request, ctx.options.body_bytes_max))
    sidecar_id = request.match_info["id"]
    if definition.id and definition.id != sidecar_id:
        raise BadRequest(f"the body's ID {definition.id!r} contradicts the path's {sidecar_id!r}")
    definition = msgspec.structs.replace(definition, id=sidecar_id)
    permit(request, *registration_needs(ctx.agent, definition))
    answers = request.headers.get(ANSWERS_HEADER, "") == "1"
    async with ctx.agent.streams.hold(definition, _pid(request), answers=answers) as feed:
        response = web.StreamResponse(headers={"Content-Type": "application/x-ndjson", "Cache-Control": "no-store"})
        await response.prepare(request)
        await _pump(request, response, feed)
    return response


@routes.add("PUT", "/v1/agent/connect/answer/{id:.*}", body=SidecarAnswer)
async def answer(ctx: Context, request: web.Request) -> web.StreamResponse:
    """A sidecar's answer to a line of its stream: it has taken it, so it is not stopped (Lictor's own). What it says
    besides may be left out."""
    sidecar_id = request.match_info["id"]
    said = await body_as(ctx, request, SidecarAnswer)
    if not ctx.agent.streams.answered(sidecar_id, _pid(request), said):
        raise NotFound(f"no stream of sidecar {sidecar_id!r} is held by this process")
    return empty()


def _pid(request: web.Request) -> str:
    return request.headers.get(PID_HEADER, "")[:20]


async def _pump(request: web.Request, response: web.StreamResponse, feed: SidecarFeed) -> None:
    """Send updates until either end is gone. The sidecar's end shows as the end of its request's connection."""
    updates = feed.updates()
    transport = request.transport
    try:
        async for update in updates:
            if transport is None or transport.is_closing():
                return
            await response.write(to_json(update) + b"\n")
    except (ConnectionError, asyncio.CancelledError):
        # aiohttp cancels the handler when the peer hangs up; for this stream that is its ordinary end.
        if transport is not None and not transport.is_closing():
            raise
    finally:
        await updates.aclose()  # type: ignore[attr-defined]  # an async generator
    with contextlib.suppress(ConnectionError):
        await response.write_eof()
