"""gRPC that leaves through a sidecar: each call is routed, split, balanced and retried, with the real grpcio."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import h2.events
import msgspec
import pytest

from raftstate.model.intention import HTTPMatch, Intention, Permission
from tests.e2e.support_e2e import a_free_port, need
from tests.e2e.test_http2_grpc import Raw
from tests.support.sidecars import Member, Mesh, hang_up, until
from tests.support.traffic import SUBSETS, Stage

GRPC = {"Config": {"protocol": "grpc"}}
UNARY, DOWN, UP, BOTH, HANG = (f"/test.Echo/{name}" for name in ("Unary", "Down", "Up", "Both", "Hang"))


class Echo(grpc.GenericRpcHandler):
    """One instance's app. What it answers begins with its name."""

    def __init__(self, name: str) -> None:
        self.name = name.encode()
        self.calls: Counter[str] = Counter()
        self.metadata: dict[str, str] = {}
        self.cancelled = asyncio.Event()
        self.fail: grpc.StatusCode | None = None
        self.fail_late = False
        self.server = grpc.aio.server(options=[("grpc.so_reuseport", 0), ("grpc.max_receive_message_length", -1)])
        self.server.add_generic_rpc_handlers((self,))
        self.port = self.server.add_insecure_port("127.0.0.1:0")

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
        self.calls[details.method] += 1
        self.metadata = dict(details.invocation_metadata)
        if details.method.startswith("/test.Other/"):
            return grpc.unary_unary_rpc_method_handler(self.unary)
        return {
            UNARY: grpc.unary_unary_rpc_method_handler(self.unary),
            DOWN: grpc.unary_stream_rpc_method_handler(self.down),
            UP: grpc.stream_unary_rpc_method_handler(self.up),
            BOTH: grpc.stream_stream_rpc_method_handler(self.both),
            HANG: grpc.unary_unary_rpc_method_handler(self.hang),
        }.get(details.method)

    async def unary(self, request: bytes, context: Any) -> bytes:
        if self.fail is not None:
            if self.fail_late:
                await context.send_initial_metadata(())
            await context.abort(self.fail, "as asked")
        context.set_trailing_metadata((("x-trailer", "t"),))
        return self.name + request

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
            yield self.name + request

    async def hang(self, request: bytes, context: Any) -> bytes:
        try:
            await asyncio.Event().wait()
        finally:
            self.cancelled.set()
        return b""


class GrpcStage(Stage):
    """Instances that are gRPC servers."""

    def __init__(self, mesh: Mesh) -> None:
        super().__init__(mesh)
        self.entries["proxy-defaults", "global"] = GRPC
        self.echoes: dict[str, Echo] = {}

    async def echo(self, instance: str, version: str = "", service: str = "backend") -> Echo:
        echo = self.echoes[instance] = Echo(instance)
        await echo.server.start()
        server = await self.add(service, instance, version, echo.port)
        me = server.sidecar.config.self
        assert me is not None
        await server.push(self=msgspec.structs.replace(me, protocol="grpc"))
        return echo

    @contextlib.asynccontextmanager
    async def channel(self) -> AsyncIterator[grpc.aio.Channel]:
        target = f"127.0.0.1:{self.client.ports.upstreams['backend']}"
        options = [("grpc.max_receive_message_length", -1), ("grpc.enable_retries", 0)]
        async with grpc.aio.insecure_channel(target, options=options) as channel:
            yield channel

    def leases(self) -> int:
        """What the balancers think is under way."""
        upstream = self.client.sidecar._upstreams["backend"]
        return sum(one.active for each in upstream.balancers.values() for one in each.instances.values())


@contextlib.asynccontextmanager
async def stage(*instances: str) -> AsyncIterator[GrpcStage]:
    """``b1:v1``: an instance and its version."""
    async with Mesh() as mesh, asyncio.timeout(60):
        made = GrpcStage(mesh)
        for instance in instances:
            name, _, version = instance.partition(":")
            await made.echo(name, version)
        await made.caller()
        try:
            yield made
        finally:
            for echo in made.echoes.values():
                await echo.server.stop(0)


async def counted(channel: grpc.aio.Channel, calls: int, method: str = UNARY, **more: Any) -> Counter[bytes]:
    answers = await asyncio.gather(*(channel.unary_unary(method)(b"", **more) for _ in range(calls)))
    return Counter(answers)


async def test_calls_of_one_connection_are_spread_over_the_instances() -> None:
    async with stage("b1", "b2", "b3") as s, s.channel() as channel:
        answers = await counted(channel, 300)
        assert set(answers) == {b"b1", b"b2", b"b3"}
        assert min(answers.values()) > 50, answers
        assert s.leases() == 0
        rendered = s.client.sidecar.metrics.render()
        assert 'destination="backend",method="POST",code="200",origin="app"} 300' in rendered
        assert 'destination="backend",method="/test.Echo/Unary",grpc_status="0",origin="app"} 300' in rendered


async def test_all_four_kinds_of_call() -> None:
    async with stage("b1", "b2") as s, s.channel() as channel:
        metadata = (("x-one", "1"), ("traceparent", "00-" + "a" * 32 + "-" + "b" * 16 + "-01"))
        forged = ("x-forwarded-client-cert", "URI=spiffe://forged")
        call = channel.unary_unary(UNARY)(b"hello", metadata=(*metadata, forged))
        answer = await call
        assert answer[2:] == b"hello"
        assert ("x-trailer", "t") in tuple(await call.trailing_metadata())
        seen = s.echoes[answer[:2].decode()].metadata
        assert seen["x-one"] == "1"
        assert seen["traceparent"].startswith("00-aaaa")
        assert "svc/web" in seen["x-forwarded-client-cert"]
        assert "forged" not in seen["x-forwarded-client-cert"]

        down = channel.unary_stream(DOWN)(b"500")
        assert [int(reply) async for reply in down] == list(range(500))

        async def parts() -> AsyncIterator[bytes]:
            for _ in range(50):
                yield b"x" * 20_000

        assert await channel.stream_unary(UP)(parts()) == b"1000000"

        both = channel.stream_stream(BOTH)()
        for word in (b"one", b"two", b"three"):
            await both.write(word)
            assert (await both.read())[2:] == word
        await both.done_writing()
        assert await both.read() is grpc.aio.EOF
        assert await both.code() == grpc.StatusCode.OK
        assert s.leases() == 0


async def test_large_messages_pass_both_ways_beside_small_ones_and_a_stalled_stream() -> None:
    async with stage("b1", "b2") as s, s.channel() as channel:
        stalled = channel.stream_stream(BOTH)()

        async def flood() -> None:
            for _ in range(200):  # nobody reads the answers: its windows fill up, and only its own
                await stalled.write(b"x" * 50_000)

        flooding = asyncio.create_task(flood())
        big = b"y" * 20_000_000
        assert sum((await counted(channel, 100)).values()) == 100
        assert (await channel.unary_unary(UNARY)(big))[2:] == big
        assert not flooding.done()
        budgets = [member.sidecar._memory for member in s.mesh.members]
        await until(lambda: sum(each.held > 100_000 for each in budgets) == 2)  # the caller's, and its instance's
        flooding.cancel()
        stalled.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await flooding
        await until(lambda: s.leases() == 0)
        await until(lambda: not any(each.held for each in budgets))


async def test_many_streams_at_once_need_more_links_than_one() -> None:
    async with stage("b1") as s, s.channel() as channel:
        calls = [channel.stream_stream(BOTH)() for _ in range(400)]
        for number, call in enumerate(calls):
            await call.write(b"%d" % number)
        for number, call in enumerate(calls):
            assert await call.read() == b"b1%d" % number
        assert s.leases() == 400
        assert len(s.client.sidecar._upstreams["backend"]._http2_fleet._links) == 1
        for call in calls:
            await call.done_writing()
            assert await call.read() is grpc.aio.EOF
        assert s.leases() == 0


async def test_a_deadline_and_a_cancel_reach_the_app() -> None:
    async with stage("b1") as s, s.channel() as channel:
        echo = s.echoes["b1"]
        with pytest.raises(grpc.aio.AioRpcError) as late:
            await channel.unary_unary(HANG)(b"x", timeout=0.2)
        assert late.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
        assert "grpc-timeout" not in echo.metadata, "grpcio takes it off"
        await echo.cancelled.wait()
        echo.cancelled.clear()
        call = channel.unary_unary(HANG)(b"x")
        await until(lambda: echo.calls[HANG] == 2)
        call.cancel()
        await echo.cancelled.wait()
        await until(lambda: s.leases() == 0)
        assert await channel.unary_unary(UNARY)(b"x") == b"b1x"


async def test_a_canary_takes_its_share_of_calls_and_a_change_is_in_force_at_once() -> None:
    async with stage("b1:v1", "b2:v2") as s, s.channel() as channel:
        splits = [{"Weight": 90, "ServiceSubset": "v1"}, {"Weight": 10, "ServiceSubset": "v2"}]
        await s.follow(resolver_backend={"Subsets": SUBSETS}, splitter_backend={"Splits": splits})
        answers = await counted(channel, 600)
        assert 0.05 < answers[b"b2"] / 600 < 0.17, answers
        both = channel.stream_stream(BOTH)()
        while True:
            await both.write(b"")
            first = await both.read()
            if first == b"b1":
                break
            both.cancel()
            both = channel.stream_stream(BOTH)()
        await s.follow(splitter_backend={"Splits": [{"Weight": 100, "ServiceSubset": "v2"}]})
        assert await counted(channel, 50) == {b"b2": 50}
        await both.write(b"")
        assert await both.read() == b"b1", "what is under way goes on"
        both.cancel()


async def test_methods_are_routed_one_by_one_on_one_connection() -> None:
    async with stage("b1") as s, s.channel() as channel:
        await s.echo("o1", service="other")
        await s.follow(
            router_backend={
                "Routes": [
                    {
                        "Match": {"HTTP": {"PathExact": "/test.Other/Get"}},
                        "Destination": {"Service": "other", "RequestHeaders": {"Set": {"x-route": "other"}}},
                    },
                    {
                        "Match": {"HTTP": {"Header": [{"Name": "x-to", "Exact": "other"}]}},
                        "Destination": {"Service": "other", "ResponseHeaders": {"Add": {"x-by": "route"}}},
                    },
                ]
            }
        )
        assert await channel.unary_unary("/test.Other/Get")(b"x") == b"o1x"
        assert s.echoes["o1"].metadata["x-route"] == "other"
        assert await channel.unary_unary(UNARY)(b"x") == b"b1x"
        call = channel.unary_unary(UNARY)(b"x", metadata=(("x-to", "other"),))
        assert await call == b"o1x"
        assert dict(await call.initial_metadata())["x-by"] == "route"


async def test_an_instance_that_is_killed_costs_only_what_it_had_begun() -> None:
    async with stage("b1", "b2") as s, s.channel() as channel:
        both = [channel.stream_stream(BOTH)() for _ in range(20)]
        for call in both:
            await call.write(b"")
        names = [await call.read() for call in both]
        assert set(names) == {b"b1", b"b2"}
        await s.servers["b1"].sidecar.close()
        for call, name in zip(both, names, strict=True):
            if name == b"b2":
                await call.write(b"")
                assert await call.read() == b"b2"
            else:
                with pytest.raises(grpc.aio.AioRpcError) as lost:
                    await call.read()
                assert lost.value.code() == grpc.StatusCode.UNAVAILABLE
            call.cancel()
        assert await counted(channel, 50) == {b"b2": 50}
        await until(lambda: s.leases() == 0)


async def test_an_instance_whose_app_is_down_is_passed_over() -> None:
    async with stage("b1", "b2") as s, s.channel() as channel:
        await s.echoes["b1"].server.stop(0)
        assert await counted(channel, 50) == {b"b2": 50}


async def test_an_instance_that_drains_loses_no_call() -> None:
    async with stage("b1", "b2") as s, s.channel() as channel:
        assert set(await counted(channel, 50)) == {b"b1", b"b2"}
        calls = asyncio.create_task(counted(channel, 400))
        await asyncio.sleep(0)
        draining = asyncio.create_task(s.servers["b1"].sidecar.drain(10))
        assert sum((await calls).values()) == 400
        assert await counted(channel, 50) == {b"b2": 50}
        await draining


async def test_an_instance_that_left_the_catalog_loses_its_streams() -> None:
    async with stage("b1", "b2") as s, s.channel() as channel:
        calls: dict[bytes, Any] = {}
        while len(calls) < 2:
            call = channel.stream_stream(BOTH)()
            await call.write(b"")
            calls[await call.read()] = call
        s.endpoints = [one for one in s.endpoints if one.service_id != "b1"]
        await s.follow()
        with pytest.raises(grpc.aio.AioRpcError) as lost:
            await asyncio.wait_for(calls[b"b1"].read(), 1)
        assert lost.value.code() == grpc.StatusCode.UNAVAILABLE
        await calls[b"b2"].write(b"")
        assert await calls[b"b2"].read() == b"b2"
        calls[b"b2"].cancel()


async def test_a_grpc_status_is_tried_again_only_when_a_route_says_so() -> None:
    async with stage("b1", "b2") as s, s.channel() as channel:
        s.echoes["b1"].fail = grpc.StatusCode.UNAVAILABLE
        codes: Counter[grpc.StatusCode] = Counter()
        for _ in range(40):
            try:
                await channel.unary_unary(UNARY)(b"")
            except grpc.aio.AioRpcError as error:
                codes[error.code()] += 1
        assert set(codes) == {grpc.StatusCode.UNAVAILABLE}
        route = {"Match": {"HTTP": {"PathPrefix": "/"}}, "Destination": {"RetryOn": ["unavailable"]}}
        await s.follow(router_backend={"Routes": [route]})
        assert await counted(channel, 40) == {b"b2": 40}
        s.echoes["b1"].fail = grpc.StatusCode.INTERNAL
        with pytest.raises(grpc.aio.AioRpcError):
            await asyncio.gather(*(channel.unary_unary(UNARY)(b"") for _ in range(40)))
        s.echoes["b1"].fail, s.echoes["b1"].fail_late = grpc.StatusCode.UNAVAILABLE, True
        with pytest.raises(grpc.aio.AioRpcError):  # the app has part of the answer already
            await asyncio.gather(*(channel.unary_unary(UNARY)(b"") for _ in range(40)))


async def test_a_denied_caller_and_a_denied_method() -> None:
    async with stage("b1") as s, s.channel() as channel:
        await s.servers["b1"].push(intentions=())
        with pytest.raises(grpc.aio.AioRpcError) as denied:
            await channel.unary_unary(UNARY)(b"")
        assert denied.value.code() == grpc.StatusCode.PERMISSION_DENIED
        permission = Permission("allow", HTTPMatch(path_exact=DOWN))
        only = Intention(source_name="web", destination_name="backend", permissions=(permission,))
        await s.servers["b1"].push(intentions=(only,))
        with pytest.raises(grpc.aio.AioRpcError) as denied:
            await channel.unary_unary(UNARY)(b"")
        assert denied.value.code() == grpc.StatusCode.PERMISSION_DENIED
        assert [part async for part in channel.unary_stream(DOWN)(b"2")] == [b"0", b"1"]
        assert s.echoes["b1"].calls[UNARY] == 0


async def test_draining_the_caller_lets_calls_end() -> None:
    async with stage("b1") as s, s.channel() as channel:
        both = channel.stream_stream(BOTH)()
        await both.write(b"one")
        assert await both.read() == b"b1one"
        draining = asyncio.create_task(s.client.sidecar.drain(20))
        await until(lambda: s.client.sidecar._upstreams["backend"].http2.draining)
        await both.write(b"two")
        assert await both.read() == b"b1two"
        await both.done_writing()
        assert await both.read() is grpc.aio.EOF
        await asyncio.wait_for(draining, 5)


async def test_no_instance_is_unavailable() -> None:
    async with stage("b1") as s, s.channel() as channel:
        s.endpoints = []
        await s.follow()
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await channel.unary_unary(UNARY)(b"")
        assert failed.value.code() == grpc.StatusCode.UNAVAILABLE
        assert "no instance" in (failed.value.details() or "")


async def test_http1_on_the_same_listener_is_served_as_such() -> None:
    async with stage("b1") as s:
        s.endpoints = []
        await s.follow()
        reader, writer = await s.client.dial()
        for piece in (b"P", b"OST / HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n"):
            writer.write(piece)
            await writer.drain()
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 503 ")
        await hang_up(writer)


async def test_a_client_that_resets_streams_at_once_is_cut_off() -> None:
    async with stage("b1") as s:
        reader, writer = await s.client.dial()
        raw = Raw(reader, writer)
        with contextlib.suppress(ConnectionError):
            for _ in range(4000):
                raw.conn.reset_stream(raw.request())
                writer.write(raw.conn.data_to_send())
                await writer.drain()
            while await reader.read(65536):
                pass
        await hang_up(writer)
        await until(lambda: not s.client.sidecar._upstreams["backend"].http2.connections)
        await until(lambda: s.leases() == 0)
        assert s.echoes["b1"].calls[UNARY] < 4000


async def test_more_streams_than_are_taken_and_malformed_requests_are_refused() -> None:
    async with stage("b1") as s:
        reader, writer = await s.client.dial()
        raw = Raw(reader, writer)
        answer = await raw.next(h2.events.ResponseReceived, raw.request(path="no-slash"))
        assert dict(answer.headers)[":status"] == "400"
        assert s.echoes["b1"].calls.total() == 0
        await hang_up(writer)


async def test_an_upstream_that_is_the_app_itself() -> None:
    async with stage("b1") as s:
        port = s.echoes["b1"].port
        await s.client.route("backend", loopback_port=port, protocol="grpc")
        async with s.channel() as channel:
            assert await channel.unary_unary(UNARY)(b"x") == b"b1x"
            assert await counted(channel, 150) == {b"b1": 150}


async def test_a_foreign_peer_is_dialled_with_http2() -> None:
    async with Mesh() as mesh, asyncio.timeout(30):
        s = GrpcStage(mesh)
        echo = await s.echo("b1")
        server: Member = s.servers["b1"]
        material = server.sidecar.config.material
        assert material is not None
        material.server_http2.current().set_alpn_protocols(["h2", "http/1.1"])  # as a foreign sidecar offers
        await s.caller()
        async with s.channel() as channel:
            assert await counted(channel, 50) == {b"b1": 50}
            assert await channel.unary_unary(UNARY)(b"z" * 1_000_000) == b"b1" + b"z" * 1_000_000
        links = s.client.sidecar._upstreams["backend"]._http2_fleet._links
        assert echo.calls[UNARY] == 51
        assert sum(map(len, links.values())) == 1
        await echo.server.stop(0)


@contextlib.asynccontextmanager
async def nginx(directory: Path) -> AsyncIterator[int]:
    """An HTTP/2 server that ends its connections by a GOAWAY after a few requests, as real ones do."""
    need("nginx")
    port = a_free_port()
    (directory / "nginx.conf").write_text(
        f"""
        daemon off; master_process off; pid {directory}/pid; error_log {directory}/error.log;
        events {{ worker_connections 512; }}
        http {{
          access_log off; client_body_temp_path {directory}/body; proxy_temp_path {directory}/proxy;
          fastcgi_temp_path {directory}/fastcgi; uwsgi_temp_path {directory}/uwsgi; scgi_temp_path {directory}/scgi;
          keepalive_requests 50;
          server {{ listen 127.0.0.1:{port} http2; location / {{ return 200 "ok $uri\\n"; }} }}
        }}
        """
    )
    process = await asyncio.create_subprocess_exec("nginx", "-p", str(directory), "-c", str(directory / "nginx.conf"))
    try:
        await until(lambda: _listens(port))
        yield port
    finally:
        process.terminate()
        await process.wait()


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.parametrize("protocol", ["http2", "tcp"])
async def test_an_app_that_ends_its_connections_now_and_then_costs_no_request(tmp_path: Path, protocol: str) -> None:
    """``tcp``: the instance's sidecar only relays, so the app's GOAWAYs are the caller's to deal with."""
    async with Mesh() as mesh, asyncio.timeout(60), nginx(tmp_path) as port:
        server = await mesh.member("backend", "b1", port=port)
        me = server.sidecar.config.self
        assert me is not None
        await server.push(self=msgspec.structs.replace(me, protocol=protocol))
        await server.allow("web")
        client = await mesh.member("web", "web-1", upstreams=("backend",))
        await client.route("backend", server.endpoint, protocol="http2")
        reader, writer = await client.dial()
        raw = Raw(reader, writer)
        asked: dict[int, int] = {}
        answers: dict[int, bytes] = {}
        while len(answers) < 600:
            while len(asked) < 600 and len(asked) - len(answers) < 40:
                asked[raw.request(path=f"/{len(asked)}", method="GET")] = len(asked)
            ended = await raw.next(h2.events.StreamEnded)
            parts = [event for event in raw.events if getattr(event, "stream_id", 0) == ended.stream_id]
            raw.events = [event for event in raw.events if event not in parts]
            answers[asked[ended.stream_id]] = b"".join(
                one.data for one in parts if isinstance(one, h2.events.DataReceived)
            )
        assert answers == {number: b"ok /%d\n" % number for number in range(600)}
        await hang_up(writer)
