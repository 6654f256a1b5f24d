"""What of Consul's API Lictor leaves out, said plainly. Last in the table: what is answered elsewhere comes first."""

from __future__ import annotations

from typing import Never

from aiohttp import web

from node.http.context import Context, Routes
from node.http.errors import NotSupported

routes = Routes("unsupported")

_REASONS = {
    "query": ("Prepared queries", "read /v1/health/service/:name with ?passing, ?near and ?filter"),
    "peering": ("Cluster peering", "a Lictor mesh is one datacenter"),
    "peerings": ("Cluster peering", "a Lictor mesh is one datacenter"),
    "namespace": ("Namespaces", "there is one, 'default'"),
    "namespaces": ("Namespaces", "there is one, 'default'"),
    "partition": ("Admin partitions", ""),
    "partitions": ("Admin partitions", ""),
    "exported-services": ("Exporting services", ""),
    "imported-services": ("Importing services", ""),
    "operator": ("This operator endpoint", "see /v1/openapi.json for those there are"),
    "internal": ("This internal endpoint", "see /v1/openapi.json for those there are"),
}


@routes.add("GET PUT POST DELETE", f"/v1/{{family:{'|'.join(_REASONS)}}}{{rest:(?:/.*)?}}", answer=Never)
async def left_out(ctx: Context, request: web.Request) -> web.StreamResponse:
    """Not supported, with what to use instead."""
    raise NotSupported(*_REASONS[request.match_info["family"]])
