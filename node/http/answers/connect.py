"""The trust bundle, the authority, intentions."""

from __future__ import annotations

from typing import Any, NotRequired, TypedDict


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
    IgnoreCase: NotRequired[bool]


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
