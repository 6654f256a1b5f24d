"""Consul's JSON forms of catalog rows, field by field."""

from __future__ import annotations

from typing import cast

import msgspec

from node.http.answers.catalog import (  # fmt: skip
    AgentServiceRow,
    CatalogServiceRow,
    CheckRow,
    HealthRow,
    NodeRow,
    ProxyRow,
    ServiceRow,
    Status,
    UpstreamRow,
)
from raftstate.model.catalog import (
    CatalogService,
    Check,
    InstanceHealth,
    Node,
    ServiceInstance,
    ServiceProxy,
    Upstream,
)

_NO_PROXY: ProxyRow = {"Mode": "", "MeshGateway": {}, "Expose": {}}


def node_shape(node: Node) -> NodeRow:
    """A node as the health and catalog endpoints show it."""
    return {
        "ID": node.id,
        "Node": node.node,
        "Address": node.address,
        "Datacenter": node.datacenter,
        "TaggedAddresses": node.tagged_addresses,
        "Meta": node.meta,
        "CreateIndex": node.create_index,
        "ModifyIndex": node.modify_index,
    }


def upstream_shape(upstream: Upstream) -> UpstreamRow:
    """One upstream of a proxy; Lictor's own fields only where they are set."""
    shape: UpstreamRow = {
        "DestinationType": upstream.destination_type,
        "DestinationName": upstream.destination_name,
        "LocalBindAddress": upstream.local_bind_address,
        "LocalBindPort": upstream.local_bind_port,
        "Config": upstream.config or None,
        "MeshGateway": {},
    }
    if upstream.upstream_name:
        shape["UpstreamName"] = upstream.upstream_name
    if upstream.destination_port:
        shape["DestinationPort"] = upstream.destination_port
    return shape


def proxy_shape(proxy: ServiceProxy | None) -> ProxyRow:
    """The Proxy part of a service; Consul shows it, nearly empty, for services without one too."""
    if proxy is None:
        return _NO_PROXY
    shape: ProxyRow = {
        "DestinationServiceName": proxy.destination_service_name,
        "DestinationServiceID": proxy.destination_service_id,
        "LocalServiceAddress": proxy.local_service_address,
        "LocalServicePort": proxy.local_service_port,
        "Mode": proxy.mode,
        "Config": proxy.config or None,
        "MeshGateway": {},
        "Expose": {},
    }
    if proxy.upstreams:
        shape["Upstreams"] = [upstream_shape(one) for one in proxy.upstreams]
    return shape


def service_shape(row: ServiceInstance) -> ServiceRow:
    """A service as ``/v1/health/service`` and ``/v1/catalog/node`` show it."""
    shape: ServiceRow = {
        "ID": row.id,
        "Service": row.service,
        "Tags": row.tags,
        "Address": row.address,
        "TaggedAddresses": row.tagged_addresses or None,
        "Meta": row.meta,
        "Port": row.port,
        "Weights": {"Passing": row.weights.passing, "Warning": row.weights.warning},
        "EnableTagOverride": row.enable_tag_override,
        "Proxy": proxy_shape(row.proxy),
        "Connect": {"Native": True} if row.connect_native else {},
        "PeerName": "",
        "CreateIndex": row.create_index,
        "ModifyIndex": row.modify_index,
    }
    if row.kind:
        shape["Kind"] = row.kind
    if row.locality:
        shape["Locality"] = row.locality
    return shape


def check_shape(row: Check) -> CheckRow:
    """A check as the health endpoints show it."""
    return {
        "Node": row.node,
        "CheckID": row.check_id,
        "Name": row.name,
        "Status": cast(Status, row.status),
        "Notes": row.notes,
        "Output": row.output,
        "ServiceID": row.service_id,
        "ServiceName": row.service_name,
        "ServiceTags": row.service_tags,
        "Type": row.type,
        "Interval": row.interval,
        "Timeout": row.timeout,
        "ExposedPort": row.exposed_port,
        "Definition": row.definition,
        "CreateIndex": row.create_index,
        "ModifyIndex": row.modify_index,
    }


def health_shape(row: InstanceHealth) -> HealthRow:
    """One entry of ``/v1/health/service/:name``."""
    return {
        "Node": node_shape(row.node),
        "Service": service_shape(row.service),
        "Checks": [check_shape(check) for check in row.checks],
    }


def catalog_service_shape(row: CatalogService) -> CatalogServiceRow:
    """One entry of ``/v1/catalog/service/:name``."""
    shape: CatalogServiceRow = msgspec.to_builtins(row)
    shape["ServiceProxy"] = proxy_shape(row.service_proxy)
    shape["ServiceTaggedAddresses"] = row.service_tagged_addresses or None
    if not row.service_locality:
        del shape["ServiceLocality"]
    return shape


def agent_service_shape(row: ServiceInstance, datacenter: str) -> AgentServiceRow:
    """A service as ``/v1/agent/services`` shows it: without indexes, optional parts only where they are set."""
    shape: AgentServiceRow = {
        "ID": row.id,
        "Service": row.service,
        "Tags": row.tags,
        "Meta": row.meta,
        "Port": row.port,
        "Address": row.address,
        "TaggedAddresses": row.tagged_addresses,
        "Weights": {"Passing": row.weights.passing, "Warning": row.weights.warning},
        "EnableTagOverride": row.enable_tag_override,
        "Datacenter": datacenter,
    }
    if row.kind:
        shape["Kind"] = row.kind
    if row.proxy is not None:
        shape["Proxy"] = proxy_shape(row.proxy)
    if row.connect_native:
        shape["Connect"] = {"Native": True}
    if row.locality:
        shape["Locality"] = row.locality
    return shape
