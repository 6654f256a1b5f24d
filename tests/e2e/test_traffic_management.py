"""Plans in real sidecars: requests are routed, split, resolved, retried and rewritten; changes drop nothing."""

from __future__ import annotations

import asyncio
import socket
from collections import Counter

import msgspec
import pytest

from tests.support.http_filter import App, Seen, simple
from tests.support.loops import with_mesh
from tests.support.promises import PATIENCE_S, Since, promptly
from tests.support.sidecars import Member, Mesh, hang_up, naming, until
from tests.support.traffic import SUBSETS, Stage


async def ask(client: Member, *requests: bytes) -> list[tuple[int, bytes, bytes]]:
    """Send requests one after the other on one connection; return status, head and body of each."""
    reader, writer = await client.dial()
    answers = []
    async with asyncio.timeout(20):
        for request in requests:
            writer.write(request)
            head = await reader.readuntil(b"\r\n\r\n")
            fields = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:-2])
            answers.append((int(head.split()[1]), head, await reader.readexactly(int(fields[b"content-length"]))))
    await hang_up(writer)
    return answers


def get(path: str = "/", **headers: str) -> bytes:
    more = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items())
    return f"GET {path} HTTP/1.1\r\nHost: backend\r\n{more}\r\n".encode()


def post() -> bytes:
    return b"POST / HTTP/1.1\r\nHost: backend\r\nContent-Length: 3\r\n\r\npay"


async def bodies(stage: Stage, *requests: bytes) -> list[bytes]:
    return [body for _, _, body in await ask(stage.client, *requests)]


@with_mesh
async def test_a_subset_that_has_no_instance_is_named(mesh: Mesh) -> None:
    stage = Stage(mesh)
    await stage.server("backend", "b1", "v1")
    await stage.caller()
    await stage.follow(resolver_backend={"Subsets": SUBSETS, "DefaultSubset": "v2"})
    ((status, _, body),) = await ask(stage.client, get())
    assert (status, body) == (503, b'{"error": "\'backend\': subset v2 of backend has no instance"}\n')


@with_mesh
async def test_a_canary_gets_its_share_of_the_requests_and_a_change_drops_none(mesh: Mesh) -> None:
    stage = Stage(mesh)
    await stage.server("backend", "b1", "v1")
    await stage.server("backend", "b2", "v2")
    await stage.caller()
    assert set(await bodies(stage, *[get()] * 40)) == {b"b1", b"b2"}
    splits = [{"Weight": 90, "ServiceSubset": "v1"}, {"Weight": 10, "ServiceSubset": "v2"}]
    await stage.follow(resolver_backend={"Subsets": SUBSETS}, splitter_backend={"Splits": splits})
    counted = Counter(await bodies(stage, *[get()] * 600))
    assert 0.05 < counted[b"b2"] / 600 < 0.17, counted
    # The canary's share changes while requests are under way: none is lost, and new ones go by the new entry.
    running = True

    async def keep_asking() -> list[tuple[int, bytes, bytes]]:
        answers = []
        while running:
            answers += await ask(stage.client, *[get()] * 20)
        return answers

    askers = [asyncio.create_task(keep_asking()) for _ in range(3)]
    for weight in (50, 100, 0, 90, 10, 0):
        splits = [{"Weight": 100 - weight, "ServiceSubset": "v1"}, {"Weight": weight, "ServiceSubset": "v2"}]
        await stage.follow(splitter_backend={"Splits": splits})
        seen = len(stage.apps["b1"].seen) + len(stage.apps["b2"].seen)
        await until(lambda seen=seen: len(stage.apps["b1"].seen) + len(stage.apps["b2"].seen) > seen + 30)  # type: ignore[misc]
    running = False
    assert {status for answers in await asyncio.gather(*askers) for status, _, _ in answers} == {200}
    assert set(await bodies(stage, *[get()] * 50)) == {b"b1"}
    await stage.follow(splitter_backend=None, resolver_backend=None)
    assert set(await bodies(stage, *[get()] * 40)) == {b"b1", b"b2"}


@with_mesh
async def test_requests_are_routed_by_path_header_query_and_method_and_rewritten(mesh: Mesh) -> None:
    stage = Stage(mesh)
    await stage.server("backend", "b1", "v1")
    await stage.server("backend", "b2", "v2")
    await stage.server("admin", "a1")
    await stage.caller()
    routes = [
        {"Match": {"HTTP": {"Header": [{"Name": "X-Canary", "Exact": "yes"}]}},
         "Destination": {"ServiceSubset": "v2"}},
        {
            "Match": {"HTTP": {"PathPrefix": "/admin/"}},
            "Destination": {
                "Service": "admin", "PrefixRewrite": "/",
                "RequestHeaders": {"Set": {"X-Via": "mesh"}, "Add": {"X-More": "1"}, "Remove": ["X-Secret"]},
                "ResponseHeaders": {"Set": {"X-Served-By": "admin"}, "Remove": ["server"]},
            },
        },
        {"Match": {"HTTP": {"PathRegex": "/v[0-9]+/x"}}, "Destination": {"Service": "admin"}},
        {"Match": {"HTTP": {"PathExact": "/old"}}, "Destination": {"Service": "admin", "PrefixRewrite": "/new"}},
        {"Match": {"HTTP": {"QueryParam": [{"Name": "who", "Regex": "a.*"}]}}, "Destination": {"Service": "admin"}},
        {"Match": {"HTTP": {"Methods": ["POST"]}}, "Destination": {"ServiceSubset": "v2"}},
    ]  # fmt: skip
    await stage.follow(
        resolver_backend={"Subsets": SUBSETS, "DefaultSubset": "v1"}, router_backend={"Routes": routes}
    )
    assert await bodies(stage, get("/"), get("/", x_canary="yes"), get("/", x_canary="no"), post()) == [
        b"b1", b"b2", b"b1", b"b2",
    ]  # fmt: skip
    answers = await ask(stage.client, get("/admin/users?x=1", x_secret="-", x_via="me"), get("/old"))
    assert [body for _, _, body in answers] == [b"a1", b"a1"]
    assert b"X-Served-By: admin\r\n" in answers[0][1]
    assert b"X-Served-By" not in answers[1][1], "a kept stream forgets the changes of the request before"
    users, old = stage.apps["a1"].seen
    assert (users.target, old.target) == ("/users?x=1", "/new")
    assert [users.header(name) for name in ("x-via", "x-more", "x-secret")] == [["mesh"], ["1"], []]
    paths = ("/administrator", "/v12/x", "/v12/xy", "/old?q", "/?who=alice", "/?who=bob")
    assert await bodies(stage, *map(get, paths)) == [b"b1", b"a1", b"b1", b"a1", b"a1", b"b1"]
    assert stage.apps["a1"].seen[-2].target == "/new?q"


@with_mesh
async def test_a_subset_without_instances_fails_over_and_back(mesh: Mesh) -> None:
    stage = Stage(mesh)
    await stage.server("backend", "b1", "v1")
    await stage.server("backend", "b2", "v2")
    await stage.server("spare", "s1")
    await stage.caller()
    targets = [{"ServiceSubset": "v2"}, {"Service": "spare"}]
    resolver = {"DefaultSubset": "v1", "Subsets": SUBSETS, "Failover": {"v1": {"Targets": targets}}}
    await stage.follow(resolver_backend=resolver)
    assert set(await bodies(stage, *[get()] * 10)) == {b"b1"}
    first, second, spare = stage.endpoints
    stage.endpoints = [msgspec.structs.replace(first, healthy=False), second, spare]
    await stage.follow()
    assert set(await bodies(stage, *[get()] * 10)) == {b"b2"}
    stage.endpoints = [spare]
    await stage.follow()
    assert set(await bodies(stage, *[get()] * 10)) == {b"s1"}
    stage.endpoints = [first, second, spare]
    await stage.follow()
    assert set(await bodies(stage, *[get()] * 10)) == {b"b1"}
    # Unreachable, which the catalog does not know yet: the request itself goes over.
    await stage.servers["b1"].sidecar.close()
    assert set(await bodies(stage, *[get()] * 10)) == {b"b2"}


@with_mesh
async def test_a_redirect_takes_new_requests_elsewhere_and_lets_old_ones_end(mesh: Mesh) -> None:
    go = asyncio.Event()

    async def slow(app: App, seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await go.wait()
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nslow")

    stage = Stage(mesh)
    await stage.server("backend", "b1", answer=slow)
    await stage.server("other", "o1")
    await stage.caller()
    pending = asyncio.create_task(bodies(stage, get("/slow")))
    await until(lambda: bool(stage.apps["b1"].seen))
    await stage.follow(resolver_backend={"Redirect": {"Service": "other"}})
    assert await bodies(stage, get(), get()) == [b"o1", b"o1"]
    go.set()
    assert await pending == [b"slow"]
    # Back again; now the instance goes from the catalog, and what is under way on it ends.
    await stage.follow(resolver_backend=None)
    go.clear()
    cut = asyncio.create_task(ask(stage.client, get("/slow")))
    await until(lambda: len(stage.apps["b1"].seen) == 2)
    stage.endpoints = [one for one in stage.endpoints if one.service != "backend"]
    await stage.follow()
    assert [status for status, _, _ in await cut] == [503]


@with_mesh
async def test_a_call_to_an_instance_that_the_plan_has_left_ends_when_it_is_deregistered(mesh: Mesh) -> None:
    async def never(app: App, seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await asyncio.Event().wait()

    stage = Stage(mesh)
    await stage.server("backend", "b1", "v1", answer=never)
    await stage.server("other", "o1")
    await stage.caller()
    pending = asyncio.create_task(ask(stage.client, post()))
    await until(lambda: bool(stage.apps["b1"].seen))
    await stage.follow(resolver_backend={"Redirect": {"Service": "other"}})
    assert await bodies(stage, get()) == [b"o1"]
    await stage.follow(resolver_backend={"Redirect": {"Service": "other"}, "ConnectTimeout": "1s"})
    assert not pending.done(), "a plan that leads elsewhere leaves it alone"
    stage.endpoints = [one for one in stage.endpoints if one.service != "backend"]
    await stage.follow()
    async with promptly():
        assert [status for status, _, _ in await pending] == [502]
    assert await bodies(stage, get()) == [b"o1"]


@with_mesh
async def test_a_connection_outlives_a_plan_in_error_but_not_its_instance(mesh: Mesh) -> None:
    stage = Stage(mesh)
    app = await mesh.app(naming("b1"))
    await stage.add("backend", "b1", "v1", app.port)
    stage.entries.clear()
    await stage.caller()
    reader, writer = await stage.client.dial()
    writer.write(b"\n")
    assert await reader.readline() == b"b1\n"
    await stage.client.route("backend", error="its configuration entries can't be compiled")
    writer.write(b"\n")
    assert await reader.readline() == b"b1\n", "what is under way goes on"
    await stage.client.route("backend", error="the same", deregistered=tuple(stage.endpoints))
    async with promptly():
        with pytest.raises(ConnectionResetError):
            await reader.read()
    await hang_up(writer)


@with_mesh
async def test_retries_follow_the_route(mesh: Mesh) -> None:
    async def failing(app: App, seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        status = b"503 Busy" if len(app.seen) % 3 else b"200 OK"
        writer.write(b"HTTP/1.1 " + status + b"\r\nContent-Length: 2\r\n\r\nb1")

    stage = Stage(mesh)
    await stage.server("backend", "b1", answer=failing)
    await stage.caller()
    assert [status for status, _, _ in await ask(stage.client, get(), get(), get())] == [503, 503, 200]
    await stage.follow(
        router_backend={
            "Routes": [
                {"Match": {"HTTP": {"PathPrefix": "/once"}}, "Destination": {"NumRetries": 1, "RetryOn": ["5xx"]}},
                {"Destination": {"NumRetries": 2, "RetryOnStatusCodes": [503]}},
            ]
        }
    )
    seen = stage.apps["b1"].seen
    seen.clear()
    assert [status for status, _, _ in await ask(stage.client, get(), post())] == [200, 200]
    assert [one.body for one in seen] == [b""] * 3 + [b"pay"] * 3
    seen.clear()
    assert [status for status, _, _ in await ask(stage.client, get("/once"))] == [503]
    assert len(seen) == 2
    upstream = stage.client.sidecar._upstreams["backend"]
    assert upstream.http.in_flight == 0
    assert all(one.active == 0 for balancer in upstream.balancers.values() for one in balancer.instances.values())


@with_mesh
async def test_a_route_bounds_the_time_of_its_requests(mesh: Mesh) -> None:
    async def never(app: App, seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(3600)

    stage = Stage(mesh)
    await stage.server("backend", "b1", answer=never)
    await stage.caller()
    await stage.follow(router_backend={"Routes": [{"Destination": {"RequestTimeout": "100ms"}}]})
    async with promptly(0.6, "not when the next look at the clock is due, a second later, but the bounded request"):
        assert [status for status, _, _ in await ask(stage.client, get())] == [504]


@with_mesh
async def test_a_requests_time_begins_at_its_end_and_is_over_at_the_end_of_the_response(mesh: Mesh) -> None:
    async def trickle(app: App, seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n")
        while seen.target == "/trickle":
            writer.write(b".")
            await writer.drain()
            await asyncio.sleep(0.02)
        writer.write(b"." * 1_000_000)

    stage = Stage(mesh)
    await stage.server("backend", "b1", answer=trickle)
    await stage.caller()
    await stage.follow(router_backend={"Routes": [{"Destination": {"RequestTimeout": "1s", "NumRetries": 3}}]})
    reader, writer = await stage.client.dial()
    writer.write(b"POST / HTTP/1.1\r\nHost: backend\r\nContent-Length: 8\r\n\r\n")
    for _ in range(8):
        writer.write(b"x")
        await asyncio.sleep(0.15)  # the upload takes longer than the response may
    assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200 ")
    await reader.readexactly(1_000_000)
    writer.write(get("/trickle"))
    since = Since()
    assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200 ")
    async with asyncio.timeout(PATIENCE_S):
        await ends(reader)
    assert since.took(1.7, "the response") > 0.95
    assert len(stage.apps["b1"].seen) == 2, "what has begun is not tried again"
    assert stage.client.sidecar._upstreams["backend"].http.in_flight == 0
    await hang_up(writer)


@with_mesh
async def test_a_route_ends_requests_on_which_nothing_is_said(mesh: Mesh) -> None:
    async def slowly(app: App, seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if seen.target == "/silent":
            await asyncio.Event().wait()
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 60\r\n\r\n")
        for _ in range(15 if seen.target == "/slow" else 2):
            writer.write(b"tick")
            await writer.drain()
            await asyncio.sleep(0.2)
        if seen.target == "/stops":
            await asyncio.Event().wait()

    stage = Stage(mesh)
    await stage.server("backend", "b1", answer=slowly)
    await stage.caller()
    await stage.follow(router_backend={"Routes": [{"Destination": {"IdleTimeout": "500ms"}}]})
    ((status, _, body),) = await ask(stage.client, get("/slow"))
    assert (status, body) == (200, b"tick" * 15), "it speaks, so it lives, however long it takes"
    ((status, _, body),) = await ask(stage.client, get("/silent"))
    assert (status, b"nothing was said for 0.5 s" in body) == (504, True)
    with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
        await ask(stage.client, get("/stops"))


@with_mesh
async def test_a_route_ends_websockets_on_which_neither_side_says_anything(mesh: Mesh) -> None:
    ended: list[str] = []

    async def upgrade(app: App, seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
        try:
            while seen.target == "/app-speaks":
                writer.write(b".")
                await writer.drain()
                await asyncio.sleep(0.1)
            while await reader.read(100):
                pass
        finally:
            ended.append(seen.target)

    async def begin(target: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await stage.client.dial()
        head = f"GET {target} HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
        writer.write(head.encode())
        assert b" 101 " in await reader.readuntil(b"\r\n\r\n")
        return reader, writer

    stage = Stage(mesh)
    await stage.server("backend", "b1", answer=upgrade)
    await stage.caller()
    await stage.follow(router_backend={"Routes": [{"Destination": {"IdleTimeout": "1500ms"}}]})
    async with asyncio.timeout(30):
        silent, client_speaks, app_speaks = [
            await begin(target) for target in ("/silent", "/client-speaks", "/app-speaks")
        ]

        async def talk() -> None:
            while True:
                client_speaks[1].write(b"x")
                await asyncio.sleep(0.05)

        talking = asyncio.create_task(talk())
        began = asyncio.get_running_loop().time()
        assert await ends(silent[0]) == b""
        assert asyncio.get_running_loop().time() - began > 1
        assert len(await app_speaks[0].readexactly(30)) == 30
        assert ended == ["/silent"], "who speaks lives, be it one side only"
        talking.cancel()
        assert await ends(client_speaks[0]) == b"", "and no longer"
        upstream = stage.client.sidecar._upstreams["backend"]
        assert upstream.http.in_flight == 1
    for _, writer in (silent, client_speaks, app_speaks):
        await hang_up(writer)
    await until(lambda: not upstream.http.connections)


async def ends(reader: asyncio.StreamReader) -> bytes:
    """Return what comes until the end or reset."""
    try:
        return await reader.read()
    except ConnectionError:
        return b""


@with_mesh
async def test_consecutive_5xx_leave_an_instance_out(mesh: Mesh) -> None:
    stage = Stage(mesh)
    await stage.server("backend", "b1", answer=simple(b"b1", "500 Bad"))
    await stage.server("backend", "b2")
    await stage.caller()
    assert Counter(status for status, _, _ in await ask(stage.client, *[get()] * 60))[500] > 10
    passive = {"max_failures": 3, "max_ejection_percent": 50, "base_ejection_time": "60s"}
    stage.fields["config"] = {"passive_health_check": passive}
    await stage.follow()
    answers = Counter(status for status, _, _ in await ask(stage.client, *[get()] * 60))
    assert answers == {500: 3, 200: 57}
    pair = 'upstream="backend",source="web",destination="backend"'
    assert f"lictor_ejections_total{{{pair}}} 1" in stage.client.sidecar.metrics.render()


@with_mesh
async def test_an_instance_takes_so_many_calls_as_its_service_says(mesh: Mesh) -> None:
    stage = Stage(mesh)
    stage.entries.clear()
    app = await mesh.app(naming("b1"))
    server = await stage.add("backend", "b1", "v1", app.port)
    me = server.sidecar.config.self
    assert me is not None
    await server.push(self=msgspec.structs.replace(me, config={"max_inbound_connections": 2}))
    await stage.caller()
    held = [await stage.client.dial() for _ in range(2)]
    for reader, writer in held:
        writer.write(b"\n")
        assert await reader.readline() == b"b1\n"
    assert await stage.client.ask() == b"", "one more is refused"
    await hang_up(held.pop()[1])
    await until(lambda: len(server.sidecar._desk.calls) == 1)
    assert await stage.client.ask() == b"b1\n"
    await hang_up(held.pop()[1])


@with_mesh
async def test_an_app_has_as_long_to_take_a_connection_as_its_service_says(mesh: Mesh) -> None:
    stage = Stage(mesh)
    stage.entries.clear()
    with socket.create_server(("127.0.0.1", 0), backlog=1) as full:
        port = full.getsockname()[1]
        waiting = [socket.socket() for _ in range(4)]
        for one in waiting:  # the queue of connections that nobody takes is full after these
            one.setblocking(False)
            one.connect_ex(("127.0.0.1", port))
        server = await stage.add("backend", "b1", "v1", port)
        me = server.sidecar.config.self
        assert me is not None
        await server.push(self=msgspec.structs.replace(me, config={"local_connect_timeout_ms": 100}))
        await stage.caller()
        async with promptly(4.0, "the default would be 5 s; the connection"):
            assert await stage.client.ask() == b""
        for one in waiting:
            one.close()


@with_mesh
async def test_a_cookie_keeps_its_caller_at_one_instance(mesh: Mesh) -> None:
    stage = Stage(mesh)
    for number in range(4):
        await stage.server("backend", f"b{number}")
    await stage.caller()
    cookie = {"Field": "cookie", "FieldValue": "sid", "CookieConfig": {"TTL": "60s", "Path": "/"}}
    for policy in ("ring_hash", "maglev"):
        await stage.follow(resolver_backend={"LoadBalancer": {"Policy": policy, "HashPolicies": [cookie]}})
        homes = set()
        for _ in range(12):
            ((_, head, home),) = await ask(stage.client, get())
            line = next(line for line in head.split(b"\r\n") if line.lower().startswith(b"set-cookie: "))
            value = line.split(b": ", 1)[1].split(b";")[0].decode()
            assert b"Max-Age=60; Path=/; HttpOnly" in line
            answers = await ask(stage.client, *[get(cookie=f"a=b; {value}")] * 5)
            assert {body for _, _, body in answers} == {home}
            assert not any(b"set-cookie" in head.lower() for _, head, _ in answers)
            homes.add(home)
        assert len(homes) > 1


@with_mesh
async def test_connections_are_split_and_fail_over_too(mesh: Mesh) -> None:
    stage = Stage(mesh)
    stage.entries.clear()
    for instance, version in (("b1", "v1"), ("b2", "v2")):
        app = await mesh.app(naming(instance))
        await stage.add("backend", instance, version, app.port)
    await stage.caller()
    splits = [{"Weight": 50, "ServiceSubset": "v1"}, {"Weight": 50, "ServiceSubset": "v2"}]
    failover = {"*": {"Targets": [{"ServiceSubset": "v1"}]}}
    await stage.follow(
        resolver_backend={"Subsets": SUBSETS, "Failover": failover}, splitter_backend={"Splits": splits}
    )
    counted = Counter([await stage.client.ask() for _ in range(80)])
    assert set(counted) == {b"b1\n", b"b2\n"}
    assert min(counted.values()) > 20
    reader, writer = await stage.client.dial()
    writer.write(b"hi\n")
    held = await reader.readline()
    other = b"v1" if held == b"b2\n" else b"v2"
    await stage.follow(splitter_backend={"Splits": [{"Weight": 100, "ServiceSubset": other.decode()}]})
    assert {await stage.client.ask() for _ in range(10)} == {b"b1\n" if other == b"v1" else b"b2\n"}
    writer.write(b"hi\n")
    assert await reader.readline() == held, "a connection under way is left alone"
    await hang_up(writer)
    await stage.follow(splitter_backend={"Splits": [{"Weight": 100, "ServiceSubset": "v2"}]})
    await stage.servers["b2"].sidecar.close()
    assert {await stage.client.ask() for _ in range(10)} == {b"b1\n"}
