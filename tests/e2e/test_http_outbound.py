"""HTTP upstreams: each request goes to an instance of its own, is tried again only where that is safe."""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
import struct
from typing import Any

import msgspec
import pytest

from proxy import http_app, listeners
from raftstate.model.intention import HTTPMatch, Intention, Permission
from tests.support.http_filter import Answer, App, Seen, simple
from tests.support.loops import with_mesh
from tests.support.sidecars import Member, Mesh, hang_up, until


async def fleet(mesh: Mesh, *apps: App, config: dict[str, Any] | None = None) -> tuple[Member, list[Member]]:
    servers = []
    for number, app in enumerate(apps):
        made = await mesh.app(app.handle)
        server = await mesh.member("backend", f"backend-{number}", port=made.port)
        await server.allow("web")
        servers.append(server)
    client = await mesh.member("web", "web-1", upstreams=("backend",))
    await client.route("backend", *(server.endpoint for server in servers), protocol="http", config=config or {})
    return client, servers


async def ask(client: Member, *requests: bytes) -> list[tuple[int, bytes]]:
    """Send requests one after the other on one connection; return status and body of each."""
    reader, writer = await client.dial()
    answers = []
    async with asyncio.timeout(10):
        for request in requests:
            writer.write(request)
            head = await reader.readuntil(b"\r\n\r\n")
            size = int(re.search(rb"content-length: (\d+)", head.lower())[1])  # type: ignore[index]
            answers.append((int(head.split()[1]), await reader.readexactly(size)))
    await hang_up(writer)
    return answers


def get(path: str = "/") -> bytes:
    return f"GET {path} HTTP/1.1\r\nHost: backend\r\n\r\n".encode()


def post(body: bytes) -> bytes:
    return b"POST / HTTP/1.1\r\nHost: backend\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)


@with_mesh
async def test_requests_of_one_connection_are_spread(mesh: Mesh) -> None:
    apps = [App(answer=simple(b"0")), App(answer=simple(b"1")), App(answer=simple(b"2"))]
    client, _ = await fleet(mesh, *apps, config={"load_balancer": "round_robin"})
    answers = await ask(client, *[get(f"/{n}") for n in range(12)])
    assert [status for status, _ in answers] == [200] * 12
    assert sorted(body for _, body in answers) == [b"0"] * 4 + [b"1"] * 4 + [b"2"] * 4
    assert [app.connections for app in apps] == [1, 1, 1], "streams are kept between requests"
    upstream = client.sidecar._upstreams["backend"]
    assert upstream.http_counters.requests == {("GET", 200, "app"): 12}
    labels = 'direction="outbound",source="web",destination="backend"'
    assert f"lictor_http_request_seconds_count{{{labels}}} 12" in client.sidecar.metrics.render()
    assert all(instance.active == 0 for instance in upstream.balancer.instances.values())
    assert upstream.http.in_flight == 0
    # Another connection of the app goes on using the streams of the first one.
    await ask(client, *[get() for _ in range(6)])
    assert [app.connections for app in apps] == [1, 1, 1]


@with_mesh
async def test_any_request_goes_elsewhere_when_an_app_is_down(mesh: Mesh) -> None:
    apps = [App(answer=simple(b"0")), App(answer=simple(b"1"))]
    client, _ = await fleet(mesh, *apps)
    await mesh.apps[0].stop()
    answers = await ask(client, *[post(b"x" * 1000) for _ in range(10)])
    assert answers == [(200, b"1")] * 10
    assert [seen.body for seen in apps[1].seen] == [b"x" * 1000] * 10


@with_mesh
async def test_any_request_goes_elsewhere_when_an_app_behind_permissions_is_down(mesh: Mesh) -> None:
    """Its sidecar has accepted the streams that are kept, and is the first to learn that there is no app any more."""
    apps = [App(answer=simple(b"0")), App(answer=simple(b"1"))]
    client, servers = await fleet(mesh, *apps, config={"load_balancer": "round_robin"})
    permissions = (Permission("deny", HTTPMatch(path_prefix="/evil")), Permission("allow", HTTPMatch()))
    for server in servers:
        await server.push(
            intentions=(Intention(source_name="web", destination_name="backend", permissions=permissions),)
        )
    await ask(client, *[get() for _ in range(6)])
    assert {len(app.seen) for app in apps} == {3}
    await mesh.apps[0].stop()
    answers = await ask(client, *[post(b"x" * 1000) for _ in range(5)], *[get() for _ in range(5)])
    assert answers == [(200, b"1")] * 10
    first, _ = client.sidecar._upstreams["backend"].balancer.instances.values()
    assert first.ejections
    await servers[1].sidecar.close()
    (answer,) = await ask(client, get())
    assert answer[0] == 503
    app = await mesh.app(App(answer=simple(b"2")).handle)
    await servers[0].push(self=msgspec.structs.replace(servers[0].sidecar.config.self, local_port=app.port))
    assert await ask(client, post(b"x")) == [(200, b"2")]


@with_mesh
async def test_an_instance_that_takes_a_session_and_then_no_stream_is_given_up_on(
    mesh: Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one that is stopped: the kernel still takes what is sent."""
    client, servers = await fleet(mesh, App(), App(answer=simple(b"1")), config={"load_balancer": "round_robin"})
    monkeypatch.setattr(servers[0].sidecar._desk, "admit_stream", lambda stream, *more: None)
    upstream = client.sidecar._upstreams["backend"]
    upstream._fleet.accept_timeout_s = 1.0
    assert await ask(client, get(), get()) == [(200, b"1")] * 2
    first, _ = upstream.balancer.instances.values()
    assert first.ejections
    await client.route("backend", servers[0].endpoint, protocol="http")
    assert [status for status, _ in await ask(client, post(b"x"))] == [502], "it may be seen yet"
    assert upstream.http.in_flight == first.active == 0
    assert not upstream._fleet.opening


@with_mesh
async def test_any_request_goes_elsewhere_when_a_sidecar_is_gone(mesh: Mesh) -> None:
    apps = [App(answer=simple(b"0")), App(answer=simple(b"1"))]
    client, servers = await fleet(mesh, *apps)
    await ask(client, *[get() for _ in range(6)])
    await servers[0].sidecar.close()
    answers = await ask(client, *[get() for _ in range(10)])
    assert answers == [(200, b"1")] * 10


def dying(name: bytes) -> Answer:
    async def answer(app: App, seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.transport.abort()

    return answer


@with_mesh
async def test_a_request_that_an_app_may_have_seen_is_repeated_only_if_idempotent(mesh: Mesh) -> None:
    apps = [App(answer=dying(b"0"))]
    client, _ = await fleet(mesh, *apps)
    (answer,) = await ask(client, post(b"pay"))
    assert answer[0] == 502
    assert len(apps[0].seen) == 1
    # The destination's own filter is not in the way here (a tcp service): the sidecar sees the cut itself.
    upstream = client.sidecar._upstreams["backend"]
    assert all(instance.active == 0 for instance in upstream.balancer.instances.values())


@with_mesh
async def test_an_idempotent_request_survives_an_app_that_dies_of_it(mesh: Mesh) -> None:
    apps = [App(answer=dying(b"0")), App(answer=simple(b"1"))]
    client, _ = await fleet(mesh, *apps, config={"load_balancer": "round_robin"})
    answers = await ask(client, *[get() for _ in range(6)])
    assert answers == [(200, b"1")] * 6


@with_mesh
async def test_one_request_that_no_app_survives_takes_no_instance_from_the_others(mesh: Mesh) -> None:
    async def answer(app: App, seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if seen.target == "/poison":
            writer.transport.abort()
        elif seen.target == "/slow":
            await asyncio.Event().wait()
        else:
            await simple(b"ok")(app, seen, reader, writer)

    config = {"try_timeout_ms": 1000, "max_attempts": 2}  # on a crowded machine an answer takes long
    client, _ = await fleet(mesh, App(answer=answer), App(answer=answer), config=config)
    answers = await ask(client, get(), get("/poison"), get(), get("/slow"), get(), get("/poison"), get())
    assert [status for status, _ in answers] == [200, 503, 200, 504, 200, 503, 200]
    instances = client.sidecar._upstreams["backend"].balancer.instances.values()
    assert [instance.ejections for instance in instances] == [0, 0]


@with_mesh
async def test_denied_by_the_destination(mesh: Mesh) -> None:
    client, servers = await fleet(mesh, App())
    await servers[0].push(intentions=())
    (answer,) = await ask(client, get())
    assert answer[0] == 403
    assert b"denies" in answer[1]


@with_mesh
async def test_no_instance_is_a_503_that_says_so(mesh: Mesh) -> None:
    client, _ = await fleet(mesh, App())
    await client.route("backend", protocol="http")
    (answer,) = await ask(client, get())
    assert answer[0] == 503
    assert b"has no instance" in answer[1]


@with_mesh
async def test_a_try_that_takes_too_long_is_made_elsewhere(mesh: Mesh) -> None:
    release = asyncio.Event()

    async def hang(app: App, seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await release.wait()

    apps = [App(answer=hang), App(answer=simple(b"1"))]
    config = {"load_balancer": "round_robin", "try_timeout_ms": 300}
    client, _ = await fleet(mesh, *apps, config=config)
    answers = await ask(client, get(), get())
    assert answers == [(200, b"1")] * 2
    assert len(apps[0].seen) >= 1
    # Where there is no other instance, the same one is tried, and in the end it was a matter of time.
    client, _ = await fleet(mesh, App(answer=hang), config={"try_timeout_ms": 20, "max_attempts": 2})
    (answer,) = await ask(client, get())
    assert answer[0] == 504
    release.set()


@with_mesh
async def test_too_many_requests_are_turned_away(mesh: Mesh) -> None:
    release = asyncio.Event()

    async def wait(app: App, seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await release.wait()
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")

    app = App(answer=wait)
    client, _ = await fleet(mesh, app, config={"limits": {"max_concurrent_requests": 2}})
    held = [asyncio.create_task(ask(client, get())) for _ in range(2)]
    await until(lambda: len(app.seen) == 2)
    (answer,) = await ask(client, get())
    assert answer[0] == 503
    assert b"in flight already" in answer[1]
    assert client.sidecar._upstreams["backend"].http_counters.requests == {("GET", 503, "limited"): 1}
    release.set()
    assert [status for ((status, _),) in await asyncio.gather(*held)] == [200, 200]
    assert (await ask(client, get()))[0][0] == 200


class Held:
    """An app that answers when it is told to, and knows how many requests it had at a time."""

    def __init__(self) -> None:
        self.release = asyncio.Semaphore(0)
        self.now = self.most = 0
        self.app = App(answer=self._answer)

    async def _answer(self, app: App, seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.now += 1
        self.most = max(self.most, self.now)
        await self.release.acquire()
        self.now -= 1
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")

    def let(self, count: int) -> None:
        for _ in range(count):
            self.release.release()


@with_mesh
async def test_requests_wait_while_all_connections_that_may_be_are_in_use(mesh: Mesh) -> None:
    held = Held()
    limits = {"max_connections": 2, "max_pending_requests": 2}
    client, _ = await fleet(mesh, held.app, config={"limits": limits})
    upstream = client.sidecar._upstreams["backend"]
    held.let(1)
    assert (await ask(client, get()))[0][0] == 200, "so that there is a session"
    asked = [asyncio.create_task(ask(client, get())) for _ in range(4)]
    await until(lambda: held.now == 2 and upstream.http.pending == 2)
    head = await ask_for_head(client)
    assert head.startswith(b"HTTP/1.1 503 ")
    assert b"\r\nx-envoy-overloaded: true\r\n" in head
    assert upstream.http_counters.requests[("GET", 503, "limited")] == 1
    held.let(4)
    assert [status for ((status, _),) in await asyncio.gather(*asked)] == [200] * 4
    assert held.most == 2
    assert (upstream.http.pending, upstream.http.in_use, upstream.http.in_flight) == (0, 0, 0)


@with_mesh
async def test_connections_of_the_app_that_ask_for_nothing_take_no_place(mesh: Mesh) -> None:
    client, _ = await fleet(mesh, App(answer=simple(b"1")), config={"limits": {"max_connections": 1}})
    writers = [(await client.dial())[1] for _ in range(4)]
    assert [status for status, _ in await ask(client, get(), get())] == [200, 200]
    for writer in writers:
        await hang_up(writer)


@with_mesh
@pytest.mark.parametrize("protocol", ["http", "http2"])
async def test_connections_of_the_app_are_bounded(mesh: Mesh, protocol: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_app, "CONNECTIONS_MAX", 2)
    client, servers = await fleet(mesh, App(answer=simple(b"1")))
    await client.route("backend", servers[0].endpoint, protocol=protocol)
    upstream = client.sidecar._upstreams["backend"]
    held = [await client.dial() for _ in range(2)]
    await until(lambda: len(upstream.connections) == 2)
    reader, writer = await client.dial()
    with contextlib.suppress(ConnectionError):
        assert await reader.read() == b""
    assert (
        client.sidecar.metrics.render().count('lictor_refused_total{direction="outbound",reason="unavailable"} 1')
        == 1
    )
    await hang_up(writer)
    for reader, writer in held:
        writer.write(get())
        assert await reader.readuntil(b"\r\n") == b"HTTP/1.1 200 OK\r\n"
        await hang_up(writer)
    await until(lambda: not upstream.connections)
    assert (await ask(client, get()))[0][0] == 200


@with_mesh
@pytest.mark.parametrize("protocol", ["http", "tcp"])
async def test_who_went_away_is_told_from_who_merely_sends_no_more(
    mesh: Mesh, protocol: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An app that never answers would hold a connection for ever for each client that gave up."""
    monkeypatch.setattr(listeners, "KEEPALIVE", ((socket.TCP_KEEPIDLE, 1), (socket.TCP_KEEPINTVL, 1)))
    held = Held()
    client, servers = await fleet(mesh, held.app)
    await client.route("backend", servers[0].endpoint, protocol=protocol)
    upstream = client.sidecar._upstreams["backend"]
    _, gone = await client.dial()
    sock: socket.socket = gone.get_extra_info("socket")
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_LINGER2, 1)  # seconds that the kernel remembers what was closed
    gone.write(get())
    reader, waiting = await client.dial()
    waiting.write(get())
    waiting.write_eof()
    await until(lambda: held.now == 2)
    gone.close()
    await until(lambda: len(upstream.connections) == 1)
    held.let(2)
    assert (await reader.read()).startswith(b"HTTP/1.1 200 OK\r\n")
    await hang_up(waiting)


@with_mesh
async def test_what_waits_for_a_connection_may_give_up_time_out_or_be_let_in(mesh: Mesh) -> None:
    held = Held()
    config: dict[str, Any] = {"limits": {"max_connections": 1}}
    client, servers = await fleet(mesh, held.app, config=config)
    upstream = client.sidecar._upstreams["backend"]
    first = asyncio.create_task(ask(client, get()))
    await until(lambda: held.now == 1)
    _, writer = await client.dial()
    writer.write(get())
    await until(lambda: upstream.http.pending == 1)
    sock: socket.socket = writer.get_extra_info("socket")
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # its end is a reset, no half-close
    writer.transport.abort()
    await until(lambda: upstream.http.pending == 0)
    endpoints = [server.endpoint for server in servers]
    await client.route("backend", *endpoints, protocol="http", config={**config, "request_timeout_ms": 100})
    assert (await ask(client, get()))[0][0] == 504
    assert upstream.http.pending == 0
    await client.route("backend", *endpoints, protocol="http", config=config)
    second = asyncio.create_task(ask(client, get()))
    await until(lambda: upstream.http.pending == 1)
    await client.route("backend", *endpoints, protocol="http", config={"limits": {"max_connections": 2}})
    await until(lambda: held.now == 2)
    held.let(2)
    assert [status for ((status, _),) in await asyncio.gather(first, second)] == [200, 200]
    # Where there may be none, none is waited for.
    await client.route("backend", *endpoints, protocol="http", config={"limits": {"max_connections": 0}})
    assert (await ask(client, get()))[0][0] == 503
    assert (upstream.http.pending, upstream.http.in_use, upstream.http.in_flight) == (0, 0, 0)


@with_mesh
async def test_too_many_requests_that_await_a_connection_are_turned_away(mesh: Mesh) -> None:
    app = App()
    client, server, _ = await mesh.pair(app.handle)
    silent = socket.create_server(("127.0.0.1", 0))  # takes connections and never shakes hands
    config = {"limits": {"max_pending_requests": 2}, "connect_timeout_ms": 60_000}
    nobody = msgspec.structs.replace(server.endpoint, port=silent.getsockname()[1])
    await client.route("backend", nobody, protocol="http", config=config)
    upstream = client.sidecar._upstreams["backend"]
    held = [asyncio.create_task(ask(client, get())) for _ in range(2)]
    await until(lambda: upstream.http.pending == 2)
    (answer,) = await ask(client, get())
    assert answer[0] == 503
    assert b"waiting for a connection already" in answer[1]
    silent.close()  # which resets those that it had taken
    assert [status for ((status, _),) in await asyncio.gather(*held)] == [503, 503]
    assert upstream.http.pending == 0
    await client.route("backend", server.endpoint, protocol="http", config=config)
    assert (await ask(client, get()))[0][0] == 200
    # Who needs none that is still to be made is not pending.
    config = {**config, "limits": {"max_pending_requests": 0}}
    await client.route("backend", server.endpoint, protocol="http", config=config)
    assert (await ask(client, get()))[0][0] == 200
    await client.route("backend", nobody, protocol="http", config=config)
    assert (await ask(client, get()))[0][0] == 503


@with_mesh
async def test_large_bodies_pass(mesh: Mesh) -> None:
    async def echo(app: App, seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(seen.body) + seen.body)

    client, _ = await fleet(mesh, App(answer=echo))
    body = bytes(range(256)) * 40_000
    (answer,) = await ask(client, post(body))
    assert answer == (200, body)


@with_mesh
async def test_websocket_through_both_filters(mesh: Mesh) -> None:
    async def upgrade(app: App, seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
        while data := await reader.read(100):
            writer.write(data.upper())
        writer.write_eof()

    client, _ = await fleet(mesh, App(answer=upgrade))
    reader, writer = await client.dial()
    async with asyncio.timeout(10):
        writer.write(b"GET / HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\nearly")
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 101 ")
        assert await reader.readexactly(5) == b"EARLY"
        writer.write_eof()
        assert await reader.read() == b""
    await hang_up(writer)
    upstream = client.sidecar._upstreams["backend"]
    await until(lambda: not upstream.connections and not upstream.http.connections)
    assert upstream.http.in_flight == 0
    assert all(instance.active == 0 for instance in upstream.balancer.instances.values())


@with_mesh
async def test_kept_streams_end_when_the_certificate_is_renewed(mesh: Mesh) -> None:
    """Or a session of the old identity would live on for as long as requests come."""
    app = App()
    client, _ = await fleet(mesh, app)
    await ask(client, get())
    old = client.sidecar._pool.describe()
    await client.push(leaf=mesh.ca.leaf("web", "web-1"))
    assert (await ask(client, get()))[0][0] == 200
    client.sidecar._upstreams["backend"].sweep()
    await until(lambda: len(client.sidecar._pool.describe()) == 1)
    assert len(old) == 1
    assert app.connections == 2


@pytest.mark.parametrize("eof", [True, False])
@with_mesh
async def test_pipelined_requests_keep_their_order(mesh: Mesh, eof: bool) -> None:
    async def name(app: App, seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\n" + seen.target[1:].encode())

    client, _ = await fleet(mesh, App(answer=name), App(answer=name))
    reader, writer = await client.dial()
    writer.write(b"".join(get(f"/{n:03}") for n in range(100)))
    if eof:
        writer.write_eof()
    async with asyncio.timeout(10):
        for n in range(100):
            await reader.readuntil(b"\r\n\r\n")
            assert await reader.readexactly(3) == b"%03d" % n
    await hang_up(writer)


@with_mesh
async def test_heads_that_do_not_arrive_whole_count_in_the_memory_budget(mesh: Mesh) -> None:
    answered = asyncio.Event()

    async def slow(app: App, seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nx-slow: " + b"y" * 5000)
        await answered.wait()
        writer.write(b"\r\ncontent-length: 0\r\n\r\n")

    client, _ = await fleet(mesh, App(answer=slow))
    memory = client.sidecar._memory
    _, lost = await client.dial()
    lost.write(b"GET / HTTP/1.1\r\nHost: backend\r\nX-Slow: " + b"y" * 5000)
    await until(lambda: memory.held > 5000)
    assert re.search(r"(?m)^lictor_buffered_bytes 5\d\d\d$", client.sidecar.metrics.render())
    await hang_up(lost)
    await until(lambda: memory.held == 0)
    asked = asyncio.create_task(ask_for_head(client))
    await until(lambda: memory.held > 5000)
    answered.set()
    assert b"200 OK" in await asked
    await until(lambda: memory.held == 0)


async def ask_for_head(client: Member) -> bytes:
    reader, writer = await client.dial()
    writer.write(get())
    head = await reader.readuntil(b"\r\n\r\n")
    await hang_up(writer)
    return head
