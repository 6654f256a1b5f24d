"""Access control's rows: tokens (by the hash of their secret), roles, policies. The deciding is done elsewhere.

What every cluster has is not stored: the policies ``global-management`` and ``builtin/global-read-only``, and, until
it is changed, the anonymous token. A role or policy that is deleted leaves its id in what referred to it, where it
means nothing from then on.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

import msgspec

from raftstate.acl.builtin import MANAGEMENT_RULES, READ_ONLY_RULES
from raftstate.model.acl import (
    ANONYMOUS_ID,
    MANAGEMENT_ID,
    READ_ONLY_ID,
    Bootstrap,
    Grants,
    NodeIdentity,
    Policy,
    Role,
    ServiceIdentity,
    Token,
)
from raftstate.state.answer import Answer, answer, index_of
from raftstate.state.changes import WatchKey
from raftstate.state.commands import (
    BootstrapACL,
    DeletePolicy,
    DeleteRole,
    DeleteToken,
    UpsertPolicy,
    UpsertRole,
    UpsertToken,
)
from raftstate.state.names import require_name, require_service_name, require_text
from raftstate.state.refusal import CONFLICT, INVALID, Refused
from raftstate.state.step import Step
from raftstate.state.store import Store

_SHA256 = re.compile("[0-9a-f]{64}")
_POLICY_NAME = re.compile("[A-Za-z0-9_-]{1,128}")
_ROLE_NAME = re.compile("[A-Za-z0-9_-]{1,256}")
DESCRIPTION_MAX = 4096
RULES_BYTES_MAX = 64 * 1024
LINKS_MAX = 256
"""Policies, roles and identities that one token or role may have, of each."""

BUILTIN_POLICIES = {
    row.id: row
    for row in (
        Policy(
            MANAGEMENT_ID,
            "global-management",
            "Builtin policy that grants everything",
            MANAGEMENT_RULES,
            create_index=1,
            modify_index=1,
        ),
        Policy(
            READ_ONLY_ID,
            "builtin/global-read-only",
            "Builtin policy that grants every read but those of access control itself",
            READ_ONLY_RULES,
            create_index=1,
            modify_index=1,
        ),
    )
}
ANONYMOUS = Token(ANONYMOUS_ID, "", description="Anonymous Token", create_index=1, modify_index=1)
ACL = ("acl",)
"""Touched by every change here. Whoever follows one token follows its own rows (`_rows_of`): an agent that knows many
tokens must not ask for all of them again whenever one is made."""


def upsert(step: Step, command: UpsertToken) -> bool:
    """Write a token."""
    token, tokens = command.token, step.store.tokens
    if command.only_first and tokens.rows:
        return False
    old = tokens.rows.get(token.accessor_id)
    if not _as_expected(command.cas_index, old):
        return False
    _check_token(step.store, token)
    _store_token(step, token)
    return True


def _check_token(store: Store, token: Token) -> None:
    require_name(token.accessor_id, "accessor id")
    if token.accessor_id == ANONYMOUS_ID:
        if token.secret_hash or token.expiration_time:
            raise Refused(INVALID, "the anonymous token has no secret and does not expire")
    elif not _SHA256.fullmatch(token.secret_hash):
        raise Refused(INVALID, "secret_hash must be 64 lower-case hex digits: the secret itself is never stored")
    require_text(token.description, "Description", length_max=DESCRIPTION_MAX)
    _check_links(store, token)
    _bounded("Roles", token.roles)
    for role_id in token.roles:
        if role_id not in store.acl_roles.rows:
            raise Refused(INVALID, f"Roles: no such ACL role with ID {role_id[:80]!r}")
    holder = store.tokens.by_secret_hash.get(token.secret_hash)
    if holder is not None and holder.accessor_id != token.accessor_id:
        raise Refused(CONFLICT, f"the secret belongs to token {holder.accessor_id} already: make a new one")


def _store_token(step: Step, token: Token) -> None:
    tokens = step.store.tokens
    old = tokens.rows.get(token.accessor_id)
    if not token.create_time:  # the log's time, so that a write that is sent again is the same
        token = msgspec.structs.replace(token, create_time=step.at if old is None else old.create_time)
    row = step.stamp(token, old)
    if row is None:
        return
    tokens.put(row.accessor_id, row)
    if old is not None and old.secret_hash != row.secret_hash:
        step.bury("token-secret", old.secret_hash)
    step.touch(*ACL)
    step.touch("tokens")
    step.touch("token", row.accessor_id)
    step.touch("token-secret", row.secret_hash)


def delete(step: Step, command: DeleteToken) -> bool:
    """Delete a token."""
    if command.accessor_id == ANONYMOUS_ID:
        raise Refused(
            INVALID, "Delete operation not permitted on the anonymous token: take its policies away instead"
        )
    row = step.store.tokens.remove(command.accessor_id)
    if row is None:
        return False
    step.touch(*ACL)
    step.touch("tokens")
    step.bury("token", row.accessor_id)
    step.bury("token-secret", row.secret_hash)
    return True


def bootstrap(step: Step, command: BootstrapACL) -> bool:
    """Write the first token, once; again only by the index of the time before. Value: whether it was written."""
    held = step.store.acl_bootstrap.rows.get("")
    if held is not None and command.reset_index != held.modify_index:
        return False
    _check_token(step.store, command.token)
    _store_token(step, command.token)
    row = step.stamp(Bootstrap(command.token.accessor_id), held)
    if row is not None:
        step.store.acl_bootstrap.put("", row)
    step.touch(*ACL)
    return True


def upsert_policy(step: Step, command: UpsertPolicy) -> bool:
    """Write a policy. Its rules are text here: what they mean is for those who enforce them."""
    policy, policies = command.policy, step.store.acl_policies
    old = policies.rows.get(policy.id)
    if not _as_expected(command.cas_index, old):
        return False
    require_name(policy.id, "policy id")
    if policy.id in BUILTIN_POLICIES:
        raise Refused(INVALID, f"Changing the builtin policy {BUILTIN_POLICIES[policy.id].name} is not permitted")
    if not _POLICY_NAME.fullmatch(policy.name):
        raise Refused(
            INVALID, f"Name {policy.name[:80]!r} is invalid: 1 to 128 letters, digits, hyphens and underscores"
        )
    require_text(policy.description, "Description", length_max=DESCRIPTION_MAX)
    if len(policy.rules.encode()) > RULES_BYTES_MAX:
        raise Refused(INVALID, f"Rules are longer than {RULES_BYTES_MAX} bytes: use several policies")
    _bounded("Datacenters", policy.datacenters)
    holder = _policy_named(step.store, policy.name)
    if holder is not None and holder.id != policy.id:
        raise Refused(CONFLICT, f"Invalid Policy: A Policy with Name {policy.name!r} already exists")
    row = step.stamp(policy, old)
    if row is not None:
        policies.put(row.id, row)
        step.touch(*ACL)
        step.touch("acl-policy", row.id)
    return True


def delete_policy(step: Step, command: DeletePolicy) -> bool:
    """Delete a policy; whoever had it loses what it granted."""
    if command.id in BUILTIN_POLICIES:
        raise Refused(
            INVALID, f"Delete operation not permitted on the builtin {BUILTIN_POLICIES[command.id].name} policy"
        )
    if step.store.acl_policies.remove(command.id) is None:
        return False
    step.touch(*ACL)
    step.bury("acl-policy", command.id)
    return True


def upsert_role(step: Step, command: UpsertRole) -> bool:
    """Write a role."""
    role, roles = command.role, step.store.acl_roles
    old = roles.rows.get(role.id)
    if not _as_expected(command.cas_index, old):
        return False
    require_name(role.id, "role id")
    if not _ROLE_NAME.fullmatch(role.name):
        raise Refused(
            INVALID, f"Name {role.name[:80]!r} is invalid: 1 to 256 letters, digits, hyphens and underscores"
        )
    require_text(role.description, "Description", length_max=DESCRIPTION_MAX)
    _check_links(step.store, role)
    holder = roles.by_name.get(role.name)
    if holder is not None and holder.id != role.id:
        raise Refused(CONFLICT, f"Invalid Role: A Role with Name {role.name!r} already exists")
    row = step.stamp(role, old)
    if row is not None:
        roles.put(row.id, row)
        step.touch(*ACL)
        step.touch("acl-role", row.id)
    return True


def delete_role(step: Step, command: DeleteRole) -> bool:
    """Delete a role; whoever had it loses what it granted."""
    if step.store.acl_roles.remove(command.id) is None:
        return False
    step.touch(*ACL)
    step.bury("acl-role", command.id)
    return True


def _as_expected(cas_index: int | None, old: Token | Policy | Role | None) -> bool:
    return cas_index is None or cas_index == (0 if old is None else old.modify_index)


def _check_links(store: Store, row: Token | Role) -> None:
    _bounded("Policies", row.policies)
    _bounded("ServiceIdentities", row.service_identities)
    _bounded("NodeIdentities", row.node_identities)
    for policy_id in row.policies:
        if _policy(store, policy_id) is None:
            raise Refused(INVALID, f"Policies: no such ACL policy with ID {policy_id[:80]!r}")
    for service in row.service_identities:
        require_service_name(service.service_name, "ServiceIdentities.ServiceName")
    for node in row.node_identities:
        require_name(node.node_name, "NodeIdentities.NodeName")


def _bounded(what: str, links: tuple[object, ...]) -> None:
    if len(links) > LINKS_MAX:
        raise Refused(INVALID, f"{what} has {len(links)} entries; the most is {LINKS_MAX}")


def _policy(store: Store, policy_id: str) -> Policy | None:
    return BUILTIN_POLICIES.get(policy_id) or store.acl_policies.rows.get(policy_id)


def _policy_named(store: Store, name: str) -> Policy | None:
    for policy in BUILTIN_POLICIES.values():
        if policy.name == name:
            return policy
    return store.acl_policies.by_name.get(name)


def token(store: Store, accessor_id: str = "", secret_hash: str = "") -> Answer:
    """A token by accessor id or by the hash of its secret, or None."""
    if accessor_id:
        default = ANONYMOUS if accessor_id == ANONYMOUS_ID else None
        return answer(store, store.tokens.rows.get(accessor_id, default), ("token", accessor_id))
    return answer(store, store.tokens.by_secret_hash.get(secret_hash), ("token-secret", secret_hash))


def tokens(store: Store) -> Answer:
    """All tokens that are stored, by accessor id."""
    rows = store.tokens.rows
    return answer(store, [rows[id] for id in sorted(rows)], ("tokens",))


def listed(store: Store) -> Answer:
    """All tokens, the anonymous one among them, without what their secrets are known by."""
    rows = {ANONYMOUS_ID: ANONYMOUS} | store.tokens.rows
    shown = [msgspec.structs.replace(rows[id], secret_hash="") for id in sorted(rows)]
    return answer(store, shown, ("tokens",))


def policy(store: Store, id: str = "", name: str = "") -> Answer:
    """A policy by id or name, or None."""
    return answer(store, _policy(store, id) if id else _policy_named(store, name), ACL)


def policies(store: Store) -> Answer:
    """All policies by name, the builtin ones among them."""
    rows = [*BUILTIN_POLICIES.values(), *store.acl_policies.rows.values()]
    return answer(store, sorted(rows, key=lambda row: row.name), ACL)


def role(store: Store, id: str = "", name: str = "") -> Answer:
    """A role by id or name, or None."""
    return answer(store, store.acl_roles.rows.get(id) if id else store.acl_roles.by_name.get(name), ACL)


def roles(store: Store) -> Answer:
    """All roles by name."""
    return answer(store, sorted(store.acl_roles.rows.values(), key=lambda row: row.name), ACL)


def bootstrapped(store: Store) -> Answer:
    """That access control was begun, or None."""
    return answer(store, store.acl_bootstrap.rows.get(""), ACL)


def resolve(store: Store, secret_hash: str = "", datacenter: str = "") -> Answer:
    """All that the bearer of a secret is granted in a datacenter, or None; without a secret: the anonymous token."""
    changed = index_of(store, (ACL,))
    key = f"{datacenter}/{secret_hash}"
    known = store.tokens.resolved.get(key)
    if known is not None and known[0] == changed:
        return known[1]
    if secret_hash:
        row, watch = store.tokens.by_secret_hash.get(secret_hash), ("token-secret", secret_hash)
    else:
        row, watch = store.tokens.rows.get(ANONYMOUS_ID, ANONYMOUS), ("token", ANONYMOUS_ID)
    found = answer(store, None, watch)
    if row is not None:
        found = answer(store, grants_of(store, row, datacenter), watch, *_rows_of(store, row))
    if known is not None and known[1].index == found.index:
        found = known[1]  # none of its own rows has changed: the same object, by which others know that
    store.tokens.remember(key, changed, found)
    return found


def _rows_of(store: Store, row: Token) -> list[WatchKey]:
    """Return the watch keys of what a token links to, directly or by its roles; of deleted rows as well."""
    keys = [("acl-policy", policy_id) for policy_id in row.policies]
    for role_id in row.roles:
        keys.append(("acl-role", role_id))
        found = store.acl_roles.rows.get(role_id)
        if found is not None:
            keys.extend(("acl-policy", policy_id) for policy_id in found.policies)
    return list(dict.fromkeys(keys))


def grants_of(store: Store, row: Token, datacenter: str) -> Grants:
    """Open a token's roles and policies, leaving out what is for other datacenters."""
    ids = dict.fromkeys(row.policies)
    services, nodes = list(row.service_identities), list(row.node_identities)
    for role_id in row.roles:
        found = store.acl_roles.rows.get(role_id)
        if found is not None:
            ids |= dict.fromkeys(found.policies)
            services += found.service_identities
            nodes += found.node_identities
    held = (_policy(store, policy_id) for policy_id in sorted(ids))
    return Grants(
        row.accessor_id,
        row.expiration_time,
        tuple(one.rules for one in held if one is not None and _here(one.datacenters, datacenter)),
        _distinct_services(one for one in services if _here(one.datacenters, datacenter)),
        _distinct_nodes(one for one in nodes if one.datacenter in ("", datacenter)),
    )


def _here(datacenters: tuple[str, ...], datacenter: str) -> bool:
    return not datacenters or datacenter in datacenters


def _distinct_services(identities: Iterable[ServiceIdentity]) -> tuple[ServiceIdentity, ...]:
    names = dict.fromkeys(one.service_name for one in identities)
    return tuple(ServiceIdentity(name) for name in names)


def _distinct_nodes(identities: Iterable[NodeIdentity]) -> tuple[NodeIdentity, ...]:
    names = dict.fromkeys(one.node_name for one in identities)
    return tuple(NodeIdentity(name) for name in names)
