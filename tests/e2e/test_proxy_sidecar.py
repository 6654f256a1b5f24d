"""The sidecar's data plane end to end on loopback: two or more sidecars, real TLS, real apps."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import weakref

import pytest

from proxy import outgoing
from proxy.call import AppChannel, Call
from proxy.errors import PortUnavailable
from proxy.mux.core import MuxCore, MuxStream
from proxy.mux.flow import window_for
from proxy.mux.session import MuxSession
from proxy.sidecar import Sidecar, SidecarOptions
from raftstate.model.connect import Revocation
from tests.support.loops import with_mesh
from tests.support.promises import PATIENCE_S, promptly
from tests.support.sidecars import Mesh, digest, echo, hang_up, naming, until


@with_mesh
async def test_echo_through_two_sidecars(mesh: Mesh) -> None:
    client, _, _ = await mesh.pair()
    assert await client.ask(b"hello\n") == b"hello\n"


@with_mesh
async def test_refused_without_intention_and_allowed_with_one(mesh: Mesh) -> None:
    client, server, _ = await mesh.pair()
    await server.push(intentions=())
    assert await client.ask() == b""
    await server.allow("web")
    assert await client.ask() == b"hi\n"


@with_mesh
async def test_an_app_that_speaks_first_is_heard_whole(mesh: Mesh) -> None:
    async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"220 ready\r\n")
        writer.write_eof()
        await reader.read()

    client, _, _ = await mesh.pair(greet)

    async def call() -> bytes:
        reader, writer = await client.dial()
        said = await reader.read()
        await hang_up(writer)
        return said

    for _ in range(10):
        assert await asyncio.gather(*(call() for _ in range(20))) == [b"220 ready\r\n"] * 20


@with_mesh
async def test_large_transfer_both_ways(mesh: Mesh) -> None:
    client, _, _ = await mesh.pair()
    reader, writer = await client.dial()
    block = bytes(range(256)) * 4096
    total = 50

    async def send() -> None:
        for _ in range(total):
            writer.write(block)
            await writer.drain()
        writer.write_eof()

    sending = asyncio.get_running_loop().create_task(send())
    received = await reader.read(-1)
    await sending
    assert len(received) == total * len(block)
    assert digest(received) == digest(block * total)
    await hang_up(writer)


@with_mesh
async def test_half_close_lets_the_answer_through(mesh: Mesh) -> None:
    async def count(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        data = await reader.read(-1)
        writer.write(b"%d" % len(data))

    client, _, _ = await mesh.pair(count)
    reader, writer = await client.dial()
    writer.write(b"x" * 1000)
    writer.write_eof()
    assert await reader.read(-1) == b"1000"
    await hang_up(writer)


@with_mesh
async def test_server_speaks_first(mesh: Mesh) -> None:
    async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"220 ready\n")
        await reader.read(1)

    client, _, _ = await mesh.pair(greet)
    reader, writer = await client.dial()
    assert await asyncio.wait_for(reader.readline(), PATIENCE_S) == b"220 ready\n"
    await hang_up(writer)


@with_mesh
async def test_slow_reader_delays_nobody(mesh: Mesh) -> None:
    async def flood(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if await reader.readline() == b"flood\n":
            while True:
                writer.write(b"x" * 65536)
                await writer.drain()
        writer.write(b"quick\n")

    client, server, _ = await mesh.pair(flood)
    _, slow = await client.dial()
    slow.write(b"flood\n")
    pair = server.sidecar.metrics.pair("inbound", "web", "backend")
    await until(lambda: pair.active == 1)
    for _ in range(20):
        async with promptly(2.0):
            assert await client.ask(b"now\n") == b"quick\n"
    await hang_up(slow)


@with_mesh
async def test_deleted_intention_cuts_the_live_call_and_no_other(mesh: Mesh) -> None:
    client, server, _ = await mesh.pair()
    other = await mesh.member("other", "other-1", upstreams=("backend",))
    await server.allow("web", "other")
    await other.route("backend", server.endpoint)
    reader, writer = await client.dial()
    kept_reader, kept_writer = await other.dial()
    for r, w in ((reader, writer), (kept_reader, kept_writer)):
        w.write(b"one\n")
        assert await r.readline() == b"one\n"
    await server.allow("other")
    with pytest.raises(ConnectionError):
        async with promptly():
            await reader.read()
    kept_writer.write(b"two\n")
    assert await kept_reader.readline() == b"two\n"
    assert await client.ask() == b""
    for w in (writer, kept_writer):
        await hang_up(w)


@pytest.mark.parametrize(
    "revocation",
    [Revocation("instance", "web-1"), Revocation("service", "web"), Revocation("instance", "web-1", service="web")],
)
@with_mesh
async def test_revoked_identity_loses_its_session_and_comes_back_when_restored(
    mesh: Mesh, revocation: Revocation
) -> None:
    client, server, _ = await mesh.pair()
    reader, writer = await client.talk()
    await server.revoke(revocation)
    with pytest.raises(ConnectionError):
        async with promptly():
            await reader.read()
    assert await client.ask() == b""
    await server.revoke()
    assert await client.ask() == b"hi\n"
    await hang_up(writer)


@with_mesh
async def test_own_revocation_stops_our_calls_at_the_source(mesh: Mesh) -> None:
    client, _, _ = await mesh.pair()
    reader, writer = await client.talk()
    await client.revoke(Revocation("instance", "web-1"))
    with pytest.raises(ConnectionError):
        async with promptly():
            await reader.read()
    assert await client.ask() == b""
    await hang_up(writer)


@with_mesh
async def test_app_that_is_down_is_retried_on_the_other_instance(mesh: Mesh) -> None:
    up, down = await mesh.app(naming("up")), await mesh.app(naming("down"))
    one = await mesh.member("backend", "backend-1", port=up.port)
    two = await mesh.member("backend", "backend-2", port=down.port)
    client = await mesh.member("web", "web-1", upstreams=("backend",))
    for server in (one, two):
        await server.allow("web")
    await client.route("backend", one.endpoint, two.endpoint)
    assert {await client.ask() for _ in range(20)} == {b"up\n", b"down\n"}
    await down.stop()
    assert [await client.ask() for _ in range(20)] == [b"up\n"] * 20


@with_mesh
async def test_killed_sidecar_is_retried_on_the_other_instance(mesh: Mesh) -> None:
    apps = [await mesh.app(naming(name)) for name in ("one", "two")]
    servers = [
        await mesh.member("backend", f"backend-{number}", port=app.port) for number, app in enumerate(apps, start=1)
    ]
    client = await mesh.member("web", "web-1", upstreams=("backend",))
    for server in servers:
        await server.allow("web")
    await client.route("backend", *[server.endpoint for server in servers])
    assert {await client.ask() for _ in range(20)} == {b"one\n", b"two\n"}
    await servers[1].stop()
    assert [await client.ask() for _ in range(20)] == [b"one\n"] * 20


@with_mesh
async def test_instance_that_denies_is_retried_on_one_that_allows(mesh: Mesh) -> None:
    apps = [await mesh.app(naming(name)) for name in ("one", "two")]
    servers = [
        await mesh.member("backend", f"backend-{number}", port=app.port) for number, app in enumerate(apps, start=1)
    ]
    client = await mesh.member("web", "web-1", upstreams=("backend",))
    await servers[0].allow("web")
    await client.route("backend", *[server.endpoint for server in servers])
    assert [await client.ask() for _ in range(10)] == [b"one\n"] * 10


@with_mesh
async def test_deregistered_instance_loses_its_calls(mesh: Mesh) -> None:
    client, _, _ = await mesh.pair()
    reader, writer = await client.talk()
    await client.route("backend")
    with pytest.raises(ConnectionError):
        async with promptly():
            await reader.read()
    await hang_up(writer)


@with_mesh
async def test_an_instance_that_was_deregistered_ends_its_callers_calls_itself(mesh: Mesh) -> None:
    """Whoever calls may not know of it: another mesh's proxy, or one whose agent is away."""
    client, server, _ = await mesh.pair()
    behind = await mesh.app(echo)
    far = await mesh.member("far", "far-1", port=behind.port)
    await far.allow("backend")
    server_calls = await mesh.member("backend", "backend-2", upstreams=("far",))
    await server_calls.route("far", far.endpoint)
    reader, writer = await client.dial()
    own_reader, own_writer = await server_calls.dial("far")
    for r, w in ((reader, writer), (own_reader, own_writer)):
        w.write(b"one\n")
        assert await r.readline() == b"one\n"
    for each in (server, server_calls):
        await each.push(registered=False)
    with pytest.raises(ConnectionError):
        async with promptly():
            await reader.read()
    assert await client.ask() == b""
    assert not server.sidecar.ready
    own_writer.write(b"two\n")
    assert await own_reader.readline() == b"two\n", "what its app calls goes on"
    await server.push(registered=True)
    assert server.sidecar.ready
    async with asyncio.timeout(10):
        while await client.ask() != b"hi\n":
            pass
    assert 'lictor_cut_total{direction="inbound",reason="deregistered"} 1' in server.sidecar.metrics.render()
    for w in (writer, own_writer):
        await hang_up(w)


@with_mesh
async def test_loopback_upstream_goes_plainly_to_the_own_app(mesh: Mesh) -> None:
    app = await mesh.app()
    member = await mesh.member("backend", "backend-1", port=app.port, upstreams=("backend",))
    await member.route("backend", loopback_port=app.port)
    assert await member.ask(b"self\n") == b"self\n"


@with_mesh
async def test_upstream_in_error_closes_at_once(mesh: Mesh, caplog: pytest.LogCaptureFixture) -> None:
    client = await mesh.member("web", "web-1", upstreams=("backend",))
    await client.route("backend", error="no service is named backend")
    for _ in range(3):
        assert await client.ask() == b""
    lines = [record.getMessage() for record in caplog.records if "no service is named backend" in record.getMessage()]
    assert len(lines) == 1


@with_mesh
async def test_renewed_leaf_and_rotated_root_drop_nothing(mesh: Mesh) -> None:
    client, server, _ = await mesh.pair()
    reader, writer = await client.talk()
    await client.push(leaf=mesh.ca.leaf("web", "web-1"))
    writer.write(b"two\n")
    assert await reader.readline() == b"two\n"
    assert await client.ask() == b"hi\n"
    await hang_up(writer)
    await until(lambda: len(server.sidecar._public.sessions) == 1)  # type: ignore[union-attr]


@with_mesh
async def test_many_idle_connections(mesh: Mesh) -> None:
    client, server, _ = await mesh.pair()
    held = []
    for _ in range(1000):
        held.append(await client.dial())
    pair = server.sidecar.metrics.pair("inbound", "web", "backend")
    await until(lambda: pair.active == 1000)
    for reader, writer in held[::100]:
        writer.write(b"still there\n")
        assert await reader.readline() == b"still there\n"
    for _, writer in held:
        writer.close()
    await until(lambda: pair.active == 0)


@with_mesh
async def test_drain_lets_live_calls_end_and_takes_no_new_ones(mesh: Mesh) -> None:
    client, server, _ = await mesh.pair()
    reader, writer = await client.talk()
    server.sidecar.start_drain(5)
    await until(lambda: server.sidecar.draining)
    assert await client.ask() == b""
    writer.write(b"two\n")
    assert await reader.readline() == b"two\n"
    await hang_up(writer)
    await until(lambda: server._running is not None and server._running.done())


@with_mesh
async def test_full_session_makes_way_for_another(mesh: Mesh) -> None:
    client, server, _ = await mesh.pair()
    client.sidecar._pool._max_streams = 10
    held = [await client.dial() for _ in range(25)]
    for reader, writer in held:
        writer.write(b"hello\n")
        assert await asyncio.wait_for(reader.readline(), PATIENCE_S) == b"hello\n"
    assert len(server.sidecar._public.sessions) == 3  # type: ignore[union-attr]
    for _, writer in held:
        await hang_up(writer)


@with_mesh
async def test_instance_that_never_answers_is_given_up_on(mesh: Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    """A peer that takes the session and then no stream: what was not sent yet goes elsewhere, the rest is closed."""
    monkeypatch.setattr(outgoing, "ACCEPT_TIMEOUT_S", 0.2)
    client, server, _ = await mesh.pair()
    assert await client.ask() == b"hi\n"
    monkeypatch.setattr(server.sidecar._desk, "_refusal", lambda identity, service: None)
    monkeypatch.setattr("proxy.call.Call.start", lambda self: None)
    assert await client.ask(b"lost\n") == b""
    await until(lambda: client.sidecar.live_calls() == 0)


@with_mesh
async def test_app_aborts_are_carried_across(mesh: Mesh) -> None:
    """Either app dropping its connection ends the other's."""

    async def reset(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readline()
        writer.transport.abort()

    client, server, _ = await mesh.pair(reset)
    reader, writer = await client.dial()
    writer.write(b"bye\n")
    with contextlib.suppress(ConnectionError):
        assert await asyncio.wait_for(reader.read(), PATIENCE_S) == b""
    await hang_up(writer)
    await until(lambda: client.sidecar.live_calls() == server.sidecar.live_calls() == 0)


@with_mesh
async def test_client_that_vanishes_frees_everything(mesh: Mesh) -> None:
    client, server, _ = await mesh.pair()
    for _ in range(20):
        _, writer = await client.dial()
        writer.write(b"hello\n")
        writer.transport.abort()
    await until(lambda: client.sidecar.live_calls() == server.sidecar.live_calls() == 0)
    assert all(not session.core.streams for session in server.sidecar._public.sessions)  # type: ignore[union-attr]


@with_mesh
async def test_lost_configuration_keeps_serving(mesh: Mesh) -> None:
    """Static stability: the stream's end changes nothing."""
    client, server, _ = await mesh.pair()
    for member in (client, server):
        assert member._running is not None
        await member.push()  # a heartbeat
    assert await client.ask() == b"hi\n"


@with_mesh
async def test_taken_port_is_said_at_bind(mesh: Mesh) -> None:
    member = await mesh.member("web", "web-1", upstreams=("backend",))
    options = SidecarOptions(upstreams=(("other", "127.0.0.1", member.ports.upstreams["backend"]),))
    with pytest.raises(PortUnavailable, match="choose another port"):
        await Sidecar(options).bind()


@with_mesh
async def test_nothing_of_a_finished_call_stays(mesh: Mesh) -> None:
    kinds = (MuxStream, outgoing.Outgoing, outgoing.AppConnection, Call, AppChannel)

    def alive() -> int:
        gc.collect()
        return sum(isinstance(each, kinds) for each in gc.get_objects())

    client, server, _ = await mesh.pair()
    assert await client.ask() == b"hi\n"
    await until(lambda: client.sidecar.live_calls() == server.sidecar.live_calls() == 0)
    before = alive()
    for _ in range(30):
        assert await client.ask() == b"hi\n"
    await server.push(intentions=())
    for _ in range(5):
        assert await client.ask() == b""
    await until(lambda: client.sidecar.live_calls() == server.sidecar.live_calls() == 0)
    await until(lambda: alive() <= before)
    assert len(server.sidecar._tasks) <= 4


@with_mesh
async def test_what_all_slow_readers_together_make_us_hold_is_bounded(mesh: Mesh) -> None:
    async def flood(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if await reader.readline() == b"flood\n":
            while True:
                writer.write(b"x" * 65536)
                await writer.drain()
        writer.write(b"quick\n")

    client, _, _ = await mesh.pair(flood)
    memory = client.sidecar._memory
    memory.limit = 1024 * 1024
    slow = [await client.dial() for _ in range(12)]
    for _, writer in slow:
        writer.write(b"flood\n")
        # The kernel must not take it all: this is about what we hold.
        writer.transport.pause_reading()  # type: ignore[attr-defined]
    await until(lambda: memory.overruns >= 3)
    assert memory.held <= memory.limit + 512 * 1024
    for _, writer in slow:
        writer.transport.abort()
    await until(lambda: memory.held == 0)
    assert await client.ask(b"now\n") == b"quick\n"


@with_mesh
async def test_decisions_are_remembered_by_source_not_by_certificate(mesh: Mesh) -> None:
    client, server, _ = await mesh.pair()
    desk = server.sidecar._desk
    for _ in range(3):
        await client.push(leaf=mesh.ca.leaf("web", "web-1"))
        assert await client.ask() == b"hi\n"
    assert list(desk._decisions) == [("web", "web-1")]


@with_mesh
async def test_a_session_knows_how_far_its_peer_is(mesh: Mesh) -> None:
    client, server, _ = await mesh.pair()
    assert await client.ask() == b"hi\n"
    sessions = [*client.sidecar._pool._live, *server.sidecar._public.sessions]  # type: ignore[union-attr]
    assert len(sessions) == 2
    await until(lambda: all(session.core.pongs >= 4 for session in sessions))
    for session in sessions:
        assert 0 < session.round_trip_s < 5
        assert session.core.growth.window_max == window_for(session.round_trip_s)


_MARK = 4095
"""The ``max_streams`` of the cores that are to be freed."""


def _marked_in_memory() -> int:
    """Count marked cores and their sessions. Compiled classes take no weak references: the collector is asked."""
    cores = [each.core if isinstance(each, MuxSession) else each for each in gc.get_objects()]
    return sum(isinstance(core, MuxCore) and core.max_streams == _MARK for core in cores)


@with_mesh
async def test_a_lost_session_and_a_replaced_certificate_are_freed_without_the_collector(mesh: Mesh) -> None:
    client, server, _ = await mesh.pair()
    assert await client.ask() == b"hi\n"
    material, public = client.sidecar.config.material, server.sidecar._public
    assert material is not None
    assert public is not None
    context = weakref.ref(material.client)
    del material
    gc.collect()
    gc.disable()
    try:
        sessions = [*client.sidecar._pool._live, *public.sessions]
        assert len(sessions) == 2
        for session in sessions:
            session.core.max_streams = _MARK
        del sessions, session
        assert _marked_in_memory() == 2 * 2
        await client.push(leaf=mesh.ca.leaf("web", "web-1"))  # a session with the old certificate is retired
        await until(lambda: _marked_in_memory() == 0)
        assert await client.ask() == b"hi\n"
        await until(lambda: context() is None)
    finally:
        gc.enable()
