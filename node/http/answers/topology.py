"""Services beside one another, for a UI."""

from __future__ import annotations

from typing import TypedDict

from node.http.answers.catalog import HealthRow


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
