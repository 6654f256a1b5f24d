"""Intention commands and queries: references are resolved when applied, and stored with what they meant.

Source of shapes and order: Consul's ``/v1/connect/intentions``. The rule for instances is ours, see
``docs/decisions/0002-instance-intentions-carry-their-service.md``.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgspec

from raftstate.model.intention import ALLOW, DENY, WILDCARD, HTTPMatch, Intention, Permission, precedence
from raftstate.state.answer import Answer, answer
from raftstate.state.changes import WatchKey
from raftstate.state.commands import DeleteIntention, UpsertIntention
from raftstate.state.names import require_meta, require_name, require_service_name, require_text
from raftstate.state.policy_tables import intention_key, intention_watch_keys
from raftstate.state.refusal import AMBIGUOUS, CONFLICT, INVALID, Refused
from raftstate.state.step import Step, plain
from raftstate.state.store import Store

PERMISSIONS_MAX = 128
DESCRIPTION_MAX = 512
PATTERN_MAX = 4096
"""Characters of a path or header value."""

Side = tuple[str, str]
"""(service, name): the service is named for an instance only."""


def upsert(step: Step, command: UpsertIntention) -> Any:
    """Create or change an intention."""
    intentions = step.store.intentions
    wanted = _resolved(step.store, command.intention, resolve=command.resolve)
    key = intention_key(wanted)
    at_pair = intentions.rows.get(key)
    named = intentions.by_id.get(wanted.id) if wanted.id else None
    old = named or at_pair
    if at_pair is not None and (not command.replace or (named is not None and named.id != at_pair.id)):
        raise Refused(CONFLICT, f"duplicate intention found: {_told(at_pair)} exists with ID {at_pair.id}")
    if old is None:
        require_name(wanted.id, "intention id")
        row = msgspec.structs.replace(wanted, created_at=step.at, updated_at=step.at)
    else:
        row = msgspec.structs.replace(wanted, id=old.id, created_at=old.created_at, updated_at=old.updated_at)
    stamped = step.stamp(row, old)
    if stamped is None:
        assert old is not None
        return plain(old)
    stamped = msgspec.structs.replace(stamped, updated_at=step.at)
    if old is not None and intention_key(old) != key:
        remove(step, old)
    intentions.put(key, stamped)
    step.touch("intentions")
    step.touch("intention", stamped.id)
    for watch in intention_watch_keys(key):
        step.touch(*watch)
    return plain(stamped)


def delete(step: Step, command: DeleteIntention) -> bool:
    """Delete an intention by id or pair."""
    intentions = step.store.intentions
    if command.id:
        row = intentions.by_id.get(command.id)
    else:
        rows = find_exact(step.store, command.source, command.destination)
        if len(rows) > 1:
            told = "; ".join(f"{_told(row)} (ID {row.id})" for row in rows)
            raise Refused(AMBIGUOUS, f"more than one intention fits, delete by ID or as service:instance: {told}")
        row = rows[0] if rows else None
    if row is None:
        return False
    remove(step, row)
    return True


def remove(step: Step, row: Intention) -> None:
    """Remove an intention that is stored."""
    intentions, key = step.store.intentions, intention_key(row)
    intentions.remove(key)
    step.touch("intentions")
    step.bury("intention", row.id)
    for watch in intention_watch_keys(key):
        if watch in intentions.by_watch:
            step.touch(*watch)
        else:
            step.bury(*watch)


def _resolved(store: Store, wanted: Intention, *, resolve: bool) -> Intention:
    """Return a valid intention whose sides say what they name."""
    source_service, source = _side(store, wanted.source_service, wanted.source_name, "source", resolve)
    destination_service, destination = _side(
        store, wanted.destination_service, wanted.destination_name, "destination", resolve
    )
    for namespace in (wanted.source_ns, wanted.destination_ns):
        if namespace not in ("", "default"):
            raise Refused(INVALID, f"there is one namespace, 'default', not {namespace!r}")
    if wanted.source_type not in ("", "consul"):
        raise Refused(INVALID, f"SourceType must be 'consul', not {wanted.source_type!r}")
    require_text(wanted.description, "intention description", length_max=DESCRIPTION_MAX)
    require_meta(wanted.meta, "intention")
    _require_action(wanted)
    row = msgspec.structs.replace(
        wanted,
        source_service=source_service,
        source_name=source,
        destination_service=destination_service,
        destination_name=destination,
        source_ns="default",
        destination_ns="default",
        source_type="consul",
    )
    return msgspec.structs.replace(row, precedence=precedence(row))


def _side(store: Store, service: str, name: str, what: str, resolve: bool) -> Side:
    if not service:
        if resolve:
            service, name = resolve_reference(store, name, what)
        elif ":" in name:
            service, _, name = name.partition(":")
    require_name(name, f"intention {what}")
    if service:
        require_service_name(service, f"intention {what} service")
        if name == WILDCARD:
            raise Refused(INVALID, f"'{service}:*' names no instance: use {service!r} for all of its instances")
    elif name != WILDCARD:
        require_service_name(name, f"intention {what}")
    return service, name


def resolve_reference(store: Store, reference: str, what: str = "reference") -> Side:
    """Return what a reference means now: a service, an instance of one, ``*``, or a service still to come."""
    services = store.services
    if reference == WILDCARD or reference in services.by_name:
        return "", reference
    service, colon, instance = reference.partition(":")
    if colon and service in services.by_name:
        return service, instance
    owners = sorted({row.service for row in services.by_id.get(reference, {}).values()})
    if len(owners) > 1:
        forms = ", ".join(f"{owner}:{reference}" for owner in owners)
        raise Refused(
            AMBIGUOUS, f"intention {what} {reference!r} is an instance of several services: say which with {forms}"
        )
    if owners:
        return owners[0], reference
    return (service, instance) if colon else ("", reference)


def _require_action(wanted: Intention) -> None:
    if not wanted.permissions:
        if wanted.action not in (ALLOW, DENY):
            raise Refused(
                INVALID, f"intention Action must be allow or deny, not {wanted.action!r}, or use Permissions"
            )
        return
    if wanted.action:
        raise Refused(INVALID, "an intention has either an Action or Permissions, not both")
    if len(wanted.permissions) > PERMISSIONS_MAX:
        raise Refused(INVALID, f"an intention has {PERMISSIONS_MAX} Permissions at most")
    for number, permission in enumerate(wanted.permissions):
        _require_permission(permission, f"Permissions[{number}]")


def _require_permission(permission: Permission, where: str) -> None:
    if permission.action not in (ALLOW, DENY):
        raise Refused(INVALID, f"{where}.Action must be allow or deny, not {permission.action!r}")
    http = permission.http
    if sum(map(bool, (http.path_exact, http.path_prefix, http.path_regex))) > 1:
        raise Refused(INVALID, f"{where}.HTTP may have one of PathExact, PathPrefix and PathRegex")
    for path in (http.path_exact, http.path_prefix):
        if path and not path.startswith("/"):
            raise Refused(INVALID, f"{where}.HTTP path {path!r} must begin with '/'")
    for method in http.methods:
        require_name(method, f"{where}.HTTP.Methods", length_max=32)
    for text in _patterns(http):
        require_text(text, f"{where}.HTTP", length_max=PATTERN_MAX)
    for header in http.header:
        require_name(header.name, f"{where}.HTTP.Header.Name")
        kinds = (header.present, header.exact, header.prefix, header.suffix, header.contains, header.regex)
        if sum(map(bool, kinds)) != 1:
            raise Refused(
                INVALID,
                f"{where}.HTTP.Header {header.name!r} needs one of Present, Exact, Prefix, Suffix, Contains, Regex",
            )
        if header.ignore_case and (header.present or header.regex):
            raise Refused(
                INVALID,
                f"{where}.HTTP.Header {header.name!r}: IgnoreCase goes with Exact, Prefix, Suffix or Contains only",
            )


def _patterns(http: HTTPMatch) -> Iterable[str]:
    yield from (http.path_exact, http.path_prefix, http.path_regex)
    for header in http.header:
        yield from (header.exact, header.prefix, header.suffix, header.contains, header.regex)


def _told(row: Intention) -> str:
    source = f"{row.source_service}:{row.source_name}" if row.source_service else row.source_name
    destination = (
        f"{row.destination_service}:{row.destination_name}" if row.destination_service else row.destination_name
    )
    return f"{source} => {destination}"


def find_exact(store: Store, source: str, destination: str) -> list[Intention]:
    """Return the intentions that a pair of references names, those of the best fit only.

    A plain reference names a service first, then an instance by its id, whether or not it is still registered.
    """
    found: dict[int, list[Intention]] = {}
    for source_service, source_name in _readings(source):
        for destination_service, destination_name in _readings(destination):
            for key, row in store.intentions.by_names.get((source_name, destination_name), {}).items():
                source_fit = _fit(source_service, key[0])
                destination_fit = _fit(destination_service, key[2])
                if source_fit is not None and destination_fit is not None:
                    found.setdefault(source_fit + destination_fit, []).append(row)
    return sorted(found[min(found)], key=intention_key) if found else []


def _readings(reference: str) -> list[tuple[str | None, str]]:
    """Return the (service or None, name) that a reference may stand for."""
    service, colon, instance = reference.partition(":")
    plain: list[tuple[str | None, str]] = [(None, reference)]
    return [*plain, (service, instance)] if colon and service and instance else plain


def _fit(wanted: str | None, service: str) -> int | None:
    """Return how well a side fits: 0 exactly, 1 as a bare instance id, None not at all."""
    if wanted is not None:
        return 0 if wanted == service else None
    return 1 if service else 0


def in_order(rows: Iterable[Intention]) -> list[Intention]:
    """Return intentions by falling precedence, then by names."""
    return sorted(
        rows,
        key=lambda row: (
            -row.precedence,
            row.destination_service,
            row.destination_name,
            row.source_service,
            row.source_name,
        ),
    )


def list_all(store: Store) -> Answer:
    """All intentions by falling precedence."""
    return answer(store, in_order(store.intentions.rows.values()), ("intentions",))


def get(store: Store, id: str) -> Answer:
    """The intention of an id, or None."""
    return answer(store, store.intentions.by_id.get(id), ("intention", id))


def exact(store: Store, source: str, destination: str) -> Answer:
    """The intention of a pair as `find_exact` has it, or None. Any intention's change may wake its watcher."""
    rows = find_exact(store, source, destination)
    return answer(store, rows[0] if rows else None, ("intentions",))


def match(store: Store, by: str, name: str, instance: str = "") -> Answer:
    """Intentions that may bear on a service as ``source`` or ``destination``, by falling precedence.

    With ``instance`` those on this instance of the service come too; ``*`` as instance: those on any of them.
    """
    if by not in ("source", "destination"):
        raise ValueError(f"'by' must be source or destination, not {by!r}")
    family = f"intention-{by}"
    watch: list[WatchKey] = [(family, name)]
    if name != WILDCARD:
        watch.append((family, WILDCARD))
        if instance:
            watch.append((family, name, instance))
    groups = store.intentions.by_watch
    rows = [row for key in watch for row in groups.get(key, {}).values()]
    return answer(store, in_order(rows), *watch)


def resolve(store: Store, reference: str) -> Answer:
    """What a reference means now: ``{"Service", "Instance", "Exists"}``, or ``{"Error"}`` when it is ambiguous."""
    try:
        service, name = resolve_reference(store, reference)
    except Refused as refused:
        return answer(store, {"Error": refused.refusal.message}, ("service-places",))
    if service:
        exists = any(row.service == service for row in store.services.by_id.get(name, {}).values())
        value = {"Service": service, "Instance": name, "Exists": exists}
    else:
        value = {"Service": name, "Instance": "", "Exists": name == WILDCARD or name in store.services.by_name}
    return answer(store, value, ("service-places",))
