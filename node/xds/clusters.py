"""Where Envoy connects to: the local app, the upstreams and their instances, and the certificates. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote

from node.xds import leaving, plan, rbac, types
from node.xds.leaving import Checked, Gone, cluster_name
from node.xds.settings import ClusterSettings, bounds, own_bounds, own_connect_timeout, seconds
from node.xds.snapshot import Snapshot
from node.xds.types import Rule, address, is_http, typed
from raftstate.model.caller_name import caller_name
from raftstate.model.plan import CONNECT_TIMEOUT_S
from raftstate.model.sidecar import Endpoint, Key, SidecarUpstream, key_of

NOBODY = ""
"""In place of a service: no certificate will do."""
WEIGHT_MAX = 1_000_000
"""Envoy takes no instances whose weights add up to more than 32 bits."""
EJECTED_AFTER = 3
"""How many calls in a row that could not be made eject an instance whose calls end with that."""
CHECK_PAUSE_S = 0.5
"""Until a check that was answered is made again; the agent holds the answer to that one."""


def local_app(snapshot: Snapshot) -> Rule:
    """Return the cluster of the app behind the sidecar; without endpoints when it takes no calls."""
    own = snapshot.self
    cluster = _static(types.LOCAL_APP, own.local_address, own.local_port, http=True)
    return cluster | {"connect_timeout": own_connect_timeout(own), "circuit_breakers": own_bounds(own)}


def upstream_clusters(
    upstream: SidecarUpstream, snapshot: Snapshot, checked: Checked | None = None
) -> dict[str, Rule]:
    """Return an upstream's clusters: one, or with a plan one for each of its resolvers.

    ``checked``: how its instances' checks are made, None when they are not (see :mod:`node.xds.leaving`).
    """
    name = cluster_name(upstream)
    if upstream.loopback_port:
        http = is_http(upstream.protocol)
        return {name: _static(name, snapshot.self.local_address, upstream.loopback_port, http=http)}
    if upstream.plan is None:
        settings = ClusterSettings(upstream, snapshot.self)
        return {name: _cluster(name, [upstream.service or NOBODY], upstream, snapshot, settings, checked)}
    found = {}
    for node_name, node in plan.resolvers(upstream.plan).items():
        one = plan.node_cluster(name, node_name)
        whom = plan.services(upstream.plan, node) or [NOBODY]
        settings = ClusterSettings(upstream, snapshot.self, node)
        found[one] = _cluster(one, whom, upstream, snapshot, settings, checked)
    return found


def _cluster(
    name: str,
    services: list[str],
    upstream: SidecarUpstream,
    snapshot: Snapshot,
    settings: ClusterSettings,
    checked: Checked | None,
) -> Rule:
    """Return a cluster. Who answers at an instance must be of the instance's service."""
    cluster: Rule = {
        "name": name,
        "type": "EDS",
        "eds_cluster_config": {"eds_config": types.ADS},
        **settings.cluster(),
        "transport_socket": _tls_to(services[0], snapshot),
    }
    matches: list[Rule] = []
    if len(services) > 1:
        matches = [
            {"name": one, "match": {"service": one}, "transport_socket": _tls_to(one, snapshot)} for one in services
        ]
    if checked is not None:
        cluster |= _checks(checked, cluster["outlier_detection"])
        matches = [
            {"name": "check", "match": {"check": True}, "transport_socket": _PLAIN},
            {"name": "withdrawn", "match": {"withdrawn": True}, "transport_socket": _tls_to(NOBODY, snapshot)},
            *matches,
        ]
    if matches:
        cluster["transport_socket_matches"] = matches
    if is_http(upstream.protocol):
        cluster["typed_extension_protocol_options"] = _protocols()
    return cluster


def _checks(checked: Checked, ejection: Rule) -> Rule:
    """Return the fields by which the calls to an instance end when its check fails, and by nothing else."""
    failures = "consecutive_local_origin_failure"
    check = {
        "timeout": "86400s",  # the agent answers sooner
        "interval": seconds(CHECK_PAUSE_S),
        "no_traffic_interval": seconds(CHECK_PAUSE_S),
        "unhealthy_interval": "0.05s",
        # What is no answer does not count: the agent may be gone. An answer that is no 200 counts at once.
        "unhealthy_threshold": 2**32 - 1,
        "healthy_threshold": 1,
        "http_health_check": {"path": f"/{quote(checked.envoy, safe='')}"},
        "transport_socket_match_criteria": {"check": True},
    }
    return {
        "health_checks": [check],
        "close_connections_on_host_health_failure": True,
        # It ends the calls to an instance that is ejected, too: not for one or two that could not be made. A call is
        # tried often enough to come past an instance that is ejected then (listeners.ATTEMPTS).
        "outlier_detection": ejection | {failures: max(ejection[failures], EJECTED_AFTER)},
    }


def upstream_endpoints(
    upstream: SidecarUpstream,
    snapshot: Snapshot,
    checked: Checked | None = None,
    gone: Mapping[str, Mapping[Key, Gone]] = {},
) -> dict[str, Rule]:
    """Return the instances of each of an upstream's clusters, as the agent knows them.

    ``gone``: by cluster, those that are being withdrawn: they are there still, and nobody can be called there.
    """
    if upstream.loopback_port:
        return {}
    nodes = {} if upstream.plan is None else plan.resolvers(upstream.plan)
    by_cluster = {plan.node_cluster(cluster_name(upstream), one): node for one, node in nodes.items()}
    return {
        name: _assignment(
            name,
            rows,
            snapshot,
            ClusterSettings(upstream, snapshot.self, by_cluster.get(name)),
            checked,
            gone.get(name, {}),
        )
        for name, rows in leaving.groups(upstream).items()
    }


def _assignment(
    name: str,
    groups: Sequence[Sequence[Endpoint]],
    snapshot: Snapshot,
    settings: ClusterSettings,
    checked: Checked | None,
    gone: Mapping[Key, Gone],
) -> Rule:
    """Return a cluster's instances in groups of falling priority, without those whose identity is revoked."""
    found: Rule = {"cluster_name": name}
    rows: list[Rule] = []
    kept = [
        [
            one
            for one in group
            if key_of(one) not in gone and not rbac.is_revoked(one.service, one.service_id, snapshot.revocations)
        ]
        for group in groups
    ]
    for one in gone.values():
        kept[min(one.group, len(kept) - 1)].append(one.endpoint)
    parts, factor = settings.nearest_first(kept)
    for part in parts:
        if part:  # Envoy wants priorities without gaps
            endpoints = [_endpoint(one, name, checked, withdrawn=key_of(one) in gone) for one in part]
            rows.append({"priority": len(rows), "lb_endpoints": endpoints})
    if rows:
        found["endpoints"] = rows
    if factor:
        found["policy"] = {"overprovisioning_factor": factor}
    return found


def _endpoint(one: Endpoint, cluster: str, checked: Checked | None, *, withdrawn: bool) -> Rule:
    about = {"instance": one.service_id, "node": one.node}
    endpoint: Rule = {"address": address(one.address, one.port)}
    if checked is not None:
        endpoint["health_check_config"] = {
            "address": address(checked.address, checked.port),
            "hostname": leaving.label(cluster, key_of(one)),
        }
    matched: Rule = {"withdrawn": True} if withdrawn else {"service": one.service}
    return {
        "endpoint": endpoint,
        "health_status": "HEALTHY" if one.healthy and not withdrawn else "UNHEALTHY",
        "load_balancing_weight": min(max(one.weight, 1), WEIGHT_MAX),
        "metadata": {"filter_metadata": {"lictor": about, "envoy.transport_socket_match": matched}},
    }


def secrets(snapshot: Snapshot, access: rbac.Access, *, http: bool) -> dict[str, Rule]:
    """Return the leaf with its key, the bundle, and the bundle with the names that may come in.

    Plain TCP callers without any intention are refused in the handshake: Envoy's RBAC is asked at the first byte of
    the caller, and an app that speaks first would have told them something by then.
    """
    leaf, own = snapshot.leaf, snapshot.self
    bundle: Rule = {"trusted_ca": {"inline_string": "\n".join(snapshot.roots)}}
    names: list[Rule] = [{"prefix": f"spiffe://{own.trust_domain}/"}]
    if not http and access.sources is not None:
        # Nobody may come: a name that no certificate has, because an empty list would admit every name.
        names = [{"exact": uri} for uri in access.sources] or [{"exact": _nobody(snapshot)}]
    return {
        types.LEAF_SECRET: {
            "name": types.LEAF_SECRET,
            "tls_certificate": {
                "certificate_chain": {"inline_string": leaf.cert_pem},
                "private_key": {"inline_string": leaf.private_key_pem},
            },
        },
        types.TRUST_SECRET: {"name": types.TRUST_SECRET, "validation_context": bundle},
        types.INBOUND_TRUST_SECRET: {
            "name": types.INBOUND_TRUST_SECRET,
            "validation_context": {**bundle, "match_typed_subject_alt_names": _uris(names)},
        },
    }


def common_tls(validation: Rule) -> Rule:
    """Return what both directions have in common: TLS 1.3, our leaf, and a way to judge the peer."""
    return {
        "tls_params": {"tls_minimum_protocol_version": "TLSv1_3", "tls_maximum_protocol_version": "TLSv1_3"},
        "tls_certificate_sds_secret_configs": [secret(types.LEAF_SECRET)],
        **validation,
    }


def secret(name: str) -> Rule:
    """Return a reference to a secret on the same stream."""
    return {"name": name, "sds_config": types.ADS}


def _nobody(snapshot: Snapshot) -> str:
    """Return a name that no certificate has."""
    return f"spiffe://{snapshot.self.trust_domain}/nobody"


def peer_of(service: str, snapshot: Snapshot) -> Rule:
    """Return the way to judge a peer that must be of a service."""
    uri = rbac.spiffe_uri(service, snapshot) if service else _nobody(snapshot)
    return {
        "combined_validation_context": {
            "default_validation_context": {"match_typed_subject_alt_names": _uris([{"exact": uri}])},
            "validation_context_sds_secret_config": secret(types.TRUST_SECRET),
        }
    }


_PLAIN: Rule = {
    "name": "envoy.transport_sockets.raw_buffer",
    "typed_config": typed("envoy.extensions.transport_sockets.raw_buffer.v3.RawBuffer"),
}


def _tls_to(service: str, snapshot: Snapshot) -> Rule:
    own = snapshot.self
    context = typed(
        "envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext",
        common_tls_context=common_tls(peer_of(service, snapshot)),
        sni=caller_name(own.service, own.service_id),
        # As a client Envoy verifies a resumed session's certificate anew, and forgets sessions with the context that
        # they were made in. As a server it does not: see listeners.py, and docs/decisions/0025-*.
        max_session_keys=4,
    )
    return {"name": "envoy.transport_sockets.tls", "typed_config": context}


def _uris(matchers: list[Rule]) -> list[Rule]:
    return [{"san_type": "URI", "matcher": matcher} for matcher in matchers]


def _static(name: str, host: str, port: int, *, http: bool) -> Rule:
    assignment: Rule = {"cluster_name": name}
    if port:
        assignment["endpoints"] = [{"lb_endpoints": [{"endpoint": {"address": address(host, port)}}]}]
    cluster: Rule = {
        "name": name,
        "type": "STATIC",
        "connect_timeout": seconds(CONNECT_TIMEOUT_S),
        "load_assignment": assignment,
        "circuit_breakers": bounds(),
    }
    if http:
        cluster["typed_extension_protocol_options"] = _protocols()
    return cluster


def _protocols() -> dict[str, Any]:
    """HTTP/1.1 goes on as HTTP/1.1, HTTP/2 as HTTP/2."""
    options = typed(
        "envoy.extensions.upstreams.http.v3.HttpProtocolOptions",
        use_downstream_protocol_config={"http_protocol_options": {}, "http2_protocol_options": {}},
    )
    return {"envoy.extensions.upstreams.http.v3.HttpProtocolOptions": options}
