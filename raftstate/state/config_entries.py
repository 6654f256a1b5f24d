"""Configuration entries. Those that manage traffic are checked, alone and together with the others.

``service-intentions`` has a module of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from raftstate.chain import BadEntry, check_entry, compile_plan
from raftstate.chain.affected import affected_by
from raftstate.model.plan import Plan
from raftstate.state import service_intentions
from raftstate.state.answer import Answer, answer
from raftstate.state.changes import WatchKey
from raftstate.state.commands import DeleteConfigEntry, SetConfigEntry
from raftstate.state.names import require_name
from raftstate.state.policy_tables import ConfigEntry
from raftstate.state.refusal import INVALID, Refused
from raftstate.state.step import Step
from raftstate.state.store import Store

KINDS = (
    "proxy-defaults",
    "service-defaults",
    service_intentions.KIND,
    "service-resolver",
    "service-router",
    "service-splitter",
)
_OWN = ("Kind", "Name", "CreateIndex", "ModifyIndex")


def put(step: Step, command: SetConfigEntry) -> bool:
    """Write an entry."""
    if command.kind not in KINDS:
        raise Refused(INVALID, f"invalid config entry kind: {command.kind} (known: {', '.join(KINDS)})")
    require_name(command.name, "config entry name")
    if command.kind == "proxy-defaults" and command.name != "global":
        raise Refused(INVALID, f"invalid name ({command.name!r}), only 'global' is supported for proxy-defaults")
    if command.kind == service_intentions.KIND:
        return service_intentions.put(step, command.name, command.entry, command.cas_index)
    key = (command.kind, command.name)
    old = step.store.config_entries.rows.get(key)
    if command.cas_index is not None and command.cas_index != (old.modify_index if old else 0):
        return False
    entry = {field: value for field, value in command.entry.items() if field not in _OWN}
    try:
        entry = check_entry(command.kind, command.name, entry)
    except BadEntry as error:
        raise Refused(INVALID, str(error)) from error
    _check_together(step.store, command.kind, command.name, entry)
    row = step.stamp(ConfigEntry(command.kind, command.name, entry), old)
    if row is not None:
        step.store.config_entries.put(key, row)
        step.touch("config", *key)
        step.touch("config-kind", command.kind)
        step.touch("config-all")
    return True


def delete(step: Step, command: DeleteConfigEntry) -> bool:
    """Delete an entry; one that is gone is deleted."""
    if command.kind == service_intentions.KIND:
        return service_intentions.delete(step, command.name, command.cas_index)
    key = (command.kind, command.name)
    old = step.store.config_entries.rows.get(key)
    if command.cas_index is not None and command.cas_index != (old.modify_index if old else 0):
        return False
    if old is not None:
        _check_together(step.store, command.kind, command.name, None)
        step.store.config_entries.remove(key)
        step.bury("config", *key)
        step.touch("config-kind", command.kind)
        step.touch("config-all")
    return True


def _check_together(store: Store, kind: str, name: str, entry: Mapping[str, Any] | None) -> None:
    """Refuse a change after which a service that has a plan now would have none (None: the entry is deleted)."""
    rows = store.config_entries.rows

    def before(kind: str, name: str) -> Mapping[str, Any] | None:
        row = rows.get((kind, name))
        return None if row is None else row.entry

    def after(kind_: str, name_: str) -> Mapping[str, Any] | None:
        return entry if (kind_, name_) == (kind, name) else before(kind_, name_)

    services = affected_by(kind, name, entry, {key: row.entry for key, row in rows.items()})
    datacenter = _datacenter(store)
    for service in services:
        try:
            compile_plan(service, after, datacenter)
        except BadEntry as error:
            try:
                compile_plan(service, before, datacenter)
            except BadEntry:
                continue  # it was broken already: a change may mend it in several steps
            raise Refused(INVALID, f"{error} (this would leave {service!r} without a way)") from error


def _datacenter(store: Store) -> str:
    """Return the one datacenter's name, as the catalog's nodes say it."""
    return min((node.datacenter for node in store.nodes.rows.values() if node.datacenter), default="dc1")


def chain(store: Store, service: str, datacenter: str = "") -> Answer:
    """The plan of calls to a service; it depends on exactly the entries that it was made of."""
    rows = store.config_entries.rows
    watch: dict[WatchKey, None] = {}

    def lookup(kind: str, name: str) -> Mapping[str, Any] | None:
        watch["config", kind, name] = None
        row = rows.get((kind, name))
        return None if row is None else row.entry

    try:
        plan = compile_plan(service, lookup, datacenter or _datacenter(store))
    except BadEntry as error:
        plan = Plan(service, default=False, error=str(error))
    return answer(store, plan, *watch)


def _shown(row: ConfigEntry) -> dict[str, Any]:
    indexes = {"CreateIndex": row.create_index, "ModifyIndex": row.modify_index}
    return {"Kind": row.kind, "Name": row.name, **row.entry, **indexes}


def get(store: Store, kind: str, name: str) -> Answer:
    """An entry in Consul's form, or None."""
    if kind == service_intentions.KIND:
        return service_intentions.get(store, name)
    row = store.config_entries.rows.get((kind, name))
    return answer(store, None if row is None else _shown(row), ("config", kind, name))


def list_kind(store: Store, kind: str = "") -> Answer:
    """All entries of a kind, by name; without a kind all that are stored (which service-intentions are not)."""
    if kind == service_intentions.KIND:
        return service_intentions.list_all(store)
    rows = store.config_entries.by_kind.get(kind, {}) if kind else store.config_entries.rows
    watch = ("config-kind", kind) if kind else ("config-all",)
    return answer(store, [_shown(rows[key]) for key in sorted(rows)], watch)
