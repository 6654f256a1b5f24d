"""``/v1/status``: who leads, who is a server."""

from __future__ import annotations

from aiohttp import web

from node.http.context import Context, Routes
from node.http.respond import json_response

routes = Routes("status")


@routes.add("GET", "/v1/status/leader", answer=str)
async def leader(ctx: Context, request: web.Request) -> web.StreamResponse:
    """The leader's RPC address, empty when there is none."""
    return json_response(request, await ctx.backend.operator("status.leader", {}) or "")


@routes.add("GET", "/v1/status/peers", answer=list[str])
async def peers(ctx: Context, request: web.Request) -> web.StreamResponse:
    """The RPC addresses of all servers."""
    return json_response(request, list(await ctx.backend.operator("status.peers", {})))
