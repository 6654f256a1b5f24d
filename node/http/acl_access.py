"""The table: every endpoint, and what a token needs to use it. A test holds it against the routes.

Source: the "ACL required" tables of Consul's API pages. What a body says is not known here: such needs are found
where the body is read (`node.http.acl_needs.permit`) or where a command is written (`node.http.acl_commands`), and
marked as such, so that an endpoint without any need stands out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from aiohttp import web

from node.http import acl_filters as f
from node.http.acl_commands import config_need
from node.http.acl_needs import Need, intention_need, node_write, service_write
from node.http.context import Context
from raftstate.acl import READ, WRITE

Find = Callable[[Context, web.Request], Iterable[Need]]

OPEN, PATH, COMMAND, BODY, FILTER = "open", "path", "command", "body", "filter"
"""Where an endpoint's needs are found: it has none; from path and query; by the command it writes; by its body; it
has none, but its answer is filtered."""


@dataclass(frozen=True, slots=True)
class Access:
    """How one endpoint is guarded."""

    kind: str
    needs: Find | None = None
    filter: f.Filter | None = None
    listed: bool = True
    """A cut answer says so by ``X-Consul-Results-Filtered-By-ACLs``."""
    denied_if_cut: bool = False
    """An answer of which anything is cut is refused instead."""
    mask: Find | None = None
    """Whoever lacks this is shown an empty list."""


def _fixed(*needs: Need) -> Access:
    return Access(PATH, lambda ctx, request: needs)


def _named(resource: str, access: int, parameter: str) -> Access:
    return Access(PATH, lambda ctx, request: (Need(resource, access, request.match_info[parameter]),))


def _own_agent(access: int) -> Access:
    return Access(PATH, lambda ctx, request: (Need("agent", access, ctx.agent.options.node),))


def _filtered(cut: f.Filter, needs: Find | None = None) -> Access:
    return Access(FILTER, needs, cut)


def _proxies(cut: f.Filter) -> Access:
    """What answers for a service is shown to those who may find that service."""
    return Access(
        FILTER, None, cut, mask=lambda ctx, request: (Need("service", READ, request.match_info["service"]),)
    )


def _local_service(access: int) -> Find:
    """A service of this agent, by its id; an unknown one is the handler's to refuse."""

    def find(ctx: Context, request: web.Request) -> Iterable[Need]:
        held = ctx.agent.local.services.get(request.match_info["id"])
        return (Need("service", access, held.row.service),) if held is not None else ()

    return find


def _local_check(ctx: Context, request: web.Request) -> Iterable[Need]:
    held = ctx.agent.local.checks.get(request.match_info["id"])
    if held is None:
        return ()
    name = held.row.service_name
    return (service_write(name) if name else node_write(ctx.agent.options.node),)


def _kv_get(ctx: Context, request: web.Request) -> Iterable[Need]:
    """One key must be readable; of many those are shown that are."""
    if "recurse" in request.query or "keys" in request.query:
        return ()
    return (Need("key", READ, request.match_info["key"]),)


def _config_get(ctx: Context, request: web.Request) -> Iterable[Need]:
    need = config_need(request.match_info["kind"], request.match_info["name"], READ)
    return (need,) if need is not None else ()


def _match(ctx: Context, request: web.Request) -> Iterable[Need]:
    return [intention_need(name.rpartition("/")[2], READ) for name in request.query.getall("name", [])]


def _intention_check(ctx: Context, request: web.Request) -> Iterable[Need]:
    """Whether a call would be admitted is no secret from who may find the destination."""
    return (Need("service", READ, request.query.get("destination", "").rpartition("/")[2]),)


def _token_kind(ctx: Context, request: web.Request) -> Iterable[Need]:
    return (Need("agent", WRITE, ctx.agent.options.node),)


_OPEN = Access(OPEN)
_COMMAND = Access(COMMAND)
_BODY = Access(BODY)
_OPERATOR_READ, _OPERATOR_WRITE = _fixed(Need("operator", READ)), _fixed(Need("operator", WRITE))
_ACL_READ, _ACL_WRITE = _fixed(Need("acl", READ)), _fixed(Need("acl", WRITE))
_ONE_INTENTION = Access(FILTER, None, f.INTENTION_ROW, listed=False, denied_if_cut=True)


TABLE: dict[str, Access] = {
    # status: whoever looks for the servers
    "GET /v1/status/leader": _OPEN,
    "GET /v1/status/peers": _OPEN,
    # agent
    "GET /v1/agent/self": _own_agent(READ),
    "GET /v1/agent/host": _OPERATOR_READ,
    "GET /v1/agent/version": _own_agent(READ),
    "GET /v1/agent/members": _filtered(f.MEMBERS),
    "PUT /v1/agent/reload": _own_agent(WRITE),
    "PUT /v1/agent/leave": _own_agent(WRITE),
    "PUT /v1/agent/join/{address}": _own_agent(WRITE),
    "PUT /v1/agent/force-leave/{node}": _OPERATOR_WRITE,
    "GET /v1/agent/metrics": _own_agent(READ),
    "GET /v1/agent/monitor": _own_agent(READ),
    "PUT /v1/agent/token/{kind}": Access(PATH, _token_kind),
    "GET /v1/agent/services": _filtered(f.AGENT_SERVICES),
    "GET /v1/agent/service/{id}": Access(PATH, _local_service(READ)),
    "PUT /v1/agent/service/register": _BODY,
    "PUT /v1/agent/service/deregister/{id}": Access(PATH, _local_service(WRITE)),
    "PUT /v1/agent/service/maintenance/{id}": Access(PATH, _local_service(WRITE)),
    "PUT /v1/agent/maintenance": Access(PATH, lambda ctx, request: (node_write(ctx.agent.options.node),)),
    "GET /v1/agent/health/service/id/{id}": Access(PATH, _local_service(READ)),
    "GET /v1/agent/health/service/name/{name}": _named("service", READ, "name"),
    "GET /v1/agent/checks": _filtered(f.AGENT_CHECKS),
    "PUT /v1/agent/check/register": _BODY,
    "PUT /v1/agent/check/deregister/{id}": Access(PATH, _local_check),
    "PUT /v1/agent/check/pass/{id}": Access(PATH, _local_check),
    "PUT /v1/agent/check/warn/{id}": Access(PATH, _local_check),
    "PUT /v1/agent/check/fail/{id}": Access(PATH, _local_check),
    "PUT /v1/agent/check/update/{id}": Access(PATH, _local_check),
    "GET /v1/agent/connect/ca/roots": _OPEN,
    "GET /v1/agent/connect/ca/leaf/{service}": _named("service", WRITE, "service"),
    "POST /v1/agent/connect/authorize": _BODY,
    "PUT /v1/agent/connect/authorize": _BODY,
    "POST /v1/agent/connect/proxy/{id}/stream": _BODY,
    "PUT /v1/agent/connect/answer/{id}": Access(PATH, _local_service(WRITE)),
    # catalog
    "GET /v1/catalog/datacenters": _OPEN,
    "GET /v1/catalog/nodes": _filtered(f.NODES),
    "GET /v1/catalog/services": _filtered(f.SERVICE_NAMES),
    "GET /v1/catalog/service/{service}": _filtered(f.CATALOG_SERVICES),
    "GET /v1/catalog/connect/{service}": _proxies(f.CATALOG_SERVICES),
    "GET /v1/catalog/node/{node}": _filtered(f.NODE_SERVICES),
    "GET /v1/catalog/node-services/{node}": _filtered(f.NODE_SERVICES),
    "GET /v1/catalog/gateway-services/{gateway}": _OPEN,
    "PUT /v1/catalog/register": _COMMAND,
    "PUT /v1/catalog/deregister": _COMMAND,
    # health
    "GET /v1/health/service/{service}": _filtered(f.HEALTH),
    "GET /v1/health/connect/{service}": _proxies(f.HEALTH),
    "GET /v1/health/ingress/{service}": _OPEN,
    "GET /v1/health/node/{node}": _filtered(f.CHECKS),
    "GET /v1/health/checks/{service}": _filtered(f.CHECKS),
    "GET /v1/health/state/{state}": _filtered(f.CHECKS),
    # intentions and the authority
    "GET /v1/connect/intentions": _filtered(f.INTENTIONS),
    "POST /v1/connect/intentions": _COMMAND,
    "GET /v1/connect/intentions/exact": _ONE_INTENTION,
    "PUT /v1/connect/intentions/exact": _COMMAND,
    "DELETE /v1/connect/intentions/exact": _COMMAND,
    "GET /v1/connect/intentions/match": Access(PATH, _match),
    "GET /v1/connect/intentions/check": Access(PATH, _intention_check),
    "GET /v1/connect/intentions/{id}": _ONE_INTENTION,
    "PUT /v1/connect/intentions/{id}": _COMMAND,
    "DELETE /v1/connect/intentions/{id}": _COMMAND,
    "GET /v1/connect/ca/roots": _OPEN,
    "GET /v1/connect/ca/configuration": _OPERATOR_READ,
    "PUT /v1/connect/ca/configuration": _OPERATOR_WRITE,
    "PUT /v1/connect/ca/rotate": _OPERATOR_WRITE,
    "GET /v1/connect/revocations": _OPERATOR_READ,
    "PUT /v1/connect/revocations": _OPERATOR_WRITE,
    "DELETE /v1/connect/revocations": _OPERATOR_WRITE,
    # operator
    "GET /v1/operator/raft/configuration": _OPERATOR_READ,
    "DELETE /v1/operator/raft/peer": _OPERATOR_WRITE,
    "PUT /v1/operator/raft/peer": _OPERATOR_WRITE,
    "POST /v1/operator/raft/transfer-leader": _OPERATOR_WRITE,
    "PUT /v1/operator/raft/transfer-leader": _OPERATOR_WRITE,
    "GET /v1/operator/autopilot/health": _OPERATOR_READ,
    "GET /v1/operator/autopilot/state": _OPERATOR_READ,
    "GET /v1/operator/autopilot/configuration": _OPERATOR_READ,
    "PUT /v1/operator/autopilot/configuration": _OPERATOR_WRITE,
    "GET /v1/operator/usage": _OPERATOR_READ,
    "PUT /v1/operator/debug/partition": _OPERATOR_WRITE,
    # keys, sessions, transactions, events
    "GET /v1/kv/{key}": Access(FILTER, _kv_get, f.KV),
    "PUT /v1/kv/{key}": _COMMAND,
    "DELETE /v1/kv/{key}": _COMMAND,
    "PUT /v1/session/create": _COMMAND,
    "PUT /v1/session/destroy/{id}": _COMMAND,
    "PUT /v1/session/renew/{id}": _COMMAND,
    "GET /v1/session/info/{id}": _filtered(f.SESSIONS),
    "GET /v1/session/list": _filtered(f.SESSIONS),
    "GET /v1/session/node/{node}": _filtered(f.SESSIONS),
    "PUT /v1/txn": Access(BODY, None, f.TXN, listed=False),
    "PUT /v1/event/fire/{name}": _named("event", WRITE, "name"),
    "GET /v1/event/list": _filtered(f.EVENTS),
    # configuration entries
    "PUT /v1/config": _COMMAND,
    "GET /v1/config/{kind}/{name}": Access(PATH, _config_get),
    "GET /v1/config/{kind}": _filtered(f.CONFIG),
    "DELETE /v1/config/{kind}/{name}": _COMMAND,
    "GET /v1/discovery-chain/{service}": _named("service", READ, "service"),
    "POST /v1/discovery-chain/{service}": _named("service", READ, "service"),
    # coordinates are not kept: there is nothing to change
    "GET /v1/coordinate/datacenters": _OPEN,
    "GET /v1/coordinate/nodes": _filtered(f.NODES),
    "GET /v1/coordinate/node/{node}": _named("node", READ, "node"),
    "PUT /v1/coordinate/update": Access(PATH, lambda ctx, request: (node_write(ctx.agent.options.node),)),
    # the whole state
    "GET /v1/snapshot": _ACL_WRITE,
    "PUT /v1/snapshot": _ACL_WRITE,
    # access control itself
    "PUT /v1/acl/bootstrap": _OPEN,
    "GET /v1/acl/replication": _ACL_READ,
    "GET /v1/acl/tokens": _ACL_READ,
    "PUT /v1/acl/token": _ACL_WRITE,
    "GET /v1/acl/token/self": _OPEN,
    "PUT /v1/acl/token/{id}/clone": _ACL_WRITE,
    "GET /v1/acl/token/{id}": _ACL_READ,
    "PUT /v1/acl/token/{id}": _ACL_WRITE,
    "DELETE /v1/acl/token/{id}": _ACL_WRITE,
    "GET /v1/acl/policies": _ACL_READ,
    "PUT /v1/acl/policy": _ACL_WRITE,
    "GET /v1/acl/policy/name/{name}": _ACL_READ,
    "GET /v1/acl/policy/{id}": _ACL_READ,
    "PUT /v1/acl/policy/{id}": _ACL_WRITE,
    "DELETE /v1/acl/policy/{id}": _ACL_WRITE,
    "GET /v1/acl/roles": _ACL_READ,
    "PUT /v1/acl/role": _ACL_WRITE,
    "GET /v1/acl/role/name/{name}": _ACL_READ,
    "GET /v1/acl/role/{id}": _ACL_READ,
    "PUT /v1/acl/role/{id}": _ACL_WRITE,
    "DELETE /v1/acl/role/{id}": _ACL_WRITE,
    "GET /v1/acl/auth-methods": _ACL_READ,
    "GET /v1/acl/binding-rules": _ACL_READ,
    "GET /v1/acl/templated-policies": _ACL_READ,
    "GET /v1/acl/{path}": _OPEN,
    "PUT /v1/acl/{path}": _OPEN,
    "POST /v1/acl/{path}": _OPEN,
    "DELETE /v1/acl/{path}": _OPEN,
    # what the web page and Prometheus ask for
    "GET /v1/internal/ui/services": _filtered(f.SUMMARIES),
    "GET /v1/internal/ui/service-topology/{service}": _filtered(
        f.TOPOLOGY, lambda ctx, request: (Need("service", READ, request.match_info["service"]),)
    ),
    "GET /v1/discovery/prometheus": _filtered(f.TARGETS),
    "GET /v1/openapi.json": _OPEN,
    # what is not supported says so to anyone
    "GET /v1/{family}{rest}": _OPEN,
    "PUT /v1/{family}{rest}": _OPEN,
    "POST /v1/{family}{rest}": _OPEN,
    "DELETE /v1/{family}{rest}": _OPEN,
}
"""By method and path, parameters without their patterns."""
