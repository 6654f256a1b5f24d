"""Random commands for the state machine, and a naive twin of its queries that scans every row."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import msgspec
from hypothesis import strategies as st

from raftstate.chain import BadEntry, compile_plan
from raftstate.model.autopilot import AutopilotConfig
from raftstate.model.catalog import (
    PASSING,
    STATUSES,
    CatalogNode,
    Check,
    InstanceHealth,
    Node,
    ServiceInstance,
    ServiceProxy,
)
from raftstate.model.connect import CARoot
from raftstate.model.intention import Intention
from raftstate.model.kv import ServiceCheck, Session
from raftstate.model.plan import Plan
from raftstate.state import commands as c
from raftstate.state.catalog_tables import destination_of
from raftstate.state.store import Store

NODES = ("n1", "n2", "n3")
SERVICES = ("web", "db", "api")
INSTANCES = ("web-1", "web-2", "db-1", "web")
KEYS = ("a", "a/", "a/b", "a/b/c", "a/d", "b/é", "b")
PREFIXES = ("", "a", "a/", "a/b", "b/", "zz")
SESSIONS = ("s1", "s2", "s3")
CHECKS = ("serfHealth", "c1", "c2")
REFERENCES = (*SERVICES, "web-1", "db-1", "web:web-1", "*")
KINDS = ("service-defaults", "service-resolver")

nodes = st.builds(
    Node,
    node=st.sampled_from(NODES),
    address=st.sampled_from(("10.0.0.1", "10.0.0.2")),
    id=st.sampled_from(("", "id-1", "id-2", "id-3")),
    meta=st.sampled_from(({}, {"rack": "r1"})),
)
proxies = st.builds(ServiceProxy, destination_service_name=st.sampled_from(SERVICES))
services = st.one_of(
    st.builds(
        ServiceInstance,
        node=st.sampled_from(NODES),
        id=st.sampled_from(INSTANCES),
        service=st.sampled_from(SERVICES),
        tags=st.sampled_from(((), ("v1",), ("v1", "V2"), ("v1", "v1"))),
        port=st.sampled_from((0, 80, 90)),
        connect_native=st.booleans(),
    ),
    st.builds(
        ServiceInstance,
        node=st.sampled_from(NODES),
        id=st.sampled_from(("p1", "p2", "web-1")),
        service=st.sampled_from(("web-sidecar-proxy", "db-sidecar-proxy")),
        kind=st.just("connect-proxy"),
        proxy=proxies,
        port=st.sampled_from((80, 20000)),
    ),
)
checks = st.builds(
    Check,
    node=st.sampled_from(NODES),
    check_id=st.sampled_from(CHECKS),
    status=st.sampled_from(STATUSES),
    service_id=st.sampled_from(("", "", *INSTANCES, "p1")),
    output=st.sampled_from(("", "ok")),
)
intentions = st.builds(
    Intention,
    source_name=st.sampled_from(REFERENCES),
    destination_name=st.sampled_from(REFERENCES),
    id=st.sampled_from([f"i{number}" for number in range(20)]),
    action=st.sampled_from(("allow", "deny")),
)
sessions = st.builds(
    Session,
    id=st.sampled_from(SESSIONS),
    node=st.sampled_from(NODES),
    behavior=st.sampled_from(("release", "delete")),
    lock_delay=st.sampled_from((0, 15_000_000_000)),
    node_checks=st.sampled_from(((), ("serfHealth",))),
    service_checks=st.sampled_from(((), (ServiceCheck("c1"),))),
)
_key, _value = st.sampled_from(KEYS), st.sampled_from((b"", b"1", b"2"))
_session, _flags = st.sampled_from(SESSIONS), st.sampled_from((0, 7))
_cas = st.sampled_from((None, 0, 1, 2, 3, 4, 5, 6))
_index = st.integers(0, 8)
txn_ops = st.one_of(
    st.builds(
        c.TxnKV,
        verb=st.sampled_from(
            ("set", "cas", "lock", "unlock", "get", "get-or-empty", "get-tree", "check-index", "check-session",
             "check-not-exists", "delete", "delete-tree", "delete-cas")
        ),
        key=_key, value=_value, index=_index, session=_session,
    ),
    st.builds(c.TxnNode, verb=st.sampled_from(("get", "set", "cas", "delete")), node=nodes, index=_index),
    st.builds(c.TxnService, verb=st.sampled_from(("get", "set", "cas", "delete")), service=services, index=_index),
    st.builds(c.TxnCheck, verb=st.sampled_from(("get", "set", "delete-cas")), check=checks, index=_index),
)  # fmt: skip
_root_id = st.sampled_from(("r1", "r2", "r3"))
commands: st.SearchStrategy[c.Command] = st.one_of(
    st.builds(c.RegisterNode, nodes),
    st.builds(c.RegisterNode, nodes),
    st.builds(c.RegisterService, services),
    st.builds(c.RegisterService, services),
    st.builds(c.RegisterCheck, checks),
    st.builds(c.RegisterCheck, checks),
    st.builds(
        c.CatalogRegister,
        nodes,
        st.one_of(st.none(), services),
        st.lists(checks, max_size=2).map(tuple),
        st.booleans(),
    ),
    st.builds(c.DeregisterNode, st.sampled_from(NODES)),
    st.builds(c.DeregisterService, st.sampled_from(NODES), st.sampled_from((*INSTANCES, "p1"))),
    st.builds(c.DeregisterCheck, st.sampled_from(NODES), st.sampled_from(CHECKS)),
    st.builds(c.UpsertIntention, intentions, st.booleans(), st.booleans()),
    st.builds(c.DeleteIntention, st.sampled_from(["", *(f"i{number}" for number in range(20))])),
    st.builds(c.DeleteIntention, st.just(""), st.sampled_from(REFERENCES), st.sampled_from(REFERENCES)),
    st.builds(c.SetCAConfig, trust_domain=st.sampled_from(("td1", "td2", "")), cas_index=_cas),
    st.builds(
        c.SetAutopilot,
        st.builds(AutopilotConfig, cleanup_dead_servers=st.booleans(), min_quorum=st.sampled_from((-1, 0, 3))),
        _cas,
    ),
    st.builds(
        c.AddCARoot,
        st.builds(CARoot, id=_root_id, name=st.just("root"), root_cert=st.just("pem")),
        st.sampled_from((b"", b"sealed-1", b"sealed-2")),
        st.booleans(),
        st.sampled_from((None, "", "r1")),
    ),
    st.builds(c.RetireCARoot, _root_id),
    st.builds(c.Revoke, st.sampled_from(("instance", "service", "serial", "bad")), st.sampled_from(INSTANCES)),
    st.builds(c.Restore, st.sampled_from(("instance", "service")), st.sampled_from(INSTANCES)),
    st.builds(c.KVSet, _key, _value, _flags),
    st.builds(c.KVSet, _key, _value, _flags),
    st.builds(c.KVDelete, _key, _cas),
    st.builds(c.KVDeleteTree, st.sampled_from(PREFIXES)),
    st.builds(c.KVCas, _key, _value, _index),
    st.builds(c.KVLock, _key, _value, _session),
    st.builds(c.KVLock, _key, _value, _session),
    st.builds(c.KVUnlock, _key, _value, _session),
    st.builds(c.SessionCreate, sessions),
    st.builds(c.SessionCreate, sessions),
    st.builds(c.SessionDestroy, _session),
    st.builds(c.SessionRenew, _session),
    st.builds(c.Txn, st.lists(txn_ops, max_size=4).map(tuple)),
    st.builds(
        c.SetConfigEntry,
        st.sampled_from((*KINDS, "bad")),
        st.sampled_from(SERVICES),
        st.sampled_from(({"Protocol": "http"}, {"Protocol": "tcp"})),
        _cas,
    ),
    st.builds(
        c.SetConfigEntry,
        st.just("service-resolver"),
        st.sampled_from(SERVICES),
        st.sampled_from(({}, {"Redirect": {"Service": "web"}}, {"Failover": {"*": {"Service": "db"}}})),
        _cas,
    ),
    st.builds(c.DeleteConfigEntry, st.sampled_from(KINDS), st.sampled_from(SERVICES), _cas),
    st.builds(
        c.SetConfigEntry,
        st.just("service-intentions"),
        st.sampled_from(("web", "*")),
        st.lists(st.sampled_from(("web", "db", "*", "web:web-1")), max_size=3).map(
            lambda names: {"Sources": [{"Name": name, "Action": "allow"} for name in names]}
        ),
        _cas,
    ),
    st.builds(c.DeleteConfigEntry, st.just("service-intentions"), st.sampled_from(("web", "db")), _cas),
    st.builds(c.ForgetRequests, st.sampled_from(("2026-01-01T00:00:20Z", "when"))),
)

SETUP: list[c.Command] = [
    *[
        c.CatalogRegister(
            Node(node, f"10.0.0.{number}"),
            ServiceInstance(node, f"web-{number}", "web", port=80, tags=("v1",)),
            (
                Check(node, "serfHealth", status=PASSING),
                Check(node, "c1", status=PASSING, service_id=f"web-{number}"),
            ),
        )
        for number, node in enumerate(NODES, 1)
    ],
    c.SessionCreate(Session("s1", "n1")),
    c.KVLock("a/b", b"1", "s1"),
    c.KVLock("b", b"1", "s1"),
    c.UpsertIntention(Intention("web-1", "db", id="i0", action="allow")),
    c.AddCARoot(CARoot("r1", "root", "pem"), b"sealed-1"),
]
"""Commands that fill a few tables, so that random ones meet something."""

QUERIES: list[tuple[str, dict[str, Any]]] = [
    ("catalog.nodes", {}),
    ("catalog.nodes", {"node_meta": {"rack": "r1"}}),
    ("catalog.services", {}),
    ("catalog.services", {"node_meta": {"rack": "r1"}}),
    *[(f"{family}.{kind}", {"service": name}) for name in (*SERVICES, "web-sidecar-proxy")
      for family, kind in (("catalog", "service"), ("catalog", "connect"), ("health", "service"),
                           ("health", "connect"), ("health", "checks"))],
    ("health.service", {"service": "web", "passing": True}),
    ("health.service", {"service": "web", "tags": ["V1"]}),
    *[(query, {"node": name}) for name in NODES
      for query in ("catalog.node", "catalog.node_rows", "health.node", "session.node")],
    *[("catalog.services_by_port", {"port": port}) for port in (80, 90)],
    *[("health.state", {"state": state}) for state in ("any", *STATUSES)],
    ("intentions.list", {}),
    *[("intentions.get", {"id": f"i{number}"}) for number in range(4)],
    *[("intentions.match", {"by": by, "name": name, "instance": instance}) for by in ("source", "destination")
      for name, instance in (("web", ""), ("web", "web-1"), ("db", "*"), ("*", ""))],
    ("intentions.exact", {"source": "web-1", "destination": "db"}),
    ("connect.roots", {}), ("connect.ca_config", {}), ("connect.revocations", {}),
    ("internal.ca_signing_material", {}),
    *[("kv.get", {"key": key}) for key in (*KEYS, "zz")],
    *[("kv.list", {"prefix": prefix}) for prefix in PREFIXES],
    *[("kv.keys", {"prefix": prefix, "separator": separator}) for prefix in PREFIXES for separator in ("", "/")],
    ("session.list", {}), *[("session.info", {"id": id}) for id in SESSIONS],
    *[("config.get", {"kind": kind, "name": "web"}) for kind in KINDS],
    *[("config.list", {"kind": kind}) for kind in (*KINDS, "")],
    *[("discovery.chain", {"service": service}) for service in SERVICES],
]  # fmt: skip

MAY_WAKE_UNCHANGED = {
    "intentions.exact",  # any intention
    "kv.keys",  # a value under the prefix
    "discovery.chain",  # a part of an entry that is no part of the plan
    "internal.ca_signing_material",  # another root
}


def may_wake_unchanged(name: str, params: dict[str, Any], command: c.Command) -> bool:
    """Whether a query's watch is documented to be wider than its answer: filters narrow the answer alone.

    A command of several steps may touch what it puts back itself.
    """
    if isinstance(command, c.Txn):
        return True
    if isinstance(command, c.CatalogRegister) and name in ("health.checks", "health.state"):
        return True
    filtered = ("node_meta", "tags", "passing")
    return name in MAY_WAKE_UNCHANGED or any(params.get(parameter) for parameter in filtered)


def naive(store: Store, name: str, params: dict[str, Any]) -> Any:
    """Answer a query by scanning all rows."""
    return _NAIVE[name](store, **params)


def _instances(store: Store, wanted: Callable[[ServiceInstance], bool]) -> list[ServiceInstance]:
    return sorted((row for row in store.services.rows.values() if wanted(row)), key=lambda row: (row.id, row.node))


def _sorted_checks(store: Store, wanted: Callable[[Check], bool]) -> list[Check]:
    return sorted(
        (row for row in store.checks.rows.values() if wanted(row)), key=lambda row: (row.node, row.check_id)
    )


def _of_node(node: str) -> Callable[[Check], bool]:
    return lambda check: check.node == node and not check.service_id


def _of_instance(row: ServiceInstance) -> Callable[[Check], bool]:
    return lambda check: (check.node, check.service_id) == (row.node, row.id)


def _healths(store: Store, rows: Iterable[ServiceInstance], passing: bool) -> list[InstanceHealth]:
    found = []
    for row in rows:
        bearing = [
            *_sorted_checks(store, _of_node(row.node)),
            *_sorted_checks(store, _of_instance(row)),
        ]
        if not passing or all(check.status == PASSING for check in bearing):
            found.append(InstanceHealth(store.nodes.rows[row.node], row, tuple(bearing)))
    return found


def _matching_nodes(store: Store, node_meta: dict[str, str] | None) -> list[Node]:
    wanted = (node_meta or {}).items()
    return sorted((row for row in store.nodes.rows.values() if wanted <= row.meta.items()), key=lambda row: row.node)


def _services(store: Store, node_meta: dict[str, str] | None = None) -> dict[str, list[str]]:
    names = {node.node for node in _matching_nodes(store, node_meta)}
    found: dict[str, set[str]] = {}
    for row in store.services.rows.values():
        if row.node in names:
            found.setdefault(row.service, set()).update(row.tags)
    return {name: sorted(tags) for name, tags in found.items()}


def _health_service(
    store: Store, service: str, tags: Iterable[str] = (), passing: bool = False
) -> list[InstanceHealth]:
    folded = {tag.lower() for tag in tags}
    rows = _instances(store, lambda row: row.service == service and folded <= {tag.lower() for tag in row.tags})
    return _healths(store, rows, passing)


def _flat(store: Store, rows: Iterable[ServiceInstance]) -> list[tuple[Any, ...]]:
    return [(row.node, row.id, row.service, row.port, store.nodes.rows[row.node].address) for row in rows]


def _node(store: Store, node: str) -> CatalogNode | None:
    row = store.nodes.rows.get(node)
    if row is None:
        return None
    return CatalogNode(row, {found.id: found for found in _instances(store, lambda found: found.node == node)})


def _node_rows(store: Store, node: str) -> list[Any]:
    found = _node(store, node)
    return [] if found is None else [found.node, *found.services.values()]


def _match(store: Store, by: str, name: str, instance: str) -> list[Intention]:
    found = []
    for row in store.intentions.rows.values():
        service, side = (
            (row.source_service, row.source_name)
            if by == "source"
            else (row.destination_service, row.destination_name)
        )
        at_instance = service == name and instance in ("*", side)
        if side == "*" or (not service and side == name) or at_instance:
            found.append(row)
    return sorted(found, key=lambda row: -row.precedence)


def _under(store: Store, prefix: str) -> list[Any]:
    return sorted((row for row in store.kv.rows.values() if row.key.startswith(prefix)), key=lambda row: row.key)


def _keys(store: Store, prefix: str, separator: str) -> list[str]:
    keys = [row.key for row in _under(store, prefix)]
    if not separator:
        return keys
    cut = set()
    for key in keys:
        head, found, _ = key[len(prefix) :].partition(separator)
        cut.add(prefix + head + found)
    return sorted(cut)


def _roots(store: Store) -> Any:
    config = store.ca_config.rows.get("")
    return {row.id for row in store.ca_roots.rows.values()}, config.trust_domain if config else ""


def _config(store: Store, kind: str, name: str | None = None) -> list[tuple[str, str]]:
    rows = store.config_entries.rows.values()
    return sorted((row.kind, row.name) for row in rows if kind in ("", row.kind) and name in (None, row.name))


def _chain(store: Store, service: str) -> Plan:
    rows = {(row.kind, row.name): row.entry for row in store.config_entries.rows.values()}
    dc = min((node.datacenter for node in store.nodes.rows.values()), default="dc1")
    try:
        return compile_plan(service, lambda kind, name: rows.get((kind, name)), dc)
    except BadEntry as error:
        return Plan(service, default=False, error=str(error))


_NAIVE: dict[str, Callable[..., Any]] = {
    "catalog.nodes": lambda store, node_meta=None: _matching_nodes(store, node_meta),
    "catalog.services": _services,
    "catalog.service": lambda store, service: _flat(store, _instances(store, lambda row: row.service == service)),
    "catalog.connect": lambda store, service: _flat(
        store, _instances(store, lambda row: destination_of(row) == service)
    ),
    "catalog.node": _node,
    "catalog.node_rows": _node_rows,
    "catalog.services_by_port": lambda store, port: _instances(
        store, lambda row: row.port == port and row.kind == ""
    ),
    "health.service": _health_service,
    "health.connect": lambda store, service: _healths(
        store, _instances(store, lambda row: destination_of(row) == service), False
    ),
    "health.node": lambda store, node: _sorted_checks(store, lambda row: row.node == node),
    "health.checks": lambda store, service: _sorted_checks(
        store, lambda row: row.service_id != "" and row.service_name == service
    ),
    "health.state": lambda store, state: _sorted_checks(store, lambda row: state in ("any", row.status)),
    "intentions.list": lambda store: sorted(store.intentions.rows.values(), key=lambda row: -row.precedence),
    "intentions.get": lambda store, id: next((r for r in store.intentions.rows.values() if r.id == id), None),
    "intentions.match": _match,
    "connect.roots": _roots,
    "connect.ca_config": lambda store: next(iter(store.ca_config.rows.values()), None),
    "connect.revocations": lambda store: sorted(
        store.revocations.rows.values(), key=lambda row: (row.kind, row.service, row.value)
    ),
    "kv.get": lambda store, key: next((row for row in store.kv.rows.values() if row.key == key), None),
    "kv.list": _under,
    "kv.keys": _keys,
    "session.list": lambda store: sorted(store.sessions.rows.values(), key=lambda row: row.id),
    "session.info": lambda store, id: [row for row in store.sessions.rows.values() if row.id == id],
    "session.node": lambda store, node: sorted(
        (row for row in store.sessions.rows.values() if row.node == node), key=lambda row: row.id
    ),
    "config.get": _config,
    "config.list": _config,
    "discovery.chain": _chain,
}


def shown(name: str, value: Any) -> Any:
    """Return a real answer in the form that `naive` gives: where order is left open, or only some fields count."""
    if name in ("catalog.service", "catalog.connect"):
        return [(row.node, row.service_id, row.service_name, row.service_port, row.address) for row in value]
    if name == "connect.roots":
        return {row.id for row in value.roots}, value.trust_domain
    if name == "config.get":
        return [] if value is None else [(value["Kind"], value["Name"])]
    if name == "config.list":
        return [(row["Kind"], row["Name"]) for row in value]
    return value


def same(name: str, real: Any, expected: Any) -> bool:
    """Compare; intentions by precedence, and among equals in any order."""
    if name in ("intentions.list", "intentions.match"):
        falling = [row.precedence for row in real] == [row.precedence for row in expected]
        return falling and sorted(real, key=_pair) == sorted(expected, key=_pair)
    return bool(real == expected)


def _pair(row: Intention) -> Any:
    return msgspec.structs.astuple(row)[:8]
