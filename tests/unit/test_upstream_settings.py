"""What an upstream's registration says in vain is told in the sidecar's log, once."""

from __future__ import annotations

from typing import Any

import pytest

from proxy.upstream_settings import ignored_settings
from tests.support.sidecars import Mesh

ALL = {
    "load_balancer": "maglev", "limits": {"max_connections": 3}, "connect_timeout_ms": 500, "panic_threshold": 0.5,
    "failures_to_eject": 2, "slow_start_ms": 0, "passive_health_check": {}, "locality": "zone", "protocol": "http",
    "request_timeout_ms": 100, "try_timeout_ms": 50.5, "max_attempts": 2,
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
    ],
)
def test_what_is_not_acted_on_is_told_with_the_reason(config: dict[str, Any], said: str) -> None:
    (text,) = ignored_settings({**ALL, **config})
    assert text.startswith(said)


async def test_it_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    async with Mesh() as mesh:
        client, server, _ = await mesh.pair()
        for _ in range(3):
            await client.route("backend", server.endpoint, config={"lod_balancer": "maglev"})
        assert caplog.text.count("upstream backend: nothing acts on the setting lod_balancer") == 1
        assert await client.ask() == b"hi\n"
