"""What an agent says of itself, of the members and their coordinates."""

from __future__ import annotations

from typing import TypedDict

from node.http.answers.common import Empty


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
