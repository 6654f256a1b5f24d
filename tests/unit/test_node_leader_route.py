"""The way to the leader: what is retried, what is not, and what a failure says of the outcome."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from typing import Any, cast

import pytest

from node.errors import BadRequest, Busy, NodeError, NoLeader, Refused, TimedOut, UnknownOutcome, Unreachable
from node.leader_route import LeaderRoute
from raftstate import errors as raft
from raftstate.raft_members import Member


class FakeReplica:
    """A server that leads or knows who does."""

    def __init__(self, leader: str | None, *, me: str = "s1") -> None:
        self.id, self.leader, self.failure = me, leader, None
        self._callbacks: list[Callable[[str | None], None]] = []

    @property
    def is_leader(self) -> bool:
        return self.leader == self.id

    def on_leader(self, callback: Callable[[str | None], None]) -> None:
        self._callbacks.append(callback)

    def elect(self, leader: str | None) -> None:
        self.leader = leader
        for callback in self._callbacks:
            callback(leader)

    def members(self) -> tuple[Member, ...]:
        return tuple(Member(name, f"127.0.0.1:{port}") for name, port in (("s1", 1), ("s2", 2), ("s3", 3)))


class FakePeers:
    def __init__(self) -> None:
        self.asked: list[str] = []
        self.kept: list[str] = []
        self.unreachable: set[str] = set()

    async def get(self, node: str, address: str) -> str:
        self.asked.append(node)
        if node in self.unreachable:
            raise Unreachable(f"{node} is down")
        return node

    def drop_all_but(self, node: str) -> None:
        self.kept.append(node)


class Route:
    """A route whose work follows a script: each attempt takes the next outcome."""

    def __init__(self, leader: str | None, *script: BaseException | bytes) -> None:
        self.replica, self.peers = FakeReplica(leader), FakePeers()
        self.route = LeaderRoute(cast(Any, self.replica), cast(Any, self.peers), rng=random.Random(1))
        self.script = list(script)
        self.attempts: list[str] = []

    async def _next(self, where: str) -> bytes:
        self.attempts.append(where)
        outcome = self.script.pop(0) if len(self.script) > 1 else self.script[0]
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    async def run(self, *, timeout_s: float = 0.3, write: bool = True, forwarded: bool = False) -> bytes:
        return await self.route.run(
            lambda left_s: self._next("here"),
            lambda leader, left_s: self._next(str(leader)),
            timeout_s=timeout_s,
            write=write,
            forwarded=forwarded,
        )


async def test_the_leader_does_it_itself_and_a_follower_asks_it() -> None:
    assert await Route("s1", b"done").run() == b"done"
    route = Route("s2", b"done")
    assert await route.run() == b"done"
    assert route.attempts == ["s2"]


@pytest.mark.parametrize(
    "error",
    [
        raft.NotLeader("s2"),
        raft.UnknownOutcome("?"),
        raft.NoQuorum("slow"),
        raft.TooBusy("full"),
        Unreachable(),
        TimedOut(),
        NoLeader(),
    ],
)
async def test_what_may_pass_is_tried_again(error: Exception) -> None:
    route = Route("s1", error, error, b"done")
    assert await route.run(timeout_s=5) == b"done"
    assert len(route.attempts) == 3


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (raft.CommandTooLarge("x"), Refused),
        (raft.MembershipRefused("x"), Refused),
        (BadRequest("x"), BadRequest),
        (Refused("x"), Refused),
        (NodeError("x"), NodeError),
    ],
)
async def test_what_will_not_pass_is_told_at_once(error: Exception, expected: type[NodeError]) -> None:
    route = Route("s1", error)
    with pytest.raises(expected):
        await route.run(timeout_s=5)
    assert route.attempts == ["here"]


async def test_a_full_queue_is_tried_a_few_times_only() -> None:
    route = Route("s1", raft.TooBusy("full"))
    with pytest.raises(Busy):
        await route.run(timeout_s=5)
    assert 1 < len(route.attempts) < 10


@pytest.mark.parametrize(
    ("error", "write", "expected"),
    [
        (Unreachable(), True, UnknownOutcome),
        (TimedOut(), True, UnknownOutcome),
        (raft.UnknownOutcome("?"), True, UnknownOutcome),
        (Unreachable(), False, NoLeader),
        (NoLeader(), True, NoLeader),
        (raft.NotLeader(), True, NoLeader),
    ],
)
async def test_only_a_write_that_may_have_arrived_has_an_unknown_outcome(
    error: Exception, write: bool, expected: type[NodeError]
) -> None:
    with pytest.raises(expected):
        await Route("s2", error).run(write=write)


@pytest.mark.parametrize("first", [Unreachable(), TimedOut(), raft.UnknownOutcome("?")])
async def test_a_full_queue_does_not_undo_an_attempt_that_may_have_arrived(first: Exception) -> None:
    route = Route("s1", first, raft.TooBusy("full"))
    with pytest.raises(UnknownOutcome):
        await route.run(timeout_s=5)
    route = Route("s1", first, raft.TooBusy("full"))
    with pytest.raises(Busy):
        await route.run(timeout_s=5, write=False)


async def test_a_stopped_server_does_not_undo_an_attempt_that_may_have_arrived() -> None:
    route = Route("s1", raft.UnknownOutcome("?"), raft.Stopped("the disk failed"))
    cast(Any, route.replica).failure = "the disk failed"
    with pytest.raises(UnknownOutcome):
        await route.run(timeout_s=5)


async def test_a_leader_that_cannot_be_dialled_got_nothing() -> None:
    route = Route("s2", b"never")
    route.peers.unreachable.add("s2")
    with pytest.raises(NoLeader):
        await route.run()
    assert route.attempts == []


async def test_no_leader_is_waited_for_and_the_new_one_is_asked_at_once() -> None:
    route = Route(None, b"done")
    running = asyncio.ensure_future(route.run(timeout_s=30))
    await asyncio.sleep(0)
    assert route.attempts == []
    route.replica.elect("s3")
    assert await running == b"done"
    assert route.attempts == ["s3"]
    assert route.peers.kept == ["s3"], "what waits for an older leader is broken off"


async def test_a_forwarded_request_is_not_passed_on() -> None:
    route = Route("s2", b"done")
    with pytest.raises(NoLeader):
        await route.run(forwarded=True, timeout_s=5)
    assert route.peers.asked == []
