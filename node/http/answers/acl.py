"""Tokens, policies, roles."""

from __future__ import annotations

from typing import Any, NotRequired, TypedDict


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
