"""RPC over real TLS: answers, errors, streams, uploads, deadlines, bounds, and what a lost connection does."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path

import pytest

from node.config import Limits
from node.errors import BadRequest, Busy, NodeError, NoLeader, Refused, TimedOut, UnknownOutcome, Unreachable
from node.faults import FaultFilter
from node.rpc.server import Call, Methods, Upload
from tests.support.both_loops import both_loops
from tests.support.promises import PATIENCE_S
from tests.support.rpc import eventually, rpc_ends


class Served:
    """Methods that show every kind of call."""

    def __init__(self) -> None:
        self.methods = Methods()
        self.methods.add("echo", self.echo)
        self.methods.add("fail", self.fail)
        self.methods.add("hang", self.hang)
        self.methods.add("left", self.left)
        self.methods.add("sum", self.sum)
        self.methods.add_stream("count", self.count)
        self.cancelled = 0
        self.started = 0
        self.release = asyncio.Event()

    async def echo(self, call: Call) -> bytes:
        return call.peer.node.encode() + b":" + call.body

    async def fail(self, call: Call) -> bytes:
        raise {
            b"refused": Refused("no", reason="conflict", http_status=409),
            b"leader": NoLeader("none"),
            b"unknown": UnknownOutcome("who knows"),
            b"bug": ValueError("secret detail"),
        }[call.body]

    async def hang(self, call: Call) -> bytes:
        self.started += 1
        try:
            await self.release.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        return b"released"

    async def left(self, call: Call) -> bytes:
        return str(call.left_s()).encode()

    async def sum(self, call: Call) -> bytes:
        return str([len(piece) async for piece in call.upload()]).encode()

    async def count(self, call: Call) -> AsyncIterator[bytes]:
        try:
            for number in range(int(call.body)):
                yield str(number).encode()
            if call.body == b"3":
                raise Refused("enough")
            await self.release.wait()
        finally:
            self.cancelled += 1


@both_loops
async def test_calls_interleave_and_know_their_caller(tmp_path: Path) -> None:
    served = Served()
    async with rpc_ends(tmp_path, served.methods) as ends:
        connection = await ends.dial("client-2")
        hanging = asyncio.ensure_future(connection.call("hang", b"", 5))
        answers = await asyncio.gather(*(connection.call("echo", str(n).encode(), 5) for n in range(200)))
        assert answers == [f"client-2:{n}".encode() for n in range(200)]
        served.release.set()
        assert await hanging == b"released"
        connection.close()


@both_loops
async def test_errors_keep_their_kind(tmp_path: Path) -> None:
    served = Served()
    async with rpc_ends(tmp_path, served.methods) as ends:
        connection = await ends.dial()
        with pytest.raises(Refused, match="no") as refused:
            await connection.call("fail", b"refused", 5)
        assert (refused.value.reason, refused.value.http_status) == ("conflict", 409)
        with pytest.raises(NoLeader, match="none"):
            await connection.call("fail", b"leader", 5)
        with pytest.raises(UnknownOutcome, match="who knows"):
            await connection.call("fail", b"unknown", 5)
        with pytest.raises(NodeError, match="the server failed: ValueError; see its log") as bug:
            await connection.call("fail", b"bug", 5)
        assert "secret" not in str(bug.value)
        with pytest.raises(BadRequest, match="unknown method 'nope'"):
            await connection.call("nope", b"", 5)
        connection.close()


@both_loops
async def test_the_deadline_travels_and_ends_the_call_at_both_ends(tmp_path: Path) -> None:
    served = Served()
    async with rpc_ends(tmp_path, served.methods) as ends:
        connection = await ends.dial()
        assert 3 < float(await connection.call("left", b"", 4)) <= 4
        with pytest.raises(TimedOut, match="server-1 did not answer hang"):
            await connection.call("hang", b"", 0.05)
        await eventually(lambda: served.cancelled == 1)
        connection.close()


@both_loops
async def test_a_cancelled_caller_cancels_the_call(tmp_path: Path) -> None:
    served = Served()
    async with rpc_ends(tmp_path, served.methods) as ends:
        connection = await ends.dial()
        task = asyncio.ensure_future(connection.call("hang", b"", 30))
        await eventually(lambda: served.started == 1)
        task.cancel()
        await eventually(lambda: served.cancelled == 1)
        connection.close()


@both_loops
async def test_streams_end_fail_and_are_cancelled(tmp_path: Path) -> None:
    served = Served()
    async with rpc_ends(tmp_path, served.methods) as ends:
        connection = await ends.dial()
        seen = []
        with pytest.raises(Refused, match="enough"):  # noqa: PT012 - the error comes after the items
            async for item in connection.stream("count", b"3"):
                seen.append(item)
        assert seen == [b"0", b"1", b"2"]
        async with aclosing(connection.stream("count", b"50")) as items:
            async for item in items:
                if item == b"49":
                    break
        await eventually(lambda: served.cancelled == 2)
        served.release.set()
        assert len([item async for item in connection.stream("count", b"7")]) == 7
        connection.close()


@both_loops
async def test_an_upload_arrives_in_bounded_pieces(tmp_path: Path) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        yield b"x" * 10
        yield b"y" * 300_000

    async with rpc_ends(tmp_path, Served().methods) as ends:
        connection = await ends.dial()
        assert await connection.upload("sum", b"", pieces(), 5) == b"[10, 262144, 37856]"
        connection.close()


@both_loops
async def test_calls_in_progress_are_bounded(tmp_path: Path) -> None:
    served = Served()
    async with rpc_ends(tmp_path, served.methods, limits=Limits(rpc_inflight_max=2)) as ends:
        connection = await ends.dial()
        hanging = [asyncio.ensure_future(connection.call("hang", b"", 5)) for _ in range(2)]
        await eventually(lambda: served.started == 2)
        with pytest.raises(Busy, match="try again"):
            await connection.call("echo", b"", 5)
        served.release.set()
        assert await asyncio.gather(*hanging) == [b"released"] * 2
        assert await connection.call("echo", b"", 5) == b"client-1:"
        connection.close()


@both_loops
async def test_an_oversized_request_is_refused_before_it_is_sent(tmp_path: Path) -> None:
    async with rpc_ends(tmp_path, Served().methods) as ends:
        connection = await ends.dial()
        with pytest.raises(BadRequest, match="split it"):
            await connection.call("echo", b"x" * 10_000_000, 5)
        assert await connection.call("echo", b"", 5) == b"client-1:"
        connection.close()


@both_loops
async def test_a_lost_connection_fails_what_waits_at_once(tmp_path: Path) -> None:
    served = Served()
    async with rpc_ends(tmp_path, served.methods) as ends:
        connection = await ends.dial()
        ended: list[object] = []

        async def follow() -> None:
            with pytest.raises(Unreachable):
                async for _ in connection.stream("count", b"5"):
                    pass
            ended.append(True)

        following = asyncio.ensure_future(follow())
        hanging = asyncio.ensure_future(connection.call("hang", b"", 30))
        await eventually(lambda: served.started == 1)
        for open_connection in ends.listener.connections:
            open_connection.abort()
        with pytest.raises(Unreachable, match="server-1 broke"):
            await hanging
        await following
        with pytest.raises(Unreachable, match="is closed"):
            await connection.call("echo", b"", 5)
        await eventually(lambda: served.cancelled == 2 and len(ends.listener) == 0)


@both_loops
async def test_ping_proves_the_peer_alive(tmp_path: Path) -> None:
    async with rpc_ends(tmp_path, Served().methods) as ends:
        connection = await ends.dial()
        async with asyncio.timeout(PATIENCE_S):
            await connection.ping()
        connection.close()


@both_loops
async def test_a_partition_is_silent_and_its_connections_die_when_it_heals(tmp_path: Path) -> None:
    faults = FaultFilter(enabled=True)
    async with rpc_ends(tmp_path, Served().methods, blocked=faults.blocks) as ends:
        connection = await ends.dial()
        assert await connection.call("echo", b"1", 5) == b"client-1:1"
        faults.block(["client-1"])
        with pytest.raises(TimedOut):
            await connection.call("echo", b"2", 0.1)
        assert not connection.closed
        with pytest.raises(Unreachable):  # noqa: PT012 - TLS 1.3 lets either step be the one that fails
            fresh = await ends.dial()
            await fresh.call("echo", b"3", 5)
        faults.block([])
        with pytest.raises((Unreachable, TimedOut)):
            await connection.call("echo", b"4", 5)
        assert connection.closed
        again = await ends.dial()
        assert await again.call("echo", b"5", 5) == b"client-1:5"
        again.close()


def test_faults_need_leave() -> None:
    with pytest.raises(Refused, match="fault_injection"):
        FaultFilter(enabled=False).block(["server-1"])


@both_loops
async def test_an_upload_that_outruns_its_reader_is_held_back_not_lost(tmp_path: Path) -> None:
    served, release, read = Served(), asyncio.Event(), []

    async def slow(call: Call) -> bytes:
        await release.wait()
        async for piece in call.upload():
            read.append(len(piece))
        return b"done"

    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(200):
            yield b"x" * 65536

    served.methods.add("slow", slow)
    async with rpc_ends(tmp_path, served.methods) as ends:
        connection = await ends.dial()
        upload = asyncio.ensure_future(connection.upload("slow", b"", pieces(), 30))
        await asyncio.sleep(0.1)
        assert not upload.done()
        release.set()
        assert await upload == b"done"
        assert sum(read) == 200 * 65536
        assert await connection.call("echo", b"x", 5) == b"client-1:x"
        connection.close()


async def test_what_waits_of_an_upload_is_bounded_in_bytes_whatever_its_pieces() -> None:
    for size, pieces_max in ((9 * 1024 * 1024, 1), (64 * 1024, 128), (0, 70_000)):
        calls: list[str] = []
        upload = Upload(lambda calls=calls: calls.append("hold"), lambda calls=calls: calls.append("go on"))  # type: ignore[misc]
        put = 0
        while not calls:
            upload.put(b"x" * size)
            put += 1
        assert put <= pieces_max
        upload.put(None)
        read = 0
        async for _ in upload.read():
            read += 1
            assert calls == ["hold"] or read > put // 2, "read on only once much of it is gone"
        assert (read, calls) == (put, ["hold", "go on"])


@both_loops
async def test_a_call_that_is_answered_at_once_needs_no_place_among_those_in_progress(tmp_path: Path) -> None:
    served = Served()

    def alive(call: Call) -> bytes:
        if call.body == b"bug":
            raise ValueError("secret detail")
        if call.body == b"no":
            raise Refused("no", reason="conflict", http_status=409)
        return call.peer.node.encode()

    served.methods.add_immediate("alive", alive)
    async with rpc_ends(tmp_path, served.methods, limits=Limits(rpc_inflight_max=1)) as ends:
        connection = await ends.dial()
        hanging = asyncio.ensure_future(connection.call("hang", b"", 5))
        await eventually(lambda: served.started == 1)
        with pytest.raises(Busy):
            await connection.call("echo", b"", 5)
        assert await connection.call("alive", b"", 5) == b"client-1"
        with pytest.raises(Refused, match="no"):
            await connection.call("alive", b"no", 5)
        with pytest.raises(NodeError, match=r"^the server failed: ValueError; see its log$"):
            await connection.call("alive", b"bug", 5)
        served.release.set()
        await hanging
        connection.close()
