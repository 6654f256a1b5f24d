"""The middleware of access control: who asks, may they, and what of the answer may they see."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, cast

import msgspec
from aiohttp import web
from aiohttp.typedefs import Middleware

from node.errors import Refused
from node.http.acl_access import OPEN, TABLE, Access
from node.http.acl_needs import BEARER, COVERED, NEEDS, first_lacking, lacks, permit
from node.http.context import Context
from node.http.errors import HttpError
from node.http.front.repeats import Body
from node.http.middleware import foreign
from node.tokens import AccessControl, Bearer, bearer_token
from raftstate.acl import DENY

log = logging.getLogger("lictor.acl")

Next = Callable[[web.Request], Awaitable[web.StreamResponse]]
FILTERED_HEADER = "X-Consul-Results-Filtered-By-ACLs"
DEFAULT_POLICY_HEADER = "X-Consul-Default-ACL-Policy"
_BLOCKING = ("index", "hash")
_UNKNOWN = "this endpoint has no rule in the table of access control: please report this"


def shown_token(request: web.Request) -> str:
    """Return the secret that a request shows, or an empty text."""
    return bearer_token(request.headers, request.query.get("token", ""))


def make_enforcer(ctx: Context, control: AccessControl, held: frozenset[str]) -> Middleware:
    """Return the middleware; it stands within the one that turns errors into answers. ``held``: paths whose answers
    are sent piece by piece."""
    default = "deny" if control.tokens.default == DENY else "allow"

    @web.middleware
    async def enforce(request: web.Request, handler: Next) -> web.StreamResponse:
        resource = request.match_info.route.resource
        if resource is None:
            return await handler(request)  # no such path, or method: the same for everyone
        access = TABLE.get(f"{request.method} {resource.canonical}")
        if access is None:
            raise HttpError(403, f"Permission denied: {_UNKNOWN}")
        secret = shown_token(request)
        if not secret and (refusal := foreign(request, ctx.options.allowed_hosts)):
            # Nothing that a web page could not send as well stands between it and what needs no token.
            raise HttpError(403, refusal)
        if access.kind == OPEN:
            return await handler(request)
        bearer = await control.bearer(secret)
        request[BEARER] = bearer
        if access.needs is not None:
            permit(request, *access.needs(ctx, request))
            request[COVERED] = access.filter is None
        if resource.canonical in held and request.method != "PUT":  # a restore ends by itself, perhaps with its token
            return await _held(control, secret, request, handler)
        response = await handler(request)
        if any(name in request.query for name in _BLOCKING):
            # It may have waited for minutes, and its token may be another one by now.
            bearer = await control.bearer(secret)
            if lacking := first_lacking(bearer, request.get(NEEDS, ())):
                raise Refused(lacks(bearer, lacking), http_status=403)
        if access.filter is not None and response.status == 200:
            response = _cut(ctx, request, access, bearer, response)
        if "X-Consul-Index" in response.headers:
            response.headers[DEFAULT_POLICY_HEADER] = default
        content = cast(Any, request.content)
        if isinstance(content, Body) and content.noted is not None:
            content.holds = partial(control.is_still, bearer, secret, control.hash_for(secret))
        return response

    return enforce


def _cut(
    ctx: Context, request: web.Request, access: Access, bearer: Bearer, response: web.StreamResponse
) -> web.StreamResponse:
    cut = access.filter
    assert cut is not None
    masked = access.mask is not None and first_lacking(bearer, access.mask(ctx, request)) is not None
    if not masked and (bearer.authorizer.everything or cut.passes(bearer.authorizer)):
        return response
    if response.content_type != "application/json":  # a single raw value, which its own need let through
        return response
    assert isinstance(response, web.Response)
    whole = msgspec.json.decode(cast(bytes, response.body) or b"null")
    value, taken = ([], bool(whole)) if masked else cut.apply(bearer.authorizer, whole)
    if not taken:
        return response
    if access.denied_if_cut:
        raise HttpError(403, "Permission denied")
    headers = response.headers
    if access.listed:
        headers[FILTERED_HEADER] = "true"
    if cut.empty_is_missing and not value:
        kept = {name: held for name, held in headers.items() if name.startswith("X-Consul-")}
        return web.Response(status=404, headers=kept)
    body = msgspec.json.encode(value)
    if "pretty" in request.query:
        body = json.dumps(value, indent=4, ensure_ascii=False).encode() + b"\n"
    response.body = body
    return response


async def _held(control: AccessControl, secret: str, request: web.Request, handler: Next) -> web.StreamResponse:
    """Answer piece by piece, for as long as the token is good for it."""

    def still(bearer: Bearer) -> bool:
        return first_lacking(bearer, request.get(NEEDS, ())) is None

    async def watch() -> None:
        why = await control.tokens.until_withdrawn(control.hash_for(secret), still)
        log.info("%s %s ends: %s", request.method, request.path, why)
        if request.transport is not None:
            request.transport.close()

    watcher = asyncio.get_running_loop().create_task(watch())
    try:
        return await handler(request)
    finally:
        watcher.cancel()
