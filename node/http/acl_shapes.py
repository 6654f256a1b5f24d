"""Tokens, policies and roles in the form of Consul's ``/v1/acl``: what is shown, and what bodies say."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from typing import Any

import msgspec

from node.http.errors import BadRequest
from raftstate.acl import BadRules, parse_rules
from raftstate.model.acl import NodeIdentity, Policy, Role, ServiceIdentity, Token
from raftstate.model.wire import Wire

HIDDEN = "<hidden>"
"""In a secret's place: only its hash is stored, so it is shown once, when it is made."""


class Link(Wire, frozen=True):
    """A policy or role by id or, failing that, by name."""

    id: str = ""
    name: str = ""


class PolicyBody(Wire, frozen=True):
    """``PUT /v1/acl/policy``."""

    id: str = ""
    name: str = ""
    description: str = ""
    rules: str = ""
    datacenters: tuple[str, ...] | None = ()


class RoleBody(Wire, frozen=True):
    """``PUT /v1/acl/role``."""

    id: str = ""
    name: str = ""
    description: str = ""
    policies: tuple[Link, ...] | None = ()
    service_identities: tuple[ServiceIdentity, ...] | None = ()
    node_identities: tuple[NodeIdentity, ...] | None = ()
    templated_policies: tuple[Any, ...] | None = ()


class TokenBody(Wire, frozen=True):
    """``PUT /v1/acl/token``."""

    accessor_id: str = ""
    secret_id: str = ""
    description: str | None = None
    policies: tuple[Link, ...] | None = ()
    roles: tuple[Link, ...] | None = ()
    service_identities: tuple[ServiceIdentity, ...] | None = ()
    node_identities: tuple[NodeIdentity, ...] | None = ()
    templated_policies: tuple[Any, ...] | None = ()
    local: bool = False
    expiration_time: str | None = None
    expiration_ttl: str | int | None = msgspec.field(default=None, name="ExpirationTTL")
    auth_method: str = ""


def require_no_templates(given: tuple[Any, ...] | None) -> None:
    """Refuse what is not there rather than grant nothing in silence."""
    if given:
        raise BadRequest("TemplatedPolicies are not supported: use ServiceIdentities, NodeIdentities or Policies")


def require_rules(text: str) -> None:
    """Raises BadRequest that names the rule."""
    try:
        parse_rules(text)
    except BadRules as error:
        raise BadRequest(f"Rules: {error}") from None


def _hash(*parts: Any) -> str:
    """Return a digest of what a row says, by which clients see whether it has changed."""
    return base64.b64encode(hashlib.blake2b(json.dumps(parts).encode(), digest_size=32).digest()).decode()


def _identities(row: Token | Role) -> dict[str, Any]:
    shown: dict[str, Any] = {}
    if row.service_identities:
        shown["ServiceIdentities"] = [
            {"ServiceName": one.service_name} | ({"Datacenters": list(one.datacenters)} if one.datacenters else {})
            for one in row.service_identities
        ]
    if row.node_identities:
        shown["NodeIdentities"] = [
            {"NodeName": one.node_name, "Datacenter": one.datacenter} for one in row.node_identities
        ]
    return shown


def _links(name: str, ids: tuple[str, ...], names: Mapping[str, str]) -> dict[str, Any]:
    """Links as {ID, Name}; those of deleted rows are left out, as they mean nothing."""
    links = [{"ID": one, "Name": names[one]} for one in ids if one in names]
    return {name: links} if links else {}


def policy_shape(row: Policy, *, listed: bool = False) -> dict[str, Any]:
    """Return a policy as it is shown; in a list without its rules."""
    shown: dict[str, Any] = {"ID": row.id, "Name": row.name, "Description": row.description}
    if not listed:
        shown["Rules"] = row.rules
    if row.datacenters:
        shown["Datacenters"] = list(row.datacenters)
    return shown | {
        "Hash": _hash(row.name, row.description, row.rules, row.datacenters),
        "CreateIndex": row.create_index,
        "ModifyIndex": row.modify_index,
    }


def role_shape(row: Role, policies: Mapping[str, str]) -> dict[str, Any]:
    """Return a role as it is shown. ``policies``: their names by id."""
    shown = {"ID": row.id, "Name": row.name, "Description": row.description}
    return {
        **shown,
        **_links("Policies", row.policies, policies),
        **_identities(row),
        "Hash": _hash(row.name, row.description, row.policies, msgspec.to_builtins(_identities(row))),
        "CreateIndex": row.create_index,
        "ModifyIndex": row.modify_index,
    }


def token_shape(
    row: Token, policies: Mapping[str, str], roles: Mapping[str, str], secret: str = ""
) -> dict[str, Any]:
    """Return a token as it is shown. ``policies``, ``roles``: their names by id."""
    shown: dict[str, Any] = {
        "AccessorID": row.accessor_id,
        "SecretID": secret or ("anonymous" if not row.secret_hash else HIDDEN),
        "Description": row.description,
        **_links("Policies", row.policies, policies),
        **_links("Roles", row.roles, roles),
        **_identities(row),
        "Local": row.local,
        "CreateTime": row.create_time or "0001-01-01T00:00:00Z",
    }
    if row.expiration_time:
        shown["ExpirationTime"] = row.expiration_time
    return shown | {
        "Hash": _hash(row.description, row.policies, row.roles, _identities(row), row.local),
        "CreateIndex": row.create_index,
        "ModifyIndex": row.modify_index,
    }
