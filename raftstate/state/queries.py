"""Every question that can be put to the state, by name. Pure: the store and the parameters decide the answer."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from raftstate.errors import RaftError
from raftstate.state import acl, autopilot, config_entries, connect, intentions, kv, sessions
from raftstate.state import catalog_queries as catalog
from raftstate.state.answer import Answer, answer
from raftstate.state.digest import digest_of
from raftstate.state.store import Store

__all__ = ["QUERIES", "Answer", "BadQuery", "run_query"]


class BadQuery(RaftError, ValueError):
    """There is no such query, or it has no such parameter; the text lists those there are."""


def _datacenters(store: Store) -> Answer:
    """The one datacenter's name, as its nodes say it."""
    names = sorted({node.datacenter for node in store.nodes.rows.values()})
    return answer(store, names or ["dc1"], ("nodes",))


def _digest(store: Store) -> Answer:
    """The state's digest and the log index that it stands for. Reads everything: for tests and operators."""
    return Answer(max(store.index, 1), {"Digest": digest_of(store), "Index": store.index}, ())


QUERIES: dict[str, Callable[..., Answer]] = {
    "catalog.datacenters": _datacenters,
    "catalog.nodes": catalog.nodes,
    "catalog.services": catalog.services,
    "catalog.service": catalog.service,
    "catalog.connect": catalog.connect,
    "catalog.node": catalog.node,
    "catalog.node_rows": catalog.node_rows,
    "catalog.services_by_port": catalog.services_by_port,
    "health.service": catalog.health_service,
    "health.connect": catalog.health_connect,
    "health.node": catalog.health_node,
    "health.checks": catalog.health_checks,
    "health.state": catalog.health_state,
    "intentions.list": intentions.list_all,
    "intentions.get": intentions.get,
    "intentions.exact": intentions.exact,
    "intentions.match": intentions.match,
    "intentions.resolve": intentions.resolve,
    "connect.roots": connect.roots,
    "connect.ca_config": connect.ca_config,
    "connect.revocations": connect.revocations,
    "kv.get": kv.get,
    "kv.list": kv.list_prefix,
    "kv.keys": kv.keys,
    "session.info": sessions.info,
    "session.list": sessions.list_all,
    "session.node": sessions.list_node,
    "config.get": config_entries.get,
    "config.list": config_entries.list_kind,
    "discovery.chain": config_entries.chain,
    "operator.autopilot": autopilot.get,
    "acl.token": acl.token,
    "acl.tokens": acl.tokens,
    "acl.list": acl.listed,
    "acl.resolve": acl.resolve,
    "acl.policy": acl.policy,
    "acl.policies": acl.policies,
    "acl.role": acl.role,
    "acl.roles": acl.roles,
    "acl.bootstrap": acl.bootstrapped,
    "internal.digest": _digest,
    "internal.ca_signing_material": connect.signing_material,
}

_PARAMETERS = {
    name: {
        parameter.name: parameter.default is inspect.Parameter.empty
        for parameter in list(inspect.signature(query).parameters.values())[1:]
    }
    for name, query in QUERIES.items()
}
"""Per query: its parameters, and whether they are required."""


def run_query(store: Store, name: str, params: Mapping[str, Any] | None = None) -> Answer:
    """Answer a query. Raises BadQuery."""
    query = QUERIES.get(name)
    if query is None:
        raise BadQuery(f"there is no query {name!r}; known: {', '.join(QUERIES)}")
    if not params:
        params = {}
    known = _PARAMETERS[name]
    for parameter in params:
        if parameter not in known:
            raise BadQuery(f"query {name} has no parameter {parameter!r}; known: {', '.join(known) or 'none'}")
    for parameter, required in known.items():
        if required and parameter not in params:
            raise BadQuery(f"query {name} needs the parameter {parameter!r}")
    return query(store, **params)
