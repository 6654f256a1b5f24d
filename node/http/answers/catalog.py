"""Rows of nodes, services, checks and instances: catalog, health, discovery, and the local agent."""

from __future__ import annotations

from typing import Any, Literal, NotRequired, TypedDict

from node.http.answers.common import Empty

Status = Literal["passing", "warning", "critical"]


class NodeRow(TypedDict):
    """A node as the health and catalog endpoints show it."""

    ID: str
    Node: str
    Address: str
    Datacenter: str
    TaggedAddresses: dict[str, str]
    Meta: dict[str, str]
    CreateIndex: int
    ModifyIndex: int


class WeightsRow(TypedDict):
    """Shares of traffic."""

    Passing: int
    Warning: int


class UpstreamRow(TypedDict):
    """One upstream of a proxy."""

    DestinationType: str
    DestinationName: str
    LocalBindAddress: str
    LocalBindPort: int
    Config: dict[str, Any] | None
    MeshGateway: Empty
    UpstreamName: NotRequired[str]
    DestinationPort: NotRequired[int]


class ProxyRow(TypedDict):
    """The Proxy part of a service; nearly empty for one that is no proxy."""

    Mode: str
    MeshGateway: Empty
    Expose: Empty
    DestinationServiceName: NotRequired[str]
    DestinationServiceID: NotRequired[str]
    LocalServiceAddress: NotRequired[str]
    LocalServicePort: NotRequired[int]
    Config: NotRequired[dict[str, Any] | None]
    Upstreams: NotRequired[list[UpstreamRow]]


class ConnectRow(TypedDict):
    """Whether a service speaks for itself in the mesh."""

    Native: NotRequired[bool]


class ServiceRow(TypedDict):
    """A service as ``/v1/health/service`` and ``/v1/catalog/node`` show it."""

    ID: str
    Service: str
    Tags: tuple[str, ...]
    Address: str
    TaggedAddresses: dict[str, Any] | None
    Meta: dict[str, str]
    Port: int
    Weights: WeightsRow
    EnableTagOverride: bool
    Proxy: ProxyRow
    Connect: ConnectRow
    PeerName: str
    CreateIndex: int
    ModifyIndex: int
    Kind: NotRequired[str]
    Locality: NotRequired[dict[str, str]]


class AgentServiceRow(TypedDict):
    """A service as ``/v1/agent/services`` shows it."""

    ID: str
    Service: str
    Tags: tuple[str, ...]
    Meta: dict[str, str]
    Port: int
    Address: str
    TaggedAddresses: dict[str, Any]
    Weights: WeightsRow
    EnableTagOverride: bool
    Datacenter: str
    Kind: NotRequired[str]
    Proxy: NotRequired[ProxyRow]
    Connect: NotRequired[ConnectRow]
    Locality: NotRequired[dict[str, str]]
    ContentHash: NotRequired[str]


class AgentCheckRow(TypedDict):
    """A check as ``/v1/agent/checks`` shows it."""

    Node: str
    CheckID: str
    Name: str
    Status: Status
    Notes: str
    Output: str
    ServiceID: str
    ServiceName: str
    ServiceTags: tuple[str, ...]
    Type: str
    Interval: str
    Timeout: str
    ExposedPort: int
    Definition: dict[str, Any]


class CheckRow(AgentCheckRow):
    """A check as the health endpoints show it."""

    CreateIndex: int
    ModifyIndex: int


class HealthRow(TypedDict):
    """One entry of ``/v1/health/service/:name``."""

    Node: NodeRow
    Service: ServiceRow
    Checks: list[CheckRow]


class AgentHealthRow(TypedDict):
    """One entry of ``/v1/agent/health/service/…``."""

    AggregatedStatus: Status
    Service: AgentServiceRow
    Checks: list[CheckRow]


class CatalogServiceRow(TypedDict):
    """One entry of ``/v1/catalog/service/:name``."""

    ID: str
    Node: str
    Address: str
    Datacenter: str
    TaggedAddresses: dict[str, str]
    NodeMeta: dict[str, str]
    ServiceID: str
    ServiceName: str
    ServiceKind: str
    ServiceAddress: str
    ServiceTaggedAddresses: dict[str, Any] | None
    ServiceTags: list[str]
    ServiceMeta: dict[str, str]
    ServicePort: int
    ServiceWeights: WeightsRow
    ServiceEnableTagOverride: bool
    ServiceProxy: ProxyRow
    ServiceConnect: dict[str, Any]
    ServiceLocality: NotRequired[dict[str, str]]
    CreateIndex: int
    ModifyIndex: int


class NodeServices(TypedDict):
    """``/v1/catalog/node/:node``: services by id."""

    Node: NodeRow
    Services: dict[str, ServiceRow]


class NodeServiceList(TypedDict):
    """``/v1/catalog/node-services/:node``."""

    Node: NodeRow | None
    Services: list[ServiceRow]


class TargetGroup(TypedDict):
    """Prometheus' ``http_sd`` form of an instance."""

    targets: list[str]
    labels: dict[str, str]
