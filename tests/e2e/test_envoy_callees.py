"""Whom an Envoy calls: the calls to an instance that is withdrawn end, and no others."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable

import pytest

from cli.demo_stage import wait_until
from tests.e2e.support_e2e import Mesh
from tests.e2e.support_envoy import ENVOY, LICTOR, TIMEOUT_S, allow, call, echo, envoy_admin, stand, upstream
from tests.e2e.test_envoy import streaming
from tests.e2e.test_envoy_withdrawal import Busy, busy, untouched

PROMPT_S = 1.0


def revoke(mesh: Mesh) -> None:
    mesh.lictor("identity", "revoke", "-service-id", "store-1", host=0, quiet=True)


def deregister(mesh: Mesh) -> None:
    mesh.api().put("/v1/agent/service/deregister/store-1-sidecar-proxy")


def deregister_app(mesh: Mesh) -> None:
    mesh.api().put("/v1/agent/service/deregister/store-1")


def split(lines: list[Busy]) -> tuple[list[Busy], list[Busy]]:
    """Return the connections that instance one answers, and those that two does."""
    named: dict[bytes, list[Busy]] = {b"one": [], b"two": []}
    for line in lines:
        assert wait_until(lambda at=line: at.answered_by, TIMEOUT_S)
        named[line.answered_by].append(line)
    assert all(named.values()), "instances are balanced"
    return named[b"one"], named[b"two"]


@pytest.mark.parametrize(
    ("kind", "withdraw"),
    [
        (ENVOY, revoke),
        (LICTOR, revoke),
        (ENVOY, deregister_app),
        (LICTOR, deregister_app),
        (LICTOR, deregister),  # an Envoy registers again at once
    ],
)
def test_calls_to_an_instance_that_is_withdrawn_end_and_those_to_others_go_on(
    stage: Mesh, kind: str, withdraw: Callable[[Mesh], None]
) -> None:
    allow(stage, "shop", "store")
    with echo("one") as first, echo("two") as second:
        stand(stage, kind, "store", first)
        stand(stage, kind, "store", second, host=1)
        stand(stage, ENVOY, "shop", 0, "-upstreams", "store")
        store = upstream(stage, "shop-1", "store")
        assert wait_until(lambda: {call(store) for _ in range(4)} == {b"one hello\n", b"two hello\n"}, TIMEOUT_S)
        with busy(*[store] * 12) as lines:
            ones, twos = split(lines)
            since = time.monotonic()
            withdraw(stage)
            assert wait_until(lambda: all(one.ended_at for one in ones), TIMEOUT_S), "calls to it go on"
            assert {call(store) for _ in range(6)} == {b"two hello\n"}
            untouched(stage, "shop-1", *twos)
            took = max(one.ended_at for one in ones) - since
            print(f"{kind} {withdraw.__name__}: ended after {took:.3f} s")
            assert took < PROMPT_S
        if withdraw is revoke:
            stage.lictor("identity", "restore", "-service-id", "store-1", host=0, quiet=True)
            assert wait_until(lambda: b"one hello\n" in {call(store) for _ in range(4)}, TIMEOUT_S)


def test_an_agent_that_has_restarted_still_ends_the_calls_to_one_instance_alone(stage: Mesh) -> None:
    allow(stage, "shop", "store")
    with echo("one") as first, echo("two") as second:
        stand(stage, LICTOR, "store", first, host=1)
        (stage.directory / "store-3").mkdir(exist_ok=True)
        stage.api(1).put("/v1/agent/service/register", {"Name": "store", "ID": "store-3", "Port": second})
        stage.sidecar("store-3", 1, ["-service-id", "store-3"], {})
        stand(stage, ENVOY, "shop", 0, "-upstreams", "store")
        store = upstream(stage, "shop-1", "store")
        assert wait_until(lambda: {call(store) for _ in range(4)} == {b"one hello\n", b"two hello\n"}, TIMEOUT_S)
        with busy(*[store] * 12) as lines:
            ones, twos = split(lines)
            stage.cluster("kill", "client-1")
            untouched(stage, "shop-1", *lines)
            assert call(store) != b""
            stage.cluster("start", "client-1")
            assert wait_until(lambda: "shop-1" in streaming(stage), TIMEOUT_S)
            untouched(stage, "shop-1", *lines)
            since = time.monotonic()
            stage.api(1).put("/v1/agent/service/deregister/store-2")
            assert wait_until(lambda: all(one.ended_at for one in ones), TIMEOUT_S), "calls to it go on"
            assert max(one.ended_at for one in ones) - since < PROMPT_S
            untouched(stage, "shop-1", *twos)


def test_no_call_is_lost_to_an_instance_that_cannot_be_reached(stage: Mesh) -> None:
    """It has the fewest calls, so it is the first choice of nearly every try."""
    allow(stage, "shop", "store")
    proxy = {"DestinationServiceName": "store", "DestinationServiceID": "store-9"}
    with echo("two") as port, contextlib.ExitStack() as held:
        stand(stage, LICTOR, "store", port, host=1)
        stand(stage, ENVOY, "shop", 0, "-upstreams", "store")
        store = upstream(stage, "shop-1", "store")
        assert wait_until(lambda: call(store) == b"two hello\n", TIMEOUT_S)
        with busy(*[store] * 4) as lines:
            for _ in range(8):
                nobody = held.enter_context(socket.socket())
                nobody.bind(("127.0.0.1", 0))  # it refuses, because it does not listen
                dead = nobody.getsockname()[1]
                row = {"ID": "store-9-sidecar-proxy", "Name": "store-sidecar-proxy", "Kind": "connect-proxy"}
                stage.api().put("/v1/agent/service/register", {**row, "Port": dead, "Proxy": proxy})
                assert wait_until(lambda at=dead: f":{at}::" in envoy_admin(stage, "shop-1", "clusters"), TIMEOUT_S)
                assert [call(store) for _ in range(4)] == [b"two hello\n"] * 4
            untouched(stage, "shop-1", *lines)
