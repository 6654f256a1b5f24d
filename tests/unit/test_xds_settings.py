"""Limits, ejection, timeouts and locality as Envoy's settings, read from entries as a Lictor sidecar reads them."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from node.agent.traffic import own_config, upstream_config
from node.xds import messages, types
from node.xds.resources import Resources, resources
from node.xds.settings import ClusterSettings
from raftstate.chain import check_entry, compile_plan
from raftstate.model.plan import ResolverNode
from raftstate.model.sidecar import Endpoint, SidecarUpstream
from tests.support.xds import make_snapshot, upstream

WAY = "upstream:web"


def made(*upstreams: SidecarUpstream, own: dict[str, Any] | None = None, protocol: str = "tcp") -> Resources:
    snapshot = make_snapshot(upstreams=upstreams, protocol=protocol)
    me = msgspec.structs.replace(snapshot.self, config=own or {}, zone="a")
    found = resources(msgspec.structs.replace(snapshot, self=me))
    for url, rows in found.items():
        for row in rows.values():
            messages.encode(url, row)  # it is what Envoy's messages can hold
    return found


def web(config: dict[str, Any], *endpoints: Endpoint) -> SidecarUpstream:
    return msgspec.structs.replace(upstream("web", "http"), config=config, endpoints=endpoints)


def at(node: str, zone: str, *, service: str = "web", healthy: bool = True) -> Endpoint:
    return Endpoint(node, "10.0.0.1", 20000, service, f"{service}-{node}", 1, zone, healthy)


def priorities(assignment: dict[str, Any]) -> list[list[str]]:
    """Return the nodes of each priority's instances."""
    rows = assignment["endpoints"]
    assert [row["priority"] for row in rows] == list(range(len(rows)))
    return [[one["metadata"]["filter_metadata"]["lictor"]["node"] for one in row["lb_endpoints"]] for row in rows]


def test_what_service_defaults_says_of_an_upstream_reaches_envoy() -> None:
    defaults = {
        "UpstreamConfig": {
            "Defaults": {"ConnectTimeoutMs": 900, "Limits": {"MaxConnections": 7, "MaxPendingRequests": 6}},
            "Overrides": [
                {
                    "Name": "web",
                    "Limits": {"MaxConnections": 3, "MaxConcurrentRequests": 0},
                    "PassiveHealthCheck": {"MaxFailures": 4},
                }
            ],
        }
    }
    config = upstream_config({}, "web", defaults)
    cluster = made(web(config))[types.CLUSTER][WAY]
    (threshold,) = cluster["circuit_breakers"]["thresholds"]
    assert (threshold["max_connections"], threshold["max_pending_requests"], threshold["max_requests"]) == (3, 6, 0)
    assert cluster["outlier_detection"]["consecutive_local_origin_failure"] == 4
    assert cluster["connect_timeout"] == "0.9s"


def test_a_passive_health_check_judges_answers_as_it_says() -> None:
    passive = {
        "MaxFailures": 3, "Interval": "7s", "EnforcingConsecutive5xx": 50, "MaxEjectionPercent": 20,
        "BaseEjectionTime": "9s",
    }  # fmt: skip
    config = upstream_config({}, "web", {"UpstreamConfig": {"Defaults": {"PassiveHealthCheck": passive}}})
    found = made(web(config))[types.CLUSTER][WAY]["outlier_detection"]
    assert (found["consecutive_5xx"], found["enforcing_consecutive_5xx"], found["interval"]) == (3, 50, "7s")
    assert (found["max_ejection_percent"], found["base_ejection_time"]) == (20, "9s")
    tcp = msgspec.structs.replace(web(config), protocol="tcp")
    assert made(tcp)[types.CLUSTER][WAY]["outlier_detection"]["enforcing_consecutive_5xx"] == 0
    assert made(web({}))[types.CLUSTER][WAY]["outlier_detection"]["enforcing_consecutive_5xx"] == 0


def test_what_is_not_said_is_not_bound() -> None:
    cluster = made(web({"limits": {"max_connections": -1, "max_pending_requests": True}}))[types.CLUSTER][WAY]
    (threshold,) = cluster["circuit_breakers"]["thresholds"]
    bounds = {threshold[f"max_{what}"] for what in ("connections", "pending_requests", "requests")}
    assert bounds == {1_000_000}, "Envoy's own bounds of 1,024 would fail calls"
    assert cluster["outlier_detection"]["consecutive_local_origin_failure"] == 1
    assert (cluster["connect_timeout"], cluster["lb_policy"]) == ("5s", "LEAST_REQUEST")


def test_the_apps_own_limits_are_those_of_its_cluster_and_route() -> None:
    defaults = {"MaxInboundConnections": 2, "LocalConnectTimeoutMs": 1500, "LocalRequestTimeoutMs": 2500}
    found = made(own=own_config({}, defaults, None), protocol="http")
    app = found[types.CLUSTER][types.LOCAL_APP]
    assert app["circuit_breakers"]["thresholds"][0]["max_connections"] == 2
    assert app["connect_timeout"] == "1.5s"
    assert "'timeout': '2.5s'" in str(found[types.LISTENER][types.PUBLIC_LISTENER])
    plain = made(protocol="http")
    assert plain[types.CLUSTER][types.LOCAL_APP]["circuit_breakers"]["thresholds"][0]["max_connections"] == 1_000_000
    assert "'timeout': '0s'" in str(plain[types.LISTENER][types.PUBLIC_LISTENER])


def test_what_the_registration_says_goes_before_the_plan() -> None:
    entry = check_entry(
        "service-resolver",
        "web",
        {"ConnectTimeout": "3s", "LoadBalancer": {"Policy": "maglev"}},
    )
    plan = compile_plan(
        "web", lambda kind, name: entry if (kind, name) == ("service-resolver", "web") else None, "dc1"
    )
    planned = msgspec.structs.replace(web({}), plan=plan)
    (name,) = [name for name in made(planned)[types.CLUSTER] if name.startswith(f"{WAY}|")]
    cluster = made(planned)[types.CLUSTER][name]
    assert (cluster["lb_policy"], cluster["connect_timeout"]) == ("MAGLEV", "3s")
    said = {"load_balancer": "round_robin", "connect_timeout_ms": 100, "slow_start_ms": 4000, "panic_threshold": 0.5}
    cluster = made(msgspec.structs.replace(planned, config=said))[types.CLUSTER][name]
    assert (cluster["lb_policy"], cluster["connect_timeout"]) == ("ROUND_ROBIN", "0.1s")
    assert cluster["round_robin_lb_config"] == {"slow_start_config": {"slow_start_window": "4s"}}
    assert cluster["common_lb_config"]["healthy_panic_threshold"]["value"] == 50


@pytest.mark.parametrize(
    ("locality", "expected"),
    [
        ("", [["n9", "n1", "n2"]]),
        ("zone", [["n1", "n2"], ["n9"]]),
        ("node", [["n1"], ["n2"], ["n9"]]),
    ],
)
def test_nearer_instances_have_a_higher_priority(locality: str, expected: list[list[str]]) -> None:
    endpoints = (at("n9", "b"), at("n1", "a"), at("n2", "a"))
    assignment = made(web({"locality": locality}, *endpoints))[types.ENDPOINTS][WAY]
    assert priorities(assignment) == expected
    assert assignment.get("policy", {}).get("overprovisioning_factor", 0) == (140 if locality else 0)


def test_where_nobody_is_near_no_priority_is_left_empty() -> None:
    assignment = made(web({"locality": "node"}, at("n8", "c"), at("n9", "b")))[types.ENDPOINTS][WAY]
    assert priorities(assignment) == [["n8", "n9"]]


def test_a_plans_locality_divides_each_target_and_other_targets_come_last() -> None:
    entry = check_entry("service-resolver", "web", {"Failover": {"*": {"Service": "backup"}}})
    plan = compile_plan(
        "web", lambda kind, name: entry if (kind, name) == ("service-resolver", "web") else None, "dc1"
    )
    (node,) = plan.nodes.values()
    assert isinstance(node, ResolverNode)
    near = msgspec.structs.replace(node, balancing=msgspec.structs.replace(node.balancing, locality="zone"))
    plan = msgspec.structs.replace(plan, nodes=dict.fromkeys(plan.nodes, near))
    first, second = near.target, near.failover[0]
    targets = {
        first: (at("n9", "b"), at("n2", "a")),
        second: (at("n8", "b", service="backup"), at("n3", "a", service="backup")),
    }
    found = made(msgspec.structs.replace(web({}), plan=plan, targets=targets))[types.ENDPOINTS]
    (assignment,) = found.values()
    assert priorities(assignment) == [["n2"], ["n9"], ["n3"], ["n8"]]
    assert assignment["policy"]["overprovisioning_factor"] > 10_000, "another target only when none is left"


def test_settings_need_no_plan() -> None:
    settings = ClusterSettings(web({}), make_snapshot().self)
    assert settings.nearest_first([[at("n1", "a")]]) == ([[at("n1", "a")]], 0)


@pytest.mark.parametrize(
    ("protocol", "offered"),
    [("tcp", None), ("http", ["http/1.1"]), ("http2", ["h2", "http/1.1"]), ("grpc", ["h2", "http/1.1"])],
)
def test_the_public_listener_agrees_on_what_the_app_speaks(protocol: str, offered: list[str] | None) -> None:
    listener = resources(make_snapshot(protocol=protocol))[types.LISTENER][types.PUBLIC_LISTENER]
    (chain,) = listener["filter_chains"]
    assert chain["transport_socket"]["typed_config"]["common_tls_context"].get("alpn_protocols") == offered
