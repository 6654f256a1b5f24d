"""What an agent is told of a service or check: Consul's definitions, and the catalog rows they become."""

from __future__ import annotations

from typing import Any

import msgspec

from node.durations import format_duration
from node.loose_json import Duration
from raftstate.model.catalog import (
    CRITICAL,
    KIND_CONNECT_PROXY,
    STATUSES,
    Check,
    ServiceInstance,
    ServiceProxy,
    Weights,
)
from raftstate.model.wire import Wire

CHECK_ALIASES = {
    "scriptargs": "Args",
    "id": "CheckID",
    "alias": "AliasService",
    "disableredirects": "DisableRedirects",
}
SIDECAR_SUFFIX = "-sidecar-proxy"
TYPE_SIDECAR = "lictor-sidecar"
"""Type of the check that follows a sidecar's live configuration stream."""
MIN_INTERVAL_S = 1.0
"""Consul raises shorter check intervals to one second; so do we."""


class BadDefinition(ValueError):
    """A definition that cannot be taken; the text is what the HTTP API answers with 400."""


def split_host_port(target: str) -> tuple[str, int]:
    """Parse ``host:port`` (IPv6 in brackets). Raises ValueError."""
    host, colon, port = target.rpartition(":")
    number = int(port) if port.isascii() and port.isdigit() and len(port) <= 5 else 0
    if not colon or not 0 < number < 65536:
        raise ValueError(f"{target[:80]!r} is not HOST:PORT")
    return host.strip("[]") or "127.0.0.1", number


class CheckDefinition(Wire, frozen=True):
    """A health check as the agent is to run it. Exactly one way of checking is set."""

    check_id: str = ""
    name: str = ""
    notes: str = ""
    service_id: str = ""
    status: str = ""
    """Status before the first run; critical when empty."""
    args: tuple[str, ...] = ()
    http: str = ""
    method: str = ""
    header: dict[str, list[str]] = {}
    body: str = ""
    disable_redirects: bool = False
    tcp: str = ""
    tcp_use_tls: bool = False
    udp: str = ""
    grpc: str = ""
    grpc_use_tls: bool = False
    h2ping: str = ""
    h2ping_use_tls: bool = True
    alias_node: str = ""
    alias_service: str = ""
    ttl: Duration = 0.0
    interval: Duration = 0.0
    timeout: Duration = 0.0
    tls_server_name: str = ""
    tls_skip_verify: bool = False
    success_before_passing: int = 0
    failures_before_warning: int = 0
    failures_before_critical: int = 0
    deregister_critical_service_after: Duration = 0.0
    output_max_size: int = 4096
    sidecar: bool = False
    """Set by the agent itself: the check follows a sidecar's stream. Not taken from requests."""

    def type(self) -> str:
        """Return the check's type as Consul names it; empty when no way of checking is set."""
        if self.sidecar:
            return TYPE_SIDECAR
        for kind, given in (
            ("script", self.args), ("http", self.http), ("tcp", self.tcp), ("udp", self.udp), ("grpc", self.grpc),
            ("h2ping", self.h2ping), ("alias", self.alias_node or self.alias_service), ("ttl", self.ttl),
        ):  # fmt: skip
            if given:
                return kind
        return ""

    def _bad_target(self) -> str:
        grpc, _, _ = self.grpc.partition("/")
        for kind, target in (("TCP", self.tcp), ("UDP", self.udp), ("H2PING", self.h2ping), ("GRPC", grpc)):
            if target or (kind == "GRPC" and self.grpc):
                try:
                    split_host_port(target)
                except ValueError as error:
                    return f"{kind}: {error}"
        return ""

    def problem(self, *, scripts_enabled: bool) -> str:
        """Return why this check cannot be run, or an empty text."""
        kinds = [
            kind
            for kind, given in (
                ("Args", self.args), ("HTTP", self.http), ("TCP", self.tcp), ("UDP", self.udp), ("GRPC", self.grpc),
                ("H2PING", self.h2ping), ("Alias", self.alias_node or self.alias_service), ("TTL", self.ttl),
            )
            if given
        ]  # fmt: skip
        if len(kinds) > 1 and "TTL" in kinds:
            return "Interval and TTL cannot both be specified"
        if len(kinds) > 1:
            return f"only one way of checking may be given, not {' and '.join(kinds)}"
        if not kinds and not self.sidecar:
            return "TTL must be > 0 for TTL checks, or give one of HTTP, TCP, UDP, GRPC, H2PING, Alias, Args"
        if self.ttl < 0 or self.interval < 0 or self.timeout < 0:
            return "TTL, Interval and Timeout must not be negative"
        if kinds and kinds[0] not in ("TTL", "Alias") and self.interval <= 0:
            return "Interval must be > 0 for Script, HTTP, H2PING, TCP, UDP or GRPC checks"
        if problem := self._bad_target():
            return problem
        if self.args and not scripts_enabled:
            return (
                "Scripts are disabled on this agent; to enable, configure 'enable_script_checks' or "
                "'enable_local_script_checks' to true"
            )
        if self.status and self.status not in STATUSES:
            return f"Status must be one of passing, warning, critical, not {self.status!r}"
        if self.output_max_size < 1:
            return "MaxOutputMaxSize must be positive"
        return ""

    def to_row(self, node: str, service: ServiceInstance | None) -> Check:
        """Return the catalog row of this check before it has run."""
        timed = self.type() not in ("ttl", "alias", TYPE_SIDECAR)
        definition: dict[str, Any] = {}
        texts = {
            "HTTP": self.http, "Method": self.method, "TCP": self.tcp, "UDP": self.udp, "GRPC": self.grpc,
            "H2PING": self.h2ping, "TLSServerName": self.tls_server_name,
        }  # fmt: skip
        times = {
            "Interval": self.interval, "Timeout": self.timeout, "TTL": self.ttl,
            "DeregisterCriticalServiceAfter": self.deregister_critical_service_after,
        }  # fmt: skip
        definition.update({name: text for name, text in texts.items() if text})
        definition.update({name: format_duration(seconds) for name, seconds in times.items() if seconds})
        return Check(
            node=node,
            check_id=self.check_id,
            name=self.name or self.check_id,
            status=self.status or CRITICAL,
            notes=self.notes,
            service_id=self.service_id,
            service_name=service.service if service else "",
            service_tags=service.tags if service else (),
            type=self.type(),
            interval=format_duration(max(self.interval, MIN_INTERVAL_S)) if timed and self.interval else "",
            timeout=format_duration(self.timeout) if timed and self.timeout else "",
            definition=definition,
        )


class ConnectDefinition(Wire, frozen=True):
    """The ``Connect`` part of a service definition."""

    native: bool = False
    sidecar_service: ServiceDefinition | None = None


class ServiceDefinition(Wire, frozen=True):
    """A service instance as registered with the agent (Consul's agent service definition)."""

    name: str = ""
    id: str = ""
    kind: str = ""
    tags: tuple[str, ...] = ()
    address: str = ""
    tagged_addresses: dict[str, Any] = {}
    socket_path: str = ""
    port: int = 0
    meta: dict[str, str] = {}
    weights: Weights | None = None
    enable_tag_override: bool = False
    check: CheckDefinition | None = None
    checks: tuple[CheckDefinition, ...] = ()
    proxy: ServiceProxy | None = None
    connect: ConnectDefinition | None = None
    locality: dict[str, str] = {}

    def service_id(self) -> str:
        """Return the instance's id; the name when none is given."""
        return self.id or self.name

    def to_row(self, node: str) -> ServiceInstance:
        """Return the catalog row of this instance."""
        proxy = self.proxy
        if proxy is not None and self.kind == KIND_CONNECT_PROXY and not proxy.local_service_address:
            proxy = msgspec.structs.replace(proxy, local_service_address="127.0.0.1")
        return ServiceInstance(
            node=node,
            id=self.service_id(),
            service=self.name,
            kind=self.kind,
            tags=self.tags,
            address=self.address,
            port=self.port,
            meta=self.meta,
            weights=self.weights or Weights(),
            enable_tag_override=self.enable_tag_override,
            tagged_addresses=self.tagged_addresses,
            proxy=proxy,
            connect_native=bool(self.connect and self.connect.native),
            locality=self.locality,
        )

    def all_checks(self) -> tuple[CheckDefinition, ...]:
        """Return the checks with Consul's ids: ``service:<id>``, or ``service:<id>:1`` … when several."""
        given = ((self.check,) if self.check is not None else ()) + self.checks
        result = []
        for number, check in enumerate(given, 1):
            suffix = f":{number}" if len(given) > 1 else ""
            check_id = check.check_id or f"service:{self.service_id()}{suffix}"
            name = check.name or f"Service '{self.name}' check"
            result.append(
                msgspec.structs.replace(
                    check, check_id=check_id, name=name, service_id=self.service_id(), sidecar=check.sidecar
                )
            )
        return tuple(result)

    def problem(self) -> str:
        """Return why this definition cannot be taken, or an empty text (Consul's words where it has some)."""
        if not self.name:
            return "Missing service name"
        if self.weights is not None and (self.weights.passing < 1 or self.weights.warning < 0):
            return "Invalid Weights: passing must be at least 1 and warning at least 0"
        if not 0 <= self.port <= 65535:
            return f"Invalid port {self.port}: it must be between 0 and 65535"
        if self.address in ("0.0.0.0", "::", "[::]"):
            return f"Invalid service address: {self.address!r} is not an address that others can dial"
        if self.kind not in ("", KIND_CONNECT_PROXY):
            return f"Kind {self.kind!r} is not supported: use connect-proxy or leave it out"
        if self.kind == KIND_CONNECT_PROXY:
            if self.proxy is None or not self.proxy.destination_service_name:
                return "Proxy.DestinationServiceName must be non-empty for Connect proxy services"
            if self.port <= 0:
                return "Port or SocketPath must be set for a Connect proxy"
            if self.connect is not None and self.connect.native:
                return "A Proxy cannot also be Connect Native, only typical services"
            if self.connect is not None and self.connect.sidecar_service is not None:
                return "Proxy services cannot have a Connect.SidecarService of their own"
        elif self.proxy is not None and self.proxy.destination_service_name:
            return "Proxy.DestinationServiceName is only for services of Kind connect-proxy"
        sidecar = self.connect.sidecar_service if self.connect is not None else None
        if sidecar is not None:
            if sidecar.id:
                return "sidecar service cannot specify an ID as this is managed by the agent"
            if sidecar.connect is not None:
                return "sidecar service cannot have a nested Connect definition"
        return ""


def sidecar_of(service: ServiceDefinition, port: int) -> ServiceDefinition | None:
    """Return the sidecar registration that ``Connect.SidecarService`` stands for, with Consul's defaults.

    Source: Consul, "Register a service mesh proxy": id, name, tags and meta inherited; default checks are a TCP
    check of the public listener and an alias of the service.
    """
    given = service.connect.sidecar_service if service.connect is not None else None
    if given is None:
        return None
    service_id = service.service_id()
    proxy = given.proxy or ServiceProxy()
    proxy = msgspec.structs.replace(
        proxy,
        destination_service_name=service.name,
        destination_service_id=service_id,
        local_service_address=proxy.local_service_address or "127.0.0.1",
        local_service_port=proxy.local_service_port or service.port,
    )
    address = given.address or service.address
    checks = ((given.check,) if given.check is not None else ()) + given.checks
    if not checks:
        checks = (
            CheckDefinition(name="Connect Sidecar Listening", tcp=f"{address or '127.0.0.1'}:{port}", interval=10.0),
            CheckDefinition(name=f"Connect Sidecar Aliasing {service_id}", alias_service=service_id),
        )
    return msgspec.structs.replace(
        given,
        id=service_id + SIDECAR_SUFFIX,
        name=given.name or service.name + SIDECAR_SUFFIX,
        kind=KIND_CONNECT_PROXY,
        tags=given.tags or service.tags,
        meta=given.meta or service.meta,
        address=address,
        port=given.port or port,
        proxy=proxy,
        check=None,
        checks=checks,
        connect=None,
    )
