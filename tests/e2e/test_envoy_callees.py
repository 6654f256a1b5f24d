"""Whom an Envoy calls: the calls to an instance that is withdrawn end, and no others."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable

import pytest

from cli.demo_stage import wait_until
from tests.e2e.support_e2e import Mesh
from tests.e2e.support_envoy import (
    ENVOY,
    LICTOR,
    TIMEOUT_S,
    allow,
    call,
    echo,
    envoy_admin,
    restore,
    revoke,
    stand,
    upstream,
)
from tests.e2e.test_envoy import streaming
from tests.e2e.test_envoy_withdrawal import Busy, busy, untouched
from tests.support.promises import Since

PROMPT_S = 1.0


def revoke_it(mesh: Mesh) -> None:
    revoke(mesh, "store-1")


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
        (ENVOY, revoke_it),
        (LICTOR, revoke_it),
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
            since = Since()
            withdraw(stage)
            assert wait_until(lambda: all(one.ended_at for one in ones), TIMEOUT_S), "calls to it go on"
            took = since.took(PROMPT_S, "the withdrawal", at=max(one.ended_at for one in ones))
            print(f"{kind} {withdraw.__name__}: ended after {took:.3f} s")
            # The callee may have ended them before the caller's Envoy knew: a call may yet come to it, in vain.
            assert wait_until(lambda: {call(store) for _ in range(6)} == {b"two hello\n"}, TIMEOUT_S)
            untouched(stage, "shop-1", *twos)
        if withdraw is revoke_it:
            restore(stage, "store-1")
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
            since = Since()
            stage.api(1).put("/v1/agent/service/deregister/store-2")
            assert wait_until(lambda: all(one.ended_at for one in ones), TIMEOUT_S), "calls to it go on"
            since.took(PROMPT_S, "the withdrawal", at=max(one.ended_at for one in ones))
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
