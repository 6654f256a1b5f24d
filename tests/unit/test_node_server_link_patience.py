"""A link whose servers are slow, because everyone comes back to them at once, gives them more time and gets in."""

from __future__ import annotations

import asyncio
import itertools
import random
import ssl
from collections.abc import Callable

import pytest

from node import server_link
from node.config import Liveness
from node.errors import Overloaded, Unreachable
from node.rpc.client import ClientConnection
from node.server_link import ServerLink


class SlowToAccept(ServerLink):
    """Every dial would need ``needed_s``; what it was given is noted."""

    needed_s = 0.0

    def __init__(self) -> None:
        servers = [(f"server-{n}", f"127.0.0.1:{n}") for n in (1, 2, 3)]
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        super().__init__(servers, context, "dc1", Liveness(), rng=random.Random(1))
        self.given: list[float] = []
        self.served = asyncio.Event()

    async def _dial(
        self, name: str, address: str, timeout_s: float, on_reached: Callable[[], None] = lambda: None
    ) -> ClientConnection:
        self.given.append(timeout_s)
        if timeout_s >= self.needed_s:
            self.served.set()
            await asyncio.get_running_loop().create_future()
        await asyncio.sleep(timeout_s)
        raise Unreachable(f"{name} did not answer in {timeout_s} s")


async def test_slow_servers_are_given_more_time_up_to_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_link, "DIAL_TIMEOUT_S", 0.01)
    monkeypatch.setattr(server_link, "RACE_AFTER_S", 0.001)
    monkeypatch.setattr(server_link, "BACKOFF_S_MAX", 0.01)
    link = SlowToAccept()
    link.needed_s = 0.03  # three times what the first dial is given
    link.start()
    async with asyncio.timeout(10):
        await link.served.wait()
    await link.stop()
    assert link.given[:3] == [0.01] * 3  # a server that is merely lost is still given up soon
    assert link.given == sorted(link.given)
    assert link.given[-1] == pytest.approx(0.04)


class TooBusy(SlowToAccept):
    """Servers that turn everyone away, and by how much the rounds of dials lie apart."""

    def __init__(self) -> None:
        super().__init__()
        self.rounds: list[float] = []

    async def _dial(
        self, name: str, address: str, timeout_s: float, on_reached: Callable[[], None] = lambda: None
    ) -> ClientConnection:
        self.given.append(timeout_s)
        if len(self.given) % 3 == 1:
            self.rounds.append(asyncio.get_running_loop().time())
        if len(self.given) == 3 * 6:
            self.served.set()
        raise Overloaded(f"{name} is busy")


async def test_servers_that_say_that_they_are_busy_are_left_alone_for_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_link, "BACKOFF_S_MAX", 0.01)
    monkeypatch.setattr(server_link, "OVERLOADED_S_MIN", 0.02)
    monkeypatch.setattr(server_link, "OVERLOADED_S_MAX", 0.16)
    link = TooBusy()
    link.start()
    async with asyncio.timeout(10):
        await link.served.wait()
    await link.stop()
    pauses = [later - earlier for earlier, later in itertools.pairwise(link.rounds)]
    assert len(pauses) == 5
    assert pauses[0] >= 0.02 > 0.01, "longer from the first than for servers that merely do not answer"
    assert pauses[-1] >= 0.08


class Dialled(SlowToAccept):
    """Servers that never answer; their hosts are there or not."""

    there = False

    async def _dial(
        self, name: str, address: str, timeout_s: float, on_reached: Callable[[], None] = lambda: None
    ) -> ClientConnection:
        self.given.append(timeout_s)
        if self.there:
            on_reached()
        if len(self.given) == 2:
            self.served.set()
        await asyncio.get_running_loop().create_future()
        raise AssertionError


@pytest.mark.parametrize("there", [False, True])
async def test_a_server_whose_host_is_there_has_longer_before_it_gets_a_rival(
    there: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_link, "RACE_AFTER_S", 0.01)
    monkeypatch.setattr(server_link, "RACE_ANSWER_AFTER_S", 0.3 if there else 3600.0)
    link = Dialled()
    link.there = there
    began = asyncio.get_running_loop().time()
    link.start()
    async with asyncio.timeout(10):
        await link.served.wait()
    took_s = asyncio.get_running_loop().time() - began
    await link.stop()
    assert not there or took_s >= 0.3
