"""The discovery chain."""

from __future__ import annotations

from typing import Any, Literal, NotRequired, TypedDict

from node.http.answers.common import Empty


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
