"""What configuration entries say to a sidecar besides the plan: its configuration, and a target's instances. Pure.

What a registration says goes before ``service-defaults``, and that before ``proxy-defaults``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import msgspec

from raftstate.filter import BadFilter, compile_filter
from raftstate.model.catalog import CRITICAL, PASSING, WARNING, InstanceHealth
from raftstate.model.plan import Plan, RouterNode, Target
from raftstate.model.sidecar import Endpoint

_OWN_CONFIG = {
    "MaxInboundConnections": "max_inbound_connections",
    "LocalConnectTimeoutMs": "local_connect_timeout_ms",
    "LocalRequestTimeoutMs": "local_request_timeout_ms",
}
_LIMITS = {
    "MaxConnections": "max_connections",
    "MaxPendingRequests": "max_pending_requests",
    "MaxConcurrentRequests": "max_concurrent_requests",
}
_PASSIVE = {
    "Interval": "interval",
    "MaxFailures": "max_failures",
    "EnforcingConsecutive5xx": "enforcing_consecutive_5xx",
    "MaxEjectionPercent": "max_ejection_percent",
    "BaseEjectionTime": "base_ejection_time",
}
"""As Consul writes them in an upstream's ``config``."""
Entry = Mapping[str, Any]


def own_config(config: dict[str, Any], defaults: Entry | None, everyone: Entry | None) -> dict[str, Any]:
    """Return the configuration of a service's own sidecar."""
    said = {name: defaults[field] for field, name in _OWN_CONFIG.items() if defaults and defaults.get(field)}
    general = everyone.get("Config") if everyone else None
    return {**(general if isinstance(general, Mapping) else {}), **said, **config}


def upstream_config(config: dict[str, Any], service: str, defaults: Entry | None) -> dict[str, Any]:
    """Return the configuration of an upstream that leads to ``service``; ``defaults`` are those of the caller."""
    parts = defaults.get("UpstreamConfig") if defaults else None
    if not isinstance(parts, Mapping):
        return config
    merged = _upstream_part(parts.get("Defaults"))
    for override in parts.get("Overrides") or ():
        if isinstance(override, Mapping) and override.get("Name") == service:
            merged = _merged(merged, _upstream_part(override))
    return _merged(merged, config)


def _merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    merged = {**below, **above}
    if isinstance(below.get("limits"), dict) and isinstance(above.get("limits"), dict):
        merged["limits"] = {**below["limits"], **above["limits"]}
    return merged


def _upstream_part(part: Any) -> dict[str, Any]:
    if not isinstance(part, Mapping):
        return {}
    found: dict[str, Any] = {}
    if part.get("Protocol"):
        found["protocol"] = part["Protocol"]
    if part.get("ConnectTimeoutMs"):
        found["connect_timeout_ms"] = part["ConnectTimeoutMs"]
    limits = part.get("Limits")
    if isinstance(limits, Mapping):
        found["limits"] = {name: limits[field] for field, name in _LIMITS.items() if limits.get(field) is not None}
    passive = part.get("PassiveHealthCheck")
    if isinstance(passive, Mapping):
        said = {name: passive[field] for field, name in _PASSIVE.items() if passive.get(field) is not None}
        found["passive_health_check"] = said
    return found


def protocol_of(config: Mapping[str, Any]) -> str:
    """Return the protocol that a configuration says, or ``""``."""
    value = config.get("protocol", config.get("Protocol", ""))
    return value if isinstance(value, str) else ""


def default_protocol(defaults: Entry | None, everyone: Entry | None) -> str:
    """Return what ``service-defaults``, else ``proxy-defaults``, says a service speaks."""
    general = everyone.get("Config") if everyone else None
    return protocol_of(defaults or {}) or protocol_of(general if isinstance(general, Mapping) else {})


def upstream_protocol(config: Mapping[str, Any], instances: str, plan: Plan) -> str:
    """Return how an upstream's calls are read. ``instances``: what the instances say, if all say the same.

    A plan that routes requests needs them read as its entries say.
    """
    routes = isinstance(plan.nodes.get(plan.start), RouterNode)
    return (plan.protocol if routes else "") or protocol_of(config) or instances or plan.protocol or "tcp"


def endpoints_of(rows: Iterable[InstanceHealth], target: Target | None = None) -> tuple[Endpoint, ...]:
    """Return the instances of a service, or of one target of it. Raises :class:`raftstate.filter.BadFilter`."""
    only_passing = target is not None and target.only_passing
    holds = compile_filter(target.filter) if target is not None and target.filter else None
    found = []
    for row in rows:
        if holds is not None and not holds(msgspec.to_builtins(row)):
            continue
        service, proxy = row.service, row.service.proxy
        status = row.status()
        found.append(
            Endpoint(
                node=service.node,
                address=row.dial_address(),
                port=service.port,
                service=proxy.destination_service_name if proxy is not None else service.service,
                service_id=proxy.destination_service_id if proxy is not None else service.id,
                weight=service.weights.warning if status == WARNING else service.weights.passing,
                zone=service.locality.get("Zone", "") or row.node.meta.get("zone", ""),
                healthy=status == PASSING if only_passing else status != CRITICAL,
                meta=service.meta,
            )
        )
    return tuple(sorted(found, key=lambda one: (one.node, one.service_id, one.port)))


__all__ = [
    "BadFilter",
    "default_protocol",
    "endpoints_of",
    "own_config",
    "protocol_of",
    "upstream_config",
    "upstream_protocol",
]
