"""What each command takes to be written: checked where handlers write, whatever way led there.

Source: the "ACL required" tables of Consul's API pages. Some depend on what is there already: a service that is
replaced or removed is asked for by the name under which it is registered.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from node.http.acl_needs import BELOW, Need, intention_need, node_write, service_write
from raftstate.acl import LIST, READ, WRITE
from raftstate.model.catalog import Check, Node, ServiceInstance
from raftstate.state import commands as c

Ask = Callable[[str, dict[str, Any]], Awaitable[Any]]
"""(query, params) -> its value as builtins."""

UNIVERSAL_KINDS = frozenset({"proxy-defaults", "mesh"})
"""Kinds of configuration entries that concern every service: read by all, written with ``mesh:write``."""


async def needs_of(command: Any, ask: Ask) -> tuple[Need, ...]:
    """Return what writing a command takes. A command that is not known here takes everything."""
    find = _NEEDS.get(type(command))
    if find is None:
        return (Need("acl", WRITE), Need("operator", WRITE))
    return tuple(await find(command, ask))


def config_need(kind: str, name: str, access: int) -> Need | None:
    """Return what reading or writing a configuration entry takes; None: nothing."""
    if kind == "service-intentions":
        return intention_need(name, access)
    if kind in UNIVERSAL_KINDS:
        return None if access == READ else Need("mesh", WRITE)
    return Need("service", access, name)


async def _catalog_register(command: c.CatalogRegister, ask: Ask) -> list[Need]:
    held = await ask("catalog.node", {"node": command.node.node})
    needs = []
    if not (held and (command.skip_node_update or _same_node(held["Node"], command.node))):
        needs.append(node_write(command.node.node))
    if command.service is not None:
        needs += _service_needs(command.service, held)
    for check in command.checks:
        needs += _check_needs(check, held, command.service)
    return needs


def _same_node(held: dict[str, Any], node: Node) -> bool:
    return (held["Address"], held["TaggedAddresses"], held["Meta"]) == (
        node.address,
        dict(node.tagged_addresses),
        dict(node.meta),
    ) and node.id in ("", held["ID"])


def _service_needs(service: ServiceInstance, held: Any) -> list[Need]:
    """A service's own name, and the one that its id stands for now."""
    names = {service.service: None} | dict.fromkeys(_held_name(held, service.id))
    return [service_write(name) for name in names]


def _held_name(held: Any, service_id: str) -> tuple[str, ...]:
    row = held["Services"].get(service_id) if held else None
    return (row["Service"],) if row is not None else ()


def _check_needs(check: Check, held: Any, beside: ServiceInstance | None = None) -> list[Need]:
    """A check of a service takes the service, one of a node the node."""
    if not check.service_id:
        return [node_write(check.node)]
    if beside is not None and beside.id == check.service_id:
        return [service_write(beside.service)]
    return [service_write(name) for name in _held_name(held, check.service_id)] or [node_write(check.node)]


async def _held(ask: Ask, node: str) -> Any:
    return await ask("catalog.node", {"node": node})


async def _register_node(command: c.RegisterNode, ask: Ask) -> list[Need]:
    return [node_write(command.node.node)]


async def _register_service(command: c.RegisterService, ask: Ask) -> list[Need]:
    return _service_needs(command.service, await _held(ask, command.service.node))


async def _register_check(command: c.RegisterCheck, ask: Ask) -> list[Need]:
    return _check_needs(command.check, await _held(ask, command.check.node))


async def _deregister_node(command: c.DeregisterNode, ask: Ask) -> list[Need]:
    return [node_write(command.node)]


async def _deregister_service(command: c.DeregisterService, ask: Ask) -> list[Need]:
    names = _held_name(await _held(ask, command.node), command.service_id)
    # Whoever may write the node may clean it up, as its agent does when its services are nobody's any more.
    node = node_write(command.node)
    return [Need("service", WRITE, name, otherwise=node) for name in names] or [node]


async def _deregister_check(command: c.DeregisterCheck, ask: Ask) -> list[Need]:
    node = node_write(command.node)
    found = await check_needs(command.node, command.check_id, ask)
    return [Need(need.resource, need.access, need.name, otherwise=node) for need in found]


async def check_needs(node: str, check_id: str, ask: Ask) -> list[Need]:
    """Return what changing a check that is registered takes."""
    for row in await ask("health.node", {"node": node}):
        if row["CheckID"] == check_id and row["ServiceName"]:
            return [service_write(row["ServiceName"])]
    return [node_write(node)]


async def _upsert_intention(command: c.UpsertIntention, ask: Ask) -> list[Need]:
    row = command.intention
    needs = {await _destination(ask, row.destination_name, row.destination_service)}
    held = await ask("intentions.get", {"id": row.id}) if row.id else None
    if held:  # it is moved: both places count
        needs.add(await _destination(ask, held["DestinationName"], held["DestinationService"]))
    return list(needs)


async def _delete_intention(command: c.DeleteIntention, ask: Ask) -> list[Need]:
    if command.id:
        held = await ask("intentions.get", {"id": command.id})
        if not held:
            return [intention_need("*", READ)]
        return [await _destination(ask, held["DestinationName"], held["DestinationService"])]
    return [await _destination(ask, command.destination, "")]


async def _destination(ask: Ask, name: str, service: str) -> Need:
    """An intention is its destination's; one on an instance is its service's."""
    if not service and name != "*":
        found = await ask("intentions.resolve", {"reference": name})
        service = found.get("Service") or ""
    return intention_need(service or name, WRITE)


async def _set_config(command: c.SetConfigEntry | c.DeleteConfigEntry, ask: Ask) -> list[Need]:
    need = config_need(command.kind, command.name, WRITE)
    return [need] if need is not None else []


async def _key(command: c.KVSet | c.KVDelete | c.KVCas | c.KVLock | c.KVUnlock, ask: Ask) -> list[Need]:
    return [Need("key", WRITE, command.key)]


async def _tree(command: c.KVDeleteTree, ask: Ask) -> list[Need]:
    return [Need("key", WRITE, command.prefix, BELOW)]


async def _session_create(command: c.SessionCreate, ask: Ask) -> list[Need]:
    return [Need("session", WRITE, command.session.node)]


async def _session(command: c.SessionDestroy | c.SessionRenew, ask: Ask) -> list[Need]:
    rows = await ask("session.info", {"id": command.id})
    return [Need("session", WRITE, row["Node"]) for row in rows or ()]


async def _operator(command: Any, ask: Ask) -> list[Need]:
    return [Need("operator", WRITE)]


async def _txn(command: c.Txn, ask: Ask) -> list[Need]:
    return [need for op in command.ops for need in await txn_needs(op, ask)]


_KV_READS = frozenset({"get", "get-or-empty", "check-index", "check-session", "check-not-exists"})


async def txn_needs(op: c.TxnOp, ask: Ask) -> list[Need]:
    """Return what one operation of a transaction takes."""
    match op:
        case c.TxnKV():
            if op.verb in _KV_READS:
                return [Need("key", READ, op.key)]
            if op.verb == "get-tree":
                return [Need("key", LIST, op.key, BELOW)]
            return [Need("key", WRITE, op.key, BELOW if op.verb == "delete-tree" else "one")]
        case c.TxnNode():
            return [Need("node", READ if op.verb == "get" else WRITE, op.node.node)]
        case c.TxnService():
            held = await _held(ask, op.service.node)
            if op.verb == "get":
                names = _held_name(held, op.service.id)
                return [Need("service", READ, name) for name in names] or [Need("node", READ, op.service.node)]
            service = op.service
            if service.service:
                return _service_needs(service, held)
            return [service_write(name) for name in _held_name(held, service.id)] or [node_write(service.node)]
        case c.TxnCheck():
            if op.verb == "get":
                found = await check_needs(op.check.node, op.check.check_id, ask)
                return [Need(need.resource, READ, need.name) for need in found]
            held = await _held(ask, op.check.node)
            return [*_check_needs(op.check, held), *await check_needs(op.check.node, op.check.check_id, ask)]


_NEEDS: dict[type, Callable[[Any, Ask], Awaitable[list[Need]]]] = {
    c.RegisterNode: _register_node,
    c.RegisterService: _register_service,
    c.RegisterCheck: _register_check,
    c.CatalogRegister: _catalog_register,
    c.DeregisterNode: _deregister_node,
    c.DeregisterService: _deregister_service,
    c.DeregisterCheck: _deregister_check,
    c.UpsertIntention: _upsert_intention,
    c.DeleteIntention: _delete_intention,
    c.SetCAConfig: _operator,
    c.SetAutopilot: _operator,
    c.Revoke: _operator,
    c.Restore: _operator,
    c.KVSet: _key,
    c.KVDelete: _key,
    c.KVCas: _key,
    c.KVLock: _key,
    c.KVUnlock: _key,
    c.KVDeleteTree: _tree,
    c.SessionCreate: _session_create,
    c.SessionDestroy: _session,
    c.SessionRenew: _session,
    c.Txn: _txn,
    c.SetConfigEntry: _set_config,
    c.DeleteConfigEntry: _set_config,
}
