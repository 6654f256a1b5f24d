"""A compiled plan as Envoy's clusters, instances and routes."""

from __future__ import annotations

from typing import Any

import msgspec

from node.xds import messages, types
from node.xds.resources import Resources, resources
from raftstate.chain import check_entry, compile_plan
from raftstate.model.connect import Revocation
from raftstate.model.sidecar import Endpoint
from tests.support.xds import make_snapshot, upstream

DEFAULTS, ROUTER, SPLITTER, RESOLVER = "service-defaults", "service-router", "service-splitter", "service-resolver"
WAY = "upstream:web"


def compiled(protocol: str, entries: dict[tuple[str, str], dict[str, Any]], **more: Any) -> Resources:
    checked = {key: check_entry(*key, entry) for key, entry in entries.items()}
    plan = compile_plan("web", lambda kind, name: checked.get((kind, name)), "dc1")
    targets = {
        one.id: (Endpoint("n", "10.0.0.1", 20000 + i, one.service, f"{one.service}-1"),)
        for i, one in enumerate(plan.targets.values())
    }
    with_plan = msgspec.structs.replace(upstream("web", protocol), plan=plan, targets=targets)
    found = resources(make_snapshot(upstreams=(with_plan,), **more))
    for url, rows in found.items():
        for row in rows.values():
            messages.encode(url, row)
    return found


def http_defaults(*services: str) -> dict[tuple[str, str], dict[str, Any]]:
    return {(DEFAULTS, service): {"Protocol": "http"} for service in services}


def test_a_router_leads_by_request_and_a_splitter_by_weight() -> None:
    found = compiled(
        "http",
        {
            **http_defaults("web", "admin"),
            (ROUTER, "web"): {
                "Routes": [
                    {
                        "Match": {"HTTP": {"PathPrefix": "/admin", "Methods": ["get"]}},
                        "Destination": {
                            "Service": "admin", "PrefixRewrite": "/", "RequestTimeout": "1500ms", "NumRetries": 3,
                            "RetryOnStatusCodes": [503], "RequestHeaders": {"Set": {"x-via": "100%"}},
                        },
                    },
                    {
                        "Match": {"HTTP": {"Header": [{"Name": "x-canary", "Exact": "1", "Invert": True}]}},
                        "Destination": {"ServiceSubset": "v1"},
                    },
                ]
            },
            (SPLITTER, "web"): {
                "Splits": [{"Weight": 90.5, "ServiceSubset": "v1"}, {"Weight": 9.5, "ServiceSubset": "v2"}]
            },
            (RESOLVER, "web"): {
                "ConnectTimeout": "3s",
                "Subsets": {"v1": {"Filter": "Service.Meta.v == 1"}, "v2": {"Filter": "Service.Meta.v == 2"}},
                "LoadBalancer": {
                    "Policy": "ring_hash", "HashPolicies": [{"Field": "header", "FieldValue": "x-user"}],
                },
            },
        },
    )  # fmt: skip
    admin, canary, rest = found[types.ROUTES][WAY]["virtual_hosts"][0]["routes"]
    assert admin["match"]["prefix"] == "/admin"
    assert admin["match"]["headers"] == [{"name": ":method", "string_match": {"safe_regex": {"regex": "GET"}}}]
    assert admin["route"]["cluster"] == f"{WAY}|admin.default.default.dc1"
    assert admin["route"]["prefix_rewrite"] == "/"
    assert admin["route"]["timeout"] == "1.5s"
    assert admin["route"]["retry_policy"] == {
        "retry_on": "retriable-status-codes",
        "num_retries": 3,
        "retriable_status_codes": [503],
    }
    assert admin["request_headers_to_add"][0]["header"] == {"key": "x-via", "value": "100%%"}
    assert canary["match"]["headers"][0]["invert_match"] is True
    shares = rest["route"]["weighted_clusters"]["clusters"]
    assert [share["weight"] for share in shares] == [9050, 950]
    assert rest["route"]["hash_policy"] == [{"header": {"header_name": "x-user"}, "terminal": False}]
    for share in shares:
        cluster = found[types.CLUSTER][share["name"]]
        assert (cluster["lb_policy"], cluster["connect_timeout"]) == ("RING_HASH", "3s")
        assert found[types.ENDPOINTS][share["name"]]["endpoints"]


def test_those_that_take_over_have_lower_priority_and_an_identity_of_their_own() -> None:
    entries = {(RESOLVER, "web"): {"Failover": {"*": {"Service": "backup"}}}}
    found = compiled("tcp", entries)
    (name,) = found[types.ENDPOINTS]
    first, second = found[types.ENDPOINTS][name]["endpoints"]
    assert (first["priority"], second["priority"]) == (0, 1)
    sockets = {one["name"]: one["transport_socket"] for one in found[types.CLUSTER][name]["transport_socket_matches"]}
    for group, service in ((first, "web"), (second, "backup")):
        about = group["lb_endpoints"][0]["metadata"]["filter_metadata"]["envoy.transport_socket_match"]
        assert about == {"service": service}
        assert f"/svc/{service}" in str(sockets[service])
    (filters,) = (chain["filters"] for chain in found[types.LISTENER][WAY]["filter_chains"])
    assert filters[0]["typed_config"]["cluster"] == name
    revoked = compiled("tcp", entries, revocations=(Revocation("service", "web"),))
    (only,) = revoked[types.ENDPOINTS][name]["endpoints"]
    assert only["priority"] == 0
    assert only["lb_endpoints"][0]["endpoint"] == second["lb_endpoints"][0]["endpoint"]


def test_without_a_plan_that_works_requests_are_answered_with_its_error() -> None:
    plan = compile_plan("web", lambda kind, name: None, "dc1")
    broken = msgspec.structs.replace(upstream("web", "http"), plan=msgspec.structs.replace(plan, error="a circle"))
    found = resources(make_snapshot(upstreams=(broken,)))
    (route,) = found[types.ROUTES][WAY]["virtual_hosts"][0]["routes"]
    assert route["direct_response"]["status"] == 503
    assert "a circle" in route["direct_response"]["body"]["inline_string"]
    assert list(found[types.CLUSTER]) == [types.LOCAL_APP]


def test_when_every_check_is_critical_calls_are_made_all_the_same() -> None:
    cluster = resources(make_snapshot(upstreams=(upstream("web", "tcp", "web-1"),)))[types.CLUSTER][WAY]
    assert cluster["common_lb_config"]["healthy_panic_threshold"]["value"] > 0, "0 turns Envoy's panic mode off"
    assert not cluster.get("close_connections_on_host_health_failure"), "a lost agent must not end live calls"
