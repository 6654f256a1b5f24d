"""The way of a call to a service, compiled from configuration entries: router -> splitter -> resolver -> target.

One :class:`Plan` is a graph of named nodes, without cycles. A call starts at ``start``: a router chooses by the
request, a splitter by chance, a resolver names a target (instances of a service, or a subset of them) with those that
take over when it has no healthy instance. Splitters are flattened: none leads to another one.

Times are seconds; 0 means that the entry says nothing. Source of the model: Consul's discovery chain.
"""

from __future__ import annotations

import msgspec

from raftstate.model.wire import Wire

PROTOCOLS = ("tcp", "http", "http2", "grpc")
HTTP_PROTOCOLS = ("http", "http2", "grpc")
POLICIES = ("random", "round_robin", "least_request", "ring_hash", "maglev")
CONNECT_TIMEOUT_S = 5.0


class HeaderChange(Wire, frozen=True):
    """What is done to the headers of a request or a response: first ``remove``, then ``set``, then ``add``."""

    add: dict[str, str] = {}
    set: dict[str, str] = {}
    remove: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.add or self.set or self.remove)


class HeaderCondition(Wire, frozen=True):
    """A condition on a request header; exactly one of ``present`` and the value matchers is set."""

    name: str
    present: bool = False
    exact: str = ""
    prefix: str = ""
    suffix: str = ""
    contains: str = ""
    regex: str = ""
    """RE2, against the whole value."""
    invert: bool = False
    ignore_case: bool = False


class QueryCondition(Wire, frozen=True):
    """A condition on a query parameter; exactly one of ``present``, ``exact`` and ``regex`` is set."""

    name: str
    present: bool = False
    exact: str = ""
    regex: str = ""


class Match(Wire, frozen=True):
    """Which requests a route takes: all parts that are set must hold; none set means all requests."""

    path_exact: str = ""
    path_prefix: str = ""
    path_regex: str = ""
    """RE2, against the whole path without the query."""
    case_insensitive: bool = False
    """For the path."""
    header: tuple[HeaderCondition, ...] = ()
    query_param: tuple[QueryCondition, ...] = ()
    methods: tuple[str, ...] = ()


class Route(Wire, frozen=True):
    """What happens to the requests that match. A router's last route matches all."""

    match: Match
    next_node: str
    prefix_rewrite: str = ""
    """Takes the place of the matched prefix (of the whole path, for an exact match or a regex)."""
    request_timeout_s: float = 0.0
    idle_timeout_s: float = 0.0
    num_retries: int = 0
    """0: nothing is said of retries unless one of the ``retry_on`` below is set, then 1."""
    retry_on_connect_failure: bool = False
    retry_on: tuple[str, ...] = ()
    """Envoy's names: ``5xx``, ``gateway-error``, ``reset``, ``connect-failure``, …"""
    retry_on_status_codes: tuple[int, ...] = ()
    request_headers: HeaderChange = HeaderChange()
    response_headers: HeaderChange = HeaderChange()


class Split(Wire, frozen=True):
    """A share of the calls."""

    weight: float
    """Percent; the weights of a splitter add up to 100."""
    next_node: str
    """Always a resolver."""
    request_headers: HeaderChange = HeaderChange()
    response_headers: HeaderChange = HeaderChange()


class HashPolicy(Wire, frozen=True):
    """One part of what a request is hashed by. Exactly one of ``field`` and ``source_ip`` is set."""

    field: str = ""
    """``header``, ``cookie`` or ``query_parameter``."""
    field_value: str = ""
    """The header's, cookie's or parameter's name."""
    source_ip: bool = msgspec.field(default=False, name="SourceIP")
    terminal: bool = False
    """When this part gave a value, the rest is not looked at."""
    cookie_ttl_s: float = 0.0
    """For a cookie that is made when the request has none; 0 with ``cookie_session`` false: none is made."""
    cookie_session: bool = False
    cookie_path: str = ""


class Balancing(Wire, frozen=True):
    """How an instance of a target is chosen."""

    policy: str = ""
    """One of :data:`POLICIES`; empty: the sidecar's default (least request)."""
    choice_count: int = 2
    """least_request: instances compared."""
    ring_size_min: int = 1024
    """ring_hash: points on the ring, at least and at most."""
    ring_size_max: int = 8_388_608
    hash_policies: tuple[HashPolicy, ...] = ()
    locality: str = ""
    """``zone``: instances of the caller's zone go first; empty: nothing is said."""


class RouterNode(Wire, frozen=True, tag="router", tag_field="Type"):
    """Chooses by the request; the first route that matches."""

    routes: tuple[Route, ...]


class SplitterNode(Wire, frozen=True, tag="splitter", tag_field="Type"):
    """Chooses by chance."""

    splits: tuple[Split, ...]


class ResolverNode(Wire, frozen=True, tag="resolver", tag_field="Type"):
    """Names the instances."""

    target: str
    """Key of :attr:`Plan.targets`."""
    failover: tuple[str, ...] = ()
    """Targets that take over, in order, when those before have no healthy instance."""
    connect_timeout_s: float = CONNECT_TIMEOUT_S
    request_timeout_s: float = 0.0
    balancing: Balancing = Balancing()


Node = RouterNode | SplitterNode | ResolverNode


class Target(Wire, frozen=True):
    """Some instances of a service."""

    id: str
    service: str
    subset: str = ""
    filter: str = ""
    """Consul's filter expression over ``/v1/health/connect`` rows that makes the subset; empty: all."""
    only_passing: bool = False
    """Instances with a warning count as unhealthy."""


class Plan(Wire, frozen=True):
    """The way of a call to ``service``."""

    service: str
    protocol: str = ""
    """What ``service-defaults`` (else ``proxy-defaults``) says; empty when neither says anything."""
    start: str = ""
    nodes: dict[str, Node] = {}
    """By name: ``router:SERVICE.default.default``, ``splitter:…`` alike, ``resolver:TARGET``."""
    targets: dict[str, Target] = {}
    default: bool = True
    """No router, splitter or resolver bears on the service: calls go to its instances, chosen by the defaults."""
    error: str = ""
    """Why there is no plan; no call can be made then."""


def target_id(service: str, datacenter: str, subset: str = "") -> str:
    """Return a target's id, as Consul spells it: ``v1.web.default.default.dc1``."""
    return f"{subset}.{service}.default.default.{datacenter}" if subset else f"{service}.default.default.{datacenter}"
