"""The configuration stream: refused once and for all at first, dialled for ever after, read whatever its chunks."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager

import pytest
from aiohttp import web

from cli.client import Api
from cli.errors import NoAgent, NoLeader, Refused
from cli.sidecar_stream import PID_HEADER, UpdateStream
from raftstate.model.sidecar import SidecarUpdate

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@asynccontextmanager
async def agent(handler: Handler) -> AsyncIterator[str]:
    """Serve the stream's path."""
    app = web.Application()
    app.router.add_post("/v1/agent/connect/proxy/{id}/stream", handler)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield f"127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


def _stream(address: str, said: list[str] | None = None) -> UpdateStream:
    return UpdateStream(
        Api(address),
        "web-1/x",
        {"ID": "web-1/x"},
        say=(said if said is not None else []).append,
        applied=lambda: None,
    )


def _line(version: int, roots: int = 0) -> bytes:
    return json.dumps({"Version": version, "Roots": ["r" * 1000] * roots}).encode() + b"\n"


async def _take(stream: UpdateStream, count: int) -> list[SidecarUpdate]:
    found: list[SidecarUpdate] = []
    async with asyncio.timeout(10), aclosing(stream.updates()) as updates:
        async for update in updates:
            found.append(update)
            if len(found) == count:
                break
    await stream.close()
    return found


async def test_lines_are_read_whatever_their_chunks() -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        assert request.match_info["id"] == "web-1/x"
        assert int(request.headers[PID_HEADER]) > 0
        assert await request.json() == {"ID": "web-1/x"}
        response = web.StreamResponse()
        await response.prepare(request)
        data = _line(1) + b"\n" + _line(2, roots=500) + _line(3)
        for start in range(0, len(data), 7919):
            await response.write(data[start : start + 7919])
        return response

    async with agent(handler) as address:
        stream = _stream(address)
        await stream.open(1)
        updates = await _take(stream, 3)
    assert [update.version for update in updates] == [1, 2, 3]
    assert updates[1].roots is not None
    assert len(updates[1].roots) == 500


async def test_a_lost_agent_is_dialled_again() -> None:
    dialled = 0
    said: list[str] = []

    async def handler(request: web.Request) -> web.StreamResponse:
        nonlocal dialled
        dialled += 1
        if dialled == 2:
            return web.Response(status=503, text="stopping")
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(_line(dialled))
        return response

    async with agent(handler) as address:
        stream = _stream(address, said)
        await stream.open(1)
        updates = await _take(stream, 2)
    assert [update.version for update in updates] == [1, 3]
    assert len([text for text in said if "lost the agent" in text]) == 1
    assert said[-1].startswith("the agent is back")


async def test_garbage_is_not_obeyed_and_not_fatal() -> None:
    dialled = 0

    async def handler(request: web.Request) -> web.StreamResponse:
        nonlocal dialled
        dialled += 1
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(b"<html>\n" if dialled == 1 else _line(7))
        return response

    async with agent(handler) as address:
        stream = _stream(address)
        await stream.open(1)
        assert (await _take(stream, 1))[0].version == 7


async def test_a_second_sidecar_is_refused_with_the_agents_text() -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        return web.Response(status=409, text="web-1 has a sidecar already: pid 42, since 10:00:00")

    async with agent(handler) as address:
        stream = _stream(address)
        with pytest.raises(Refused, match="pid 42") as error:
            await stream.open(1)
        assert error.value.exit_code == 1
        await stream.close()


async def test_an_election_is_waited_for_a_bounded_time() -> None:
    dialled = 0

    async def handler(request: web.Request) -> web.StreamResponse:
        nonlocal dialled
        dialled += 1
        return web.Response(status=500, text="No cluster leader")

    async with agent(handler) as address:
        stream = _stream(address)
        with pytest.raises(NoLeader):
            await stream.open(0.5)
        await stream.close()
    assert dialled > 1


async def test_no_agent_at_first_is_an_error(unused_tcp_port: int) -> None:
    stream = _stream(f"127.0.0.1:{unused_tcp_port}")
    with pytest.raises(NoAgent, match="lictor cluster up"):
        await stream.open(1)
    await stream.close()


async def test_an_agent_that_opens_the_stream_anew_is_reminded_of_what_calls_were_led_to() -> None:
    def upstreams(*ids: str, deregistered: tuple[str, ...] = ()) -> bytes:
        def rows(names: tuple[str, ...]) -> list[dict[str, object]]:
            return [
                {"Node": "n", "Address": "10.0.0.1", "Port": 1, "Service": "web", "ServiceID": name} for name in names
            ]

        spec = {"Name": "web", "Service": "web", "BindAddress": "", "BindPort": 1}
        more = {"Endpoints": rows(ids), "Deregistered": rows(deregistered)}
        return json.dumps({"Version": 1, "Upstreams": [spec | more]}).encode() + b"\n"

    dialled = 0
    answers: list[bytes] = []
    answered = asyncio.Event()
    fail = True

    async def answer(request: web.Request) -> web.Response:
        nonlocal fail
        body = await request.read()
        answered.set()
        if body and fail:
            fail = False
            return web.Response(status=404)
        answers.append(body)
        return web.Response()

    async def handler(request: web.Request) -> web.StreamResponse:
        nonlocal dialled
        dialled += 1
        response = web.StreamResponse()
        await response.prepare(request)
        if dialled == 1:
            for line in (upstreams("a", "b", "c"), upstreams("b", "c"), upstreams("c", deregistered=("b",))):
                answered.clear()
                await response.write(line)
                await answered.wait()
            return response
        await response.write(json.dumps({"Version": 1, "Roots": []}).encode() + b"\n")
        await response.write(upstreams("d"))
        while len(answers) < 20:
            answered.clear()
            await response.write(_line(2))
            await answered.wait()
        return response

    app = web.Application()
    app.router.add_post("/v1/agent/connect/proxy/{id}/stream", handler)
    app.router.add_put("/v1/agent/connect/answer/{id}", answer)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    stream = _stream(f"127.0.0.1:{runner.addresses[0][1]}")
    await stream.open(1)
    await _take(stream, 12)
    await runner.cleanup()
    said = [json.loads(body) for body in answers if body]
    assert len(said) == 1, "once, when it was taken"
    assert [one["ServiceID"] for one in said[0]["Left"]["web"]] == ["a", "c"]
