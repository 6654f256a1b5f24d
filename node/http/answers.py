"""Consul's JSON forms of answers, where they are no model type as it stands. `/v1/openapi.json` is made from these.

A field that is only there sometimes is `NotRequired`; one that is not named here is not sent. The functions that make
the answers are typed with them, so that neither can change without the other.
"""

from __future__ import annotations

from typing import Any, Literal, NotRequired, TypedDict

Status = Literal["passing", "warning", "critical"]


class Empty(TypedDict):
    """``{}``."""


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


class MemberRow(TypedDict):
    """A node with an agent."""

    Name: str
    Addr: str
    Port: int
    Tags: dict[str, str]
    Status: int
    ProtocolMin: int
    ProtocolMax: int
    ProtocolCur: int
    DelegateMin: int
    DelegateMax: int
    DelegateCur: int


class CoordRow(TypedDict):
    """A network coordinate."""

    Vec: list[float]
    Error: float
    Adjustment: float
    Height: float


class NodeCoord(TypedDict):
    """A node's coordinate."""

    Node: str
    Segment: str
    Coord: CoordRow


class DatacenterCoords(TypedDict):
    """The servers' coordinates in one datacenter."""

    Datacenter: str
    AreaID: str
    Coordinates: list[NodeCoord]


class AgentConfig(TypedDict):
    """The part of an agent's configuration that is shown."""

    Datacenter: str
    PrimaryDatacenter: str
    NodeName: str
    NodeID: str
    Revision: str
    Server: bool
    Version: str
    BuildDate: str


class AgentDebugConfig(TypedDict):
    """More of it."""

    Datacenter: str
    NodeName: str
    ServerMode: bool
    ConnectEnabled: bool
    LictorVersion: str
    HTTPPort: int
    DNSPort: int


class XdsPorts(TypedDict):
    """Where Envoys are served."""

    Plaintext: int
    TLS: int


class XdsRow(TypedDict):
    """What Envoys are served."""

    SupportedProxies: dict[str, list[str]]
    Port: int
    Ports: XdsPorts


class AgentSelf(TypedDict):
    """``/v1/agent/self``."""

    Config: AgentConfig
    DebugConfig: AgentDebugConfig
    Coord: CoordRow
    Member: MemberRow
    Stats: dict[str, dict[str, str]]
    Meta: dict[str, str]
    xDS: XdsRow


class HostMemory(TypedDict):
    """The process's memory, bytes."""

    rssMax: int


class HostName(TypedDict):
    """The host's name."""

    hostname: str


class AgentHost(TypedDict):
    """``/v1/agent/host``."""

    Memory: HostMemory
    CPU: list[Empty]
    Host: HostName


class AgentVersion(TypedDict):
    """``/v1/agent/version``."""

    SHA: str
    BuildDate: str
    HumanVersion: str
    FIPS: str
    Lictor: str


class GaugeRow(TypedDict):
    """One figure."""

    Name: str
    Value: float
    Labels: dict[str, str]


class AgentMetrics(TypedDict):
    """``/v1/agent/metrics``."""

    Timestamp: str
    Gauges: list[GaugeRow]
    Points: list[Empty]
    Counters: list[Empty]
    Samples: list[Empty]


class Authorization(TypedDict):
    """``/v1/agent/connect/authorize``."""

    Authorized: bool
    Reason: str


class RootRow(TypedDict):
    """A root certificate in the trust bundle."""

    ID: str
    Name: str
    SerialNumber: int
    SigningKeyID: str
    ExternalTrustDomain: str
    NotBefore: str
    NotAfter: str
    RootCert: str
    IntermediateCerts: tuple[str, ...] | None
    Active: bool
    PrivateKeyType: str
    PrivateKeyBits: int
    CreateIndex: int
    ModifyIndex: int


class Roots(TypedDict):
    """The trust bundle."""

    ActiveRootID: str
    TrustDomain: str
    Roots: list[RootRow]


class AuthorityConfig(TypedDict):
    """``/v1/connect/ca/configuration``."""

    Provider: str
    Config: dict[str, Any]
    State: dict[str, str] | None
    ForceWithoutCrossSigning: bool
    CreateIndex: int
    ModifyIndex: int


class HeaderMatchRow(TypedDict):
    """One condition on a request header."""

    Name: str
    Present: NotRequired[bool]
    Exact: NotRequired[str]
    Prefix: NotRequired[str]
    Suffix: NotRequired[str]
    Contains: NotRequired[str]
    Regex: NotRequired[str]
    Invert: NotRequired[bool]


class HttpMatchRow(TypedDict):
    """What of a request a permission covers."""

    PathExact: NotRequired[str]
    PathPrefix: NotRequired[str]
    PathRegex: NotRequired[str]
    Methods: NotRequired[list[str]]
    Header: NotRequired[list[HeaderMatchRow]]


class PermissionRow(TypedDict):
    """One rule on requests."""

    Action: str
    HTTP: HttpMatchRow


class IntentionRow(TypedDict):
    """An intention: either with an action, or with permissions."""

    ID: str
    Description: str
    SourceNS: str
    SourceName: str
    SourceService: NotRequired[str]
    DestinationNS: str
    DestinationName: str
    DestinationService: NotRequired[str]
    SourceType: str
    Action: NotRequired[str]
    Permissions: NotRequired[list[PermissionRow]]
    Meta: dict[str, str]
    Precedence: int
    CreatedAt: str
    UpdatedAt: str
    CreateIndex: int
    ModifyIndex: int


class IntentionCheck(TypedDict):
    """``/v1/connect/intentions/check``."""

    Allowed: bool
    Reason: str


class ServiceSummary(TypedDict):
    """A service and how many of its instances are well."""

    Kind: str
    Name: str
    Datacenter: str
    Tags: list[str]
    Nodes: list[str]
    InstanceCount: int
    ChecksPassing: int
    ChecksWarning: int
    ChecksCritical: int
    ConnectedWithProxy: bool


class NeighbourIntention(TypedDict):
    """What the intentions say of a pair."""

    DefaultAllow: bool
    Allowed: bool
    HasPermissions: bool
    ExternalSource: str
    HasExact: bool


class Neighbour(ServiceSummary):
    """A service beside another in a topology."""

    Source: str
    Intention: NeighbourIntention


class Topology(TypedDict):
    """Who calls a service and whom it calls."""

    Protocol: str
    TransparentProxy: bool
    Upstreams: list[Neighbour]
    Downstreams: list[Neighbour]
    FilteredByACLs: bool
    Instances: list[HealthRow]


class TargetGroup(TypedDict):
    """Prometheus' ``http_sd`` form of an instance."""

    targets: list[str]
    labels: dict[str, str]


class RaftServer(TypedDict):
    """A server of the raft cluster."""

    ID: str
    Node: str
    Address: str
    Leader: bool
    ProtocolVersion: str
    Voter: bool


class RaftConfiguration(TypedDict):
    """``/v1/operator/raft/configuration``."""

    Servers: list[RaftServer]
    Index: int


class TransferAnswer(TypedDict):
    """``/v1/operator/raft/transfer-leader``."""

    Success: bool


class AutopilotServer(TypedDict):
    """A server as autopilot's health shows it."""

    ID: str
    Name: str
    Address: str
    SerfStatus: str
    Version: str
    Leader: bool
    LastContact: str
    LastTerm: int
    LastIndex: int
    Healthy: bool
    Voter: bool
    StableSince: str


class AutopilotHealth(TypedDict):
    """``/v1/operator/autopilot/health``."""

    Healthy: bool
    FailureTolerance: int
    Servers: list[AutopilotServer]


class AutopilotStateServer(TypedDict):
    """A server as autopilot's state shows it."""

    ID: str
    Name: str
    Address: str
    NodeStatus: str
    Version: str
    LastContact: str
    LastTerm: int
    LastIndex: int
    Healthy: bool
    StableSince: str
    ReadReplica: bool
    Status: str
    Meta: dict[str, str]
    NodeType: str


class AutopilotState(TypedDict):
    """``/v1/operator/autopilot/state``."""

    Healthy: bool
    FailureTolerance: int
    OptimisticFailureTolerance: int
    Servers: dict[str, AutopilotStateServer]
    Leader: str
    Voters: list[str]


class AutopilotSettings(TypedDict):
    """``/v1/operator/autopilot/configuration``."""

    CleanupDeadServers: bool
    LastContactThreshold: str
    MaxTrailingLogs: int
    MinQuorum: int
    ServerStabilizationTime: str
    RedundancyZoneTag: str
    DisableUpgradeMigration: bool
    UpgradeVersionTag: str
    RemoveServerAfter: str
    CreateIndex: int
    ModifyIndex: int


class UsageRow(TypedDict):
    """Counts of one datacenter."""

    Services: int
    Nodes: int


class Usage(TypedDict):
    """``/v1/operator/usage``."""

    Usage: dict[str, UsageRow]
    Index: int


class Blocked(TypedDict):
    """The peers that this node is cut off from."""

    Blocked: list[str]


class Created(TypedDict):
    """The id of what was made."""

    ID: str


class TxnKVRow(TypedDict):
    """A key as a transaction's result shows it; without its value after a write."""

    LockIndex: int
    Key: str
    Flags: int
    Value: NotRequired[str | None]
    Session: NotRequired[str]
    CreateIndex: int
    ModifyIndex: int


class TxnResult(TypedDict):
    """One result of a transaction: exactly one of these."""

    KV: NotRequired[TxnKVRow]
    Node: NotRequired[dict[str, Any]]
    Service: NotRequired[dict[str, Any]]
    Check: NotRequired[dict[str, Any]]


class TxnError(TypedDict):
    """Which operation failed, and why."""

    OpIndex: int
    What: str


class TxnAnswer(TypedDict):
    """``/v1/txn``."""

    Results: list[TxnResult] | None
    Errors: list[TxnError] | None


class ChainResolver(TypedDict):
    """How a target's instances are found."""

    Default: bool
    ConnectTimeout: str
    Target: str
    RequestTimeout: NotRequired[str]
    Failover: NotRequired[dict[str, list[str]]]


class ChainBalancer(TypedDict):
    """How one of the instances is chosen."""

    Policy: str
    HashPolicies: NotRequired[list[dict[str, Any]]]


class ChainRoute(TypedDict):
    """Where matching requests go."""

    Definition: dict[str, Any]
    NextNode: str


class ChainSplit(TypedDict):
    """A share of the calls."""

    Definition: dict[str, Any]
    Weight: float
    NextNode: str


class ChainNode(TypedDict):
    """A router, a splitter or a resolver."""

    Type: Literal["router", "splitter", "resolver"]
    Name: str
    Routes: NotRequired[list[ChainRoute]]
    Splits: NotRequired[list[ChainSplit]]
    Resolver: NotRequired[ChainResolver]
    LoadBalancer: NotRequired[ChainBalancer]


class ChainTarget(TypedDict):
    """Instances that calls may go to."""

    ID: str
    Service: str
    ServiceSubset: str
    Namespace: str
    Partition: str
    Datacenter: str
    MeshGateway: Empty
    Subset: dict[str, Any]
    ConnectTimeout: str
    SNI: str
    Name: str


class Chain(TypedDict):
    """A compiled discovery chain."""

    ServiceName: str
    Namespace: str
    Partition: str
    Datacenter: str
    Protocol: str
    Default: bool
    StartNode: str
    Nodes: dict[str, ChainNode]
    Targets: dict[str, ChainTarget]
    Error: NotRequired[str]


class ChainAnswer(TypedDict):
    """``/v1/discovery-chain/:service``."""

    Chain: Chain


class LinkRow(TypedDict):
    """A policy or role."""

    ID: str
    Name: str


class ServiceIdentityRow(TypedDict):
    """What a service of this name may do."""

    ServiceName: str
    Datacenters: NotRequired[list[str]]


class NodeIdentityRow(TypedDict):
    """What a node of this name may do."""

    NodeName: str
    Datacenter: str


class PolicyListRow(TypedDict):
    """A policy in a list: without its rules."""

    ID: str
    Name: str
    Description: str
    Datacenters: NotRequired[list[str]]
    Hash: str
    CreateIndex: int
    ModifyIndex: int


class PolicyRow(PolicyListRow):
    """A policy."""

    Rules: str


class _Grants(TypedDict):
    Policies: NotRequired[list[LinkRow]]
    ServiceIdentities: NotRequired[list[ServiceIdentityRow]]
    NodeIdentities: NotRequired[list[NodeIdentityRow]]


class RoleRow(_Grants):
    """A role."""

    ID: str
    Name: str
    Description: str
    Hash: str
    CreateIndex: int
    ModifyIndex: int


class TokenRow(_Grants):
    """A token. Its secret is shown when it is made, and hidden afterwards; the last four with ``?expanded``."""

    AccessorID: str
    SecretID: str
    Description: str
    Roles: NotRequired[list[LinkRow]]
    Local: bool
    CreateTime: str
    ExpirationTime: NotRequired[str]
    Hash: str
    CreateIndex: int
    ModifyIndex: int
    ExpandedPolicies: NotRequired[list[PolicyRow]]
    ExpandedRoles: NotRequired[list[dict[str, Any]]]
    AgentACLDefaultPolicy: NotRequired[str]
    AgentACLDownPolicy: NotRequired[str]


class Replication(TypedDict):
    """``/v1/acl/replication``."""

    Enabled: bool
    Running: bool
    SourceDatacenter: str
