"""A thousand live streams of twenty callers: a withdrawal ends those of one of them, and no other notices."""

from __future__ import annotations

import asyncio

import pytest

from raftstate.model.connect import Revocation
from tests.support.promises import Since
from tests.support.sidecars import Member, Mesh, allow, echo, until

CALLERS, STREAMS = 20, 50
ENDED_S_MAX = 1.0
"""What is promised (docs/architecture.md, law 9)."""


@pytest.mark.parametrize("by", ["intention", "identity"])
async def test_a_withdrawal_among_a_thousand_streams_ends_its_own_alone_and_promptly(by: str) -> None:
    loop = asyncio.get_running_loop()
    async with Mesh() as mesh:
        app = await mesh.app(echo)
        server = await mesh.member("backend", "backend-1", port=app.port)
        callers = [await mesh.member(f"web-{n}", f"web-{n}-1", upstreams=("backend",)) for n in range(CALLERS)]
        await server.allow(*(caller.service for caller in callers))
        for caller in callers:
            await caller.route("backend", server.endpoint)
        streams = {caller.service: [await caller.dial() for _ in range(STREAMS)] for caller in callers}

        async def round_trip(stream: tuple[asyncio.StreamReader, asyncio.StreamWriter]) -> float:
            began = loop.time()
            stream[1].write(b"here\n")
            assert await stream[0].readline() == b"here\n"
            return loop.time() - began

        async with asyncio.timeout(60):
            for of_caller in streams.values():
                await asyncio.gather(*map(round_trip, of_caller))
        denied = streams.pop("web-7")
        others = [stream for of_caller in streams.values() for stream in of_caller]
        talking = True
        slowest: list[float] = []

        async def talk(stream: tuple[asyncio.StreamReader, asyncio.StreamWriter]) -> None:
            while talking:
                slowest.append(await round_trip(stream))

        talkers = [asyncio.ensure_future(talk(of_caller[0])) for of_caller in streams.values()]
        since = Since()
        await _withdraw(server, callers[7], by, [caller.service for caller in callers])
        for reader, _ in denied:
            with pytest.raises(ConnectionError):
                await asyncio.wait_for(reader.read(), 10)
        since.took(ENDED_S_MAX, "the withdrawal")
        talking = False
        await asyncio.gather(*talkers)
        since.took(ENDED_S_MAX, "the slowest round trip", at=since.at + max(slowest))
        async with asyncio.timeout(60):
            await asyncio.gather(*map(round_trip, others))  # each of the 950 is there still
        assert await callers[7].ask() == b""
        for _, writer in (*denied, *others):
            writer.transport.abort()
        await until(lambda: server.sidecar.live_calls() == 0)


async def _withdraw(server: Member, caller: Member, by: str, services: list[str]) -> None:
    if by == "intention":
        kept = tuple(allow(service, "backend") for service in services if service != caller.service)
        await server.push(intentions=kept)
    else:
        await server.revoke(Revocation("instance", "web-7-1", caller.service))
