"""Writes begun past their handlers: the same commands and answers as theirs, and nothing that is not theirs alone."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from node.backend import Applied, RefusalInfo
from node.errors import BadRequest, Busy, NodeError, NoLeader, Refused, TimedOut, UnknownOutcome
from node.http.app import all_routes, create_app, make_runner
from node.http.context import HttpOptions
from node.http.front.listener import Front
from node.http.plain_writes import PLAIN_WRITES
from tests.support.http_api import Node, eventually, serving
from tests.support.promises import PATIENCE_S
from tests.support.raw_http import RawAnswer, RawClient

HOST = b"Host: 127.0.0.1:8500\r\n"
WEB = {"Node": "n2", "Address": "10.0.0.2", "Service": {"ID": "web-1", "Service": "web", "Port": 80}}
CHECK = {"Node": "n2", "Address": "10.0.0.2", "Check": {"CheckID": "c", "ServiceID": "web-1", "Status": "warning"}}


def request(path: str, body: object, *, method: str = "PUT", more: bytes = b"") -> bytes:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return f"{method} {path} HTTP/1.1\r\n".encode() + HOST + more + b"Content-Length: %d\r\n\r\n" % len(data) + data


def count_handlers(node: Node) -> list[Any]:
    """Commands that come by way of a handler from now on."""
    seen: list[Any] = []
    apply = node.backend.apply

    async def counted(command: Any, **kwargs: Any) -> Any:
        seen.append(command)
        return await apply(command, **kwargs)

    node.backend.apply = counted  # type: ignore[method-assign]
    return seen


async def ask(client: RawClient, data: bytes) -> RawAnswer:
    client.send(data)
    return await client.answer()


BODIES: list[dict[str, Any]] = [
    WEB, CHECK, {"Node": "n3", "Address": "10.0.0.3", "NodeMeta": {"a": "b"}, "ID": "an-id"},
    {"node": "n4", "address": "x", "service": {"service": "lower", "tags": ["a"], "weights": {"passing": 3}}},
    WEB | {"Service": {"Service": "p", "Kind": "connect-proxy", "Proxy": {"DestinationServiceName": "web"}}},
    WEB | {"Service": {"Service": "all", "Tags": ["x", "y"], "Meta": {"k": "v"}, "EnableTagOverride": True}},
    {"Node": "n2", "SkipNodeUpdate": True, "Checks": [{"Name": "only a name"}, {"CheckID": "other"}]},
    {"Node": "n2", "Address": "y", "Service": None, "Check": None, "Unknown": 1},
]  # fmt: skip


@pytest.mark.parametrize("body", BODIES)
async def test_a_registration_makes_the_command_that_its_handler_makes(tmp_path: Path, body: dict[str, Any]) -> None:
    async with serving(tmp_path) as node, await RawClient.open(node.port) as client:
        await ask(client, request("/v1/catalog/register", WEB))
        handled = count_handlers(node)
        begun = len(node.backend.applied)
        quick = await ask(client, request("/v1/catalog/register", body))
        assert not handled
        plain = await ask(client, request("/v1/catalog/register?x", body))
        assert len(handled) == 1
        first, second = node.backend.applied[begun:]
        assert first == second
        assert (quick.stable(), quick.status) == (plain.stable(), 200)


@pytest.mark.parametrize("value", [b"", b"v", b"\x00" * 60_000])
async def test_a_key_is_set_without_its_handler(tmp_path: Path, value: bytes) -> None:
    async with serving(tmp_path) as node, await RawClient.open(node.port) as client:
        handled = count_handlers(node)
        quick = await ask(client, request("/v1/kv/a/b", value))
        assert not handled
        assert quick.body == b"true"
        command = node.backend.applied[-1]
        plain = await ask(client, request("/v1/kv/a/b?x", value))
        assert (handled, quick.stable()) == ([command], plain.stable())
        assert command.value == value


THEIR_HANDLERS = [
    request("/v1/kv/a?flags=1", b"v"), request("/v1/kv/a%62", b"v"), request("/v1/kv/a", b"", method="DELETE"),
    request("/v1/kv/a", b"v", more=b"X-Lictor-Request-Id: 12345678\r\n"),
    request("/v1/catalog/register?dc=dc1", WEB), request("/v1/catalog/deregister", {"Node": "n2"}),
    request("/v1/kv/a", b"v", more=b"Origin: http://127.0.0.1\r\n".replace(b"127.0.0.1", b"evil.example")),
    request("/v1/kv/a", b"v", more=b"Sec-Fetch-Site: cross-site\r\n"), request("/v1/kv/", b"v"),
    request("/v1/kv/a", b"v").replace(b"127.0.0.1:8500", b"evil.example"), request("/v1/kv/a", b"v", method="POST"),
    request("/v1/catalog/register", {"Node": "x"}), request("/v1/catalog/register", b"{"),
    request("/v1/catalog/register", {"Node": "x", "Address": "y", "Service": {"Port": 1}}),
    request("/v1/kv/a", b"v" * 2000), request("/v1/catalog/register", WEB | {"NodeMeta": {"x": "y" * 3000}}),
]  # fmt: skip


@pytest.mark.parametrize("data", THEIR_HANDLERS)
async def test_what_means_more_than_a_write_is_left_to_its_handler(tmp_path: Path, data: bytes) -> None:
    options = HttpOptions(kv_value_bytes_max=1000, body_bytes_max=2500)
    async with serving(tmp_path, http_options=options) as node:
        begun = []

        def submit(command: Any, told: Any) -> bool:
            begun.append(command)
            return False

        node.backend.submit = submit  # type: ignore[method-assign]
        for _ in range(2):  # headers are judged once
            async with await RawClient.open(node.port) as client:
                answer = await ask(client, data)
            assert answer.status in (200, 400, 403, 405, 413), answer
            assert not begun


OUTCOMES: list[Applied | NodeError] = [
    Applied(7, True), Applied(7, False), Applied(7, {"a": 1}),
    Applied(7, None, RefusalInfo("conflict", "there is another", 409)), NoLeader(), NoLeader("who knows"),
    UnknownOutcome(), Busy("too much"), TimedOut("too late"), BadRequest("no"), Refused("no", http_status=418),
]  # fmt: skip


@pytest.mark.parametrize("outcome", OUTCOMES)
async def test_an_outcome_is_answered_as_the_handler_answers_it(tmp_path: Path, outcome: Applied | NodeError) -> None:
    async with serving(tmp_path) as node, await RawClient.open(node.port) as client:

        async def apply(command: Any, **_: Any) -> Any:
            if isinstance(outcome, NodeError):
                raise outcome
            return outcome

        def submit(command: Any, told: Any) -> bool:
            asyncio.get_running_loop().call_soon(told, outcome)
            return True

        node.backend.apply, node.backend.submit = apply, submit  # type: ignore[method-assign]
        for path, body in (("/v1/kv/a", b"v"), ("/v1/catalog/register", WEB)):
            quick = await ask(client, request(path, body))
            plain = await ask(client, request(path + "?x", body))
            assert quick.stable() == plain.stable()


def hold(node: Node) -> list[Any]:
    """Have writes begin, and wait in this list to be told their outcome."""
    waiting: list[Any] = []

    def submit(command: Any, told: Any) -> bool:
        waiting.append(told)
        return True

    node.backend.submit = submit  # type: ignore[method-assign]
    return waiting


async def test_writes_sent_ahead_are_begun_and_answered_one_after_the_other(tmp_path: Path) -> None:
    async with serving(tmp_path) as node, await RawClient.open(node.port) as client:
        waiting = hold(node)
        client.send(request("/v1/kv/a", b"1") + request("/v1/kv/b", b"2"))
        await eventually(lambda: waiting)
        assert len(waiting) == 1
        waiting.pop()(Applied(1, False))
        assert (await client.answer()).body == b"false"
        await eventually(lambda: waiting)
        waiting.pop()(Applied(2, True))
        assert (await client.answer()).body == b"true"


async def test_who_hangs_up_leaves_a_write_that_goes_on(tmp_path: Path) -> None:
    async with serving(tmp_path) as node:
        front: Front = node.runner.front
        waiting = hold(node)
        async with await RawClient.open(node.port) as client:
            client.send(request("/v1/kv/a", b"1"))
            await eventually(lambda: waiting)
        await eventually(lambda: not front.connections)
        waiting.pop()(Applied(1, True))
        assert front.writes is not None
        await asyncio.wait_for(front.writes.settled(3600), PATIENCE_S)


async def test_a_write_in_progress_is_answered_while_the_listener_ends(tmp_path: Path) -> None:
    async with serving(tmp_path) as node:
        waiting = hold(node)
        async with await RawClient.open(node.port) as client, await RawClient.open(node.port) as idle:
            client.send(request("/v1/kv/a", b"1"))
            await eventually(lambda: waiting)
            ending = asyncio.create_task(node.runner.front.shutdown(5))
            assert await idle.ended() == b""
            waiting.pop()(Applied(1, True))
            answer = await client.answer()
            assert (answer.status, answer.body, answer.header("Connection")) == (200, b"true", "close")
            assert await client.ended() == b""
            await ending


async def test_a_write_without_an_outcome_does_not_keep_the_listener(tmp_path: Path) -> None:
    async with serving(tmp_path) as node, await RawClient.open(node.port) as client:
        waiting = hold(node)
        client.send(request("/v1/kv/a", b"1"))
        await eventually(lambda: waiting)
        await node.runner.front.shutdown(0.05)
        assert await client.ended() == b""
        waiting.pop()(NoLeader())


async def test_only_where_nothing_else_stands_before_handlers_is_anything_written_here(tmp_path: Path) -> None:
    @web.middleware
    async def asks_for_tokens(request: web.Request, handler: Any) -> web.StreamResponse:
        return web.Response(status=403)

    async with serving(tmp_path) as node:
        assert node.runner.front.writes is not None
        app = create_app(node.backend, node.agent)
        app.middlewares.append(asks_for_tokens)
        runner = make_runner(app)
        await runner.setup()
        assert runner.front.writes is None
        await runner.cleanup()


def test_all_have_a_route() -> None:
    routes = {(method, route.path.replace(":.*", "")) for route in all_routes() for method in route.methods}
    assert set(PLAIN_WRITES) <= routes
