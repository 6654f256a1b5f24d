"""The fast lane gives the answers that aiohttp's protocol gives, byte for byte, and hands over what it must."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from node.errors import BadRequest
from node.http.app import all_routes
from node.http.context import HttpOptions
from node.http.front.connection import Connection
from node.http.front.heads import BODY_BYTES_MAX, HEAD_BYTES_MAX, Head, HeadCache, parse_head
from node.http.front.repeats import Body
from node.http.front.routing import Router
from node.tokens import hash_of
from raftstate.model.acl import Policy, Token
from raftstate.state.commands import DeleteToken, UpsertPolicy
from tests.support.acl import ROOT, guarded, token_with
from tests.support.acl import ask as ask_with
from tests.support.http_api import Node, eventually, serving
from tests.support.raw_http import RawAnswer, RawClient

HOST = b"Host: 127.0.0.1:8500\r\n"
WEB = {
    "Node": "n2",
    "Address": "10.0.0.2",
    "NodeMeta": {"zone": "a"},
    "Service": {"ID": "web-1", "Service": "web", "Port": 80, "Tags": ["v1", "\u00fc"]},
    "Checks": [{"CheckID": "c1", "Name": "c", "Status": "passing", "ServiceID": "web-1"}],
}
SICK = WEB | {
    "Node": "n3",
    "Service": {"ID": "web-2", "Service": "web", "Port": 81},
    "Checks": [{"CheckID": "c2", "Name": "c", "Status": "critical", "ServiceID": "web-2"}],
}


def put(path: str, body: object = b"", *, method: str = "PUT", more: bytes = b"") -> bytes:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return f"{method} {path} HTTP/1.1\r\n".encode() + HOST + more + b"Content-Length: %d\r\n\r\n" % len(data) + data


def get(path: str, more: bytes = b"", *, method: bytes = b"GET") -> bytes:
    return method + b" " + path.encode() + b" HTTP/1.1\r\n" + HOST + more + b"\r\n"


@asynccontextmanager
async def both(directory: Path, options: HttpOptions | None = None) -> AsyncIterator[tuple[Node, int, int]]:
    """A node, the port of its listener, and one where its aiohttp protocol listens alone."""
    async with serving(directory, http_options=options) as node:
        for body in (WEB, SICK):
            await node.put("/v1/catalog/register", body)
        await node.put("/v1/kv/a/b", {"x": 1})
        await node.put("/v1/agent/service/register", {"Name": "mine", "Port": 1, "Check": {"TTL": "10m"}})
        loop = asyncio.get_running_loop()
        alone = await loop.create_server(node.runner.front.make_slow, "127.0.0.1", 0)
        try:
            yield node, node.port, alone.sockets[0].getsockname()[1]
        finally:
            alone.close()


async def ask(port: int, request: bytes, times: int = 1) -> list[RawAnswer]:
    """Ask over and over, on one connection unless its other end closes it."""
    answers: list[RawAnswer] = []
    while len(answers) < times:
        async with await RawClient.open(port) as client:
            try:
                while len(answers) < times:
                    client.send(request)
                    answers.append(await client.answer())
            except (EOFError, ConnectionError):
                assert answers, request
    return answers


READS = [
    "/v1/health/service/web?stale", "/v1/health/service/web?passing&stale", "/v1/health/service/web",
    "/v1/health/service/web?passing=1&tag=v1&stale=", "/v1/health/service/web?passing=maybe", "/v1/health/service/",
    "/v1/health/service/web?stale&pretty", "/v1/health/service/web?consistent", "/v1/health/service/web?cached",
    "/v1/health/service/web?stale&consistent", "/v1/health/service/none?stale", "/v1/health/service/w%65b?stale",
    "/v1/health/service/web?stale&filter=Service.Port==80", "/v1/health/service/web?stale&filter=Service.Port+==+80",
    "/v1/health/service/web?stale&filter=%28Node.Node%3D%3D%22n2%22%29", "/v1/health/service/web?filter=Bad+stuff",
    "/v1/health/service/web?stale&near=n3", "/v1/health/service/web?stale&node-meta=zone:a", "/v1/health/connect/web",
    "/v1/health/service/web?stale&dc=elsewhere", "/v1/health/service/web?stale&dc=dc1", "/v1/health/node/n2?stale",
    "/v1/health/service/web?index=x", "/v1/health/service/web?index=99999&wait=1ms", "/v1/health/state/any?stale",
    "/v1/health/service/web?max_stale=10s", "/v1/health/service/web?max_stale=x", "/v1/health/service/web?wait=-1s",
    "/v1/catalog/service/web?stale", "/v1/catalog/service/web?stale&pretty=1", "/v1/catalog/service/web?tag=v1",
    "/v1/catalog/services?stale", "/v1/catalog/nodes?stale", "/v1/catalog/node/n2?stale", "/v1/catalog/datacenters",
    "/v1/kv/a/b", "/v1/kv/a/b?raw", "/v1/kv/a?recurse", "/v1/kv/?keys&separator=/", "/v1/kv/none", "/v1/kv/",
    "/v1/kv/a%2Fb", "/v1/kv/a//b", "/v1/kv/../kv/a/b", "/v1/kv/a/b?stale&token=x", "/v1/status/leader", "/", "/v1",
    "/v1/agent/self", "/v1/agent/services", "/v1/agent/checks", "/v1/agent/service/mine", "/v1/connect/ca/roots",
    "/v1/agent/service/none", "/v1/no/such", "/v1/health/service/web?stale#x", "/v1/kv/a b", "//v1/kv/a/b", "*",
    "/v1/kv/a/b?x=%00&y=%ff&z=+;&&=", "/v1/health/service/" + "x" * 3000, "/v1/agent/health/service/name/mine",
    "/ui/", "/v1/kv/\u00fc", "http://127.0.0.1:8500/v1/kv/a/b", "/v1/health/service/web?" + "a=1&" * 500 + "stale",
]  # fmt: skip


async def test_reads_are_the_same_both_ways(tmp_path: Path) -> None:
    async with both(tmp_path) as (_, fast, slow):
        for path in READS:
            quick, plain = await ask(fast, get(path), 3), await ask(slow, get(path), 1)
            assert [one.stable() for one in quick] == [plain[0].stable()] * 3, path


HEADERS = [
    b"Origin: http://evil.example\r\n", b"Sec-Fetch-Site: cross-site\r\n", b"Cache-Control: max-age=x\r\n",
    b"Accept: text/html\r\n", b"Connection: Keep-Alive\r\n", b"X-Consul-Token:  a  \r\n", b"X-Empty:\r\n",
    b"Accept-Encoding: gzip, br\r\n", b"Cache-Control: max-age=3, must-revalidate\r\n", b"X: \xc3\xbc\r\n",
    b"X-Consul-Token: a\r\nX-Consul-Token: b\r\n", b"X: a\r\n b\r\n", b"Content-Length: 0\r\n",
    b"".join(b"X-%d: 1\r\n" % number for number in range(60)),
]  # fmt: skip


async def test_headers_mean_the_same_both_ways(tmp_path: Path) -> None:
    async with both(tmp_path) as (_, fast, slow):
        for more in HEADERS:
            for request in (
                get("/v1/health/service/web?stale", more),
                put("/v1/kv/h", b"1", more=more if b"Length" not in more else b""),
                get("/v1/kv/h", more, method=b"DELETE"),
            ):
                (quick,), (plain,) = await ask(fast, request), await ask(slow, request)
                assert quick.stable() == plain.stable(), request
        evil = get("/v1/health/service/web?stale").replace(b"127.0.0.1:8500", b"evil.example")
        (quick,), (plain,) = await ask(fast, evil), await ask(slow, evil)
        assert quick.status == 403
        assert quick.stable() == plain.stable()


WRITES = [
    put("/v1/kv/k", b"value"), put("/v1/kv/k?flags=7", b""), put("/v1/kv/k?flags=x", b""), put("/v1/kv/", b"v"),
    put("/v1/kv/k?cas=0", b"v"), put("/v1/kv/k?cas=1&acquire=x", b"v"), put("/v1/kv/k?acquire=none", b"v"),
    put("/v1/kv/sp%20ace", b"v"), put("/v1/kv/k", b"\x00" * 40_000), put("/v1/kv/k", b"v" * (BODY_BYTES_MAX + 1)),
    put("/v1/kv/k", b"v" * 600_000), get("/v1/kv/k", method=b"PUT"), get("/v1/kv/k", method=b"DELETE"),
    put("/v1/agent/service/register", {"Name": "mine", "Port": 2}), put("/v1/agent/service/register", b"{"),
    put("/v1/agent/service/register", {}), put("/v1/agent/service/register", {"Name": "x", "Port": "no"}),
    put("/v1/agent/service/deregister/mine"), put("/v1/agent/service/deregister/none"),
    put("/v1/catalog/register", WEB), put("/v1/catalog/register", {"Node": "x"}), put("/v1/catalog/register", b""),
    put("/v1/catalog/deregister", {"Node": "n9"}), put("/v1/kv/k", b"v", more=b"X-Lictor-Request-Id: ?\r\n"),
    put("/v1/catalog/register", WEB, method="POST"), put("/v1/session/create", {"TTL": "nope"}),
    put("/v1/txn", [{"KV": {"Verb": "get", "Key": "a/b"}}]), put("/v1/kv/a", b"v", method="PATCH"),
    put("/v1/kv/k", b"v", more=b"Content-Type: application/x-www-form-urlencoded\r\n"),
]  # fmt: skip


async def test_writes_are_the_same_both_ways(tmp_path: Path) -> None:
    async with both(tmp_path) as (node, fast, slow):
        for request in WRITES:
            seen = []
            for port in (fast, slow):
                await node.put("/v1/agent/service/register", {"Name": "mine", "Port": 1})
                await ask(slow, get("/v1/kv/k", method=b"DELETE"))
                (answer,) = await ask(port, request)
                (value,) = await ask(slow, get("/v1/kv/k?raw"))
                seen.append((answer.stable(), value.status, value.body))
            assert seen[0] == seen[1], request[:200]


def own(node: Node) -> int:
    return sum(not one.is_slow() for one in node.runner.front.connections)


@pytest.mark.parametrize(
    "path", ["/v1/health/service/web?stale", "/v1/catalog/service/web?stale&passing", "/v1/kv/a/b", "/v1/agent/self"]
)
async def test_plain_requests_stay_in_the_fast_lane(tmp_path: Path, path: str) -> None:
    async with both(tmp_path) as (node, fast, _):
        async with await RawClient.open(fast) as client:
            before = own(node)
            for request in (get(path), get(path), put("/v1/kv/z", b"1"), get("/v1/kv/z", method=b"DELETE")):
                client.send(request)
                assert (await client.answer()).status == 200
            assert own(node) == before >= 1


async def test_a_repeated_read_is_answered_without_its_handler_until_its_rows_change(tmp_path: Path) -> None:
    async with both(tmp_path) as (node, fast, _):
        runs = 0
        query = node.backend.query

        async def counted(*args: object, **kwargs: object) -> object:
            nonlocal runs
            runs += 1
            return await query(*args, **kwargs)  # type: ignore[arg-type]

        node.backend.query = counted  # type: ignore[method-assign, assignment]
        request = get("/v1/health/service/web?passing&stale")
        async with await RawClient.open(fast) as client:

            async def read() -> RawAnswer:
                client.send(request)
                return await client.answer()

            first = await read()
            assert runs == 1
            again = await read()
            assert (runs, again.stable()) == (1, first.stable())
            await node.put("/v1/kv/other", 1)
            assert (await read()).body == first.body
            assert runs == 1
            await node.put("/v1/catalog/register", WEB | {"Service": WEB["Service"] | {"Port": 99}})  # type: ignore[operator]
            changed = await read()
            assert runs == 2
            assert json.loads(changed.body)[0]["Service"]["Port"] == 99
            assert int(changed.header("X-Consul-Index")) > int(first.header("X-Consul-Index"))
            await node.put("/v1/catalog/deregister", {"Node": "n2"})
            assert json.loads((await read()).body) == []


async def test_where_tokens_are_asked_for_an_answer_is_sent_again_to_who_may_still_see_it(
    tmp_path: Path,
) -> None:
    async with guarded(tmp_path) as node, await RawClient.open(node.port) as client:
        assert (await ask_with(node, "PUT", "/v1/catalog/register", ROOT, json=WEB))[0] == 200
        rules = 'node_prefix "" { policy = "read" } service "web" { policy = "read" }'
        seeing, other = await token_with(node.backend, rules), await token_with(node.backend, rules)

        async def told(token: str) -> tuple[int, bool, str]:
            row = b"X-Consul-Token: %s\r\n" % token.encode() if token else b""
            client.send(get("/v1/health/service/web?stale", row))
            answer = await client.answer()
            return answer.status, b"web-1" in answer.body, answer.header("X-Consul-Results-Filtered-By-ACLs")

        def row_of(token: str) -> Token:
            return node.backend.machine.store.tokens.by_secret_hash[hash_of(token)]

        shown, hidden = (200, True, ""), (200, False, "true")
        for token, expected in (("", hidden), (ROOT, shown), (seeing, shown), (other, shown)) * 3:
            assert await told(token) == expected
        heads = node.runner.front.heads._held.values()
        assert sum(head.memo is not None for head in heads) == 4
        await node.backend.apply(UpsertPolicy(Policy(row_of(seeing).policies[0], "narrower", rules="")))
        assert await told(seeing) == hidden
        await node.backend.apply(DeleteToken(row_of(other).accessor_id))
        assert (await told(other))[0] == 403
        assert await told(ROOT) == shown
        await ask_with(node, "PUT", "/v1/agent/token/default", ROOT, json={"Token": ROOT})
        assert await told("") == shown
        assert not any(one.is_slow() for one in node.runner.front.connections)


async def test_what_stands_before_the_handlers_and_is_not_known_forbids_repeats(tmp_path: Path) -> None:
    """A middleware may judge by what no head says."""
    from aiohttp import web

    from node.agent.agent import LocalAgent
    from node.http.app import create_app, make_runner
    from tests.support.http_api import SigningBackend, TestCa, options

    backend, seen = SigningBackend(TestCa()), 0

    @web.middleware
    async def count(request: web.Request, handler: Any) -> web.StreamResponse:
        nonlocal seen
        seen += 1
        answer: web.StreamResponse = await handler(request)
        return answer

    agent = LocalAgent(backend, options(tmp_path))
    await agent.start()
    app = create_app(backend, agent)
    app.middlewares.insert(0, count)
    runner = make_runner(app)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        async with await RawClient.open(runner.addresses[0][1]) as client:
            for number in range(1, 4):
                client.send(get("/v1/health/service/web?stale"))
                assert (await client.answer()).status == 200
                assert seen == number
    finally:
        await agent.stop()
        await runner.cleanup()
        await backend.close()


READ, KV = get("/v1/health/service/web?stale"), put("/v1/kv/p", b"x\r\n\r\ny")
CHUNKED = b"PUT /v1/kv/p HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: chunked\r\n\r\n2\r\nab\r\n1\r\nc\r\n0\r\n\r\n"
STREAMS: dict[str, tuple[list[bytes], list[int]]] = {
    "two reads": ([READ, READ], [200, 200]),
    "reads around a write": ([READ, KV, READ, get("/v1/kv/p?raw"), READ], [200] * 5),
    "a chunked body, then plain ones": ([READ, CHUNKED, READ, KV, get("/v1/kv/p?raw")], [200] * 5),
    "odd ones between": ([READ, get("/v1/kv/p", b"Expect: nothing\r\n"), READ], [200, 417, 200]),
    "an empty line before": ([b"\r\n", READ, READ], [200, 200]),
    "an empty line between": ([READ, b"\r\n", READ], [200, 200]),
    "many": ([READ, KV] * 60, [200] * 120),
    "junk at the end": ([READ, KV, b"junk\r\n\r\n"], [200, 200, 400]),
    "a bare line feed": ([READ, b"GET /v1/kv/p HTTP/1.1\nHost: a\n\n\r\n\r\n"], [200, 400]),
    "two lengths": ([READ, KV.replace(b"Content-L", b"Content-Length: 3\r\nContent-L")], [200, 400]),
    "length and chunks": ([READ, CHUNKED.replace(b"Transf", b"Content-Length: 3\r\nTransf")], [200, 400]),
    "no host": ([READ, b"GET /v1/status/leader HTTP/1.1\r\n\r\n"], [200, 400]),
}


@pytest.mark.parametrize("name", STREAMS)
@pytest.mark.parametrize("split", [0, 1, 7, 100])
async def test_requests_sent_ahead_are_answered_in_order(tmp_path: Path, name: str, split: int) -> None:
    requests, statuses = STREAMS[name]
    if name == "many" and split in (1, 7):
        requests, statuses = requests[:6], statuses[:6]
    # What makes the other side close comes in one piece: it would not read the rest, and reset the connection.
    whole = 1 if statuses[-1] == 400 else 0
    data = b"".join(requests[: len(requests) - whole])
    pieces = [data[start : start + split] for start in range(0, len(data), split)] if split else [data]
    pieces += requests[len(requests) - whole :]
    async with both(tmp_path) as (_, fast, slow):
        answers: list[list[RawAnswer]] = []
        for port in (fast, slow):
            async with await RawClient.open(port) as client:
                for piece in pieces if split else [b"".join(pieces)]:
                    client.send(piece)
                    await asyncio.sleep(0)
                answers.append([])
                # aiohttp alone forgets sound requests that came in one piece with one that is malformed.
                while len(answers[-1]) < len(statuses) and 400 not in [one.status for one in answers[-1]]:
                    answers[-1].append(await client.answer())
        quick, plain = answers
        assert [one.status for one in quick] == statuses
        if statuses[-1] != 400:
            shown = [[(one.status, one.body, [name for name, _ in one.fields]) for one in lane] for lane in answers]
            assert shown[0] == shown[1]
        else:
            assert (quick[-1].status, quick[-1].header("Connection")) == (400, plain[-1].header("Connection"))


async def test_what_is_no_plain_request_is_handed_over(tmp_path: Path) -> None:
    async with both(tmp_path) as (node, fast, _):
        async with await RawClient.open(fast) as client:
            client.send(put("/v1/kv/e", b"", more=b"Expect: 100-continue\r\n").replace(b"Length: 0", b"Length: 3"))
            assert (await client.answer()).status == 100
            client.send(b"abc")
            assert (await client.answer()).body == b"true"
            client.send(get("/v1/kv/e?raw"))
            assert (await client.answer()).body == b"abc"
        async with await RawClient.open(fast) as client:
            client.send(get("/v1/kv/e", method=b"HEAD") + get("/v1/kv/e?raw"))
            assert (await client.answer(head_only=True)).status == 405
        async with await RawClient.open(fast) as client:
            client.send(b"GET /v1/kv/e?raw HTTP/1.0\r\n\r\n")
            answer = await client.answer()
            assert (answer.body, await client.ended()) == (b"abc", b"")
        async with await RawClient.open(fast) as client:
            client.send(get("/v1/kv/e?raw", b"Connection: close\r\n"))
            answer = await client.answer()
            assert (answer.body, answer.header("Connection"), await client.ended()) == (b"abc", "close", b"")
        async with await RawClient.open(fast) as client:
            client.send(b"GET /v1/kv/" + b"x" * 9000 + b" HTTP/1.1\r\n" + HOST + b"\r\n")
            assert (await client.answer()).status == 400
        async with await RawClient.open(fast) as client:
            client.send(b"GET /v1/kv/" + b"x" * 70_000)
            answer = await client.answer()
            assert (answer.status, answer.header("Connection")) == (431, "close")
        async with await RawClient.open(fast) as client:
            client.send(get("/v1/agent/monitor"))
            await eventually(lambda: any(one.is_slow() for one in node.runner.front.connections))


async def test_a_blocking_query_answers_when_something_changes_and_ends_with_its_client(tmp_path: Path) -> None:
    async with both(tmp_path) as (node, fast, _):
        watches = node.backend.watches
        async with await RawClient.open(fast) as client:
            client.send(get("/v1/health/service/web?stale"))
            index = (await client.answer()).header("X-Consul-Index")
            idle = len(watches)
            client.send(get(f"/v1/health/service/web?stale&index={index}&wait=60s") + get("/v1/status/leader"))
            await eventually(lambda: len(watches) > idle)
            await node.put("/v1/catalog/register", WEB | {"Service": WEB["Service"] | {"Port": 7}})  # type: ignore[operator]
            answer = await client.answer()
            assert json.loads(answer.body)[0]["Service"]["Port"] == 7
            assert (await client.answer()).status == 200
            index = answer.header("X-Consul-Index")
            client.send(get(f"/v1/health/service/web?index={index}&wait=60s"))
            await eventually(lambda: len(watches) > idle)
        await eventually(lambda: len(watches) <= idle)


@pytest.mark.parametrize(
    ("raised", "status"),
    [(ConnectionError("planted"), 500), (TimeoutError("planted"), 504), (asyncio.CancelledError("planted"), None)],
)
async def test_a_handlers_failure_is_told_and_ends_the_connection(
    tmp_path: Path, raised: BaseException, status: int | None
) -> None:
    async with both(tmp_path) as (node, fast, _):

        async def broken(*_: object, **__: object) -> object:
            raise raised

        node.backend.query = broken  # type: ignore[method-assign, assignment]
        async with await RawClient.open(fast) as client:
            client.send(READ + READ)
            if status is not None:
                answer = await client.answer()
                assert (answer.status, answer.header("Connection")) == (status, "close")
            assert await client.ended() == b""
            await eventually(lambda: own(node) == 1)  # the one that wrote what `both` shows


async def test_a_failure_to_ask_again_is_the_handlers_to_tell(tmp_path: Path) -> None:
    async with both(tmp_path) as (node, fast, _):

        def broken(*_: object) -> None:
            raise BadRequest("planted")

        async with await RawClient.open(fast) as client:
            node.runner.front.ask = broken
            for _ in range(3):
                client.send(READ)
                assert (await client.answer()).status == 200


async def test_a_request_in_progress_is_answered_while_the_listener_ends(tmp_path: Path) -> None:
    async with both(tmp_path) as (node, fast, _):
        release, begun, query = asyncio.Event(), asyncio.Event(), node.backend.query

        async def held(*args: object, **kwargs: object) -> object:
            begun.set()
            await release.wait()
            return await query(*args, **kwargs)  # type: ignore[arg-type]

        node.backend.query = held  # type: ignore[method-assign, assignment]
        async with await RawClient.open(fast) as client, await RawClient.open(fast) as idle:
            client.send(READ)
            await begun.wait()
            ending = asyncio.create_task(node.runner.front.shutdown(5))
            assert await idle.ended() == b""
            release.set()
            answer = await client.answer()
            assert (answer.status, answer.header("Connection")) == (200, "close")
            await ending


def test_every_streaming_route_is_known_to_the_listener() -> None:
    streams = tuple({route.path.partition("{")[0] for route in all_routes() if route.streams})
    cache = HeadCache(streams)
    for route in all_routes():
        path = route.path.replace("{id}", "x").partition("{")[0]
        for method in set(route.methods) & {"GET", "PUT", "POST", "DELETE"}:
            head = f"{method} {path} HTTP/1.1\r\nHost: a\r\n\r\n".encode()
            assert (cache.head(head) is None) == path.startswith(streams), path
    assert cache.head(b"GET /v1/agent/%6Donitor HTTP/1.1\r\nHost: a\r\n\r\n") is None


async def test_the_routes_found_are_the_ones_that_aiohttp_finds(tmp_path: Path) -> None:
    async with both(tmp_path) as (node, _, _):
        app = node.runner.app
        router = Router(app)
        paths = [route.path.replace("{id}", "x").partition("{")[0] for route in all_routes()]
        paths += [
            "/v1/kv/a/b",
            "/v1/kv/a%2Fb",
            "/v1/kv//",
            "/v1/kv/../x",
            "/v1/kv",
            "/v1/kvx",
            "/v1/health/service/a/b",
        ]
        for path in paths + [path + "x" for path in paths]:
            for method in ("GET", "PUT", "POST", "DELETE"):
                head = parse_head(f"{method} {path} HTTP/1.1\r\nHost: a\r\n\r\n".encode())
                assert head is not None
                request = node.runner.front.request(head, Body(b""), Connection(node.runner.front))
                theirs = await app.router.resolve(request)
                for _ in range(2):
                    ours = await router.match(request)
                    assert (ours.route.handler, dict(ours)) == (theirs.route.handler, dict(theirs)) or (
                        ours.http_exception is not None
                        and theirs.http_exception is not None
                        and ours.http_exception.status == theirs.http_exception.status
                    ), (method, path)


def test_heads_kept_are_bounded() -> None:
    cache = HeadCache((), entries_max=4)
    heads = [f"GET /v1/kv/{n} HTTP/1.1\r\nHost: a\r\n\r\n".encode() for n in range(10)]
    first = cache.head(heads[0])
    assert cache.head(heads[0]) is first
    for head in heads:
        cache.head(head)
        cache.head(heads[0])
    assert len(cache) == 4
    assert cache.head(heads[0]) is first
    cache.head(b"PUT /v1/kv/x HTTP/1.1\r\nHost: a\r\n\r\n")
    cache.head(b"GET /v1/kv/" + b"y" * 3000 + b" HTTP/1.1\r\nHost: a\r\n\r\n")
    assert len(cache) == 4


@pytest.mark.parametrize(
    "head",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.0\r\nHost: a\r\n\r\n",
        b"GET / HTTP/2.0\r\nHost: a\r\n\r\n",
        b"HEAD / HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nHost: a\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nhost: a\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\n",
        b"PUT / HTTP/1.1\r\nHost: a\r\nContent-Length: +5\r\n\r\n",
        b"PUT / HTTP/1.1\r\nHost: a\r\nContent-Length: 5, 5\r\n\r\n",
        b"PUT / HTTP/1.1\r\nHost: a\r\nContent-Length: 99999999999999999999\r\n\r\n",
        b"PUT / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"PUT / HTTP/1.1\r\nHost: a\r\nContent-Encoding: gzip\r\nContent-Length: 5\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nConnection: keep-alive, X-Y\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nX : y\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\n X: y\r\n\r\n",
        b"GET / HTTP/1.1\nHost: a\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nX: \x01\r\n\r\n",
        b"GET /\x7f HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET /#a HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET a HTTP/1.1\r\nHost: a\r\n\r\n",
        b"CONNECT a:1 HTTP/1.1\r\nHost: a\r\n\r\n",
        b"\r\n\r\n",
        b"junk\r\n\r\n",
        b"GET /" + b"x" * HEAD_BYTES_MAX + b" HTTP/1.1\r\nHost: a\r\n\r\n",
    ],
)
def test_a_head_that_is_not_plain_is_left_to_aiohttp(head: bytes) -> None:
    assert parse_head(head) is None


FIRST_LINES = [
    b"GET /v1/kv/a?x HTTP/1.1\r\n", b"PUT /v1/kv/a HTTP/1.1\r\n", b"DELETE /v1/kv/%61 HTTP/1.1\r\n",
    b"PUT /v1/kv/a HTTP/1.0\r\n", b"PATCH /v1/kv/a HTTP/1.1\r\n", b"PUT  /v1/kv/a HTTP/1.1\r\n", b"\r\n",
    b"PUT /v1/kv/a b HTTP/1.1\r\n", b"PUT /v1/kv/a HTTP/1.1\n", b"\r\nGET / HTTP/1.1\r\n", b"PUT /v1/kv/a\r\n",
    b"put /v1/kv/a HTTP/1.1\r\n", b"GET http://a/v1/kv/a HTTP/1.1\r\n", b"PUT /v1/kv/\xc3\xbc HTTP/1.1\r\n", b"",
    b"GET /" + b"x" * HEAD_BYTES_MAX + b" HTTP/1.1\r\n", b"PUT /v1/snapshot HTTP/1.1\r\n",
    b"GET / HTTP/1.1\r\nX:\r\n", b"GET / HTTP/1.1\r\n\r\n",
]  # fmt: skip
LINES_BELOW = [
    b"Host: a\r\n\r\n", b"Host: a\r\nContent-Length: 3\r\n\r\n", b"Host: a\r\nContent-Length: 0\r\n\r\n",
    b"Host: a\r\nhost: b\r\n\r\n", b"Content-Length: 3\r\n\r\n", b"Host: a\r\nContent-Length: 3, 3\r\n\r\n",
    b"Host : a\r\n\r\n", b"Host: a\r\nTransfer-Encoding: chunked\r\n\r\n",
    b"Host: a\r\nX: " + b"x" * 3000 + b"\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: a\r\n\r\n", b"\r\n", b"Host: a\r\nConnection: close\r\n\r\n", b"Host: a\n\r\n\r\n",
]  # fmt: skip


def test_lines_that_were_seen_below_another_first_line_mean_what_they_mean_alone() -> None:
    def told(head: Head | None) -> object:
        if head is None:
            return None
        return head.method, head.target, head.body_size, head.size, head.raw, repr(head.message)

    taken = 0
    for warm in FIRST_LINES:
        cache = HeadCache(("/v1/snapshot",))
        for below in LINES_BELOW:
            cache.head(warm + below)
        for first, below in itertools.product(FIRST_LINES, LINES_BELOW):
            data = first + below
            alone = parse_head(data)
            if alone is not None and alone.target.startswith("/v1/snapshot"):
                alone = None
            assert told(cache.head(data)) == told(alone), data
            taken += alone is not None
    assert taken > 100


def test_a_plain_head_is_taken() -> None:
    data = b"PUT /v1/kv/a?x=1 HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nConnection: Keep-Alive\r\nX:  y \r\n\r\n"
    head = parse_head(data)
    assert head is not None
    assert (head.size, head.body_size, head.message.method, head.message.path) == (
        len(data),
        5,
        "PUT",
        "/v1/kv/a?x=1",
    )
    assert head.message.headers["x"] == "y"
