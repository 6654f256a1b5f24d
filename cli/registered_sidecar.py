"""A sidecar as it is registered with the agent: what ``lictor connect -sidecar-for`` runs, as Consul's own command.

Consul's clients register it beside its service (``Connect.SidecarService``) or as a service of kind
``connect-proxy``, with its port, its upstreams and their settings.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cli.errors import CliError
from cli.proxyfile import ProxyService
from cli.upstreams import UpstreamSpec

LOOPBACK = "127.0.0.1"
KEPT = ("Tags", "Meta", "Weights", "Locality")
"""What a registration says that is not the sidecar's business; it stays."""


def as_proxy_service(row: Mapping[str, Any]) -> ProxyService:
    """Return what a registration (the agent's ``/v1/agent/service/ID``) describes. Raises CliError, which names what
    of it is not to be had."""
    proxy = row.get("Proxy") or {}
    config = dict(proxy.get("Config") or {})
    upstreams = [_upstream(f"{row['ID']}: Upstreams[{n}]", one) for n, one in enumerate(proxy.get("Upstreams") or ())]
    if (app_host := proxy.get("LocalServiceAddress") or LOOPBACK) not in (LOOPBACK, "localhost"):
        raise CliError(f"{row['ID']}: LocalServiceAddress is {app_host}, but a sidecar reaches its app at {LOOPBACK}")
    return ProxyService(
        name=str(proxy.get("DestinationServiceName") or ""),
        port=int(proxy.get("LocalServicePort") or 0),
        id=str(proxy.get("DestinationServiceID") or ""),
        protocol=str(config.pop("protocol", "") or ""),
        public_host=str(row.get("Address") or config.get("bind_address") or ""),
        public_port=int(row.get("Port") or 0),
        upstreams=tuple(upstreams),
        config=config,
    )


def kept(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return what of a registration goes into the one that the sidecar makes in its place."""
    return {key: row[key] for key in KEPT if row.get(key)}


def _upstream(where: str, row: Mapping[str, Any]) -> UpstreamSpec:
    kind, host = row.get("DestinationType") or "service", row.get("LocalBindAddress") or LOOPBACK
    if kind != "service":
        raise CliError(f"{where}: DestinationType is {kind}, but an upstream must be a service")
    if host not in (LOOPBACK, "localhost"):
        raise CliError(f"{where}: LocalBindAddress is {host}, but an upstream's port is opened at {LOOPBACK} only")
    name = str(row.get("UpstreamName") or row.get("DestinationName") or "")
    return UpstreamSpec(
        name,
        service=str(row.get("DestinationName") or ""),
        port=int(row.get("DestinationPort") or 0),
        bind_port=int(row.get("LocalBindPort") or 0),
        config=dict(row.get("Config") or {}),
    )
