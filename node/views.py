"""A query's value as keyed rows, and the difference between two such values. Pure.

Rows are compared by identity first: the state machine's rows are immutable and replaced whole, so an unchanged
row is the same object, and only rows rebuilt by a query (an instance with its checks) are compared field by field.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from operator import attrgetter
from typing import Any

import msgspec

from node.backend import ViewEvent
from raftstate.model.catalog import Check, InstanceHealth, Node, ServiceInstance
from raftstate.model.connect import CARoots, Revocation
from raftstate.model.intention import Intention
from raftstate.model.plan import Plan

Rows = dict[str, Any]
SEPARATOR = "\x00"
WHOLE = ""
"""The key of the one row of a view whose value has no rows of its own."""


def _field(row: Any, *names: str) -> str:
    """Return the first of `names` that `row` has: model types by attribute, builtins by Consul's name."""
    for name in names:
        value = row.get(name) if isinstance(row, Mapping) else getattr(row, name, None)
        if value is not None:
            return str(value)
    return ""


def _of(*parts: tuple[str, ...]) -> Callable[[Any], str]:
    """Return the key function of rows that are told apart by these parts, each by the attribute's name first."""
    values = attrgetter(*(names[0] for names in parts))

    def key(row: Any) -> str:
        if not isinstance(row, msgspec.Struct):
            return SEPARATOR.join(_field(row, *names) for names in parts)
        # A view of hundreds of rows is keyed anew for each change of one.
        found = values(row)
        return str(found) if len(parts) == 1 else SEPARATOR.join(found)

    return key


def _instance_key(row: Any) -> str:
    return _PLACE(row["Service"] if isinstance(row, dict) else row.service)


def _node_row_key(row: Any) -> str:
    """A node's own row comes without a service; an instance's id is never empty."""
    if isinstance(row, msgspec.Struct):
        return row.id if isinstance(row, ServiceInstance) else WHOLE
    return _field(row, "ID") if _field(row, "Service") else WHOLE


_NODE, _ID = ("node", "Node"), ("id", "ID")
_PLACE = _of(_NODE, _ID)
_CHECK = _of(_NODE, ("check_id", "CheckID"))
_INTENTION = _of(
    ("destination_service", "DestinationService"),
    ("destination_name", "DestinationName"),
    ("source_service", "SourceService"),
    ("source_name", "SourceName"),
)
_SERVICE = _of(_NODE, ("service_id", "ServiceID"))
ROW_KEYS: dict[str, Callable[[Any], str]] = {
    "catalog.nodes": _of(_NODE),
    "catalog.service": _SERVICE,
    "catalog.connect": _SERVICE,
    "catalog.node_rows": _node_row_key,
    "catalog.services_by_port": _of(_NODE, _ID),
    "health.service": _instance_key,
    "health.connect": _instance_key,
    "health.node": _CHECK,
    "health.checks": _CHECK,
    "health.state": _CHECK,
    "intentions.list": _INTENTION,
    "intentions.match": _INTENTION,
    "connect.revocations": _of(("kind", "Kind"), ("service", "Service"), ("value", "Value")),
    "kv.list": _of(("key", "Key")),
    "session.list": _of(_ID),
    "session.node": _of(_ID),
    "config.list": _of(("kind", "Kind"), ("name", "Name")),
}


VALUE_TYPES: dict[str, Any] = {
    "catalog.nodes": list[Node],
    "health.service": list[InstanceHealth],
    "health.connect": list[InstanceHealth],
    "health.node": list[Check],
    "health.checks": list[Check],
    "health.state": list[Check],
    "intentions.list": list[Intention],
    "connect.roots": CARoots,
    "discovery.chain": Plan,
    "connect.revocations": list[Revocation],
}
"""What an answer that came over RPC is decoded as; others stay builtins."""


def rows_of(name: str, value: Any) -> Rows:
    """Split a query's value into rows by key.

    A list whose query has a known row key gives one row each; ``catalog.services`` gives one row per service; any
    other value is a single row under :data:`WHOLE` (no row at all when it is None).
    """
    if value is None:
        return {}
    key = ROW_KEYS.get(name)
    if key is not None and isinstance(value, (list, tuple)):
        return {key(row): row for row in value}
    if name == "catalog.services" and isinstance(value, Mapping):
        return dict(value)
    return {WHOLE: value}


def difference(before: Rows, after: Rows) -> tuple[Rows, tuple[str, ...]]:
    """Return (rows to put, keys to drop) that turn `before` into `after`."""
    upserts = {
        key: row
        for key, row in after.items()
        if (old := before.get(key, msgspec.UNSET)) is not row and not (type(old) is type(row) and old == row)
    }
    deletes = tuple(key for key in before if key not in after)
    return upserts, deletes


def merge(rows: Rows, event: ViewEvent) -> Rows:
    """Return `rows` after `event`."""
    if event.reset:
        return dict(event.upserts)
    merged = {**rows, **event.upserts}
    for key in event.deletes:
        merged.pop(key, None)
    return merged


def as_delta(held: Rows, event: ViewEvent) -> ViewEvent | None:
    """Turn a reset into what changes against `held`; None when nothing does. A delta is returned as it is."""
    if not event.reset:
        return event
    upserts, deletes = difference(held, dict(event.upserts))
    if not upserts and not deletes:
        return None
    return ViewEvent(event.index, False, upserts, deletes)


def canonical(name: str, params: Mapping[str, Any] | None) -> str:
    """Return one text for equal (name, params), whatever their order: the name under which a view is shared."""

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {str(key): plain(value[key]) for key in sorted(value, key=str)}
        if isinstance(value, (set, frozenset)):
            return sorted(str(item) for item in value)
        if isinstance(value, Iterable) and not isinstance(value, (str, bytes)):
            return [plain(item) for item in value]
        return value

    return name + SEPARATOR + msgspec.json.encode(plain(params or {})).decode()
