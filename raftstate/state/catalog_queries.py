"""Catalog and health queries. Lists are ordered by id, then node, so that equal states give equal answers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from raftstate.model.catalog import (
    PASSING,
    CatalogNode,
    CatalogService,
    Check,
    InstanceHealth,
    Node,
    ServiceInstance,
)
from raftstate.state.answer import Answer, answer
from raftstate.state.catalog_tables import InstanceKey
from raftstate.state.changes import WatchKey
from raftstate.state.store import Store

_NATIVE = {"Native": True}


def nodes(store: Store, node_meta: Mapping[str, str] | None = None) -> Answer:
    """Nodes by name, with all of ``node_meta`` in their metadata."""
    rows = store.nodes.rows
    return answer(store, [rows[name] for name in sorted(rows) if _has_meta(rows[name], node_meta)], ("nodes",))


def _has_meta(node: Node, wanted: Mapping[str, str] | None) -> bool:
    return not wanted or all(node.meta.get(key) == value for key, value in wanted.items())


def services(store: Store, node_meta: Mapping[str, str] | None = None) -> Answer:
    """Service names, each with the tags its instances have."""
    if not node_meta:
        index, known = store.services.listing
        found_at = store.changed_at(("services",))
        if index != found_at:
            tags = store.services.tags
            known = {name: sorted(tags[name]) for name in sorted(tags)}
            # Thousands of names take milliseconds to list, and most changes change none of them.
            store.services.listing = found_at, known
        return Answer(max(found_at, 1), known, (("services",),))
    found: dict[str, set[str]] = {}
    for name, node in store.nodes.rows.items():
        if _has_meta(node, node_meta):
            for row in store.services.by_node.get(name, {}).values():
                found.setdefault(row.service, set()).update(row.tags)
    value = {name: sorted(found[name]) for name in sorted(found)}
    return answer(store, value, ("service-places",), ("nodes",))


def service(store: Store, service: str, tags: Iterable[str] = ()) -> Answer:
    """Instances of a service with all of ``tags``, each with its node."""
    rows = _tagged(_in_order(store.services.by_name.get(service)), tags)
    return answer(store, [_flat(store, row) for row in rows], ("service", service))


def connect(store: Store, service: str) -> Answer:
    """What answers for a service in the mesh: its proxies and native instances."""
    rows = _in_order(store.services.by_destination.get(service))
    return answer(store, [_flat(store, row) for row in rows], ("connect", service))


def node(store: Store, node: str) -> Answer:
    """A node with its instances by id, or None."""
    row = store.nodes.rows.get(node)
    value = None
    if row is not None:
        found = _in_order(store.services.by_node.get(node))
        value = CatalogNode(row, {instance.id: instance for instance in found})
    return answer(store, value, ("node", node))


def node_rows(store: Store, node: str) -> Answer:
    """As `node`, for who follows it: the node, then each instance, so that a change is sent without the rest."""
    row = store.nodes.rows.get(node)
    value = [] if row is None else [row, *_in_order(store.services.by_node.get(node))]
    return answer(store, value, ("node", node))


def services_by_port(store: Store, port: int) -> Answer:
    """Typical instances registered on a port."""
    return answer(store, _in_order(store.services.by_port.get(port)), ("port", str(port)))


def health_service(store: Store, service: str, tags: Iterable[str] = (), passing: bool = False) -> Answer:
    """Instances of a service with their nodes and checks; with ``passing`` only those all of whose checks pass."""
    rows = _tagged(_in_order(store.services.by_name.get(service)), tags)
    return _health(store, rows, passing, ("service", service), ("health", service))


def health_connect(store: Store, service: str, passing: bool = False) -> Answer:
    """As `health_service`, for what answers for the service in the mesh."""
    rows = _in_order(store.services.by_destination.get(service))
    return _health(store, rows, passing, ("connect", service), ("connect-health", service))


def _health(store: Store, rows: list[ServiceInstance], passing: bool, *watch: WatchKey) -> Answer:
    nodes, node_level, by_instance = store.nodes.rows, store.checks.node_level, store.checks.by_instance
    found = []
    for row in rows:
        checks = _checks(node_level.get(row.node)) + _checks(by_instance.get((row.node, row.id)))
        if passing and any(check.status != PASSING for check in checks):
            continue
        found.append(InstanceHealth(nodes[row.node], row, checks))
    return answer(store, found, *watch)


def _checks(rows: dict[tuple[str, str], Check] | None) -> tuple[Check, ...]:
    if not rows:
        return ()
    if len(rows) == 1:
        return tuple(rows.values())
    return tuple(rows[key] for key in sorted(rows))


def health_node(store: Store, node: str) -> Answer:
    """All checks on a node."""
    return answer(store, list(_checks(store.checks.by_node.get(node))), ("node-checks", node))


def health_checks(store: Store, service: str) -> Answer:
    """The checks of a service's instances."""
    return answer(store, list(_checks(store.checks.by_service.get(service))), ("service-checks", service))


def health_state(store: Store, state: str = "any") -> Answer:
    """All checks in a state, or in ``any``."""
    if state == "any":
        return answer(store, list(_checks(store.checks.rows)), ("checks",))
    return answer(store, list(_checks(store.checks.by_status.get(state))), ("check-state", state))


def _in_order(rows: dict[InstanceKey, ServiceInstance] | None) -> list[ServiceInstance]:
    if not rows:
        return []
    if len(rows) == 1:
        return list(rows.values())
    return [rows[key] for key in sorted(rows, key=_id_first)]


def _id_first(key: InstanceKey) -> InstanceKey:
    return key[1], key[0]


def _tagged(rows: list[ServiceInstance], tags: Iterable[str]) -> list[ServiceInstance]:
    wanted = {tag.lower() for tag in tags}
    if not wanted:
        return rows
    return [row for row in rows if wanted <= {tag.lower() for tag in row.tags}]


def _flat(store: Store, row: ServiceInstance) -> CatalogService:
    node = store.nodes.rows[row.node]
    return CatalogService(
        id=node.id,
        node=node.node,
        address=node.address,
        datacenter=node.datacenter,
        tagged_addresses=node.tagged_addresses,
        node_meta=node.meta,
        service_id=row.id,
        service_name=row.service,
        service_kind=row.kind,
        service_address=row.address,
        service_tagged_addresses=row.tagged_addresses,
        service_tags=row.tags,
        service_meta=row.meta,
        service_port=row.port,
        service_weights=row.weights,
        service_enable_tag_override=row.enable_tag_override,
        service_proxy=row.proxy,
        service_connect=_NATIVE if row.connect_native else {},
        service_locality=row.locality,
        create_index=row.create_index,
        modify_index=row.modify_index,
    )
