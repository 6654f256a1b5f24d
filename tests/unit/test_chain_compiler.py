"""Configuration entries become one plan; what cannot is refused with the field at fault."""

from __future__ import annotations

from typing import Any

import pytest

from raftstate.chain import BadEntry, check_entry, check_expressions, compile_plan
from raftstate.model.plan import Plan, ResolverNode, RouterNode, SplitterNode
from raftstate.state import commands as c
from tests.unit.support_state import Log

DEFAULTS, ROUTER, SPLITTER, RESOLVER = "service-defaults", "service-router", "service-splitter", "service-resolver"
HTTP = {"Protocol": "http"}
SUBSETS = {"v1": {"Filter": "Service.Meta.version == v1"}, "v2": {"Filter": "Service.Meta.version == v2"}}


def plan(service: str, entries: dict[tuple[str, str], dict[str, Any]]) -> Plan:
    checked = {key: check_entry(*key, entry) for key, entry in entries.items()}
    return compile_plan(service, lambda kind, name: checked.get((kind, name)), "dc1")


def test_without_entries_the_plan_leads_to_the_service() -> None:
    found = plan("web", {})
    assert found.default
    assert found.nodes == {"resolver:web.default.default.dc1": ResolverNode("web.default.default.dc1")}
    assert found.targets["web.default.default.dc1"].service == "web"
    assert plan("web", {(DEFAULTS, "web"): HTTP}).default


def test_a_whole_chain_router_splitter_resolver_with_defaults_of_everyone() -> None:
    found = plan(
        "web",
        {
            ("proxy-defaults", "global"): {"Config": {"protocol": "http"}},
            (ROUTER, "web"): {
                "routes": [
                    {
                        "match": {"http": {"path_prefix": "/admin", "methods": ["get"]}},
                        "destination": {"service": "admin", "request_timeout": "1500ms", "num_retries": 3},
                    },
                    {
                        "Match": {"HTTP": {"Header": [{"Name": "x-canary", "Present": True}]}},
                        "Destination": {"ServiceSubset": "v2", "RetryOnStatusCodes": [503]},
                    },
                ]
            },
            (SPLITTER, "web"): {
                "Splits": [{"Weight": 90, "ServiceSubset": "v1"}, {"Weight": 10, "ServiceSubset": "v2"}]
            },
            (RESOLVER, "web"): {
                "ConnectTimeout": "3s", "DefaultSubset": "v1", "Subsets": SUBSETS,
                "Failover": {"*": {"Service": "web-old"}},
                "LoadBalancer": {
                    "Policy": "ring_hash",
                    "HashPolicies": [{"Field": "cookie", "FieldValue": "sid", "CookieConfig": {"TTL": "60s"}}],
                },
            },
        },
    )  # fmt: skip
    assert found.start == "router:web.default.default"
    router = found.nodes["router:web.default.default"]
    assert isinstance(router, RouterNode)
    first, second, last = router.routes
    assert (first.match.path_prefix, first.match.methods, first.request_timeout_s, first.num_retries) == (
        "/admin", ("GET",), 1.5, 3,
    )  # fmt: skip
    assert first.next_node == "resolver:admin.default.default.dc1"
    assert (second.next_node, second.num_retries) == ("resolver:v2.web.default.default.dc1", 1)
    assert (last.match.path_prefix, last.next_node) == ("/", "splitter:web.default.default")
    splitter = found.nodes["splitter:web.default.default"]
    assert isinstance(splitter, SplitterNode)
    assert [(split.weight, split.next_node) for split in splitter.splits] == [
        (90, "resolver:v1.web.default.default.dc1"), (10, "resolver:v2.web.default.default.dc1"),
    ]  # fmt: skip
    resolver = found.nodes["resolver:v1.web.default.default.dc1"]
    assert isinstance(resolver, ResolverNode)
    assert resolver.failover == ("web-old.default.default.dc1",)
    assert resolver.connect_timeout_s == 3
    assert resolver.balancing.policy == "ring_hash"
    assert resolver.balancing.hash_policies[0].cookie_ttl_s == 60
    assert found.targets["v1.web.default.default.dc1"].filter == "Service.Meta.version == v1"
    assert not found.default


def test_nested_splitters_are_flattened_and_weights_multiply() -> None:
    found = plan(
        "a",
        {
            (SPLITTER, "a"): {"Splits": [{"Weight": 50}, {"Weight": 50, "Service": "b"}]},
            (SPLITTER, "b"): {
                "Splits": [{"Weight": 20}, {"Weight": 60, "Service": "c"}, {"Weight": 20, "Service": "d"}]
            },
        },
    )
    splitter = found.nodes["splitter:a.default.default"]
    assert isinstance(splitter, SplitterNode)
    shares = {split.next_node.split(":")[1].split(".")[0]: split.weight for split in splitter.splits}
    assert shares == pytest.approx({"a": 50, "b": 10, "c": 30, "d": 10})


def test_redirects_are_followed_with_default_subsets() -> None:
    found = plan(
        "old",
        {
            (RESOLVER, "old"): {"Redirect": {"Service": "middle"}},
            (RESOLVER, "middle"): {"Redirect": {"Service": "new"}},
            (RESOLVER, "new"): {"DefaultSubset": "v2", "Subsets": SUBSETS},
        },
    )
    assert found.start == "resolver:v2.new.default.default.dc1"
    assert list(found.targets) == ["v2.new.default.default.dc1"]


@pytest.mark.parametrize(
    ("failover", "leads_to"),
    [
        ({"ServiceSubset": "v2"}, ["v2.web"]),
        ({"Service": "web", "ServiceSubset": "v2"}, ["v2.web"]),
        ({"Service": "web"}, []),  # the same subset, which it is already
        ({"Service": "other"}, ["other"]),
        ({"Targets": [{"Service": "web"}, {"Service": "other"}, {"ServiceSubset": "v2"}]}, ["other", "v2.web"]),
    ],
)
def test_failover_to_the_service_itself_keeps_the_subset(failover: dict[str, Any], leads_to: list[str]) -> None:
    entry = {"DefaultSubset": "v1", "Subsets": SUBSETS, "Failover": {"v1": failover}}
    for subset in ("v1", ""):
        entry["DefaultSubset"] = subset
        route = {"Weight": 100, "ServiceSubset": "v1"}
        found = plan("web", {(SPLITTER, "web"): {"Splits": [route]}, (RESOLVER, "web"): entry})
        node = found.nodes["resolver:v1.web.default.default.dc1"]
        assert isinstance(node, ResolverNode)
        assert list(node.failover) == [f"{name}.default.default.dc1" for name in leads_to]


@pytest.mark.parametrize(
    ("service", "entries", "said"),
    [
        (
            "a",
            {(RESOLVER, "a"): {"Redirect": {"Service": "b"}},
             (RESOLVER, "b"): {"Redirect": {"Service": "a"}}},
            "Redirect.Service: redirects lead in a circle: a -> b -> a",
        ),
        (
            "a",
            {(SPLITTER, "a"): {"Splits": [{"Weight": 100, "Service": "b"}]},
             (SPLITTER, "b"): {"Splits": [{"Weight": 100, "Service": "a"}]}},
            "Splits[0].Service: splitters lead in a circle: a -> b -> a",
        ),
        (
            "a",
            {(SPLITTER, "a"): {"Splits": [{"Weight": 100, "ServiceSubset": "v9"}]},
             (RESOLVER, "a"): {"Subsets": SUBSETS}},
            "service-splitter 'a': Splits[0].ServiceSubset: service 'a' has no subset 'v9' (its service-resolver "
            "names: v1, v2)",
        ),
        ("a", {(ROUTER, "a"): {"Routes": []}}, "Routes: requests can only be routed with the protocol"),
        (
            "a",
            {(DEFAULTS, "a"): HTTP,
             (ROUTER, "a"): {"Routes": [{"Destination": {"Service": "b"}}]}},
            "Routes[0].Destination.Service: the protocol of 'b' is 'tcp', that of 'a' 'http'",
        ),
        (
            "a",
            {(RESOLVER, "a"): {"Failover": {"*": {"Datacenters": ["dc2"]}}}},
            "Failover['*'].Datacenters: there is no datacenter 'dc2'",
        ),
    ],
)  # fmt: skip
def test_impossible_references_are_named(
    service: str, entries: dict[tuple[str, str], dict[str, Any]], said: str
) -> None:
    with pytest.raises(BadEntry) as error:
        plan(service, entries)
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("kind", "entry", "field"),
    [
        (DEFAULTS, {"Protocol": "htpt"}, "Protocol"),
        (DEFAULTS, {"Protocl": "http"}, "Protocl"),
        (DEFAULTS, {"Protocol": 7}, "Protocol"),
        (DEFAULTS, {"UpstreamConfig": {"Overrides": [{"Protocol": ""}]}}, "UpstreamConfig.Overrides[0].Name"),
        (
            DEFAULTS, {"UpstreamConfig": {"Defaults": {"PassiveHealthCheck": {"MaxEjectionPercent": 101}}}},
            "UpstreamConfig.Defaults.PassiveHealthCheck.MaxEjectionPercent",
        ),
        (
            DEFAULTS, {"UpstreamConfig": {"Defaults": {"PassiveHealthCheck": {"BaseEjectionTime": "soon"}}}},
            "UpstreamConfig.Defaults.PassiveHealthCheck.BaseEjectionTime",
        ),
        (ROUTER, {"Routes": [{"Match": {"HTTP": {"PathPrefix": "x"}}}]}, "Routes[0].Match.HTTP.PathPrefix"),
        (ROUTER, {"Routes": [{"Match": {"HTTP": {"PathPrefix": "/", "PathExact": "/"}}}]}, "Routes[0].Match.HTTP"),
        (ROUTER, {"Routes": [{"Match": {"HTTP": {"Header": [{"Name": "a"}]}}}]}, "Routes[0].Match.HTTP.Header[0]"),
        (ROUTER, {"Routes": [{"Match": {"HTTP": {"Metods": []}}}]}, "Routes[0].Match.HTTP.Metods"),
        (ROUTER, {"Routes": [{"Destination": {"PrefixRewrite": "/"}}]}, "Routes[0].Destination.PrefixRewrite"),
        (ROUTER, {"Routes": [{"Destination": {"RequestTimeout": "soon"}}]}, "Routes[0].Destination.RequestTimeout"),
        (ROUTER, {"Routes": [{"Destination": {"RetryOn": ["rain"]}}]}, "Routes[0].Destination.RetryOn[0]"),
        (ROUTER, {"Routes": [{"Destination": {"RequestHeaders": {"Set": {"host": "x"}}}}]},
         "Routes[0].Destination.RequestHeaders.Set"),
        (ROUTER, {"Routes": [{"Destination": {"RequestHeaders": {"Add": {"a": "x\r\nb: y"}}}}]},
         "Routes[0].Destination.RequestHeaders.Add"),
        (SPLITTER, {"Splits": [{"Weight": 99}]}, "Splits"),
        (SPLITTER, {"Splits": [{"Weight": 100.5}]}, "Splits[0].Weight"),
        (SPLITTER, {"Splits": [{"Weight": 50}, {"Weight": 50}]}, "Splits[1]"),
        (RESOLVER, {"DefaultSubset": "v1"}, "DefaultSubset"),
        (RESOLVER, {"Subsets": {"V_1": {}}}, "Subsets['V_1']"),
        (RESOLVER, {"Redirect": {"Service": "b"}, "Failover": {"*": {"Service": "c"}}}, "Failover"),
        (RESOLVER, {"Redirect": {"Peer": "b"}}, "Redirect.Peer"),
        (RESOLVER, {"LoadBalancer": {"Policy": "best"}}, "LoadBalancer.Policy"),
        (RESOLVER, {"LoadBalancer": {"Policy": "random", "HashPolicies": [{"SourceIP": True}]}},
         "LoadBalancer.HashPolicies"),
        (RESOLVER, {"LoadBalancer": {"Policy": "maglev", "HashPolicies": [{"Field": "moon"}]}},
         "LoadBalancer.HashPolicies[0].Field"),
        (RESOLVER, {"Namespace": "team"}, "Namespace"),
        ("proxy-defaults", {"Config": {"protocol": "smtp"}}, "Config.protocol"),
    ],
)  # fmt: skip
def test_a_bad_entry_is_refused_by_its_field(kind: str, entry: dict[str, Any], field: str) -> None:
    with pytest.raises(BadEntry) as error:
        check_entry(kind, "web", entry)
    assert error.value.field == field, str(error.value)


@pytest.mark.parametrize(
    ("kind", "entry", "field"),
    [
        (ROUTER, {"Routes": [{"Match": {"HTTP": {"PathRegex": "("}}}]}, "Routes[0].Match.HTTP.PathRegex"),
        (
            "service-router",
            {"Routes": [{"Match": {"HTTP": {"PathRegex": "(?=x)"}}}]},
            "Routes[0].Match.HTTP.PathRegex",
        ),
        (RESOLVER, {"Subsets": {"v1": {"Filter": "Service.Meta ="}}}, "Subsets['v1'].Filter"),
    ],
)
def test_expressions_that_do_not_compile_are_refused(kind: str, entry: dict[str, Any], field: str) -> None:
    with pytest.raises(BadEntry) as error:
        check_expressions(kind, "web", check_entry(kind, "web", entry))
    assert error.value.field == field


def test_the_state_refuses_what_would_leave_a_service_without_a_way() -> None:
    log = Log()
    log.do(c.SetConfigEntry(RESOLVER, "b", {"subsets": {"v1": {"filter": ""}}}))
    log.do(
        c.SetConfigEntry(
            "service-splitter", "a", {"Splits": [{"Weight": 100, "Service": "b", "ServiceSubset": "v1"}]}
        )
    )
    assert log.ask("discovery.chain", service="a").value.start == "splitter:a.default.default"
    assert log.ask("config.get", kind=RESOLVER, name="b").value["Subsets"] == {"v1": {"Filter": ""}}
    code, text = log.refused(c.DeleteConfigEntry(RESOLVER, "b"))
    assert code == "invalid"
    assert "Splits[0].ServiceSubset" in text
    assert "'a' without a way" in text
    assert log.refused(c.SetConfigEntry(RESOLVER, "b", {"Redirect": {"Service": "b", "ServiceSubset": "v7"}}))
    log.do(c.DeleteConfigEntry(SPLITTER, "a"))
    log.do(c.DeleteConfigEntry(RESOLVER, "b"))
    assert log.ask("discovery.chain", service="a").value.default


def test_a_chain_is_woken_by_the_entries_it_was_made_of_and_by_no_others() -> None:
    log = Log()
    log.do(c.SetConfigEntry(RESOLVER, "a", {"Redirect": {"Service": "b"}}))
    before = log.ask("discovery.chain", service="a")
    log.do(c.SetConfigEntry(RESOLVER, "other", {"ConnectTimeout": "1s"}))
    assert log.ask("discovery.chain", service="a").index == before.index
    log.do(c.SetConfigEntry(RESOLVER, "b", {"ConnectTimeout": "1s"}))
    after = log.ask("discovery.chain", service="a")
    assert after.index > before.index
    assert after.value.nodes["resolver:b.default.default.dc1"].connect_timeout_s == 1
