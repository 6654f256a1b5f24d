"""Envoy for :mod:`benchmarks.data_plane`: one worker thread, TLS 1.3, a certificate on both sides, RBAC, no xDS."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

from cli.envoy import find_binary
from tests.support.certs import TestCA

TYPE = "type.googleapis.com/envoy."


def start(directory: Path, name: str, config: dict[str, Any]) -> subprocess.Popen[bytes]:
    """Start an Envoy with a static configuration."""
    path = directory / f"{name}.json"
    path.write_text(json.dumps(config))
    command = [find_binary(""), "--config-path", str(path), "--concurrency", "1", "--use-dynamic-base-id"]
    return subprocess.Popen([*command, "--log-level", "error"])


def inbound(ca: TestCA, port: int, app_port: int, *, http: bool) -> dict[str, Any]:
    """Return the public listener before the app: only ``web`` may come; with ``http`` only GET below ``/``."""
    rules: dict[str, Any] = {
        "action": "ALLOW",
        "policies": {
            "web": {
                "permissions": [{"any": True}],
                "principals": [{"authenticated": {"principal_name": {"exact": _uri(ca, "web")}}}],
            }
        },
    }
    if http:
        method = {"header": {"name": ":method", "string_match": {"exact": "GET"}}}
        path = {"url_path": {"path": {"prefix": "/"}}}
        rules["policies"]["web"]["permissions"] = [{"and_rules": {"rules": [method, path]}}]
        filters = [_http("in", "app", [_filter("http.rbac", "filters.http.rbac.v3.RBAC", rules=rules)])]
    else:
        rbac = _filter("network.rbac", "filters.network.rbac.v3.RBAC", stat_prefix="in", rules=rules)
        filters = [rbac, _tcp("app")]
    context = {
        "@type": TYPE + "extensions.transport_sockets.tls.v3.DownstreamTlsContext",
        "common_tls_context": _tls(ca, "backend", f"spiffe://{ca.trust_domain}/"),
        "require_client_certificate": True,
        "disable_stateless_session_resumption": True,
        "disable_stateful_session_resumption": True,
    }
    chain = {"transport_socket": _socket(context), "filters": filters}
    return _bootstrap(port, chain, {"name": "app", **_to(app_port, "app")})


def outbound(ca: TestCA, port: int, peer_port: int, *, http: bool) -> dict[str, Any]:
    """Return the listener that the app of ``web`` calls to reach ``backend``."""
    context = {
        "@type": TYPE + "extensions.transport_sockets.tls.v3.UpstreamTlsContext",
        "common_tls_context": _tls(ca, "web", _uri(ca, "backend")),
        "max_session_keys": 0,
    }
    chain = {"filters": [_http("out", "peer", []) if http else _tcp("peer")]}
    return _bootstrap(port, chain, {"name": "peer", **_to(peer_port, "peer"), "transport_socket": _socket(context)})


def _uri(ca: TestCA, service: str) -> str:
    return f"spiffe://{ca.trust_domain}/ns/default/dc/dc1/svc/{service}"


def _tls(ca: TestCA, service: str, peer: str) -> dict[str, Any]:
    leaf = ca.leaf(service, f"{service}-1")
    return {
        "tls_params": {"tls_minimum_protocol_version": "TLSv1_3", "tls_maximum_protocol_version": "TLSv1_3"},
        "tls_certificates": [
            {
                "certificate_chain": {"inline_string": leaf.cert_pem},
                "private_key": {"inline_string": leaf.private_key_pem},
            }
        ],
        "validation_context": {
            "trusted_ca": {"inline_string": ca.root_pem},
            "match_typed_subject_alt_names": [{"san_type": "URI", "matcher": {"prefix": peer}}],
        },
    }


def _socket(context: dict[str, Any]) -> dict[str, Any]:
    return {"name": "envoy.transport_sockets.tls", "typed_config": context}


def _filter(name: str, message: str, **fields: Any) -> dict[str, Any]:
    return {"name": f"envoy.filters.{name}", "typed_config": {"@type": f"{TYPE}extensions.{message}", **fields}}


def _tcp(cluster: str) -> dict[str, Any]:
    return _filter("network.tcp_proxy", "filters.network.tcp_proxy.v3.TcpProxy", stat_prefix=cluster, cluster=cluster)


def _http(prefix: str, cluster: str, filters: list[dict[str, Any]]) -> dict[str, Any]:
    route = {"match": {"prefix": "/"}, "route": {"cluster": cluster, "timeout": "0s"}}
    return _filter(
        "network.http_connection_manager",
        "filters.network.http_connection_manager.v3.HttpConnectionManager",
        stat_prefix=prefix,
        generate_request_id=False,
        http_filters=[*filters, _filter("http.router", "filters.http.router.v3.Router")],
        route_config={"virtual_hosts": [{"name": "all", "domains": ["*"], "routes": [route]}]},
    )


def _address(port: int) -> dict[str, Any]:
    return {"socket_address": {"address": "127.0.0.1", "port_value": port}}


def _to(port: int, name: str) -> dict[str, Any]:
    bound = {"max_connections": 100_000, "max_pending_requests": 100_000, "max_requests": 100_000}
    return {
        "type": "STATIC",
        "connect_timeout": "5s",
        "circuit_breakers": {"thresholds": [bound]},
        "load_assignment": {
            "cluster_name": name,
            "endpoints": [{"lb_endpoints": [{"endpoint": {"address": _address(port)}}]}],
        },
    }


def _bootstrap(port: int, chain: dict[str, Any], cluster: dict[str, Any]) -> dict[str, Any]:
    listener = {"name": "listener", "address": _address(port), "filter_chains": [chain]}
    return {"static_resources": {"listeners": [listener], "clusters": [cluster]}}
