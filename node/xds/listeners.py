"""Where Envoy listens: the public listener before the app, and the upstreams' on loopback. Pure."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence

from node.xds import rbac, types
from node.xds.callers import Chain
from node.xds.clusters import common_tls, peer_of, secret
from node.xds.leaving import cluster_name
from node.xds.plan import DEFAULT_RETRY, http_routes, tcp_way
from node.xds.settings import own_request_timeout
from node.xds.snapshot import Snapshot
from node.xds.types import Rule, address, is_http, typed
from raftstate.model.caller_name import caller_name, service_domain
from raftstate.model.sidecar import SidecarUpstream

HTTP2_PROTOCOLS = frozenset({"http2", "grpc"})
SHARED_FOR = "5s"
"""How long callers that are not told apart keep a connection for their next request."""
LINGER = "0.1s"
"""How long Envoy waits for the other side to close a connection whose answer was cut; its default is 1 s."""
ATTEMPTS = 5
"""How often a TCP call is tried, each time with the instance that is due."""
HEAD_WITHIN = "10s"
"""How long a caller may take over a request's head: what is half said would be kept for ever."""
WEBSOCKET = [{"upgrade_type": "websocket"}]


def public_listener(snapshot: Snapshot, access: rbac.Access, chains: Sequence[Chain], *, http: bool) -> Rule:
    """Return the listener that other sidecars call, with a filter chain for each caller that is told apart."""
    own = snapshot.self
    host = own.config.get("bind_address")
    return {
        "name": types.PUBLIC_LISTENER,
        "address": address(host if isinstance(host, str) and host else own.public_address, own.public_port),
        "traffic_direction": "INBOUND",
        "listener_filters": [_tls_inspector()],
        "filter_chains": [_chain(one, snapshot, access, http=http) for one in chains],
    }


def _chain(chain: Chain, snapshot: Snapshot, access: rbac.Access, *, http: bool) -> Rule:
    """Return a caller's filter chain: found by the server name it gives, and closed to every other's certificate."""
    service, instance = chain.caller
    filters = [_peer_state(), _discovered(_of(types.REVOKED_RBAC, service), types.NETWORK_RBAC_TYPE)]
    if service:
        validation = peer_of(service, snapshot)
        names = [caller_name(service, instance) if instance else f"*.{service_domain(service)}"]
        match: Rule = {"filter_chain_match": {"server_names": names}}
    else:
        validation = {"validation_context_sds_secret_config": secret(types.INBOUND_TRUST_SECRET)}
        match = {}
    if instance:
        filters.append(_only(service, instance))
    if http:
        filters.append(_inbound_http(snapshot, access, service, shared=not instance))
    else:
        filters += [
            _discovered(_of(types.NETWORK_RBAC, service), types.NETWORK_RBAC_TYPE),
            _tcp_proxy(types.LOCAL_APP, _stats(instance)),
        ]
    context = common_tls(validation)
    if http:
        # gRPC clients insist on the answer; to an app that speaks HTTP/1.1 alone, HTTP/2 is not offered.
        http2 = snapshot.self.protocol in HTTP2_PROTOCOLS
        context["alpn_protocols"] = ["h2", "http/1.1"] if http2 else ["http/1.1"]
    tls = typed(
        "envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext",
        common_tls_context=context,
        require_client_certificate=True,
        disable_stateless_session_resumption=True,
        disable_stateful_session_resumption=True,
    )
    who = ":".join(part for part in chain.caller if part) or "everyone else"
    return {
        "name": f"{who} #{chain.generation}",
        **match,
        "transport_socket": {"name": "envoy.transport_sockets.tls", "typed_config": tls},
        "transport_socket_connect_timeout": "10s",
        "filters": filters,
    }


def _stats(told_apart: object) -> str:
    """Return under which name connections are counted: those that share a chain with other callers' by themselves."""
    return "inbound" if told_apart else "inbound_shared"


def _only(service: str, instance: str) -> Rule:
    """Return the filter that keeps others of the service out of an instance's chain: they would outlive in there
    what withdraws them."""
    policy = {"permissions": [{"any": True}], "principals": [rbac.instance_is(service, instance)]}
    config = typed(
        "envoy.extensions.filters.network.rbac.v3.RBAC",
        stat_prefix="caller",
        rules={"action": "ALLOW", "policies": {"caller": policy}},
    )
    return {"name": "caller", "typed_config": config}


def _tls_inspector() -> Rule:
    """Return the filter that reads the server name before a chain is chosen."""
    return {
        "name": "envoy.filters.listener.tls_inspector",
        "typed_config": typed("envoy.extensions.filters.listener.tls_inspector.v3.TlsInspector"),
    }


def upstream_listener(upstream: SidecarUpstream, generation: int = 0) -> Rule:
    """Return the listener that the app calls to reach an upstream.

    ``generation`` grows when an instance was revoked to which calls may be under way: Envoy ends no connection
    because of where it leads, so all that go through the filter chain of before are ended.
    """
    name = cluster_name(upstream)
    if is_http(upstream.protocol):
        http = _http(name, {"rds": {"config_source": types.ADS, "route_config_name": name}}, [])
    else:
        way = None if upstream.plan is None or upstream.loopback_port else tcp_way(upstream.plan, name)
        http = _tcp_proxy(name, name, way)
    return {
        "name": name,
        "address": address(upstream.bind_address or "127.0.0.1", upstream.bind_port),
        "traffic_direction": "OUTBOUND",
        "filter_chains": [{"name": f"calls #{generation}", "filters": [http]}],
    }


def upstream_routes(upstream: SidecarUpstream) -> Rule:
    """Return the routes of an HTTP upstream."""
    name = cluster_name(upstream)
    if upstream.plan is None or upstream.loopback_port:
        return _route_table(name, name, {"retry_policy": DEFAULT_RETRY})
    return _routes(name, http_routes(upstream.plan, name))


def rbac_filters(snapshot: Snapshot, access: rbac.Access, services: Iterable[str]) -> dict[str, Rule]:
    """Return the RBAC filters' configurations: a change of one disturbs no connection.

    One of each for the chains of each of these services (empty: for everyone else's), with what concerns its callers
    alone: Envoy builds one for every chain, and hundreds of chains with hundreds of policies each would take it long.
    """
    network, http = types.NETWORK_RBAC_TYPE, types.HTTP_RBAC_TYPE
    found: dict[str, Rule] = {}
    for service in services:
        policies = rbac.policies_for(service, access.decisions, snapshot) if service else access.policies
        allow = {"action": "ALLOW", "policies": policies}
        deny = {"action": "DENY", "policies": rbac.revoked(snapshot, service)}
        found[_of(types.REVOKED_RBAC, service)] = {"@type": network, "stat_prefix": "revoked", "rules": deny}
        found[_of(_http_rbac(access), service)] = {"@type": http, "rules": allow}
        if not access.http:
            config = {"@type": network, "stat_prefix": "intentions", "rules": allow}
            found[_of(types.NETWORK_RBAC, service)] = config
    return {name: {"name": name, "typed_config": config} for name, config in found.items()}


def _of(name: str, service: str) -> str:
    return f"{name}:{service}" if service else name


def _http_rbac(access: rbac.Access) -> str:
    """Return the filter's name: policies on headers never reach a listener that lets ``_`` pass for ``-``."""
    return f"{types.HTTP_RBAC}-headers" if access.headers else types.HTTP_RBAC


def _peer_state() -> Rule:
    """Return the filter that puts the peer's subject and serial number where RBAC can see them."""
    values = [
        {
            "object_key": key,
            "factory_key": "envoy.string",
            "format_string": {"text_format_source": {"inline_string": text}, "omit_empty_values": True},
        }
        for key, text in (
            (rbac.SUBJECT_KEY, "%DOWNSTREAM_PEER_SUBJECT%"),
            (rbac.SERIAL_KEY, "%DOWNSTREAM_PEER_SERIAL%"),
        )
    ]
    # As a TypedStruct: the messages that Python has are older than the field.
    config = typed(
        "xds.type.v3.TypedStruct",
        type_url="type.googleapis.com/envoy.extensions.filters.network.set_filter_state.v3.Config",
        value={"on_downstream_tls_handshake": values},
    )
    return {"name": "peer", "typed_config": config}


def _discovered(name: str, type_url: str) -> Rule:
    return {"name": name, "config_discovery": {"config_source": types.ADS, "type_urls": [type_url]}}


def _tcp_proxy(cluster: str, prefix: str, way: Rule | None = None) -> Rule:
    config = typed(
        "envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy",
        stat_prefix=prefix,
        idle_timeout="0s",
        **({} if cluster == types.LOCAL_APP else _again()),
        **(way or {"cluster": cluster}),
    )
    return {"name": "envoy.filters.network.tcp_proxy", "typed_config": config}


def _again() -> Rule:
    """Return how often a call is tried: with pauses, in which an instance that cannot be reached is ejected."""
    pauses = {"base_interval": "0.02s", "max_interval": "0.25s"}
    return {"max_connect_attempts": ATTEMPTS, "backoff_options": pauses}


def _inbound_http(snapshot: Snapshot, access: rbac.Access, service: str, *, shared: bool) -> Rule:
    """Return the connection manager before the app. ``shared``: of a chain that may hold several instances' calls.

    Those leave it when they can, with no request cut: an instance that has been told apart since has a chain of its
    own, in which nothing ends that is withdrawn from others.
    """
    timeout = {"timeout": own_request_timeout(snapshot.self)}
    routes = {"route_config": _route_table("inbound", types.LOCAL_APP, timeout)}
    denial = json.dumps({"error": f"destination {snapshot.self.service!r} denies this request"}) + "\n"
    more: Rule = {
        # Always, because a policy that looks at paths reaches the listener that is there before its successor comes.
        # Escaped slashes are left to the policies, which never allow them.
        "normalize_path": True,
        "merge_slashes": True,
        "request_headers_timeout": HEAD_WITHIN,
        "forward_client_cert_details": "SANITIZE_SET",
        "set_current_client_cert_details": {"uri": True},
        "local_reply_config": {
            "mappers": [
                {
                    "filter": {
                        "status_code_filter": {
                            "comparison": {
                                "op": "EQ",
                                "value": {"default_value": 403, "runtime_key": "lictor.denied"},
                            }
                        }
                    },
                    "body_format_override": {
                        "text_format_source": {"inline_string": denial.replace("%", "%%")},
                        "content_type": "application/json",
                    },
                }
            ]
        },
    }
    options: Rule = {}
    if access.headers:
        options["headers_with_underscores_action"] = "REJECT_REQUEST"
    if shared:
        options["max_connection_duration"] = SHARED_FOR
        more["http1_safe_max_connection_duration"] = True
    if options:
        more["common_http_protocol_options"] = options
    return _http(
        _stats(not shared), routes, [_discovered(_of(_http_rbac(access), service), types.HTTP_RBAC_TYPE)], more
    )


def _http(prefix: str, routes: Rule, filters: list[Rule], more: Rule | None = None) -> Rule:
    router = {
        "name": "envoy.filters.http.router",
        "typed_config": typed("envoy.extensions.filters.http.router.v3.Router", suppress_envoy_headers=True),
    }
    config = typed(
        "envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
        stat_prefix=prefix,
        codec_type="AUTO",
        stream_idle_timeout="0s",
        delayed_close_timeout=LINGER,
        skip_xff_append=True,
        server_header_transformation="PASS_THROUGH",
        generate_request_id=False,
        upgrade_configs=WEBSOCKET,
        http_filters=[*filters, router],
        **routes,
        **(more or {}),
    )
    return {"name": "envoy.filters.network.http_connection_manager", "typed_config": config}


def _route_table(name: str, cluster: str, more: Rule) -> Rule:
    return _routes(name, [{"match": {"prefix": "/"}, "route": {"cluster": cluster, "timeout": "0s", **more}}])


def _routes(name: str, routes: list[Rule]) -> Rule:
    return {"name": name, "virtual_hosts": [{"name": name, "domains": ["*"], "routes": routes}]}
