"""Between resources as dicts and protobuf messages. Needs the extra ``lictor[envoy]``.

Importing this module registers every message that may stand inside an ``Any``, by which the JSON form is parsed.
"""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any

import envoy.config.cluster.v3.cluster_pb2 as cluster_pb2
import envoy.config.core.v3.extension_pb2 as extension_pb2
import envoy.config.endpoint.v3.endpoint_pb2 as endpoint_pb2
import envoy.config.listener.v3.listener_components_pb2 as components_pb2
import envoy.config.listener.v3.listener_pb2 as listener_pb2
import envoy.config.route.v3.route_pb2 as route_pb2
import envoy.extensions.filters.http.rbac.v3.rbac_pb2
import envoy.extensions.filters.http.router.v3.router_pb2
import envoy.extensions.filters.listener.tls_inspector.v3.tls_inspector_pb2
import envoy.extensions.filters.network.http_connection_manager.v3.http_connection_manager_pb2
import envoy.extensions.filters.network.rbac.v3.rbac_pb2
import envoy.extensions.filters.network.tcp_proxy.v3.tcp_proxy_pb2
import envoy.extensions.transport_sockets.raw_buffer.v3.raw_buffer_pb2
import envoy.extensions.transport_sockets.tls.v3.secret_pb2 as secret_pb2
import envoy.extensions.transport_sockets.tls.v3.tls_pb2
import envoy.extensions.upstreams.http.v3.http_protocol_options_pb2  # noqa: F401 - registers it
import xds.type.v3.typed_struct_pb2  # noqa: F401 - registers it
from envoy.service.discovery.v3 import discovery_pb2
from google.protobuf import any_pb2, json_format

from node.xds import types

_MESSAGES = {
    types.CLUSTER: cluster_pb2.Cluster,
    types.ENDPOINTS: endpoint_pb2.ClusterLoadAssignment,
    types.LISTENER: listener_pb2.Listener,
    types.ROUTES: route_pb2.RouteConfiguration,
    types.SECRET: secret_pb2.Secret,
    types.EXTENSION: extension_pb2.TypedExtensionConfig,
}

DeltaRequest = discovery_pb2.DeltaDiscoveryRequest
DeltaResponse = discovery_pb2.DeltaDiscoveryResponse


class BadResource(Exception):
    """A resource that is no message of its type: a number that its field has no room for, say."""


CHAINS_KEPT = 512
"""Filter chains whose encoded form is remembered: of hundreds in a listener, a change touches a few."""


def encode(type_url: str, resource: dict[str, Any]) -> Any:
    """Return the resource as an ``Any``. Raises :class:`BadResource` naming the field that is wrong."""
    try:
        return _encoded(type_url, resource)
    except json_format.ParseError as error:
        raise BadResource(str(error)) from error


def _encoded(type_url: str, resource: dict[str, Any]) -> Any:
    chains = resource.get("filter_chains", ()) if type_url == types.LISTENER else ()
    if chains:
        resource = {name: value for name, value in resource.items() if name != "filter_chains"}
    message = json_format.ParseDict(resource, _MESSAGES[type_url]())
    for chain in chains:
        message.filter_chains.add().ParseFromString(_encoded_chain(json.dumps(chain, sort_keys=True)))
    return any_pb2.Any(type_url=type_url, value=message.SerializeToString(deterministic=True))


@lru_cache(CHAINS_KEPT)
def _encoded_chain(text: str) -> bytes:
    encoded: bytes = json_format.Parse(text, components_pb2.FilterChain()).SerializeToString(deterministic=True)
    return encoded


def delta_response(type_url: str, nonce: str, rows: list[tuple[str, str, Any]], removed: list[str]) -> Any:
    """Return a response with (name, version, encoded resource) rows."""
    resources = [discovery_pb2.Resource(name=name, version=version, resource=one) for name, version, one in rows]
    return DeltaResponse(type_url=type_url, nonce=nonce, resources=resources, removed_resources=removed)


def metadata_of(request: Any) -> dict[str, Any]:
    """Return the node's metadata as builtins."""
    found: dict[str, Any] = json_format.MessageToDict(request.node.metadata)
    return found
