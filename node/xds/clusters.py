"""Where Envoy connects to: the local app, the upstreams and their instances, and the certificates. Pure."""

from __future__ import annotations

from typing import Any

from node.xds import rbac, types
from node.xds.snapshot import Snapshot
from node.xds.types import Rule, address, is_http, typed
from raftstate.model.sidecar import SidecarUpstream

CONNECT_TIMEOUT = "5s"
BOUND = 1_000_000
"""Envoy's own bounds (1,024 connections and requests) would fail calls that a Lictor sidecar carries."""


def cluster_name(upstream: SidecarUpstream) -> str:
    """Return the name of an upstream's cluster, listener and routes."""
    return f"upstream:{upstream.name}"


def local_app(snapshot: Snapshot) -> Rule:
    """Return the cluster of the app behind the sidecar; without endpoints when it takes no calls."""
    own = snapshot.self
    return _static(types.LOCAL_APP, own.local_address, own.local_port, http=True)


def upstream_cluster(upstream: SidecarUpstream, snapshot: Snapshot) -> Rule:
    """Return an upstream's cluster. Who answers must be of the upstream's service."""
    name = cluster_name(upstream)
    if upstream.loopback_port:
        return _static(name, snapshot.self.local_address, upstream.loopback_port, http=is_http(upstream.protocol))
    cluster: Rule = {
        "name": name,
        "type": "EDS",
        "connect_timeout": CONNECT_TIMEOUT,
        "eds_cluster_config": {"eds_config": types.ADS},
        "lb_policy": "LEAST_REQUEST",
        # As Lictor's balancer: health is ignored only when no instance is healthy.
        "common_lb_config": {"healthy_panic_threshold": {"value": 0}},
        "ignore_health_on_host_removal": True,
        "close_connections_on_host_health_failure": True,
        "circuit_breakers": _bounds(),
        "outlier_detection": {
            "split_external_local_origin_errors": True,
            "consecutive_local_origin_failure": 1,
            "enforcing_consecutive_local_origin_failure": 100,
            "enforcing_local_origin_success_rate": 0,
            "enforcing_consecutive_5xx": 0,
            "enforcing_consecutive_gateway_failure": 0,
            "enforcing_success_rate": 0,
            "base_ejection_time": "1s",
            "max_ejection_time": "30s",
            "interval": "1s",
            "max_ejection_percent": 100,
        },
        "transport_socket": _tls_to(upstream, snapshot),
    }
    if is_http(upstream.protocol):
        cluster["typed_extension_protocol_options"] = _protocols()
    return cluster


def endpoints(upstream: SidecarUpstream, snapshot: Snapshot) -> Rule:
    """Return the upstream's instances as the agent knows them, without those whose identity is revoked."""
    rows = [
        {
            "endpoint": {"address": address(one.address, one.port)},
            "health_status": "HEALTHY" if one.healthy else "UNHEALTHY",
            "load_balancing_weight": max(one.weight, 1),
            "metadata": {"filter_metadata": {"lictor": {"instance": one.service_id, "node": one.node}}},
        }
        for one in upstream.endpoints
        if not rbac.is_revoked(one.service, one.service_id, snapshot.revocations)
    ]
    found: Rule = {"cluster_name": cluster_name(upstream)}
    if rows:
        found["endpoints"] = [{"lb_endpoints": rows}]
    return found


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


def _tls_to(upstream: SidecarUpstream, snapshot: Snapshot) -> Rule:
    uri = rbac.spiffe_uri(upstream.service or "nobody", snapshot)
    context = typed(
        "envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext",
        common_tls_context=common_tls(
            {
                "combined_validation_context": {
                    "default_validation_context": {"match_typed_subject_alt_names": _uris([{"exact": uri}])},
                    "validation_context_sds_secret_config": secret(types.TRUST_SECRET),
                }
            }
        ),
        # A resumed session would skip the certificate check, and so outlive a revocation or a rotation.
        max_session_keys=0,
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
        "connect_timeout": CONNECT_TIMEOUT,
        "load_assignment": assignment,
        "circuit_breakers": _bounds(),
    }
    if http:
        cluster["typed_extension_protocol_options"] = _protocols()
    return cluster


def _bounds() -> Rule:
    bound = {"max_connections": BOUND, "max_pending_requests": BOUND, "max_requests": BOUND, "max_retries": 100}
    return {"thresholds": [{"priority": "DEFAULT", **bound}]}


def _protocols() -> dict[str, Any]:
    """HTTP/1.1 goes on as HTTP/1.1, HTTP/2 as HTTP/2."""
    options = typed(
        "envoy.extensions.upstreams.http.v3.HttpProtocolOptions",
        use_downstream_protocol_config={"http_protocol_options": {}, "http2_protocol_options": {}},
    )
    return {"envoy.extensions.upstreams.http.v3.HttpProtocolOptions": options}
