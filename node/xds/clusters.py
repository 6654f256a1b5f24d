"""Where Envoy connects to: the local app, the upstreams and their instances, and the certificates. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from node.xds import plan, rbac, types
from node.xds.settings import ClusterSettings, bounds, own_bounds, own_connect_timeout, seconds
from node.xds.snapshot import Snapshot
from node.xds.types import Rule, address, is_http, typed
from raftstate.model.caller_name import caller_name
from raftstate.model.plan import CONNECT_TIMEOUT_S
from raftstate.model.sidecar import Endpoint, SidecarUpstream


def cluster_name(upstream: SidecarUpstream) -> str:
    """Return the name of an upstream's listener and routes, and of its cluster when it has one."""
    return f"upstream:{upstream.name}"


def local_app(snapshot: Snapshot) -> Rule:
    """Return the cluster of the app behind the sidecar; without endpoints when it takes no calls."""
    own = snapshot.self
    cluster = _static(types.LOCAL_APP, own.local_address, own.local_port, http=True)
    return cluster | {"connect_timeout": own_connect_timeout(own), "circuit_breakers": own_bounds(own)}


def upstream_clusters(upstream: SidecarUpstream, snapshot: Snapshot) -> dict[str, Rule]:
    """Return an upstream's clusters: one, or with a plan one for each of its resolvers."""
    name = cluster_name(upstream)
    if upstream.loopback_port:
        http = is_http(upstream.protocol)
        return {name: _static(name, snapshot.self.local_address, upstream.loopback_port, http=http)}
    if upstream.plan is None:
        settings = ClusterSettings(upstream, snapshot.self)
        return {name: _cluster(name, [upstream.service or "nobody"], upstream, snapshot, settings)}
    found = {}
    for node_name, node in plan.resolvers(upstream.plan).items():
        one = plan.node_cluster(name, node_name)
        whom = plan.services(upstream.plan, node) or ["nobody"]
        found[one] = _cluster(one, whom, upstream, snapshot, ClusterSettings(upstream, snapshot.self, node))
    return found


def _cluster(
    name: str, services: list[str], upstream: SidecarUpstream, snapshot: Snapshot, settings: ClusterSettings
) -> Rule:
    """Return a cluster. Who answers at an instance must be of the instance's service."""
    cluster: Rule = {
        "name": name,
        "type": "EDS",
        "eds_cluster_config": {"eds_config": types.ADS},
        **settings.cluster(),
        "transport_socket": _tls_to(services[0], snapshot),
    }
    if len(services) > 1:
        cluster["transport_socket_matches"] = [
            {"name": one, "match": {"service": one}, "transport_socket": _tls_to(one, snapshot)} for one in services
        ]
    if is_http(upstream.protocol):
        cluster["typed_extension_protocol_options"] = _protocols()
    return cluster


def upstream_endpoints(upstream: SidecarUpstream, snapshot: Snapshot) -> dict[str, Rule]:
    """Return the instances of each of an upstream's clusters, as the agent knows them."""
    name = cluster_name(upstream)
    if upstream.loopback_port:
        return {}
    if upstream.plan is None:
        return {name: _assignment(name, [upstream.endpoints], snapshot, ClusterSettings(upstream, snapshot.self))}
    found = {}
    for node_name, node in plan.resolvers(upstream.plan).items():
        one = plan.node_cluster(name, node_name)
        groups = [upstream.targets.get(target, ()) for target in (node.target, *node.failover)]
        found[one] = _assignment(one, groups, snapshot, ClusterSettings(upstream, snapshot.self, node))
    return found


def _assignment(
    name: str, groups: Sequence[Sequence[Endpoint]], snapshot: Snapshot, settings: ClusterSettings
) -> Rule:
    """Return a cluster's instances in groups of falling priority, without those whose identity is revoked."""
    found: Rule = {"cluster_name": name}
    rows: list[Rule] = []
    parts, factor = settings.nearest_first(groups)
    for group in parts:
        live = [one for one in group if not rbac.is_revoked(one.service, one.service_id, snapshot.revocations)]
        if live:  # Envoy wants priorities without gaps
            rows.append({"priority": len(rows), "lb_endpoints": [_endpoint(one) for one in live]})
    if rows:
        found["endpoints"] = rows
    if factor:
        found["policy"] = {"overprovisioning_factor": factor}
    return found


def _endpoint(one: Endpoint) -> Rule:
    about = {"instance": one.service_id, "node": one.node}
    return {
        "endpoint": {"address": address(one.address, one.port)},
        "health_status": "HEALTHY" if one.healthy else "UNHEALTHY",
        "load_balancing_weight": max(one.weight, 1),
        "metadata": {
            "filter_metadata": {"lictor": about, "envoy.transport_socket_match": {"service": one.service}},
        },
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
        names = [{"exact": uri} for uri in access.sources] or [{"exact": f"spiffe://{own.trust_domain}/nobody"}]
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


def peer_of(service: str, snapshot: Snapshot) -> Rule:
    """Return the way to judge a peer that must be of a service."""
    uri = rbac.spiffe_uri(service, snapshot)
    return {
        "combined_validation_context": {
            "default_validation_context": {"match_typed_subject_alt_names": _uris([{"exact": uri}])},
            "validation_context_sds_secret_config": secret(types.TRUST_SECRET),
        }
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
