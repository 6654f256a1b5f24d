"""What an upstream's registration says in vain is told in the sidecar's log, once."""

from __future__ import annotations

from typing import Any

import pytest

from proxy.upstream_settings import UpstreamSettings, ignored_settings
from tests.support.sidecars import Mesh

ALL = {
    "load_balancer": "maglev", "limits": {"max_connections": 3}, "connect_timeout_ms": 500, "panic_threshold": 0.5,
    "failures_to_eject": 2, "slow_start_ms": 0, "locality": "zone", "protocol": "http",
    "request_timeout_ms": 100, "try_timeout_ms": 50.5, "max_attempts": 2,
    "passive_health_check": {"interval": "10s", "max_failures": 3, "base_ejection_time": 5_000_000_000},
}  # fmt: skip


def test_what_is_acted_on_is_not_told() -> None:
    assert ignored_settings(ALL) == ignored_settings({}) == []


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"lod_balancer": "maglev"}, "lod_balancer (known: connect_timeout_ms, "),
        ({"load_balancer": "best"}, "load_balancer: 'best' is none of least_request, "),
        ({"locality": "planet"}, "locality: 'planet' is neither node nor zone"),
        ({"connect_timeout_ms": "5s"}, "connect_timeout_ms: '5s' is no number of 0 or more"),
        ({"slow_start_ms": -1}, "slow_start_ms: -1 is no number of 0 or more"),
        ({"max_attempts": True}, "max_attempts: True is no number of 0 or more"),
        ({"limits": 7}, "limits: it must be an object"),
        (
            {"limits": {"max_conections": 7}},
            "limits.max_conections (known: max_concurrent_requests, max_connections, ",
        ),
        ({"limits": {"max_connections": "7"}}, "limits.max_connections: '7' is no number of 0 or more"),
        (
            {"passive_health_check": {"max_failurs": 1}},
            "passive_health_check.max_failurs (known: base_ejection_time, ",
        ),
        ({"passive_health_check": {"interval": "soon"}}, "passive_health_check.interval: invalid duration 'soon'"),
        ({"passive_health_check": {"base_ejection_time": []}}, "passive_health_check.base_ejection_time: invalid"),
        ({"panic_threshold": 50}, "panic_threshold: 50 is no share: 0 to 1"),
    ],
)
def test_what_is_not_acted_on_is_told_with_the_reason(config: dict[str, Any], said: str) -> None:
    (text,) = ignored_settings({**ALL, **config})
    assert text.startswith(said)


def test_a_share_of_more_than_all_is_not_taken_for_all() -> None:
    assert UpstreamSettings({"panic_threshold": 50}, None).balancer.panic_threshold == 0
    assert UpstreamSettings({"panic_threshold": 1}, None).balancer.panic_threshold == 1


async def test_it_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    async with Mesh() as mesh:
        client, server, _ = await mesh.pair()
        for _ in range(3):
            await client.route("backend", server.endpoint, config={"lod_balancer": "maglev"})
        assert caplog.text.count("upstream backend: nothing acts on the setting lod_balancer") == 1
        assert await client.ask() == b"hi\n"
