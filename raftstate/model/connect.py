"""The certificate authority's public side: roots, leaves, revocations."""

from __future__ import annotations

from typing import Any

from raftstate.model.wire import Wire


class CARoot(Wire, frozen=True):
    """A root certificate in the trust bundle. Exactly one root is active (signs new leaves)."""

    id: str
    """Lower-case hex SHA-1 of the certificate, bytes joined by ``:``, as Consul's."""
    name: str
    root_cert: str
    """PEM."""
    intermediate_certs: tuple[str, ...] = ()
    """PEM; the cross-signed form of this root while an older root is still trusted."""
    serial_number: int = 0
    signing_key_id: str = ""
    active: bool = False
    not_before: str = ""
    not_after: str = ""
    create_index: int = 0
    modify_index: int = 0


class CARoots(Wire, frozen=True):
    """The trust bundle as ``/v1/connect/ca/roots`` shows it."""

    active_root_id: str = ""
    trust_domain: str = ""
    roots: tuple[CARoot, ...] = ()


class Leaf(Wire, frozen=True):
    """A leaf certificate with its key, as ``/v1/agent/connect/ca/leaf/:service`` shows it (loopback only)."""

    serial_number: str
    cert_pem: str
    """The leaf, then any intermediate, PEM."""
    private_key_pem: str
    service: str
    service_uri: str
    valid_after: str
    valid_before: str
    create_index: int = 0
    modify_index: int = 0


class Revocation(Wire, frozen=True):
    """A withdrawn identity. ``kind`` is ``instance``, ``service`` or ``serial``; ``value`` names it.

    For ``instance``, ``value`` is the instance id (any service's), unless ``service`` narrows it.
    """

    kind: str
    value: str
    service: str = ""
    reason: str = ""
    created_at: str = ""
    create_index: int = 0
    modify_index: int = 0


class CAConfig(Wire, frozen=True):
    """The authority's configuration, as ``/v1/connect/ca/configuration`` shows it (plus the trust domain)."""

    provider: str = "consul"
    config: dict[str, Any] = {}
    state: dict[str, str] = {}
    force_without_cross_signing: bool = False
    trust_domain: str = ""
    """Made once, with the first configuration; later configurations keep it."""
    create_index: int = 0
    modify_index: int = 0


class SigningMaterial(Wire, frozen=True):
    """The active root with its sealed key. Only the authority on a server may ask for it."""

    root: CARoot
    sealed_key: bytes
    """AES-256-GCM under the cluster key; useless without it."""
