"""Catalog commands: what a registration does, and what goes with a deregistration.

Source of the rules: Consul's ``/v1/catalog/register`` and ``deregister``. Writing what is stored already changes no
index and wakes nobody.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from raftstate.model.catalog import (
    CRITICAL,
    KIND_CONNECT_PROXY,
    KIND_TYPICAL,
    SERF_HEALTH,
    STATUSES,
    Check,
    Node,
    ServiceInstance,
)
from raftstate.state import sessions
from raftstate.state.catalog_tables import destination_of
from raftstate.state.commands import (
    CatalogRegister,
    DeregisterCheck,
    DeregisterNode,
    DeregisterService,
    RegisterCheck,
    RegisterNode,
    RegisterService,
)
from raftstate.state.names import is_text, require_meta, require_name, require_service_name, require_text
from raftstate.state.refusal import CONFLICT, INVALID, UNKNOWN_NODE, UNKNOWN_SERVICE, Refused
from raftstate.state.step import Step, says_the_same

OUTPUT_MAX = 64 * 1024
"""Characters of a check's output and notes; agents cut long before this."""
TAGS_MAX = 256
KINDS = frozenset(
    (KIND_TYPICAL, KIND_CONNECT_PROXY, "mesh-gateway", "terminating-gateway", "ingress-gateway", "api-gateway")
)


def register_node(step: Step, command: RegisterNode) -> bool:
    """Register or update a node."""
    put_node(step, command.node)
    return True


def register_service(step: Step, command: RegisterService) -> bool:
    """Register or update an instance."""
    put_service(step, command.service)
    return True


def register_check(step: Step, command: RegisterCheck) -> bool:
    """Register or update a check."""
    put_check(step, command.check)
    return True


def catalog_register(step: Step, command: CatalogRegister) -> bool:
    """Register a node with an instance and checks; a refusal of any part undoes all."""
    node = command.node
    if not (command.skip_node_update and node.node in step.store.nodes.rows):
        put_node(step, node)
    if command.service is not None:
        service = command.service
        if service.node != node.node:
            service = msgspec.structs.replace(service, node=node.node)
        put_service(step, service)
    for check in command.checks:
        if check.node != node.node:
            if check.node:
                raise Refused(INVALID, f"check {check.check_id!r} is for node {check.node!r}, not {node.node!r}")
            check = msgspec.structs.replace(check, node=node.node)
        put_check(step, check)
    return True


def deregister_node(step: Step, command: DeregisterNode) -> bool:
    """Remove a node, its instances and checks; its sessions end."""
    if command.node not in step.store.nodes.rows:
        return False
    remove_node(step, command.node)
    return True


def deregister_service(step: Step, command: DeregisterService) -> bool:
    """Remove an instance and its checks."""
    service = step.store.services.rows.get((command.node, command.service_id))
    if service is None:
        return False
    remove_service(step, service)
    return True


def deregister_check(step: Step, command: DeregisterCheck) -> bool:
    """Remove a check."""
    check = step.store.checks.rows.get((command.node, command.check_id))
    if check is None:
        return False
    remove_check(step, check)
    return True


def put_node(step: Step, node: Node) -> None:
    """Store a node; its name and its id must not belong to another."""
    nodes = step.store.nodes
    old = nodes.rows.get(node.node)
    if old is not None and says_the_same(node, old):
        return  # it was looked at when it was stored, and with most registrations of an instance the node comes again
    require_name(node.node, "node name")
    require_name(node.address, f"address of node {node.node!r}")
    require_text(node.id, "node id")
    require_meta(node.meta, "node")
    if node.id and (holder := nodes.name_by_id.get(node.id, node.node)) != node.node:
        raise Refused(
            CONFLICT,
            f"Node ID {node.id!r} is in use by node {holder!r} and cannot be taken by {node.node!r}: "
            f"deregister {holder!r} first, or give this node an id of its own",
        )
    if old is not None and old.id and node.id != old.id:
        if not node.id:
            node = msgspec.structs.replace(node, id=old.id)
        elif not _is_down(step, node.node):
            raise Refused(
                CONFLICT,
                f"Node name {node.node} is reserved by node {old.id} with name {old.node} ({old.address}): "
                "rename this node, or deregister the other or let it fail first",
            )
    row = step.stamp(node, old)
    if row is None:
        return
    nodes.put(row.node, row)
    step.touch("nodes")
    step.touch("node", row.node)
    for service in step.store.services.by_node.get(row.node, {}).values():
        step.touch("service", service.service)
        if destination := destination_of(service):
            step.touch("connect", destination)


def _is_down(step: Step, node: str) -> bool:
    check = step.store.checks.rows.get((node, SERF_HEALTH))
    return check is not None and check.status == CRITICAL


def put_service(step: Step, service: ServiceInstance) -> None:
    """Store an instance on a node that is registered."""
    store = step.store
    service = _valid_service(service)
    if service.node not in store.nodes.rows:
        raise Refused(UNKNOWN_NODE, f"Missing node registration of {service.node!r}: register the node first")
    key = (service.node, service.id)
    old = store.services.rows.get(key)
    row = step.stamp(service, old)
    if row is None:
        return
    if old is None:
        listed = _lists(step, row)
        store.services.put(key, row)
    else:
        names = (row.service, old.service)
        before = _listed(step, names)
        store.services.put(key, row)
        listed = _listed(step, names) == before
        _touch_service(step, old)
    _touch_service(step, row)
    step.touch("node", row.node)
    if not listed:
        step.touch("services")
    if old is None or (old.service, old.tags) != (row.service, row.tags):
        step.touch("service-places")
        for check in list(store.checks.by_instance.get(key, {}).values()):
            put_check(step, check)


def _valid_service(service: ServiceInstance) -> ServiceInstance:
    require_service_name(service.service)
    if not service.id:
        service = msgspec.structs.replace(service, id=service.service)
    if not is_text(service.id):
        require_name(service.id, "service id")
    if not is_text(service.address):
        require_text(service.address, f"address of service {service.id!r}")
    if not 0 <= service.port <= 65535:
        raise Refused(INVALID, f"port of service {service.id!r} must be between 0 and 65535, not {service.port}")
    if service.kind not in KINDS:
        raise Refused(INVALID, f"service {service.id!r} has the unknown kind {service.kind!r}")
    if len(service.tags) > TAGS_MAX:
        raise Refused(INVALID, f"service {service.id!r} has {len(service.tags)} tags; the most is {TAGS_MAX}")
    for tag in service.tags:
        if not is_text(tag):
            require_text(tag, f"tag of service {service.id!r}")
    if service.meta:
        require_meta(service.meta, f"service {service.id!r}")
    weights = service.weights
    if weights.passing < 1 or not 0 <= weights.warning <= 65535 or weights.passing > 65535:
        raise Refused(INVALID, f"weights of service {service.id!r} must be 1 to 65535 passing and 0 to 65535 warning")
    if service.kind == KIND_CONNECT_PROXY:
        if service.proxy is None or not service.proxy.destination_service_name:
            raise Refused(INVALID, "Proxy.DestinationServiceName must be non-empty for Connect proxy services")
        require_service_name(service.proxy.destination_service_name, "Proxy.DestinationServiceName")
        if service.connect_native:
            raise Refused(INVALID, f"proxy {service.id!r} cannot be Connect native as well")
    return service


def _listed(step: Step, names: Iterable[str]) -> list[frozenset[str] | None]:
    """Return what `catalog.services` shows of these services: their tags, None for one that has no instance."""
    tags = step.store.services.tags
    return [None if (found := tags.get(name)) is None else frozenset(found) for name in names]


def _lists(step: Step, row: ServiceInstance) -> bool:
    """Whether `catalog.services` shows the same with this instance as without: its name and tags are there."""
    found = step.store.services.tags.get(row.service)
    return found is not None and all(tag in found for tag in row.tags)


def _touch_service(step: Step, row: ServiceInstance) -> None:
    """Touch what shows an instance; call it once the tables are as they will be."""
    services = step.store.services
    if row.service in services.by_name:
        step.touch("service", row.service)
    else:
        step.bury("service", row.service)
        step.bury("health", row.service)
    if destination := destination_of(row):
        if destination in services.by_destination:
            step.touch("connect", destination)
        else:
            step.bury("connect", destination)
            step.bury("connect-health", destination)
    if row.kind == KIND_TYPICAL and row.port:
        if row.port in services.by_port:
            step.touch("port", str(row.port))
        else:
            step.bury("port", str(row.port))


def put_check(step: Step, check: Check) -> None:
    """Store a check on a node, and on an instance if it names one; those it bears on are touched."""
    store = step.store
    require_name(check.node, "node of a check")
    require_name(check.check_id, "check id")
    require_text(check.name, "check name")
    if check.status not in STATUSES:
        raise Refused(INVALID, f"Invalid check status: '{check.status}' (use {', '.join(STATUSES)})")
    if len(check.output) > OUTPUT_MAX or len(check.notes) > OUTPUT_MAX:
        raise Refused(INVALID, f"output and notes of check {check.check_id!r} are limited to {OUTPUT_MAX} characters")
    if check.node not in store.nodes.rows:
        raise Refused(UNKNOWN_NODE, f"Missing node registration of {check.node!r}: register the node first")
    name: str = ""
    tags: tuple[str, ...] = ()
    if check.service_id:
        service = store.services.rows.get((check.node, check.service_id))
        if service is None:
            raise Refused(
                UNKNOWN_SERVICE,
                f"Missing service registration: no service {check.service_id!r} on node {check.node!r}",
            )
        name, tags = service.service, service.tags
    if (check.service_name, check.service_tags) != (name, tags):
        check = msgspec.structs.replace(check, service_name=name, service_tags=tags)
    key = (check.node, check.check_id)
    old = store.checks.rows.get(key)
    row = step.stamp(check, old)
    if row is not None:
        store.checks.put(key, row)
        if old is not None and (old.service_id, old.service_name, old.status) != (
            row.service_id,
            row.service_name,
            row.status,
        ):
            _touch_check(step, old)
        _touch_check(step, row)
    if check.status == CRITICAL:
        sessions.end_by_check(step, check.node, check.check_id)


def _touch_check(step: Step, row: Check) -> None:
    store = step.store
    step.touch("checks")
    step.touch("check-state", row.status)
    if row.node in store.checks.by_node:
        step.touch("node-checks", row.node)
    else:
        step.bury("node-checks", row.node)
    if not row.service_id:
        for service in store.services.by_node.get(row.node, {}).values():
            _touch_health(step, service)
        return
    if row.service_name in store.checks.by_service:
        step.touch("service-checks", row.service_name)
    else:
        step.bury("service-checks", row.service_name)
    service_row = store.services.rows.get((row.node, row.service_id))
    if service_row is not None:
        _touch_health(step, service_row)


def _touch_health(step: Step, service: ServiceInstance) -> None:
    step.touch("health", service.service)
    if destination := destination_of(service):
        step.touch("connect-health", destination)


def remove_check(step: Step, check: Check) -> None:
    """Remove a check that is stored; sessions that depend on it end."""
    step.store.checks.remove((check.node, check.check_id))
    _touch_check(step, check)
    sessions.end_by_check(step, check.node, check.check_id)


def remove_service(step: Step, service: ServiceInstance) -> None:
    """Remove an instance that is stored, with its checks."""
    store, key = step.store, (service.node, service.id)
    for check in _in_order(store.checks.by_instance.get(key, {})):
        remove_check(step, check)
    before = _listed(step, (service.service,))
    store.services.remove(key)
    _touch_service(step, service)
    step.touch("node", service.node)
    step.touch("service-places")
    if _listed(step, (service.service,)) != before:
        step.touch("services")


def remove_node(step: Step, name: str) -> None:
    """Remove a node that is stored, with all that is on it."""
    store = step.store
    sessions.end_by_node(step, name)
    services = store.services.by_node.get(name, {})
    for key in sorted(services):
        remove_service(step, services[key])
    for check in _in_order(store.checks.by_node.get(name, {})):
        remove_check(step, check)
    store.nodes.remove(name)
    step.touch("nodes")
    step.bury("node", name)


def _in_order(checks: dict[tuple[str, str], Check]) -> list[Check]:
    return [checks[key] for key in sorted(checks)]
