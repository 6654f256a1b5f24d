"""The forms of the configuration entries that are acted on.

Fields that Consul knows and Lictor does not act on are there too, loosely typed: see :mod:`raftstate.chain.unserved`.

Source of the forms: Consul's pages on service-defaults, service-router, service-splitter, service-resolver
and proxy-defaults.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from raftstate.model.plan import HeaderChange, HeaderCondition, QueryCondition
from raftstate.model.wire import Wire

DEFAULTS, GLOBAL = "service-defaults", "proxy-defaults"
ROUTER, SPLITTER, RESOLVER = "service-router", "service-splitter", "service-resolver"
Duration = str | int | float


class BadEntry(ValueError):
    """An entry cannot be used. ``field`` is the path to what is wrong."""

    def __init__(self, kind: str, name: str, field: str, text: str) -> None:
        super().__init__(f"{kind} {name!r}: {field}: {text}" if field else f"{kind} {name!r}: {text}")
        self.field = field


class Form(Wire, frozen=True):
    """What many parts have; only the default is taken."""

    namespace: str = ""
    partition: str = ""


class HTTPPart(Wire, frozen=True):
    """``Match.HTTP`` of a route."""

    path_exact: str = ""
    path_prefix: str = ""
    path_regex: str = ""
    case_insensitive: bool = False
    header: tuple[HeaderCondition, ...] = ()
    query_param: tuple[QueryCondition, ...] = ()
    methods: tuple[str, ...] = ()


class MatchPart(Wire, frozen=True):
    """``Match`` of a route."""

    http: HTTPPart | None = None


class Destination(Form, frozen=True):
    """``Destination`` of a route."""

    service: str = ""
    service_subset: str = ""
    prefix_rewrite: str = ""
    request_timeout: Duration = 0
    idle_timeout: Duration = 0
    num_retries: int = 0
    retry_on_connect_failure: bool = False
    retry_on: tuple[str, ...] = ()
    retry_on_status_codes: tuple[int, ...] = ()
    request_headers: HeaderChange | None = None
    response_headers: HeaderChange | None = None


class RoutePart(Wire, frozen=True):
    """One of a router's ``Routes``."""

    match: MatchPart | None = None
    destination: Destination | None = None


class RouterEntry(Form, frozen=True):
    """``service-router``"""

    routes: tuple[RoutePart, ...] = ()
    meta: dict[str, str] | None = None


class SplitPart(Form, frozen=True):
    """One of a splitter's ``Splits``."""

    weight: float = 0.0
    service: str = ""
    service_subset: str = ""
    request_headers: HeaderChange | None = None
    response_headers: HeaderChange | None = None


class SplitterEntry(Form, frozen=True):
    """``service-splitter``"""

    splits: tuple[SplitPart, ...] = ()
    meta: dict[str, str] | None = None


class Subset(Wire, frozen=True):
    """One of a resolver's ``Subsets``."""

    filter: str = ""
    only_passing: bool = False


class Redirect(Form, frozen=True):
    """``Redirect`` of a resolver."""

    service: str = ""
    service_subset: str = ""
    datacenter: str = ""
    peer: str = ""
    sameness_group: str = ""


class Failover(Form, frozen=True):
    """One of a resolver's ``Failover``."""

    service: str = ""
    service_subset: str = ""
    datacenters: tuple[str, ...] | None = None
    targets: tuple[Redirect, ...] | None = None
    sameness_group: str = ""
    policy: dict[str, Any] | None = None


class CookieConfig(Wire, frozen=True):
    """The cookie that is made when a request has none."""

    session: bool = False
    ttl: Duration = 0
    path: str = ""


class HashPart(Wire, frozen=True):
    """One of a load balancer's ``HashPolicies``."""

    field: str = ""
    field_value: str = ""
    cookie_config: CookieConfig | None = None
    source_ip: bool = msgspec.field(default=False, name="SourceIP")
    terminal: bool = False


class RingConfig(Wire, frozen=True):
    """``RingHashConfig``"""

    minimum_ring_size: int = 1024
    maximum_ring_size: int = 8_388_608


class LeastConfig(Wire, frozen=True):
    """``LeastRequestConfig``"""

    choice_count: int = 2


class LoadBalancer(Wire, frozen=True):
    """``LoadBalancer`` of a resolver."""

    policy: str = ""
    ring_hash_config: RingConfig | None = None
    least_request_config: LeastConfig | None = None
    hash_policies: tuple[HashPart, ...] | None = None


class ResolverEntry(Form, frozen=True):
    """``service-resolver``"""

    connect_timeout: Duration = 0
    request_timeout: Duration = 0
    default_subset: str = ""
    subsets: dict[str, Subset] | None = None
    redirect: Redirect | None = None
    failover: dict[str, Failover] | None = None
    load_balancer: LoadBalancer | None = None
    prioritize_by_locality: dict[str, Any] | None = None
    meta: dict[str, str] | None = None


class Limits(Wire, frozen=True):
    """``Limits`` of an upstream's configuration."""

    max_connections: int | None = None
    max_pending_requests: int | None = None
    max_concurrent_requests: int | None = None


class PassivePart(Wire, frozen=True):
    """``PassiveHealthCheck`` of an upstream's configuration."""

    interval: Duration = 0
    max_failures: int | None = None
    enforcing_consecutive_5xx: int | None = msgspec.field(default=None, name="EnforcingConsecutive5xx")
    max_ejection_percent: int | None = None
    base_ejection_time: Duration = 0


class UpstreamPart(Form, frozen=True):
    """``UpstreamConfig.Defaults``, or one of its ``Overrides``."""

    name: str = ""
    protocol: str = ""
    connect_timeout_ms: int = 0
    limits: Limits | None = None
    passive_health_check: PassivePart | None = None
    mesh_gateway: dict[str, Any] | None = None
    balance_outbound_connections: str = ""


class UpstreamConfig(Wire, frozen=True):
    """``UpstreamConfig`` of service-defaults: how the service calls others."""

    defaults: UpstreamPart | None = None
    overrides: tuple[UpstreamPart, ...] | None = None


class DefaultsEntry(Form, frozen=True):
    """``service-defaults``"""

    protocol: str = ""
    upstream_config: UpstreamConfig | None = None
    max_inbound_connections: int = 0
    local_connect_timeout_ms: int = 0
    local_request_timeout_ms: int = 0
    meta: dict[str, str] | None = None
    mode: str = ""
    balance_inbound_connections: str = ""
    external_sni: str = msgspec.field(default="", name="ExternalSNI")
    mutual_tls_mode: str = ""
    mesh_gateway: dict[str, Any] | None = None
    transparent_proxy: dict[str, Any] | None = None
    expose: dict[str, Any] | None = None
    destination: dict[str, Any] | None = None
    rate_limits: dict[str, Any] | None = None
    envoy_extensions: list[Any] | None = None


class GlobalEntry(Form, frozen=True):
    """``proxy-defaults``"""

    config: dict[str, Any] | None = None
    meta: dict[str, str] | None = None
    mode: str = ""
    access_logs: dict[str, Any] | None = None
    mesh_gateway: dict[str, Any] | None = None
    transparent_proxy: dict[str, Any] | None = None
    expose: dict[str, Any] | None = None
    mutual_tls_mode: str = ""
    failover_policy: dict[str, Any] | None = None
    prioritize_by_locality: dict[str, Any] | None = None
    envoy_extensions: list[Any] | None = None


Entry = RouterEntry | SplitterEntry | ResolverEntry | DefaultsEntry | GlobalEntry
KINDS: dict[str, type[Any]] = {
    ROUTER: RouterEntry,
    SPLITTER: SplitterEntry,
    RESOLVER: ResolverEntry,
    DEFAULTS: DefaultsEntry,
    GLOBAL: GlobalEntry,
}


def read_entry(kind: str, name: str, entry: Mapping[str, Any]) -> Any:
    """Return a stored entry as its form. Raises :class:`BadEntry`."""
    try:
        return msgspec.convert(entry, KINDS[kind])
    except msgspec.ValidationError as error:
        text, _, where = str(error).partition(" - at `$.")
        raise BadEntry(kind, name, where.rstrip("`"), text) from error
