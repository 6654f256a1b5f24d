"""Blocking queries with the same head wait in one place: one run of the handler answers them all."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, cast

import pytest
from aiohttp import web

from node.errors import NodeError
from node.http.front import parking
from node.http.front.connection import Connection
from node.http.front.heads import Head, parse_head
from node.http.front.parking import Parking
from node.http.front.repeats import Body, Parked
from node.http.reading import Reading
from tests.support.http_api import Node, eventually, serving
from tests.support.raw_http import RawClient


def register(port: int) -> dict[str, Any]:
    return {"Node": "n2", "Address": "10.0.0.2", "Service": {"ID": "web-1", "Service": "web", "Port": port}}


def get(path: str, more: str = "") -> bytes:
    return f"GET {path} HTTP/1.1\r\nHost: localhost\r\n{more}\r\n".encode()


async def index_of(node: Node, path: str = "/v1/health/service/web") -> str:
    async with node.http.get(node.url + path) as answer:
        return answer.headers["X-Consul-Index"]


async def park(node: Node, stack: AsyncExitStack, request: bytes, count: int) -> list[RawClient]:
    before = len(node.runner.front.parking)
    clients = [await stack.enter_async_context(await RawClient.open(node.port)) for _ in range(count)]
    for client in clients:
        client.send(request)
    await eventually(lambda: len(node.runner.front.parking) == before + count)
    return clients


@pytest.mark.parametrize("mode", ["&stale", "", "&consistent"])
async def test_one_run_of_the_handler_answers_all_who_wait_for_the_same(
    tmp_path: Path, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = 0
    decode = Reading.decode

    def counted(self: Reading, kind: Any) -> Any:
        nonlocal runs
        runs += 1
        return decode(self, kind)

    async with serving(tmp_path) as node, AsyncExitStack() as stack:
        await node.put("/v1/catalog/register", register(80))
        path = f"/v1/health/service/web?index={await index_of(node)}&wait=60s{mode}"
        clients = await park(node, stack, get(path), 120)
        (other,) = await park(node, stack, get(path + "&filter=Service.Port==80"), 1)
        front = node.runner.front
        assert not [one for one in front.connections if one.task is not None], "a request that waits has no task"
        monkeypatch.setattr(Reading, "decode", counted)
        await node.put("/v1/catalog/register", register(7))
        answers = [await client.answer() for client in clients]
        assert {json.loads(answer.body)[0]["Service"]["Port"] for answer in answers} == {7}
        assert {answer.header("X-Consul-Index") for answer in answers} == {await index_of(node)}
        assert (await other.answer()).body == b"[]", "another filter is another answer"
        assert runs <= 4, "each of the two heads is answered by one run, and `index_of` asked once"
        assert len(front.parking) == 0
        clients[0].send(get("/v1/status/leader"))
        assert (await clients[0].answer()).status == 200


async def test_each_reader_has_its_own_time(tmp_path: Path) -> None:
    async with serving(tmp_path) as node, AsyncExitStack() as stack:
        await node.put("/v1/catalog/register", register(80))
        index = await index_of(node)
        patient = await park(node, stack, get(f"/v1/health/service/web?index={index}&wait=60s"), 2)
        async with await RawClient.open(node.port) as hasty:
            hasty.send(get(f"/v1/health/service/web?index={index}&wait=50ms"))
            answer = await hasty.answer()
        assert (answer.status, answer.header("X-Consul-Index")) == (200, index)
        assert json.loads(answer.body)[0]["Service"]["Port"] == 80
        assert len(node.runner.front.parking) == 2
        await node.put("/v1/catalog/register", register(7))
        assert [json.loads((await one.answer()).body)[0]["Service"]["Port"] for one in patient] == [7, 7]


async def test_a_reader_whose_handler_would_find_nothing_new_waits_without_one(tmp_path: Path) -> None:
    async with serving(tmp_path) as node, AsyncExitStack() as stack:
        await node.put("/v1/catalog/register", register(80))
        request = get(f"/v1/health/service/web?index={await index_of(node)}&wait=60s&stale")
        await park(node, stack, request, 1)
        handled = node.runner.front.handle

        async def never(head: Head, request: web.Request) -> web.StreamResponse:
            raise AssertionError("the handler ran")

        node.runner.front.handle = never
        (second,) = await park(node, stack, request, 1)
        node.runner.front.handle = handled
        await node.put("/v1/catalog/register", register(7))
        assert json.loads((await second.answer()).body)[0]["Service"]["Port"] == 7
        second.send(request)  # whose index is the past's by now: answered at once
        assert json.loads((await second.answer()).body)[0]["Service"]["Port"] == 7


async def test_nothing_stays_behind_readers_that_left(tmp_path: Path) -> None:
    async with serving(tmp_path) as node, AsyncExitStack() as stack:
        watches, front = node.backend.watches, node.runner.front
        idle = len(watches)
        request = get("/v1/kv/none?index=1&wait=60s")
        clients = await park(node, stack, request, 1)
        await eventually(lambda: len(watches) > idle)
        one = len(watches)
        clients += await park(node, stack, request, 4)
        assert len(watches) == one, "all of them wait at one place of the state"
        for client in clients:
            client.writer.close()
        await eventually(lambda: len(front.parking) == 0)
        await eventually(lambda: len(watches) == idle)
        assert not front.parking._places


async def test_a_token_that_was_withdrawn_while_its_request_waited_sees_nothing_new(tmp_path: Path) -> None:
    async with serving(tmp_path) as node, AsyncExitStack() as stack:
        good = {"secret-1", "secret-2"}

        @web.middleware
        async def require_token(request: web.Request, handler: Any) -> web.StreamResponse:
            if request.headers.get("X-Consul-Token") not in good:
                return web.Response(status=403, text="ACL not found")
            return cast(web.StreamResponse, await handler(request))

        # Before the application's own guard, where the process puts its own.
        app = cast(Any, node.runner.app)
        app._middlewares = [require_token, *app._middlewares]
        path = "/v1/kv/k?index=1&wait=60s&raw"
        (first,) = await park(node, stack, get(path, "X-Consul-Token: secret-1\r\n"), 1)
        (second,) = await park(node, stack, get(path, "X-Consul-Token: secret-2\r\n"), 1)
        good.discard("secret-1")
        async with node.http.put(node.url + "/v1/kv/k", data=b"v", headers={"X-Consul-Token": "secret-2"}) as done:
            assert done.status == 200
        answer = await first.answer()
        assert (answer.status, answer.body) == (403, b"ACL not found")
        assert (await second.answer()).body == b"v"


async def test_the_listener_ends_without_waiting_for_those_who_wait(tmp_path: Path) -> None:
    async with serving(tmp_path) as node, AsyncExitStack() as stack:
        (client,) = await park(node, stack, get("/v1/kv/none?index=1&wait=60s"), 1)
        began = asyncio.get_running_loop().time()
        await node.runner.front.shutdown(5.0)
        assert await client.ended() == b""
        assert asyncio.get_running_loop().time() - began < 4.0


class Reader:
    """A connection as the parking sees one."""

    def __init__(self, name: str, log: list[str], outcomes: list[bytes | Parked]) -> None:
        self.name, self.log, self.outcomes = name, log, outcomes

    async def make(self, head: Head, body: Body) -> tuple[bytes, bool]:
        self.log.append("made" if body.waits else "made as it stands")
        await asyncio.sleep(0)
        outcome = self.outcomes.pop(0)
        if isinstance(outcome, Parked):
            raise outcome
        return outcome, False

    def take(self, answer: bytes, *, ends: bool) -> None:
        self.log.append(f"{self.name} {answer.decode()}")

    def again(self, head: Head) -> None:
        self.log.append(f"{self.name} again")


class Query:
    """What `newer` waits for."""

    def __init__(self) -> None:
        self.calls: list[asyncio.Future[None]] = []

    async def newer(self, name: str, params: Mapping[str, Any], min_index: int, wait_s: float) -> None:
        self.calls.append(asyncio.get_running_loop().create_future())
        await self.calls[-1]


def head_of(path: str = "/v1/kv/k?index=5&wait=60s") -> Head:
    head = parse_head(get(path))
    assert head is not None
    return head


def parked(wait_s: float = 60.0) -> Parked:
    return Parked("kv.get", {"key": "k"}, 5, wait_s, stale=False)


async def test_a_wake_for_nothing_is_no_answer_and_no_readers_time_is_lost_by_it() -> None:
    query, log = Query(), list[str]()
    outcomes: list[bytes | Parked] = [parked(), b"new"]
    lot, head = Parking(query.newer), head_of()
    patient, hasty = (cast(Connection, Reader(name, log, outcomes)) for name in ("patient", "hasty"))
    lot.enter(patient, head, parked())
    lot.enter(hasty, head, parked(0.0))
    await eventually(lambda: "hasty again" in log)
    lot.enter(hasty, head, parked(0.02))
    await eventually(lambda: query.calls)
    query.calls[0].set_result(None)
    await eventually(lambda: len(query.calls) == 2)
    await eventually(lambda: log.count("hasty again") == 2)
    query.calls[1].set_result(None)
    await eventually(lambda: "patient new" in log)
    assert len(lot) == 0
    await lot.close()


async def test_a_failure_to_wait_is_answered_and_not_tried_in_a_circle() -> None:
    log: list[str] = []

    async def fails(name: str, params: Mapping[str, Any], min_index: int, wait_s: float) -> None:
        raise NodeError("planted")

    lot = Parking(fails)
    lot.enter(cast(Connection, Reader("one", log, [b"told"])), head_of(), parked())
    await eventually(lambda: "one told" in log)
    assert log == ["made as it stands", "one told"]
    await lot.close()


async def test_who_comes_while_an_answer_is_made_does_not_get_it() -> None:
    query, log = Query(), list[str]()
    lot, head = Parking(query.newer), head_of()
    late = cast(Connection, Reader("late", log, [b"second"]))

    class Slow(Reader):
        async def make(self, head: Head, body: Body) -> tuple[bytes, bool]:
            lot.enter(late, head, parked())
            return await super().make(head, body)

    lot.enter(cast(Connection, Slow("early", log, [b"first"])), head, parked())
    await eventually(lambda: query.calls)
    query.calls[0].set_result(None)
    await eventually(lambda: "early first" in log and len(query.calls) == 2)
    assert "late first" not in log
    query.calls[1].set_result(None)
    await eventually(lambda: "late second" in log)
    await lot.close()


async def test_the_loop_has_its_turn_between_handfuls_of_answers() -> None:
    query, log = Query(), list[str]()
    lot, head = Parking(query.newer), head_of()
    count = parking.ANSWERS_A_TURN * 10
    for number in range(count):
        lot.enter(cast(Connection, Reader(str(number), log, [b"x"] * 2)), head, parked())
    await eventually(lambda: query.calls)
    most = 0
    query.calls[0].set_result(None)
    while len(lot):
        before = len(log)
        await asyncio.sleep(0)
        most = max(most, len(log) - before)
    assert len(log) == count + 1
    assert most <= parking.ANSWERS_A_TURN + 1, f"{most} answers were given in one turn of the loop"
    await lot.close()
