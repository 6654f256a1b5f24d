"""``/v1/acl``: tokens are not managed over this API; without them it answers as a Consul agent without ACLs does."""

from __future__ import annotations

from typing import Never

from aiohttp import web

from node.http.context import Context, Routes
from node.http.errors import HttpError

routes = Routes("acl")


@routes.add("GET PUT POST DELETE", "/v1/acl/{path:.*}", answer=Never)
async def disabled(ctx: Context, request: web.Request) -> web.StreamResponse:
    """Not supported; where no tokens are asked for, in the words of a Consul agent without access control."""
    if not ctx.options.acl_enabled:
        raise HttpError(401, "ACL support disabled")
    raise HttpError(
        501,
        "/v1/acl is not supported: tokens are asked for here, but this API does not manage them."
        " The management token is the content of cluster.acl_token_file; see docs/http-api.md",
    )
