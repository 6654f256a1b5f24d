"""RPC calls that have no task, at the end that serves them and at the end that makes them."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from node.config import Limits
from node.errors import BadRequest, Busy, NodeError, Refused, TimedOut, Unreachable
from node.rpc.server import Call, Methods, Reply
from tests.support.both_loops import both_loops
from tests.support.rpc import eventually, rpc_ends


class Served:
    """One method, answered without a task as the test says: by default when the test gives the reply."""

    def __init__(self) -> None:
        self.methods = Methods()
        self.methods.add("write", self.in_a_task)
        self.methods.add_direct("write", self.directly)
        self.replies: list[Reply] = []
        self.leads = True

    async def in_a_task(self, call: Call) -> bytes:
        return b"task:" + call.body

    def directly(self, call: Call, reply: Reply) -> bool:
        if call.body == b"refuse":
            raise Refused("not you", http_status=403)
        if call.body == b"bug":
            raise ValueError("secret detail")
        if self.leads:
            self.replies.append(reply)
        return self.leads


@both_loops
async def test_a_reply_ends_its_call_in_any_order(tmp_path: Path) -> None:
    served = Served()
    async with rpc_ends(tmp_path, served.methods) as ends:
        connection = await ends.dial()
        calls = [asyncio.ensure_future(connection.call("write", b"%d" % n, 5)) for n in range(3)]
        await eventually(lambda: len(served.replies) == 3)
        served.replies[2].send(b"third")
        assert await calls[2] == b"third"
        served.replies[0].send(Refused("no", reason="conflict", http_status=409))
        with pytest.raises(Refused, match="no") as refused:
            await calls[0]
        assert (refused.value.reason, refused.value.http_status) == ("conflict", 409)
        served.replies[1].send(b"second")
        served.replies[1].send(b"again")
        assert await calls[1] == b"second"
        connection.close()


@both_loops
async def test_what_is_not_begun_directly_runs_in_a_task(tmp_path: Path) -> None:
    served = Served()
    served.leads = False
    async with rpc_ends(tmp_path, served.methods) as ends:
        connection = await ends.dial()
        assert await connection.call("write", b"1", 5) == b"task:1"
        connection.close()


@both_loops
async def test_a_fault_in_one_call_answers_that_call_alone(tmp_path: Path) -> None:
    served = Served()
    async with rpc_ends(tmp_path, served.methods) as ends:
        connection = await ends.dial()
        waiting = asyncio.ensure_future(connection.call("write", b"1", 5))
        with pytest.raises(Refused, match="not you"):
            await connection.call("write", b"refuse", 5)
        with pytest.raises(NodeError, match="the server failed: ValueError; see its log") as bug:
            await connection.call("write", b"bug", 5)
        assert "secret" not in str(bug.value)
        served.replies[0].send(b"well")
        assert await waiting == b"well"
        connection.close()


@both_loops
async def test_direct_calls_count_among_those_in_progress_until_answered_or_cancelled(
    tmp_path: Path,
) -> None:
    served = Served()
    async with rpc_ends(tmp_path, served.methods, limits=Limits(rpc_inflight_max=2)) as ends:
        connection = await ends.dial()
        calls = [asyncio.ensure_future(connection.call("write", b"%d" % n, 5)) for n in range(2)]
        await eventually(lambda: len(served.replies) == 2)
        with pytest.raises(Busy, match="2 calls are in progress"):
            await connection.call("write", b"one too many", 5)
        calls[0].cancel()
        served.replies[1].send(b"done")
        assert await calls[1] == b"done"
        more = [asyncio.ensure_future(connection.call("write", b"%d" % n, 5)) for n in range(2)]
        await eventually(lambda: len(served.replies) == 4)
        served.replies[0].send(b"for one who went away")
        for reply in served.replies[2:]:
            reply.send(b"for one who waits")
        assert await asyncio.gather(*more) == [b"for one who waits"] * 2
        connection.close()


@both_loops
async def test_a_reply_after_the_connection_ended_is_dropped(tmp_path: Path) -> None:
    served = Served()
    async with rpc_ends(tmp_path, served.methods) as ends:
        connection = await ends.dial()
        call = asyncio.ensure_future(connection.call("write", b"1", 5))
        await eventually(lambda: len(served.replies) == 1)
        connection.abort()
        with pytest.raises(Unreachable):
            await call
        other = await ends.dial()
        served.replies[0].send(b"too late")
        served.leads = False
        assert await other.call("write", b"2", 5) == b"task:2"
        other.close()


@both_loops
async def test_a_call_that_was_begun_is_told_its_outcome_once(tmp_path: Path) -> None:
    served = Served()
    told: list[bytes | NodeError] = []
    async with rpc_ends(tmp_path, served.methods) as ends:
        connection = await ends.dial()
        connection.begin("write", b"1", 5, told.append)
        await eventually(lambda: len(served.replies) == 1)
        assert told == []
        served.replies[0].send(b"done")
        await eventually(lambda: bool(told))
        connection.begin("write", b"refuse", 5, told.append)
        await eventually(lambda: len(told) == 2)
        assert told[0] == b"done"
        assert isinstance(told[1], Refused)
        connection.close()
    assert len(told) == 2


@both_loops
async def test_a_call_that_was_begun_has_its_time_and_its_end_with_the_connection(tmp_path: Path) -> None:
    served = Served()
    late: list[bytes | NodeError] = []
    lost: list[bytes | NodeError] = []
    async with rpc_ends(tmp_path, served.methods, limits=Limits(rpc_inflight_max=1)) as ends:
        connection = await ends.dial()
        connection.begin("write", b"1", 0.05, late.append)
        await eventually(lambda: bool(late))
        assert isinstance(late[0], TimedOut)
        # The server was told: the place among the calls in progress is free.
        connection.begin("write", b"2", 5, lost.append)
        await eventually(lambda: len(served.replies) == 2)
        served.replies[0].send(b"too late")
        connection.abort()
        await eventually(lambda: bool(lost))
        assert isinstance(lost[0], Unreachable)
        with pytest.raises(Unreachable):
            connection.begin("write", b"3", 5, lost.append)
        other = await ends.dial()
        with pytest.raises(BadRequest):
            other.begin("write", bytes(10 << 20), 5, lost.append)
        other.close()
    assert (len(late), len(lost)) == (1, 1)
