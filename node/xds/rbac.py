"""Intentions and revocations as Envoy's RBAC. Pure.

Lictor finds the one intention that decides; RBAC with the action ALLOW asks whether any policy holds. So each
intention that allows becomes a policy for its sources without those that an intention of higher precedence decides.

A service is known by its URI name (SPIFFE id); an instance by its certificate's subject, a certificate by its serial
number: two filters on the listener put both where RBAC sees them (:data:`SUBJECT_KEY`, :data:`SERIAL_KEY`).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgspec
from cryptography import x509
from cryptography.x509.oid import NameOID

from node.xds.permissions import permission_rules, uses_headers
from node.xds.snapshot import Snapshot
from raftstate.model.connect import Revocation
from raftstate.model.identity import SpiffeId
from raftstate.model.intention import ALLOW, DENY, WILDCARD, Intention, Permission, precedence

Rule = dict[str, Any]
Source = tuple[str, str]
"""(service, instance id); the instance is empty for a service, the service is ``*`` for anyone."""

SUBJECT_KEY, SERIAL_KEY = "lictor.peer_subject", "lictor.peer_serial"
ANYONE: Source = (WILDCARD, "")


class Decision(msgspec.Struct, frozen=True):
    """What one of the intentions that decide says of its source."""

    source: Source
    allowed: tuple[Rule, ...]
    """RBAC permissions of which one must hold; none when the source is denied."""
    permissions: tuple[Permission, ...]
    shadows: tuple[Source, ...]
    """Sources within this one that an intention of higher precedence decides."""


class Access(msgspec.Struct, frozen=True):
    """Who may call this instance."""

    policies: dict[str, Rule]
    """RBAC policies, action ALLOW, by a name that tells the source."""
    http: bool
    """Whether a policy looks at requests."""
    headers: bool
    """Whether one looks at their headers."""
    sources: tuple[str, ...] | None
    """SPIFFE ids that some policy may admit; None when anyone of the trust domain may come."""
    decisions: tuple[Decision, ...] = ()


def decisions(snapshot: Snapshot) -> list[Decision]:
    """Return what decides about callers, in the order in which the first that covers a caller decides about them."""
    found: list[Decision] = []
    decided: dict[Source, None] = {}
    by_service: dict[str, list[Source]] = {}
    rules = [(_source(one), _action(one), one.permissions) for one in _applying(snapshot)]
    if snapshot.default_allow:
        rules.append((ANYONE, ALLOW, ()))
    for source, action, permissions in rules:
        service, instance = source
        if source in decided or (service, "") in decided or ANYONE in decided:
            continue
        shadows = tuple(decided) if source == ANYONE else () if instance else tuple(by_service.get(service, ()))
        decided[source] = None
        by_service.setdefault(service, []).append(source)
        allowed = permission_rules(permissions) if permissions and action != DENY else [{"any": True}]
        if action == DENY:
            allowed = []
        found.append(Decision(source, tuple(allowed), permissions, shadows))
    return found


def policies_for(service: str, decided: Iterable[Decision], snapshot: Snapshot) -> dict[str, Rule]:
    """Return RBAC policies, action ALLOW. ``service``: what none but its instances are asked by; empty: anyone."""
    return {
        _label(one.source): {
            "permissions": list(one.allowed),
            "principals": [
                _except(
                    principal(one.source, snapshot),
                    [principal(source, snapshot) for source in one.shadows if service in ("", source[0])],
                )
            ],
        }
        for one in decided
        if one.allowed and (not service or one.source[0] in (service, WILDCARD))
    }


def access(snapshot: Snapshot) -> Access:
    """Compile the intentions on this instance."""
    sources: set[str] | None = set()
    http = headers = False
    decided = decisions(snapshot)
    for one in decided:
        http, headers = http or bool(one.permissions), headers or uses_headers(one.permissions)
        if not one.allowed:
            continue
        if one.source == ANYONE:
            sources = None
        elif sources is not None:
            sources.add(spiffe_uri(one.source[0], snapshot))
    policies = policies_for("", decided, snapshot)
    return Access(policies, http, headers, None if sources is None else tuple(sorted(sources)), tuple(decided))


def revoked(snapshot: Snapshot, service: str = "") -> dict[str, Rule]:
    """Return RBAC policies, action DENY, for what is revoked. ``service``: as :func:`policies_for`."""
    policies = {}
    for one in snapshot.revocations:
        whose = one.value if one.kind == "service" else one.service if one.kind == "instance" else ""
        if service and whose not in ("", service):
            continue
        principals = _revoked_principals(one, snapshot)
        if principals:
            policies[f"{one.kind} {_label((one.service, one.value) if one.service else (one.value, ''))}"] = {
                "permissions": [{"any": True}],
                "principals": principals,
            }
    return policies


def is_revoked(service: str, instance: str, revocations: Iterable[Revocation]) -> bool:
    """Whether an instance may no longer be called."""
    return any(
        (one.kind == "service" and one.value == service)
        or (one.kind == "instance" and one.value == instance and one.service in ("", service))
        for one in revocations
    )


def principal(source: Source, snapshot: Snapshot) -> Rule:
    """Return the RBAC principal of a source."""
    service, instance = source
    if source == ANYONE:
        return {"any": True}
    named = _uri_is(spiffe_uri(service, snapshot))
    if not instance:
        return named
    return {"and_ids": {"ids": [named, instance_is(service, instance)]}}


def spiffe_uri(service: str, snapshot: Snapshot) -> str:
    """Return the URI name that the service's certificates carry."""
    own = snapshot.self
    return SpiffeId(trust_domain=own.trust_domain, service=service, datacenter=own.datacenter).uri()


def subject(service: str, instance: str) -> str:
    """Return the subject of an instance's leaf as Envoy prints it (RFC 2253: the last part first)."""
    return _printed(
        x509.NameAttribute(NameOID.COMMON_NAME, service[:64]), x509.NameAttribute(NameOID.USER_ID, instance)
    )


def _printed(*parts: x509.NameAttribute[str]) -> str:
    """Return a subject as Envoy's BoringSSL prints it: what is not ASCII as its bytes in UTF-8, in hexadecimal."""
    text = x509.Name(parts).rfc4514_string()
    return "".join(one if one.isascii() else "".join(f"\\{byte:02X}" for byte in one.encode()) for one in text)


def _applying(snapshot: Snapshot) -> list[Intention]:
    own = snapshot.self
    mine = [
        one
        for one in snapshot.intentions
        if one.destination_name == WILDCARD
        or (not one.destination_service and one.destination_name == own.service)
        or (one.destination_service == own.service and one.destination_name == own.service_id)
    ]
    return sorted(mine, key=lambda one: (-precedence(one), _source(one), _strictness(one)))


def _strictness(one: Intention) -> int:
    return 0 if _action(one) == DENY else 1 if one.permissions else 2


def _action(one: Intention) -> str:
    """Return allow or deny; an intention that says neither, and has no permissions, denies."""
    return ALLOW if one.action == ALLOW or (one.permissions and one.action != DENY) else DENY


def _source(one: Intention) -> Source:
    if one.source_name == WILDCARD:
        return ANYONE
    return (one.source_service, one.source_name) if one.source_service else (one.source_name, "")


def _label(source: Source) -> str:
    """Return a name of a source that no other has: names may have colons."""
    service, instance = (part.replace("\\", "\\\\").replace(":", "\\:") for part in source)
    return f"{service}:{instance}" if instance else service


def _except(rule: Rule, others: list[Rule]) -> Rule:
    if not others:
        return rule
    excluded = others[0] if len(others) == 1 else {"or_ids": {"ids": others}}
    return {"and_ids": {"ids": [rule, {"not_id": excluded}]}}


def _revoked_principals(one: Revocation, snapshot: Snapshot) -> list[Rule]:
    if one.kind == "service":
        return [_uri_is(spiffe_uri(one.value, snapshot))]
    if one.kind == "serial":
        digits = one.value.replace(":", "").lower()
        # Envoy prints the number without separators; a leading zero may be left out.
        return [_state(SERIAL_KEY, {"exact": form}) for form in sorted({digits, digits.lstrip("0")})]
    if one.kind == "instance" and one.service:
        return [principal((one.service, one.value), snapshot)]
    if one.kind == "instance":
        # Of whatever service: the subject is UID=<instance>,CN=<service>, and what the UID holds is escaped.
        uid = _printed(x509.NameAttribute(NameOID.USER_ID, one.value))
        return [_state(SUBJECT_KEY, {"prefix": uid + ",CN="}), _state(SUBJECT_KEY, {"exact": uid})]
    return []


def instance_is(service: str, instance: str) -> Rule:
    """Return the RBAC principal of whoever's certificate is that instance's, by its subject alone."""
    return _state(SUBJECT_KEY, {"exact": subject(service, instance)})


def _uri_is(uri: str) -> Rule:
    return {"authenticated": {"principal_name": {"exact": uri}}}


def _state(key: str, match: Rule) -> Rule:
    return {"filter_state": {"key": key, "string_match": match}}
