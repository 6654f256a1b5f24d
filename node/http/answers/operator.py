"""Raft, autopilot, usage, faults."""

from __future__ import annotations

from typing import TypedDict


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
