"""Taking out of an answer what its token may not see. Pure: JSON values in, JSON values out.

A filter works on what the handler made, so no handler knows of it, and answers that are kept to be sent again are
kept whole. Where a token may read all of a filter's resources, the answer is not even looked into.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from node.http.acl_commands import config_need
from raftstate.acl import READ, Authorizer
from raftstate.acl.rules import INTENTION

Visible = Callable[[Authorizer, Any], bool]
"""Whether one row may be seen."""
Apply = Callable[[Authorizer, Any], tuple[Any, bool]]
"""(authorizer, value) -> what is left of it, and whether anything was taken away."""


@dataclass(frozen=True, slots=True)
class Filter:
    """How an answer is cut. ``resources``: whoever may read all of these sees it whole."""

    resources: tuple[str, ...]
    apply: Apply
    empty_is_missing: bool = False
    """An answer of which nothing is left is a 404, as if there had been nothing."""

    def passes(self, authorizer: Authorizer) -> bool:
        """Whether there is nothing to take away, whatever the answer."""
        return all(authorizer.allows_all(resource, READ) for resource in self.resources)


def _node(authorizer: Authorizer, name: str) -> bool:
    return authorizer.allows("node", name, READ)


def _service(authorizer: Authorizer, name: str) -> bool:
    return not name or authorizer.allows("service", name, READ)


def _rows(visible: Visible) -> Apply:
    def apply(authorizer: Authorizer, value: Any) -> tuple[Any, bool]:
        left = [row for row in value or () if visible(authorizer, row)]
        return left, len(left) < len(value or ())

    return apply


def _values(visible: Visible) -> Apply:
    def apply(authorizer: Authorizer, value: Any) -> tuple[Any, bool]:
        left = {key: row for key, row in value.items() if visible(authorizer, row)}
        return left, len(left) < len(value)

    return apply


def _names(authorizer: Authorizer, value: Any) -> tuple[Any, bool]:
    left = {name: tags for name, tags in value.items() if _service(authorizer, name)}
    return left, len(left) < len(value)


def _node_and_services(authorizer: Authorizer, value: Any) -> tuple[Any, bool]:
    """A node with its services, as an object by id or as a list; null where the node may not be seen."""
    if not value or not value.get("Node"):
        return value, False
    by_id = isinstance(value["Services"], dict)
    if not _node(authorizer, value["Node"]["Node"]):
        return (None if by_id else {"Node": None, "Services": []}), True
    cut = _values if by_id else _rows
    services, taken = cut(lambda asked, row: _service(asked, row["Service"]))(authorizer, value["Services"])
    return value | {"Services": services}, taken


def _health(authorizer: Authorizer, row: Any) -> bool:
    return _node(authorizer, row["Node"]["Node"]) and _service(authorizer, row["Service"]["Service"])


def _check(authorizer: Authorizer, row: Any) -> bool:
    return _node(authorizer, row["Node"]) and _service(authorizer, row["ServiceName"])


def _intention(authorizer: Authorizer, row: Any) -> bool:
    sides = (
        row.get("SourceService") or row["SourceName"],
        row.get("DestinationService") or row["DestinationName"],
    )
    return any(
        authorizer.allows_any(INTENTION, READ) if side == "*" else authorizer.allows(INTENTION, side, READ)
        for side in sides
    )


def _config(authorizer: Authorizer, row: Any) -> bool:
    need = config_need(row["Kind"], row["Name"], READ)
    return need is None or need.met(authorizer)


def _summary(authorizer: Authorizer, value: Any) -> tuple[Any, bool]:
    """Services with the names of their nodes."""
    left, taken = _rows(lambda asked, row: _service(asked, row["Name"]))(authorizer, value)
    for row in left:
        nodes = [name for name in row["Nodes"] if _node(authorizer, name)]
        taken = taken or len(nodes) < len(row["Nodes"])
        row["Nodes"] = nodes
    return left, taken


def _topology(authorizer: Authorizer, value: Any) -> tuple[Any, bool]:
    upstreams, first = _summary(authorizer, value["Upstreams"])
    downstreams, second = _summary(authorizer, value["Downstreams"])
    instances, third = _rows(_health)(authorizer, value["Instances"])
    taken = first or second or third
    left = value | {"Upstreams": upstreams, "Downstreams": downstreams, "Instances": instances}
    return left | {"FilteredByACLs": taken}, taken


def _target(authorizer: Authorizer, row: Any) -> bool:
    labels = row["labels"]
    return _node(authorizer, labels["__meta_consul_node"]) and _service(authorizer, labels["__meta_consul_service"])


def _kv(authorizer: Authorizer, row: Any) -> bool:
    """An entry, or, where names are listed, a key."""
    return authorizer.allows("key", row if isinstance(row, str) else row["Key"], READ)


_BOTH = ("node", "service")
NODES = Filter(("node",), _rows(lambda asked, row: _node(asked, row["Node"])))
MEMBERS = Filter(("node",), _rows(lambda asked, row: _node(asked, row["Name"])))
SERVICE_NAMES = Filter(("service",), _names)
CATALOG_SERVICES = Filter(
    _BOTH, _rows(lambda asked, row: _node(asked, row["Node"]) and _service(asked, row["ServiceName"]))
)
NODE_SERVICES = Filter(_BOTH, _node_and_services)
HEALTH = Filter(_BOTH, _rows(_health))
CHECKS = Filter(_BOTH, _rows(_check))
AGENT_SERVICES = Filter(("service",), _values(lambda asked, row: _service(asked, row["Service"])))
AGENT_CHECKS = Filter(_BOTH, _values(_check))
KV = Filter(("key",), _rows(_kv), empty_is_missing=True)
SESSIONS = Filter(("session",), _rows(lambda asked, row: asked.allows("session", row["Node"], READ)))
INTENTIONS = Filter((INTENTION,), _rows(_intention))
INTENTION_ROW = Filter((INTENTION,), lambda asked, row: (row, not _intention(asked, row)))
EVENTS = Filter(("event",), _rows(lambda asked, row: asked.allows("event", row["Name"], READ)))
CONFIG = Filter(("service", INTENTION), _rows(_config))
SUMMARIES = Filter(_BOTH, _summary)
TOPOLOGY = Filter(_BOTH, _topology)
TARGETS = Filter(_BOTH, _rows(_target))


def txn_results(authorizer: Authorizer, value: Any) -> tuple[Any, bool]:
    """What a transaction read, less what may not be read one by one."""
    results = value.get("Results")
    if not results:
        return value, False
    left = [row for row in results if _txn_row(authorizer, row)]
    return value | {"Results": left}, len(left) < len(results)


def _txn_row(authorizer: Authorizer, row: Any) -> bool:
    if "KV" in row:
        return _kv(authorizer, row["KV"])
    if "Node" in row:
        return _node(authorizer, row["Node"]["Node"])
    if "Service" in row:
        return _service(authorizer, row["Service"]["Service"])
    return "Check" not in row or _check(authorizer, row["Check"])


TXN = Filter(("key", *_BOTH), txn_results)
