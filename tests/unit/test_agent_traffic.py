"""What a sidecar is sent of configuration entries: the plan with each target's instances, defaults of its service."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import to_builtins

from cli.sidecar_left import Left
from node.agent.departures import DEREGISTERED_MAX, LEFT_SERVICES_MAX, Departures
from node.agent.traffic import endpoints_of, own_config, upstream_config, upstream_protocol
from raftstate.chain import compile_plan
from raftstate.model.catalog import CRITICAL, WARNING, Check, InstanceHealth, Node, ServiceInstance, ServiceProxy
from raftstate.model.plan import Target
from raftstate.model.sidecar import LEFT_MAX, Endpoint, SidecarUpstream
from tests.support.http_api import serving
from tests.unit.test_http_walkthrough import CLIENT_SIDECAR, SERVER_SIDECAR, open_stream

Moment = tuple[frozenset[int], frozenset[int], bool]
"""Instances that are wanted, those registered, and whether the agent has restarted."""
SUBSETS = {v: {"Filter": f"Service.Meta.version == {v}"} for v in ("v1", "v2")}


async def test_entries_reach_the_stream_with_the_instances_of_each_target(tmp_path: Path) -> None:
    async with serving(tmp_path) as node:
        meta = {"Meta": {"version": "v1"}, "Weights": {"Passing": 7, "Warning": 1}}
        await node.put(
            "/v1/agent/service/register", {"Name": "echo-server", "ID": "echo-server-1", "Port": 8080, **meta}
        )
        await node.put("/v1/agent/service/register", {"Name": "echo-client", "ID": "echo-client-1"})
        named = json.loads(json.dumps(CLIENT_SIDECAR))
        named["Proxy"]["Upstreams"] = [{"DestinationName": "echo-server", "LocalBindPort": 21000}]
        server = await open_stream(node, "echo-server-1-sidecar-proxy", SERVER_SIDECAR)
        client = await open_stream(node, "echo-client-1-sidecar-proxy", named)

        def upstream(known: dict[str, Any]) -> dict[str, Any]:
            found: dict[str, Any] = (known.get("Upstreams") or [{}])[0]
            return found

        await client.until(lambda known: len(upstream(known).get("Endpoints", ())) == 1)
        await node.put("/v1/config", {"Kind": "proxy-defaults", "Name": "global", "Config": {"protocol": "http"}})
        await client.until(lambda known: upstream(known)["Protocol"] == "http")
        await server.until(lambda known: known.get("Self", {}).get("Protocol") == "http")
        resolver = {"Kind": "service-resolver", "Name": "echo-server", "Subsets": SUBSETS, "DefaultSubset": "v1"}
        await node.put("/v1/config", resolver)
        await client.until(lambda known: upstream(known).get("Plan") is not None)
        await client.until(lambda known: "v1.echo-server.default.default.dc1" in upstream(known)["Targets"])
        (endpoint,) = upstream(client.known)["Targets"]["v1.echo-server.default.default.dc1"]
        assert (endpoint["ServiceID"], endpoint["Meta"], endpoint["Weight"]) == (
            "echo-server-1", {"version": "v1"}, 7,
        )  # fmt: skip
        assert upstream(client.known)["Endpoints"] == []
        await node.put("/v1/config", {**resolver, "DefaultSubset": "v2"})
        await client.until(lambda known: upstream(known)["Targets"] == {"v2.echo-server.default.default.dc1": []})
        await node.put("/v1/config", {"Kind": "service-resolver", "Name": "echo-server", "ConnectTimeout": "2s"})
        await client.until(lambda known: [*upstream(known)["Targets"]] == ["echo-server.default.default.dc1"])
        limits = {"MaxConnections": 3, "MaxPendingRequests": 0}
        defaults = {"Defaults": {"Limits": limits}, "Overrides": [{"Name": "echo-server", "ConnectTimeoutMs": 250}]}
        await node.put("/v1/config", {"Kind": "service-defaults", "Name": "echo-client", "UpstreamConfig": defaults})
        wanted = {"connect_timeout_ms": 250, "limits": {"max_connections": 3, "max_pending_requests": 0}}
        await client.until(lambda known: upstream(known)["Config"] == wanted)
        async with node.http.delete(node.url + "/v1/config/service-resolver/echo-server") as answer:
            assert answer.status == 200
        await client.until(lambda known: upstream(known).get("Plan") is None)
        assert len(upstream(client.known)["Endpoints"]) == 1
        server.response.close()
        client.response.close()


def test_a_target_has_the_instances_that_its_filter_takes() -> None:
    def row(number: int, version: str, status: str) -> InstanceHealth:
        proxy = ServiceProxy(destination_service_name="web", destination_service_id=f"web-{number}")
        service = ServiceInstance(
            "n", f"p-{number}", "web-proxy", port=number, meta={"version": version}, proxy=proxy
        )
        return InstanceHealth(Node("n", "10.0.0.1"), service, (Check("n", "c", status=status),))

    rows = [row(1, "v1", "passing"), row(2, "v2", WARNING), row(3, "v2", CRITICAL)]
    second = Target("v2.web", "web", "v2", "Service.Meta.version == v2")
    assert [(one.service_id, one.healthy) for one in endpoints_of(rows, second)] == [
        ("web-2", True), ("web-3", False),
    ]  # fmt: skip
    strict = Target("v2.web", "web", "v2", "Service.Meta.version == v2", only_passing=True)
    assert [one.healthy for one in endpoints_of(rows, strict)] == [False, False]
    assert len(endpoints_of(rows)) == 3


def test_what_is_nearer_goes_first() -> None:
    everyone = {"Config": {"protocol": "grpc", "local_request_timeout_ms": 1}}
    assert own_config({}, {"LocalRequestTimeoutMs": 2}, everyone)["local_request_timeout_ms"] == 2
    assert own_config({"local_request_timeout_ms": 3}, {"LocalRequestTimeoutMs": 2}, None) == {
        "local_request_timeout_ms": 3
    }
    defaults = {
        "UpstreamConfig": {
            "Defaults": {"Protocol": "http", "Limits": {"MaxConnections": 1, "MaxPendingRequests": 2}},
            "Overrides": [{"Name": "b", "Limits": {"MaxConnections": 5}, "PassiveHealthCheck": {"MaxFailures": 4}}],
        }
    }
    assert upstream_config({"limits": {"max_pending_requests": 9}}, "b", defaults) == {
        "protocol": "http", "limits": {"max_connections": 5, "max_pending_requests": 9},
        "passive_health_check": {"max_failures": 4},
    }  # fmt: skip
    assert upstream_config({"protocol": "tcp"}, "c", defaults)["protocol"] == "tcp"


def test_a_plan_that_routes_says_how_requests_are_read() -> None:
    entries: dict[tuple[str, str], dict[str, Any]] = {("service-defaults", "b"): {"Protocol": "http"}}
    plain = compile_plan("b", lambda *key: entries.get(key), "dc1")
    assert upstream_protocol({}, "", plain) == "http"
    assert upstream_protocol({"protocol": "tcp"}, "grpc", plain) == "tcp"
    assert upstream_protocol({}, "grpc", plain) == "grpc"
    entries["service-router", "b"] = {"Routes": []}
    routed = compile_plan("b", lambda *key: entries.get(key), "dc1")
    assert upstream_protocol({"protocol": "tcp"}, "tcp", routed) == "http"


def test_instances_that_were_left_are_followed_until_they_are_gone() -> None:
    def at(service: str, port: int) -> Endpoint:
        return Endpoint("n", "10.0.0.1", port, service, f"{service}-{port}")

    web1, web2, api = at("web", 1), at("web", 2), at("api", 3)
    departures = Departures()
    departures.follow([web1, web2], {"web": [web1, web2]})
    departures.follow([api], {"web": [web1, web2], "api": [api]})
    assert (departures.services, departures.deregistered) == ({"web"}, ())
    departures.follow([api], {"api": [api]})
    assert (departures.services, departures.deregistered) == ({"web"}, ()), "nothing is known of it, so it stays"
    departures.follow([api], {"web": [web2], "api": [api]})
    assert (departures.services, departures.deregistered) == ({"web"}, (web1,))
    departures.follow([api, web2], {"web": [web2], "api": [api]})
    assert departures.services == set(), "it is led to again"
    departures.follow([api], {"web": [], "api": [api]})
    assert departures.deregistered == (web1, web2)
    departures.follow([web1], {"web": [web1]})
    assert departures.deregistered == (web2,), "it is back"
    for port in range(1000, 1600):
        departures.follow([at("web", port)], {"web": [at("web", port)]})
    departures.follow([], {"web": []})
    assert len(departures.deregistered) == DEREGISTERED_MAX


async def test_an_instance_that_the_plan_has_left_is_told_when_it_goes(tmp_path: Path) -> None:
    async with serving(tmp_path) as node:
        service = {"Name": "echo-server", "ID": "echo-server-1", "Port": 8080}
        await node.put("/v1/agent/service/register", service)
        await node.put("/v1/agent/service/register", {"Name": "echo-client", "ID": "echo-client-1"})
        named = json.loads(json.dumps(CLIENT_SIDECAR))
        named["Proxy"]["Upstreams"] = [{"DestinationName": "echo-server", "LocalBindPort": 21000}]
        server = await open_stream(node, "echo-server-1-sidecar-proxy", SERVER_SIDECAR)
        client = await open_stream(node, "echo-client-1-sidecar-proxy", named)

        def upstream(known: dict[str, Any]) -> dict[str, Any]:
            found: dict[str, Any] = (known.get("Upstreams") or [{}])[0]
            return found

        await client.until(lambda known: len(upstream(known).get("Endpoints", ())) == 1)
        redirect = {"Kind": "service-resolver", "Name": "echo-server", "Redirect": {"Service": "other"}}
        await node.put("/v1/config", redirect)
        await client.until(lambda known: upstream(known)["Targets"] == {"other.default.default.dc1": []})
        assert upstream(client.known)["Deregistered"] == []
        await node.put("/v1/agent/service/deregister/echo-server-1-sidecar-proxy")
        await client.until(lambda known: len(upstream(known)["Deregistered"]) == 1)
        assert upstream(client.known)["Deregistered"][0]["ServiceID"] == "echo-server-1"
        server.response.close()
        client.response.close()


async def test_a_sidecar_reminds_an_agent_that_has_restarted_of_what_its_calls_were_led_to(tmp_path: Path) -> None:
    async with serving(tmp_path) as node:
        for number in (1, 2):
            service = {"Name": "echo-server", "ID": f"echo-server-{number}", "Port": 8080 + number}
            await node.put("/v1/agent/service/register", service)
        await node.put("/v1/agent/service/register", {"Name": "echo-client", "ID": "echo-client-1"})
        named = json.loads(json.dumps(CLIENT_SIDECAR))
        named["Proxy"]["Upstreams"] = [{"DestinationName": "echo-server", "LocalBindPort": 21000}]
        await node.put(
            "/v1/config", {"Kind": "service-resolver", "Name": "echo-server", "Redirect": {"Service": "o"}}
        )
        server = await open_stream(node, "echo-server-1-sidecar-proxy", SERVER_SIDECAR)
        client = await open_stream(node, "echo-client-1-sidecar-proxy", named)
        await client.until(lambda known: "Upstreams" in known)

        def deregistered(known: dict[str, Any]) -> list[str]:
            return [one["ServiceID"] for one in known["Upstreams"][0]["Deregistered"]]

        (row,) = await node.get("/v1/health/connect/echo-server")
        there = Endpoint("n", "127.0.0.1", row["Service"]["Port"], "echo-server", "echo-server-1")
        gone = Endpoint("n", "127.0.0.1", 20999, "echo-server", "echo-server-2")
        left = {"Left": {"echo-server": to_builtins([there, gone]), "no-such-upstream": to_builtins([gone])}}
        answer, pid = "/v1/agent/connect/answer/echo-client-1-sidecar-proxy", {"X-Lictor-Pid": "4711"}
        async with node.http.put(node.url + answer, json=left, headers=pid) as response:
            assert response.status == 200
        await client.until(lambda known: deregistered(known) == ["echo-server-2"])
        await node.put("/v1/agent/service/deregister/echo-server-1-sidecar-proxy")
        await client.until(lambda known: deregistered(known) == ["echo-server-2", "echo-server-1"])
        async with node.http.put(node.url + answer, json={"Left": {"x": [{"Port": "y"}]}}, headers=pid) as response:
            assert response.status == 400
            assert "Left" in await response.text()
        server.response.close()
        client.response.close()


def test_what_a_sidecar_brings_to_mind_is_bounded() -> None:
    departures = Departures()
    led_to = Endpoint("n", "10.0.0.1", 1, "web", "web-1")
    departures.follow([led_to], {"web": [led_to]})
    services = [Endpoint("n", "10.0.0.1", 2, f"s{n}", f"s{n}") for n in range(LEFT_SERVICES_MAX + 5)]
    departures.remember([led_to, *services])
    assert len(departures.services) == LEFT_SERVICES_MAX
    assert "web" not in departures.services, "it is led to"
    departures.remember(Endpoint("n", "10.0.0.1", n, "s1", "s1") for n in range(2 * LEFT_MAX))
    departures.follow([led_to], {"s1": []})
    assert len(departures.deregistered) == DEREGISTERED_MAX


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.tuples(st.frozensets(st.integers(0, 4)), st.frozensets(st.integers(0, 4)), st.booleans()), max_size=12
    )
)
def test_a_restart_of_the_agent_hides_no_departure(
    history: list[tuple[frozenset[int], frozenset[int], bool]],
) -> None:
    """Whatever is led to and registered, and whenever the agent starts anew: each instance that was led to and is
    deregistered is told, at once."""
    everyone = [Endpoint("n", "10.0.0.1", n, "web", f"web-{n}") for n in range(5)]
    departures, left = Departures(), Left()
    alive: set[int] = set()
    """To these a call may be under way: they were led to, and nobody has said since that they are gone."""
    for wanted, there, restarts in history:
        led_to = wanted & there
        if restarts:
            departures = Departures()
        for reminded in (False, True):  # the first line of a stream; then what follows the sidecar's answer
            if reminded:
                departures.remember(left.told().get("web", ()))
            departures.follow([everyone[n] for n in led_to], {"web": [everyone[n] for n in there]})
            endpoints = tuple(everyone[n] for n in led_to)
            spec = SidecarUpstream("web", "web", "", 0, endpoints=endpoints, deregistered=departures.deregistered)
            left.follow([spec])
            told = {one.port for one in departures.deregistered}
            assert not told & there
            alive = (alive | led_to) - told
        assert alive <= there
