"""Upstream specs and proxy.json: what is read, and the one clear error for what can't be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cli.errors import UsageError
from cli.proxyfile import ProxyService, choose, parse_proxy_file, read_proxy_file
from cli.sidecar_run import SidecarPlan
from cli.upstreams import UpstreamSpec, merge, parse_upstreams
from proxy.sidecar import BoundPorts


@pytest.mark.parametrize(
    ("text", "specs"),
    [
        ("backend:8080", [UpstreamSpec("backend", port=8080)]),
        ("backend", [UpstreamSpec("backend")]),
        ("db=postgres", [UpstreamSpec("db", "postgres")]),
        ("db=postgres:5432, cache:6379", [UpstreamSpec("db", "postgres", 5432), UpstreamSpec("cache", port=6379)]),
        ("", []),
    ],
)
def test_upstreams(text: str, specs: list[UpstreamSpec]) -> None:
    assert list(parse_upstreams(text)) == specs


@pytest.mark.parametrize("text", ["a:b", "a:0", "a:70000", "=x", "a=:1", ":80", "a b", "a=b=c", "a:1:2", "-a", "ü"])
def test_bad_upstreams_name_themselves(text: str) -> None:
    with pytest.raises(UsageError) as error:
        parse_upstreams(text)
    assert repr(text) in str(error.value)


def test_variable_names() -> None:
    assert UpstreamSpec("user-db.v2").variable == "USER_DB_V2"


def test_merge_refuses_contradictions_and_joins_the_same() -> None:
    flag, file = UpstreamSpec("backend", port=8080), UpstreamSpec("backend", port=8080, bind_port=21005)
    assert merge((flag,), (file,)) == (file,)
    with pytest.raises(UsageError, match="BACKEND_ADDR"):
        merge((flag,), (UpstreamSpec("backend", "other"),))
    with pytest.raises(UsageError, match="A_B_ADDR"):
        merge((UpstreamSpec("a-b"),), (UpstreamSpec("a.b"),))


@given(st.text(max_size=30))
def test_any_text_is_specs_or_a_usage_error(text: str) -> None:
    try:
        specs = parse_upstreams(text)
    except UsageError:
        return
    assert parse_upstreams(",".join(map(str, specs))) == specs


def test_merge_keeps_what_the_file_says_beside_the_flag() -> None:
    flag, file = UpstreamSpec("backend"), UpstreamSpec("backend", config={"locality": "zone"})
    assert merge((flag,), (file,)) == merge((file,), (flag,)) == (file,)


def _file(*services: Any) -> str:
    return json.dumps({"services": list(services)})


def test_the_walkthroughs_file() -> None:
    assert parse_proxy_file(_file({"name": "echo-server", "port": 8080}), "p") == (ProxyService("echo-server", 8080),)


def test_an_upstream_says_how_it_is_called() -> None:
    config = {"locality": "node", "slow_start_ms": 5000, "limits": {"max_connections": 10}}
    text = _file({"name": "web", "port": 80, "upstreams": [{"name": "db", "config": config}]})
    (service,) = parse_proxy_file(text, "p")
    assert service.upstreams == (UpstreamSpec("db", config=config),)
    plan = SidecarPlan("web", "web-1", 80, upstreams=service.upstreams)
    (row,) = plan.definition(BoundPorts(20000, {"db": 21000}))["Proxy"]["Upstreams"]
    assert row["Config"] == config


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ([], "config: must be an object"),
        ({"localty": "zone"}, "config: localty (known: "),
        ({"locality": "rack"}, "config: locality: 'rack' is neither node nor zone"),
        ({"slow_start_ms": "5s"}, "config: slow_start_ms: '5s' is no number of 0 or more"),
        ({"load_balancer": "luck"}, "config: load_balancer: 'luck' is none of least_request"),
        ({"limits": 3}, "config: limits: it must be an object"),
    ],
)
def test_how_an_upstream_is_called_is_checked(config: Any, told: str) -> None:
    with pytest.raises(UsageError) as error:
        parse_proxy_file(_file({"name": "web", "port": 80, "upstreams": [{"name": "db", "config": config}]}), "p")
    assert str(error.value).startswith(f"p: services[0].upstreams[0].{told}")


def test_the_longer_form() -> None:
    text = _file(
        {
            "name": "web", "port": 80, "id": "web-1", "protocol": "http", "public_port": 20005, "workers": 2,
            "upstreams": [{"name": "db", "service": "postgres", "port": 5432, "bind_port": 21007}, "cache:6379"],
        }
    )  # fmt: skip
    (service,) = parse_proxy_file(text, "p")
    assert service.upstreams == (UpstreamSpec("db", "postgres", 5432, 21007), UpstreamSpec("cache", port=6379))
    assert (service.id, service.protocol, service.public_port) == ("web-1", "http", 20005)
    assert service.workers == 2


@pytest.mark.parametrize(
    ("text", "part"),
    [
        (_file({"name": "a", "prot": 1}), "services[0].prot: unknown key. Did you mean 'port'?"),
        (_file({"name": "a", "port": "80"}), 'services[0].port: must be a port from 0 to 65535, not "80"'),
        (_file({"name": "a", "port": True}), "services[0].port"),
        (_file({"name": "a", "port": -1}), "not -1"),
        (_file({"port": 1}), "services[0].name: is missing"),
        (_file({"name": "a", "protocol": "smtp"}), "services[0].protocol: must be one of tcp, http, http2, grpc"),
        (_file({"name": "a", "upstreams": [{"name": "b", "bind": 1}]}), "services[0].upstreams[0].bind: unknown key"),
        (_file({"name": "a", "upstreams": {}}), "services[0].upstreams: must be a list"),
        (_file({"name": "a", "workers": 0}), "services[0].workers: must be a number from 1 to 64, not 0"),
        ('{"services": [], "x": 1}', "x: unknown key"),
        ("[]", "must be an object"),
        ("{", "is not JSON"),
    ],
)
def test_errors_name_the_keys_path(text: str, part: str) -> None:
    with pytest.raises(UsageError) as error:
        parse_proxy_file(text, "proxy.json")
    assert part in str(error.value)
    assert str(error.value).startswith("proxy.json")
    assert "\n" not in str(error.value)


def test_all_errors_at_once() -> None:
    with pytest.raises(UsageError) as error:
        parse_proxy_file(_file({"name": "", "port": 99999, "zone": 1}), "p")
    assert all(part in str(error.value) for part in ("services[0].name", "services[0].port", "services[0].zone"))


def test_a_missing_file_says_what_to_write(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="Write it before the sidecar starts"):
        read_proxy_file(str(tmp_path / "proxy.json"))


_KEYS = st.sampled_from(["services", "name", "port", "upstreams", "x"])
_LEAVES = st.none() | st.booleans() | st.integers() | st.text(max_size=5)


@given(st.recursive(_LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_KEYS, inner)))
def test_any_json_is_services_or_a_usage_error(value: Any) -> None:
    try:
        services = parse_proxy_file(json.dumps(value), "p")
    except UsageError:
        return
    assert all(service.name for service in services)


def test_choose_by_name_and_id() -> None:
    web, api = ProxyService("web", 80), ProxyService("api", 81, id="api-1")
    assert choose((web, api), "api", "", "p") is api
    assert choose((web,), "", "web-1", "p") is web
    with pytest.raises(UsageError, match="contradicts the flags"):
        choose((web,), "echo-server", "", "p")
    with pytest.raises(UsageError, match="several services"):
        choose((web, ProxyService("web", 90)), "web", "", "p")
