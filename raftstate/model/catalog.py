"""The catalog's rows: nodes, service instances and health checks, as Consul's API shows them."""

from __future__ import annotations

from typing import Any

from raftstate.model.wire import Wire

PASSING, WARNING, CRITICAL = "passing", "warning", "critical"
STATUSES = (PASSING, WARNING, CRITICAL)
SERF_HEALTH = "serfHealth"
"""Consul's name of the node liveness check; every registered agent node has one."""
KIND_TYPICAL, KIND_CONNECT_PROXY = "", "connect-proxy"


class Node(Wire, frozen=True):
    """A host that runs an agent (or one registered from outside through the catalog API)."""

    node: str
    address: str
    id: str = ""
    datacenter: str = "dc1"
    tagged_addresses: dict[str, str] = {}
    meta: dict[str, str] = {}
    create_index: int = 0
    modify_index: int = 0


class Weights(Wire, frozen=True):
    """Relative share of traffic of an instance while passing and while warning."""

    passing: int = 1
    warning: int = 1


class Upstream(Wire, frozen=True):
    """One upstream of a sidecar: a local listener that leads to a service elsewhere."""

    destination_name: str = ""
    """The service to reach; empty when it is to be found by ``destination_port`` (Lictor's NAME:PORT form)."""
    destination_type: str = "service"
    local_bind_address: str = "127.0.0.1"
    local_bind_port: int = 0
    upstream_name: str = ""
    """The name of the environment variables (``backend`` -> ``BACKEND_ADDR``); defaults to destination_name."""
    destination_port: int = 0
    config: dict[str, Any] = {}


class ServiceProxy(Wire, frozen=True):
    """What a connect-proxy instance stands in front of, and what it dials."""

    destination_service_name: str = ""
    destination_service_id: str = ""
    local_service_address: str = ""
    local_service_port: int = 0
    mode: str = ""
    config: dict[str, Any] = {}
    upstreams: tuple[Upstream, ...] = ()


class ServiceInstance(Wire, frozen=True):
    """One registered instance of a service on one node. Key: (node, id)."""

    node: str
    id: str
    service: str
    """The service's name."""
    kind: str = KIND_TYPICAL
    tags: tuple[str, ...] = ()
    address: str = ""
    port: int = 0
    meta: dict[str, str] = {}
    weights: Weights = Weights()
    enable_tag_override: bool = False
    tagged_addresses: dict[str, Any] = {}
    proxy: ServiceProxy | None = None
    connect_native: bool = False
    locality: dict[str, str] = {}
    create_index: int = 0
    modify_index: int = 0


class Check(Wire, frozen=True):
    """A health check's latest verdict. Key: (node, check_id); ``service_id`` is empty for a node check."""

    node: str
    check_id: str
    name: str = ""
    status: str = CRITICAL
    notes: str = ""
    output: str = ""
    service_id: str = ""
    service_name: str = ""
    service_tags: tuple[str, ...] = ()
    type: str = ""
    interval: str = ""
    timeout: str = ""
    exposed_port: int = 0
    definition: dict[str, Any] = {}
    create_index: int = 0
    modify_index: int = 0


class InstanceHealth(Wire, frozen=True):
    """An instance together with its node and all checks that bear on it (its own and the node's)."""

    node: Node
    service: ServiceInstance
    checks: tuple[Check, ...] = ()

    def status(self) -> str:
        """Return the worst status among the checks; passing when there are none."""
        worst = 0
        for check in self.checks:
            if check.status == CRITICAL:
                return CRITICAL
            if check.status == WARNING:
                worst = 1
        return WARNING if worst else PASSING

    def dial_address(self) -> str:
        """Return the host part to dial: the instance's own address, else its node's."""
        return self.service.address or self.node.address


class CatalogService(Wire, frozen=True):
    """An instance with its node in one flat row, as ``/v1/catalog/service/:name`` shows it."""

    id: str
    """The node's id."""
    node: str
    address: str
    """The node's address."""
    datacenter: str
    tagged_addresses: dict[str, str]
    node_meta: dict[str, str]
    service_id: str
    service_name: str
    service_kind: str
    service_address: str
    service_tagged_addresses: dict[str, Any]
    service_tags: tuple[str, ...]
    service_meta: dict[str, str]
    service_port: int
    service_weights: Weights
    service_enable_tag_override: bool
    service_proxy: ServiceProxy | None = None
    service_connect: dict[str, Any] = {}
    service_locality: dict[str, str] = {}
    create_index: int = 0
    modify_index: int = 0


class CatalogNode(Wire, frozen=True):
    """A node and all instances on it by id, as ``/v1/catalog/node/:node`` shows it."""

    node: Node
    services: dict[str, ServiceInstance]
