"""The catalog's tables and their indexes, so that no query reads rows that are not in its answer."""

from __future__ import annotations

from raftstate.model.catalog import KIND_CONNECT_PROXY, KIND_TYPICAL, Check, Node, ServiceInstance
from raftstate.state.table import Journal, Table, group_put, group_remove

InstanceKey = tuple[str, str]
"""(node, instance id)"""
CheckKey = tuple[str, str]
"""(node, check id)"""


class Nodes(Table[str, Node]):
    """Nodes by name."""

    def __init__(self, journal: Journal) -> None:
        super().__init__("nodes", Node, journal)
        self.name_by_id: dict[str, str] = {}

    def key_of(self, row: Node) -> str:
        return row.node

    def reindex(self, key: str, old: Node | None, new: Node | None) -> None:
        if old is not None and old.id:
            self.name_by_id.pop(old.id, None)
        if new is not None and new.id:
            self.name_by_id[new.id] = key


class Services(Table[InstanceKey, ServiceInstance]):
    """Service instances by (node, id)."""

    def __init__(self, journal: Journal) -> None:
        super().__init__("services", ServiceInstance, journal)
        self.by_node: dict[str, dict[InstanceKey, ServiceInstance]] = {}
        self.by_name: dict[str, dict[InstanceKey, ServiceInstance]] = {}
        self.by_destination: dict[str, dict[InstanceKey, ServiceInstance]] = {}
        """What answers for a service in the mesh: proxies by the service behind them, and native instances."""
        self.by_port: dict[int, dict[InstanceKey, ServiceInstance]] = {}
        """Typical instances only."""
        self.by_id: dict[str, dict[InstanceKey, ServiceInstance]] = {}
        """Typical instances only."""
        self.tags: dict[str, dict[str, int]] = {}
        """Per service name: how many instances have each tag."""
        self.listing: tuple[int, dict[str, list[str]]] = (-1, {})
        """The last answer to ``catalog.services``, and when that last changed; only that query writes it."""

    def key_of(self, row: ServiceInstance) -> InstanceKey:
        return row.node, row.id

    def reindex(self, key: InstanceKey, old: ServiceInstance | None, new: ServiceInstance | None) -> None:
        if old is not None:
            self._forget(key, old)
        if new is None:
            return
        group_put(self.by_node, new.node, key, new)
        group_put(self.by_name, new.service, key, new)
        if destination := destination_of(new):
            group_put(self.by_destination, destination, key, new)
        if new.kind == KIND_TYPICAL:
            group_put(self.by_id, new.id, key, new)
            if new.port:
                group_put(self.by_port, new.port, key, new)
        counts = self.tags.setdefault(new.service, {})
        for tag in new.tags:
            counts[tag] = counts.get(tag, 0) + 1

    def _forget(self, key: InstanceKey, old: ServiceInstance) -> None:
        group_remove(self.by_node, old.node, key)
        group_remove(self.by_name, old.service, key)
        if destination := destination_of(old):
            group_remove(self.by_destination, destination, key)
        if old.kind == KIND_TYPICAL:
            group_remove(self.by_id, old.id, key)
            if old.port:
                group_remove(self.by_port, old.port, key)
        counts = self.tags[old.service]
        for tag in old.tags:
            counts[tag] -= 1
            if not counts[tag]:
                del counts[tag]
        if old.service not in self.by_name:
            del self.tags[old.service]


class Checks(Table[CheckKey, Check]):
    """Checks by (node, check id)."""

    def __init__(self, journal: Journal) -> None:
        super().__init__("checks", Check, journal)
        self.by_node: dict[str, dict[CheckKey, Check]] = {}
        self.node_level: dict[str, dict[CheckKey, Check]] = {}
        self.by_instance: dict[InstanceKey, dict[CheckKey, Check]] = {}
        self.by_service: dict[str, dict[CheckKey, Check]] = {}
        self.by_status: dict[str, dict[CheckKey, Check]] = {}

    def key_of(self, row: Check) -> CheckKey:
        return row.node, row.check_id

    def reindex(self, key: CheckKey, old: Check | None, new: Check | None) -> None:
        if old is not None:
            group_remove(self.by_node, old.node, key)
            group_remove(self.by_status, old.status, key)
            if old.service_id:
                group_remove(self.by_instance, (old.node, old.service_id), key)
                group_remove(self.by_service, old.service_name, key)
            else:
                group_remove(self.node_level, old.node, key)
        if new is not None:
            group_put(self.by_node, new.node, key, new)
            group_put(self.by_status, new.status, key, new)
            if new.service_id:
                group_put(self.by_instance, (new.node, new.service_id), key, new)
                group_put(self.by_service, new.service_name, key, new)
            else:
                group_put(self.node_level, new.node, key, new)


def destination_of(service: ServiceInstance) -> str:
    """Return the service that this instance answers for in the mesh; empty when for none."""
    if service.kind == KIND_CONNECT_PROXY:
        return service.proxy.destination_service_name if service.proxy else ""
    return service.service if service.connect_native else ""
