"""The authority's commands and queries: configuration, roots, sealed keys, revocations."""

from __future__ import annotations

import msgspec

from raftstate.model.connect import CAConfig, CARoot, CARoots, Revocation, SigningMaterial
from raftstate.state.answer import Answer, answer
from raftstate.state.commands import AddCARoot, Restore, RetireCARoot, Revoke, SetCAConfig
from raftstate.state.names import require_name, require_text
from raftstate.state.refusal import CONFLICT, INVALID, Refused
from raftstate.state.step import Step
from raftstate.state.store import Store

REVOCATION_KINDS = ("instance", "service", "serial")
REASON_MAX = 512
ROOTS_MAX = 16


def set_ca_config(step: Step, command: SetCAConfig) -> bool:
    """Set the authority's configuration; the first trust domain stays."""
    old = step.store.ca_config.rows.get("")
    if command.cas_index is not None and command.cas_index != (old.modify_index if old else 0):
        return False
    trust_domain = command.trust_domain
    require_text(trust_domain, "trust domain")
    if old is not None and old.trust_domain:
        trust_domain = old.trust_domain
    config = CAConfig(
        command.provider, command.config, command.state, command.force_without_cross_signing, trust_domain
    )
    row = step.stamp(config, old)
    if row is not None:
        step.store.ca_config.put("", row)
        step.touch("ca-config")
        if row.trust_domain != (old.trust_domain if old else ""):
            step.touch("ca-roots")
    return True


def add_ca_root(step: Step, command: AddCARoot) -> bool:
    """Add or change a root; with ``make_active`` it takes the place of the one that signed."""
    roots = step.store.ca_roots
    require_name(command.root.id, "root id")
    active = active_root(step.store)
    active_id = active.id if active else ""
    if command.expected_active_root_id is not None and command.expected_active_root_id != active_id:
        raise Refused(
            CONFLICT,
            f"the active root is {active_id or 'none'}, not {command.expected_active_root_id or 'none'}: "
            "another change came first; read the roots again",
        )
    old = roots.rows.get(command.root.id)
    if old is None and len(roots.rows) >= ROOTS_MAX:
        raise Refused(INVALID, f"there are {ROOTS_MAX} roots already: retire an old one first")
    has_key = bool(command.sealed_key) or command.root.id in step.store.sealed_keys.rows
    if command.make_active and not has_key:
        raise Refused(INVALID, "a root without a key cannot sign: give its sealed key, or add it as not active")
    becomes_active = command.make_active or (old is not None and old.active)
    row = step.stamp(msgspec.structs.replace(command.root, active=becomes_active), old)
    if command.sealed_key and step.store.sealed_keys.rows.get(command.root.id) != command.sealed_key:
        step.store.sealed_keys.put(command.root.id, command.sealed_key)
        step.touch("ca-keys")
    if row is None:
        return True
    if command.make_active and active is not None and active.id != row.id:
        roots.put(active.id, msgspec.structs.replace(active, active=False, modify_index=step.index))
    roots.put(row.id, row)
    step.touch("ca-roots")
    return True


def retire_ca_root(step: Step, command: RetireCARoot) -> bool:
    """Drop a root that does not sign, with its key."""
    root = step.store.ca_roots.rows.get(command.root_id)
    if root is None:
        return False
    if root.active:
        raise Refused(CONFLICT, f"root {root.id} is active: rotate to another root first")
    step.store.ca_roots.remove(root.id)
    step.store.sealed_keys.remove(root.id)
    step.touch("ca-roots")
    step.touch("ca-keys")
    return True


def revoke(step: Step, command: Revoke) -> bool:
    """Withdraw an identity; repeating it with another reason changes the reason."""
    if command.kind not in REVOCATION_KINDS:
        raise Refused(INVALID, f"kind must be one of {', '.join(REVOCATION_KINDS)}, not {command.kind!r}")
    require_name(command.value, f"{command.kind} to revoke")
    require_text(command.service, "service of the revocation")
    require_text(command.reason, "reason", length_max=REASON_MAX)
    if command.service and command.kind != "instance":
        raise Refused(INVALID, f"a service narrows the revocation of an instance only, not of a {command.kind}")
    key = (command.kind, command.service, command.value)
    old = step.store.revocations.rows.get(key)
    created_at = old.created_at if old else step.at
    revocation = Revocation(command.kind, command.value, command.service, command.reason, created_at)
    row = step.stamp(revocation, old)
    if row is not None:
        step.store.revocations.put(key, row)
        step.touch("revocations")
    return True


def restore(step: Step, command: Restore) -> bool:
    """Take a withdrawal back."""
    if step.store.revocations.remove((command.kind, command.service, command.value)) is None:
        return False
    step.touch("revocations")
    return True


def active_root(store: Store) -> CARoot | None:
    """Return the root that signs, if there is one."""
    return next((root for root in store.ca_roots.rows.values() if root.active), None)


def roots(store: Store) -> Answer:
    """The trust bundle, active root first, then the newest."""
    rows = sorted(store.ca_roots.rows.values(), key=lambda root: (not root.active, -root.create_index, root.id))
    config = store.ca_config.rows.get("")
    active = rows[0].id if rows and rows[0].active else ""
    value = CARoots(active, config.trust_domain if config else "", tuple(rows))
    return answer(store, value, ("ca-roots",))


def ca_config(store: Store) -> Answer:
    """The authority's configuration, or None before the first."""
    return answer(store, store.ca_config.rows.get(""), ("ca-config",))


def signing_material(store: Store) -> Answer:
    """The active root with its sealed key, or None. Not for the API: only the authority on a server asks this."""
    root = active_root(store)
    value = None
    if root is not None and (key := store.sealed_keys.rows.get(root.id)) is not None:
        value = SigningMaterial(root, key)
    return answer(store, value, ("ca-roots",), ("ca-keys",))


def revocations(store: Store) -> Answer:
    """All withdrawn identities, in order of their key."""
    rows = store.revocations.rows
    return answer(store, [rows[key] for key in sorted(rows)], ("revocations",))
