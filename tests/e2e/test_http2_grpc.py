"""gRPC through two sidecars, with the real grpcio on both ends, and HTTP/2 by hand where grpcio is too good."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio
import h2.config
import h2.connection
import h2.events
import msgspec
import pytest

from raftstate.model.intention import HeaderMatch, HTTPMatch, Intention, Permission
from tests.support.sidecars import Member, Mesh, hang_up, until
from tests.support.tls_peers import context


class Service(grpc.GenericRpcHandler):
    """Methods of ``test.Echo``, on bytes."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.metadata: dict[str, str] = {}
        self.cancelled = asyncio.Event()

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
        self.calls.append(details.method)
        self.metadata = dict(details.invocation_metadata)
        return {
            "/test.Echo/Unary": grpc.unary_unary_rpc_method_handler(self.unary),
            "/test.Echo/Down": grpc.unary_stream_rpc_method_handler(self.down),
            "/test.Echo/Up": grpc.stream_unary_rpc_method_handler(self.up),
            "/test.Echo/Both": grpc.stream_stream_rpc_method_handler(self.both),
            "/test.Echo/Fail": grpc.unary_unary_rpc_method_handler(self.fail),
            "/test.Echo/Hang": grpc.unary_unary_rpc_method_handler(self.hang),
        }.get(details.method)

    async def unary(self, request: bytes, context: Any) -> bytes:
        context.set_trailing_metadata((("x-trailer", "t"),))
        return request

    async def down(self, request: bytes, context: Any) -> AsyncIterator[bytes]:
        for n in range(int(request)):
            yield b"%d" % n

    async def up(self, requests: AsyncIterator[bytes], context: Any) -> bytes:
        total = 0
        async for request in requests:
            total += len(request)
        return b"%d" % total

    async def both(self, requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
        async for request in requests:
            yield request.upper()

    async def fail(self, request: bytes, context: Any) -> bytes:
        await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "not now: ä%")
        return b""

    async def hang(self, request: bytes, context: Any) -> bytes:
        try:
            await asyncio.Event().wait()
        finally:
            self.cancelled.set()
        return b""


METHODS = Intention(
    source_name="web",
    destination_name="backend",
    permissions=(
        Permission(
            "deny", HTTPMatch(path_exact="/test.Echo/Fail", header=(HeaderMatch(name="x-bad", present=True),))
        ),
        *(
            Permission("allow", HTTPMatch(path_exact=f"/test.Echo/{name}", methods=("POST",)))
            for name in ("Unary", "Down", "Both", "Up", "Fail", "Hang")
        ),
    ),
)


@contextlib.asynccontextmanager
async def setting() -> AsyncIterator[tuple[Member, Member, Service, grpc.aio.Channel]]:
    service = Service()
    app = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
    app.add_generic_rpc_handlers((service,))
    port = app.add_insecure_port("127.0.0.1:0")
    await app.start()
    async with Mesh() as mesh:
        server = await mesh.member("backend", "backend-1", port=port)
        client = await mesh.member("web", "web-1", upstreams=("backend",))
        await server.push(intentions=(METHODS,))
        await client.route("backend", server.endpoint)
        async with grpc.aio.insecure_channel(f"127.0.0.1:{client.ports.upstreams['backend']}") as channel:
            yield client, server, service, channel
        await app.stop(0)


async def test_all_four_kinds_of_call() -> None:
    async with setting() as (_, server, service, channel), asyncio.timeout(30):
        call = channel.unary_unary("/test.Echo/Unary")(b"hello", metadata=(("x-one", "1"),))
        assert await call == b"hello"
        assert ("x-trailer", "t") in tuple(await call.trailing_metadata())
        assert service.metadata["x-one"] == "1"
        assert "svc/web" in service.metadata["x-forwarded-client-cert"]

        down = channel.unary_stream("/test.Echo/Down")(b"500")
        assert [int(reply) async for reply in down] == list(range(500))

        async def parts() -> AsyncIterator[bytes]:
            for _ in range(50):
                yield b"x" * 20_000

        assert await channel.stream_unary("/test.Echo/Up")(parts()) == b"1000000"

        both = channel.stream_stream("/test.Echo/Both")()
        for word in (b"one", b"two", b"three"):
            await both.write(word)
            assert await both.read() == word.upper()
        await both.done_writing()
        assert await both.read() is grpc.aio.EOF
        assert await both.code() == grpc.StatusCode.OK
        assert 'method="POST",code="200",origin="app"} 4' in server.sidecar.metrics.render()


async def test_methods_are_decided_one_by_one() -> None:
    async with setting() as (_, server, service, channel), asyncio.timeout(30):
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await channel.unary_unary("/test.Echo/Other")(b"x")
        assert refused.value.code() == grpc.StatusCode.PERMISSION_DENIED
        assert refused.value.details() == "destination 'backend' denies this request of source 'web'"
        assert service.calls == []
        assert await channel.unary_unary("/test.Echo/Unary")(b"x") == b"x"
        # On the same connection, by the policy of the moment:
        only_down = Intention(
            source_name="web",
            destination_name="backend",
            permissions=(Permission("allow", HTTPMatch(path_exact="/test.Echo/Down")),),
        )
        await server.push(intentions=(only_down,))
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await channel.unary_unary("/test.Echo/Unary")(b"x", wait_for_ready=True)
        assert refused.value.code() in (grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.UNAVAILABLE)
        assert service.calls == ["/test.Echo/Unary"]


async def test_a_status_of_the_app_passes() -> None:
    async with setting() as (_, _, service, channel), asyncio.timeout(30):
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await channel.unary_unary("/test.Echo/Fail")(b"x")
        assert failed.value.code() == grpc.StatusCode.FAILED_PRECONDITION
        assert failed.value.details() == "not now: ä%"
        with pytest.raises(grpc.aio.AioRpcError) as denied:
            await channel.unary_unary("/test.Echo/Fail")(b"x", metadata=(("x-bad", "1"),))
        assert denied.value.code() == grpc.StatusCode.PERMISSION_DENIED
        assert service.calls == ["/test.Echo/Fail"]


async def test_a_cancelled_call_is_cancelled_at_the_app() -> None:
    async with setting() as (_, _, service, channel), asyncio.timeout(30):
        call = channel.unary_unary("/test.Echo/Hang")(b"x")
        await until(lambda: bool(service.calls))
        call.cancel()
        await service.cancelled.wait()
        assert await channel.unary_unary("/test.Echo/Unary")(b"x") == b"x"


async def test_many_calls_at_once_and_large_ones_do_not_block_each_other() -> None:
    async with setting() as (_, _, _, channel), asyncio.timeout(60):
        stalled = channel.stream_stream("/test.Echo/Both")()

        async def flood() -> None:
            # Nobody reads the answers: its windows fill up, and only its own.
            for _ in range(200):
                await stalled.write(b"x" * 50_000)

        flooding = asyncio.create_task(flood())
        big = b"y" * 3_000_000
        answers = await asyncio.gather(*(channel.unary_unary("/test.Echo/Unary")(b"%d" % n) for n in range(50)))
        assert answers == [b"%d" % n for n in range(50)]
        assert await channel.unary_unary("/test.Echo/Unary")(big) == big
        assert not flooding.done()
        flooding.cancel()
        stalled.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await flooding


async def test_what_a_stalled_stream_makes_the_sidecar_hold_is_counted() -> None:
    async with setting() as (_, server, _, channel), asyncio.timeout(60):
        stalled = channel.stream_stream("/test.Echo/Both")()
        memory = server.sidecar._memory

        async def flood() -> None:
            while True:
                await stalled.write(b"x" * 50_000)  # nobody reads the answers

        flooding = asyncio.create_task(flood())
        await until(lambda: memory.held > 100_000)
        flooding.cancel()
        stalled.cancel()
        await until(lambda: memory.held == 0)
        with contextlib.suppress(asyncio.CancelledError):
            await flooding


async def test_a_connection_that_the_app_cut_is_made_again() -> None:
    async with setting() as (_, server, _, channel), asyncio.timeout(30):
        assert await channel.unary_unary("/test.Echo/Unary")(b"x") == b"x"
        for connection in list(server.sidecar._desk.http.http2.connections):
            for app in list(connection._apps):  # type: ignore[attr-defined]
                app.half.channel.abort()
                app.half.abort(None)  # as if the app had cut it
        assert await channel.unary_unary("/test.Echo/Unary")(b"y") == b"y", "dialled again"


async def test_draining_ends_the_connection_after_the_call() -> None:
    async with setting() as (_, server, _, channel), asyncio.timeout(30):
        both = channel.stream_stream("/test.Echo/Both")()
        await both.write(b"one")
        assert await both.read() == b"ONE"
        draining = asyncio.create_task(server.sidecar.drain(20))
        await until(lambda: server.sidecar._desk.http.http2.draining)
        await both.write(b"two")
        assert await both.read() == b"TWO", "the call under way goes on"
        await both.done_writing()
        assert await both.read() is grpc.aio.EOF
        await asyncio.wait_for(draining, 5)


# By hand


class Raw:
    """A minimal HTTP/2 client that can misbehave."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer
        config = h2.config.H2Configuration(
            header_encoding="utf-8", validate_outbound_headers=False, normalize_outbound_headers=False
        )
        self.conn = h2.connection.H2Connection(config)
        self.conn.initiate_connection()
        self.events: list[h2.events.Event] = []

    def request(
        self, *extra: tuple[str, str], path: str = "/test.Echo/Unary", end: bool = True, method: str = "POST"
    ) -> int:
        stream_id = self.conn.get_next_available_stream_id()
        headers = [(":method", method), (":scheme", "http"), (":authority", "a"), (":path", path), *extra]
        self.conn.send_headers(stream_id, headers, end_stream=end)
        self.writer.write(self.conn.data_to_send())
        return stream_id

    async def next(self, kind: type[Any], stream_id: int | None = None) -> Any:
        while True:
            for event in self.events:
                if isinstance(event, kind) and (stream_id is None or event.stream_id == stream_id):
                    self.events.remove(event)
                    return event
            data = await self.reader.read(65536)
            assert data, f"ended before {kind.__name__}"
            self.events += self.conn.receive_data(data)
            self.writer.write(self.conn.data_to_send())


@contextlib.asynccontextmanager
async def raw() -> AsyncIterator[tuple[Raw, Service, Member]]:
    async with setting() as (client, server, service, _), asyncio.timeout(30):
        reader, writer = await client.dial()
        yield Raw(reader, writer), service, server
        await hang_up(writer)


@pytest.mark.parametrize(
    ("path", "extra", "status"),
    [
        ("/test.Echo/Other", (), "403"),
        ("/x/..%2ftest.Echo/Unary", (), "400"),
        ("/test.Echo/Unary#", (), "400"),
        ("test.Echo/Unary", (), "400"),
        ("/test.Echo/Un ary", (), "400"),
        ("/test.Echo/Unary", (("content-length", "0"), ("content-length", "0")), "400"),
        ("/test.Echo/Fail", (("x-bad", "1"),), "403"),
        ("/test.Echo/Fail", (("x_bad", "1"),), "403"),
    ],
)
async def test_refused_before_the_app(path: str, extra: tuple[tuple[str, str], ...], status: str) -> None:
    async with raw() as (client, service, _):
        stream_id = client.request(*extra, path=path)
        response = await client.next(h2.events.ResponseReceived, stream_id)
        assert dict(response.headers)[":status"] == status
        body = await client.next(h2.events.DataReceived, stream_id)
        assert b"error" in body.data
        assert service.calls == []


@pytest.mark.parametrize(
    "extra",
    [
        (("transfer-encoding", "chunked"),),
        (("connection", "x"),),
        (("X-Upper", "1"),),
        (("x-lines", "a\r\nb: c"),),
        (("te", "gzip"),),
        (("host", "other"),),
        ((":path", "/other"),),
        ((":method", "GET"),),
    ],
)
async def test_malformed_header_lists_end_the_stream_or_connection(extra: tuple[tuple[str, str], ...]) -> None:
    async with raw() as (client, service, _):
        client.request(*extra)
        data = b"".join([chunk async for chunk in _until_end(client.reader)])
        assert data, "a GOAWAY or an answer came"
        assert service.calls == []


async def _until_end(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    with contextlib.suppress(ConnectionError, TimeoutError):
        while chunk := await asyncio.wait_for(reader.read(65536), 0.5):
            yield chunk


async def test_connect_is_refused() -> None:
    async with raw() as (client, service, _):
        stream_id = client.conn.get_next_available_stream_id()
        client.conn.send_headers(stream_id, [(":method", "CONNECT"), (":authority", "a:1")], end_stream=True)
        client.writer.write(client.conn.data_to_send())
        data = b"".join([chunk async for chunk in _until_end(client.reader)])
        assert data
        assert service.calls == []


async def test_rapid_resets_are_cut_off() -> None:
    async with raw() as (client, service, server):
        with contextlib.suppress(ConnectionError):
            for _ in range(2000):
                stream_id = client.request()
                client.conn.reset_stream(stream_id)
                client.writer.write(client.conn.data_to_send())
                await client.writer.drain()
            while await client.reader.read(65536):
                pass
        assert not server.sidecar._desk.http.http2.connections
        assert len(service.calls) < 2000


async def test_a_stopped_sidecar_keeps_no_connection_to_an_app_that_does_not_hang_up() -> None:
    gone = asyncio.Event()

    async def app(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.read(65536):
            pass
        try:
            while True:  # the sidecar has ended its side; only a reset shows in what we send
                writer.write(b"\0")
                await writer.drain()
                await asyncio.sleep(0.005)
        except ConnectionError:
            gone.set()
            raise

    async with Mesh() as mesh, asyncio.timeout(30):
        client, server, _ = await mesh.pair(app)
        await server.push(intentions=(METHODS,))
        reader, writer = await client.dial()
        raw_client = Raw(reader, writer)
        await raw_client.next(h2.events.ResponseReceived, raw_client.request(path="/test.Echo/Other"))
        await hang_up(writer)
        await until(lambda: not server.sidecar.live_calls())
        await server.sidecar.close()
        await gone.wait()


@pytest.mark.parametrize(("protocol", "agreed"), [("grpc", "h2"), ("http2", "h2"), ("http", "http/1.1")])
async def test_a_foreign_peer_agrees_on_http2_where_the_app_speaks_it(protocol: str, agreed: str) -> None:
    async with setting() as (_, server, service, _), asyncio.timeout(30):
        me = server.sidecar.config.self
        assert me is not None
        await server.push(self=msgspec.structs.replace(me, protocol=protocol))
        ca = server.mesh.ca
        tls = context(ca.leaf("web", "web-9"), ca.root_pem, alpn=("h2", "http/1.1"))
        reader, writer = await asyncio.open_connection("127.0.0.1", server.ports.public_port, ssl=tls)
        assert writer.get_extra_info("ssl_object").selected_alpn_protocol() == agreed
        if agreed == "h2":
            client = Raw(reader, writer)
            grpc_headers = (("content-type", "application/grpc"), ("te", "trailers"))
            call = client.request(*grpc_headers, end=False)
            client.conn.send_data(call, b"\0\0\0\0\x02hi", end_stream=True)
            writer.write(client.conn.data_to_send())
            assert (await client.next(h2.events.DataReceived, call)).data == b"\0\0\0\0\x02hi"
            assert dict((await client.next(h2.events.TrailersReceived, call)).headers)["grpc-status"] == "0"
            denied = client.request(*grpc_headers, path="/test.Echo/Other")
            assert dict((await client.next(h2.events.ResponseReceived, denied)).headers)["grpc-status"] == "7"
            assert service.calls == ["/test.Echo/Unary"]
        await hang_up(writer)
