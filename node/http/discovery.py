"""``/v1/discovery``: the catalog in the form that Prometheus asks for by ``http_sd`` (Lictor's own endpoint)."""

from __future__ import annotations

from typing import Any

from aiohttp import web

from node.http.answers.catalog import TargetGroup
from node.http.context import Context, Routes
from node.http.options import read_options
from node.http.reading import filtered
from node.http.respond import json_response
from node.http.shapes import catalog_service_shape
from raftstate.model.catalog import CatalogService, InstanceHealth

routes = Routes("discovery")


def _label(text: str) -> str:
    return "".join(letter if letter.isascii() and letter.isalnum() else "_" for letter in text)


def target(row: InstanceHealth) -> TargetGroup:
    """Return one target group with the labels of Prometheus' ``consul_sd_config``."""
    node, service = row.node, row.service
    host = row.dial_address()
    labels = {
        "__meta_consul_address": node.address,
        "__meta_consul_dc": node.datacenter,
        "__meta_consul_health": row.status(),
        "__meta_consul_node": node.node,
        "__meta_consul_service": service.service,
        "__meta_consul_service_address": service.address,
        "__meta_consul_service_id": service.id,
        "__meta_consul_service_port": str(service.port),
        "__meta_consul_tags": f",{','.join(service.tags)}," if service.tags else ",,",
    }
    labels |= {f"__meta_consul_metadata_{_label(key)}": value for key, value in node.meta.items()}
    labels |= {f"__meta_consul_service_metadata_{_label(key)}": value for key, value in service.meta.items()}
    labels |= {f"__meta_consul_tagged_address_{_label(key)}": value for key, value in node.tagged_addresses.items()}
    return {"targets": [f"[{host}]:{service.port}" if ":" in host else f"{host}:{service.port}"], "labels": labels}


@routes.add("GET", "/v1/discovery/prometheus", answer=list[TargetGroup])
async def prometheus(ctx: Context, request: web.Request) -> web.StreamResponse:
    """Targets for Prometheus' ``http_sd_configs``; ``?service=`` (repeated) and ``?tag=`` narrow them."""
    options = read_options(request.query, request.headers, ctx.rng)
    wanted, tags = request.query.getall("service", []), request.query.getall("tag", [])
    names = wanted or sorted((await ctx.backend.query("catalog.services", {}, mode="stale")).value)
    groups: list[TargetGroup] = []
    for name in names:
        params: dict[str, Any] = {"service": name} | ({"tags": tags} if tags else {})
        rows = (await ctx.backend.query("health.service", params, mode="stale")).decode(list[InstanceHealth])
        if options.filter:
            flat = {(row.node.node, row.service.id): row for row in rows}
            shapes = [catalog_service_shape(_flat(row)) for row in rows]
            rows = [flat[shape["Node"], shape["ServiceID"]] for shape in filtered(shapes, options)]
        groups.extend(target(row) for row in rows)
    return json_response(request, groups)


def _flat(row: InstanceHealth) -> CatalogService:
    node, service = row.node, row.service
    return CatalogService(
        id=node.id,
        node=node.node,
        address=node.address,
        datacenter=node.datacenter,
        tagged_addresses=node.tagged_addresses,
        node_meta=node.meta,
        service_id=service.id,
        service_name=service.service,
        service_kind=service.kind,
        service_address=service.address,
        service_tagged_addresses=service.tagged_addresses,
        service_tags=service.tags,
        service_meta=service.meta,
        service_port=service.port,
        service_weights=service.weights,
        service_enable_tag_override=service.enable_tag_override,
    )
