"""Tokens, roles and policies as the state keeps them: no secret is stored, only its hash."""

from __future__ import annotations

import datetime
from typing import Any

from raftstate.model.wire import Wire

ANONYMOUS_ID = "00000000-0000-0000-0000-000000000002"
"""Accessor id of the token that a request without one is taken to show (Consul's)."""
MANAGEMENT_ID = "00000000-0000-0000-0000-000000000001"
"""Id of the policy that grants everything (Consul's ``global-management``)."""
READ_ONLY_ID = "00000000-0000-0000-0000-000000000002"
"""Id of the policy that grants every read but those of the access control itself (``builtin/global-read-only``)."""


class ServiceIdentity(Wire, frozen=True):
    """Grants what an instance of a service and its sidecar need."""

    service_name: str
    datacenters: tuple[str, ...] = ()


class NodeIdentity(Wire, frozen=True):
    """Grants what an agent of that name needs."""

    node_name: str
    datacenter: str = ""


class Policy(Wire, frozen=True):
    """Rules under a name. ``rules`` is the text as it was written; it is compiled where it is enforced."""

    id: str
    name: str
    description: str = ""
    rules: str = ""
    datacenters: tuple[str, ...] = ()
    create_index: int = 0
    modify_index: int = 0


class Role(Wire, frozen=True):
    """Policies and identities under a name. ``policies`` are ids; those of deleted policies mean nothing."""

    id: str
    name: str
    description: str = ""
    policies: tuple[str, ...] = ()
    service_identities: tuple[ServiceIdentity, ...] = ()
    node_identities: tuple[NodeIdentity, ...] = ()
    create_index: int = 0
    modify_index: int = 0


class Token(Wire, frozen=True):
    """An access token. ``policies`` and ``roles`` are ids; those of deleted ones mean nothing."""

    accessor_id: str
    secret_hash: str
    """Lower-case hex SHA-256 of the secret; empty for the anonymous token, which has none."""
    document: dict[str, Any] = {}
    """Of rows that an older version wrote; not read."""
    create_time: str = ""
    expiration_time: str = ""
    """RFC 3339; empty: never."""
    create_index: int = 0
    modify_index: int = 0
    description: str = ""
    policies: tuple[str, ...] = ()
    roles: tuple[str, ...] = ()
    service_identities: tuple[ServiceIdentity, ...] = ()
    node_identities: tuple[NodeIdentity, ...] = ()
    local: bool = False


class Bootstrap(Wire, frozen=True):
    """That access control was begun, and when last: ``modify_index`` is what a reset has to name."""

    accessor_id: str
    create_index: int = 0
    modify_index: int = 0


class Grants(Wire, frozen=True):
    """All that a token stands for, its roles opened: what an `Authorizer` is made of."""

    accessor_id: str
    expiration_time: str = ""
    rules: tuple[str, ...] = ()
    """Texts of its policies, in the order of their ids."""
    service_identities: tuple[ServiceIdentity, ...] = ()
    node_identities: tuple[NodeIdentity, ...] = ()


def expired(expiration_time: str, now: datetime.datetime) -> bool:
    """Whether a token's time has passed; one that cannot be read has."""
    try:
        return datetime.datetime.fromisoformat(expiration_time) <= now
    except (ValueError, TypeError):  # no time, or one without an offset
        return True
