"""Envoy's type URLs, the names of resources, and small pieces that many resources need. Pure."""

from __future__ import annotations

from typing import Any

Rule = dict[str, Any]

_PREFIX = "type.googleapis.com/"
CLUSTER = _PREFIX + "envoy.config.cluster.v3.Cluster"
ENDPOINTS = _PREFIX + "envoy.config.endpoint.v3.ClusterLoadAssignment"
LISTENER = _PREFIX + "envoy.config.listener.v3.Listener"
ROUTES = _PREFIX + "envoy.config.route.v3.RouteConfiguration"
SECRET = _PREFIX + "envoy.extensions.transport_sockets.tls.v3.Secret"
EXTENSION = _PREFIX + "envoy.config.core.v3.TypedExtensionConfig"

PUSH_ORDER = (CLUSTER, ENDPOINTS, SECRET, EXTENSION, LISTENER, ROUTES)
"""What is used before what uses it, so that nothing is missing for a moment."""
USERS = (LISTENER, ROUTES)
"""What uses the rest: that is taken away once these have changed."""

LEAF_SECRET, TRUST_SECRET, INBOUND_TRUST_SECRET = "leaf", "trust", "trust-inbound"
PUBLIC_LISTENER, LOCAL_APP = "public", "local_app"
REVOKED_RBAC, NETWORK_RBAC, HTTP_RBAC = "revoked", "intentions", "intentions-http"

NETWORK_RBAC_TYPE = _PREFIX + "envoy.extensions.filters.network.rbac.v3.RBAC"
HTTP_RBAC_TYPE = _PREFIX + "envoy.extensions.filters.http.rbac.v3.RBAC"

ADS: Rule = {"ads": {}, "resource_api_version": "V3"}


def typed(name: str, **fields: Any) -> Rule:
    """Return a message inside an Any; ``name`` is the message's full name."""
    return {"@type": _PREFIX + name, **fields}


def address(host: str, port: int) -> Rule:
    """Return an address and a TCP port."""
    return {"socket_address": {"address": host, "port_value": port}}


def is_http(protocol: str) -> bool:
    """Whether a protocol's requests can be told apart."""
    return protocol in ("http", "http2", "grpc")
