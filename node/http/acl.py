"""``/v1/acl``: answered as a Consul agent without access control does."""

from __future__ import annotations

from aiohttp import web

from node.http.context import Context, Routes
from node.http.errors import HttpError

routes = Routes("acl")


@routes.add("GET PUT POST DELETE", "/v1/acl/{path:.*}")
async def disabled(ctx: Context, request: web.Request) -> web.StreamResponse:
    """Access control is off."""
    raise HttpError(401, "ACL support disabled")
