"""What Consul knows and nothing here acts on is refused by its name; what asks for nothing is taken."""

from __future__ import annotations

from typing import Any

import pytest

from raftstate.chain import BadEntry, check_entry, check_served

DEFAULTS, GLOBAL, RESOLVER, ROUTER = "service-defaults", "proxy-defaults", "service-resolver", "service-router"
SPLITTER = "service-splitter"


def served(kind: str, entry: dict[str, Any]) -> None:
    check_served(kind, "web", check_entry(kind, "web", entry))


@pytest.mark.parametrize(
    ("kind", "entry", "field"),
    [
        (DEFAULTS, {"Mode": "transparent"}, "Mode"),
        (DEFAULTS, {"mutual_tls_mode": "permissive"}, "MutualTLSMode"),
        (DEFAULTS, {"TransparentProxy": {"DialedDirectly": True}}, "TransparentProxy"),
        (DEFAULTS, {"MeshGateway": {"Mode": "local"}}, "MeshGateway"),
        (DEFAULTS, {"Expose": {"Paths": [{"Path": "/health", "ListenerPort": 21500}]}}, "Expose"),
        (DEFAULTS, {"expose": {"checks": True}}, "Expose"),
        (DEFAULTS, {"EnvoyExtensions": [{"Name": "builtin/lua"}]}, "EnvoyExtensions"),
        (DEFAULTS, {"BalanceInboundConnections": "exact_balance"}, "BalanceInboundConnections"),
        (DEFAULTS, {"ExternalSNI": "x.example"}, "ExternalSNI"),
        (DEFAULTS, {"Destination": {"Addresses": ["x.example"], "Port": 443}}, "Destination"),
        (DEFAULTS, {"RateLimits": {"InstanceLevel": {"RequestsPerSecond": 5}}}, "RateLimits"),
        (
            DEFAULTS, {"UpstreamConfig": {"Defaults": {"MeshGateway": {"Mode": "remote"}}}},
            "UpstreamConfig.Defaults.MeshGateway",
        ),
        (DEFAULTS, {"UpstreamConfig": {"Defaults": {"Name": "db"}}}, "UpstreamConfig.Defaults.Name"),
        (
            DEFAULTS,
            {"UpstreamConfig": {"Overrides": [{"Name": "db", "BalanceOutboundConnections": "exact_balance"}]}},
            "UpstreamConfig.Overrides[0].BalanceOutboundConnections",
        ),
        (GLOBAL, {"AccessLogs": {"Enabled": True}}, "AccessLogs"),
        (GLOBAL, {"FailoverPolicy": {"Mode": "order-by-locality"}}, "FailoverPolicy"),
        (GLOBAL, {"PrioritizeByLocality": {"Mode": "failover"}}, "PrioritizeByLocality"),
        (GLOBAL, {"Config": {"envoy_prometheus_bind_addr": "0.0.0.0:9102"}}, "Config['envoy_prometheus_bind_addr']"),
        (GLOBAL, {"Config": {"local_request_timeout_ms": "5s"}}, "Config['local_request_timeout_ms']"),
        (GLOBAL, {"Config": {"max_inbound_connections": -1}}, "Config['max_inbound_connections']"),
        (RESOLVER, {"PrioritizeByLocality": {"Mode": "always"}}, "PrioritizeByLocality"),
        (
            RESOLVER, {"Failover": {"*": {"Service": "b", "Policy": {"Mode": "order-by-locality"}}}},
            "Failover['*'].Policy",
        ),
        (ROUTER, {"Routes": [{}, {"Destination": {"RetryOn": ["5xx", "envoy-ratelimited"]}}]},
         "Routes[1].Destination.RetryOn[1]"),
        (ROUTER, {"Routes": [{"Destination": {"RequestHeaders": {"Set": {"x-ip": "%DOWNSTREAM_REMOTE_ADDRESS%"}}}}]},
         "Routes[0].Destination.RequestHeaders.Set['x-ip']"),
        (SPLITTER, {"Splits": [{"Weight": 100, "ResponseHeaders": {"Add": {"x": "a %REQ(x-id):8% b"}}}]},
         "Splits[0].ResponseHeaders.Add['x']"),
    ],
)  # fmt: skip
def test_what_nothing_acts_on_is_refused_by_its_field(kind: str, entry: dict[str, Any], field: str) -> None:
    with pytest.raises(BadEntry) as error:
        served(kind, entry)
    assert error.value.field == field, str(error.value)
    assert f"{kind} 'web': {field}: " in str(error.value)


NOTHING = {"MeshGateway": {}, "TransparentProxy": {}, "Expose": {"Checks": False, "Paths": None}, "Mode": ""}


@pytest.mark.parametrize(
    ("kind", "entry"),
    [
        (DEFAULTS, {**NOTHING, "Protocol": "http", "Destination": None, "RateLimits": None, "EnvoyExtensions": []}),
        (DEFAULTS, {"Mode": "direct", "MutualTLSMode": "strict", "MeshGateway": {"Mode": "none"}}),
        (DEFAULTS, {"UpstreamConfig": {"Defaults": {"MeshGateway": {}, "Limits": None}, "Overrides": None}}),
        (GLOBAL, {**NOTHING, "AccessLogs": {"Enabled": False, "Type": ""}, "FailoverPolicy": None, "Config": None}),
        (GLOBAL, {"Config": {"protocol": "http", "local_connect_timeout_ms": 500, "envoy_tracing_json": ""}}),
        (RESOLVER, {"PrioritizeByLocality": {"Mode": "failover"}, "Failover": None, "Redirect": None}),
        (RESOLVER, {"Failover": {"*": {"Service": "b", "Policy": {"Mode": "sequential", "Regions": None}}}}),
        (ROUTER, {"Routes": [{"Match": None, "Destination": None}, {"Destination": {"RetryOn": ["5xx"]}}]}),
        ("service-splitter", {"Splits": [{"Weight": 100}]}),
    ],
)
def test_what_asks_for_nothing_is_taken(kind: str, entry: dict[str, Any]) -> None:
    served(kind, entry)
