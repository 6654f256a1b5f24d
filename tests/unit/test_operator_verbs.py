"""Operator verbs whose answer gets lost as leadership moves: made again, they do not undo or double themselves."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any, cast

import msgspec
import pytest

from node.errors import NodeError, Refused, TimedOut, UnknownOutcome, Unreachable
from node.leader_route import LeaderRoute
from node.operator_verbs import OperatorVerbs
from node.protocol import OperatorRequest
from tests.unit.test_node_leader_route import FakePeers, FakeReplica


class Replica(FakeReplica):
    def __init__(self, leader: str) -> None:
        super().__init__(leader)
        self.transfers: list[str | None] = []

    def members(self) -> tuple[Any, ...]:
        return tuple(msgspec.structs.replace(member, voter=True) for member in super().members())

    async def transfer_leadership(self, to: str | None) -> None:
        self.transfers.append(to)


@dataclass
class Leader:
    """A connection to another server, which leads until the first request: its answer is lost."""

    replica: Replica
    then: str
    error: NodeError
    params: list[dict[str, Any]] = field(default_factory=list)

    @property
    def peer(self) -> Any:
        return self

    node = "s2"

    async def call(self, method: str, body: bytes, timeout_s: float) -> bytes:
        self.params.append(msgspec.msgpack.decode(body, type=OperatorRequest).params)
        if len(self.params) > 1:
            return msgspec.msgpack.encode(None)
        self.replica.elect(self.then)
        raise self.error


class Peers(FakePeers):
    leader: Leader

    async def get(self, node: str, address: str) -> Any:
        return self.leader


class Rotations:
    """The authority as far as it is asked here."""

    def __init__(self) -> None:
        self.ids: list[str] = []

    async def rotate(self, *, request_id: str) -> None:
        self.ids.append(request_id)


def verbs(then: str, error: NodeError) -> tuple[OperatorVerbs, Replica, Leader, Rotations]:
    replica, peers, authority = Replica("s2"), Peers(), Rotations()
    peers.leader = Leader(replica, then, error)
    route = LeaderRoute(cast(Any, replica), cast(Any, peers), rng=random.Random(1))
    made = OperatorVerbs(
        cast(Any, replica), route, cast(Any, authority), cast(Any, None), health=dict, autopilot=dict
    )
    return made, replica, peers.leader, authority


@pytest.mark.parametrize("error", [Unreachable(), TimedOut(), UnknownOutcome()])
async def test_a_transfer_whose_answer_is_lost_is_not_made_back(error: NodeError) -> None:
    made, replica, leader, _ = verbs("s1", error)
    await made.run(OperatorRequest("raft.transfer_leader"))
    assert len(leader.params) == 1
    assert replica.transfers == [], "s1 leads since: leadership has moved"


async def test_the_new_leader_is_told_who_was_asked_before() -> None:
    made, _, leader, _ = verbs("s3", Unreachable())
    await made.run(OperatorRequest("raft.transfer_leader"))
    assert [params.get("asked") for params in leader.params] == [None, "s2"]
    there, new, _, _ = verbs("s1", Unreachable())
    new.elect("s1")
    await there.run(OperatorRequest("raft.transfer_leader", leader.params[1], forwarded=True))
    assert new.transfers == []
    await there.run(OperatorRequest("raft.transfer_leader", {"asked": "s1"}, forwarded=True))
    assert new.transfers == [None], "whoever was asked and still leads hands over"


async def test_a_named_server_is_made_leader_however_often_it_takes() -> None:
    made, replica, _, _ = verbs("s1", Unreachable())
    await made.run(OperatorRequest("raft.transfer_leader", {"id": "s3"}))
    assert replica.transfers == ["s3"]


async def test_a_rotation_made_again_has_the_first_ones_request_id() -> None:
    made, _, leader, authority = verbs("s1", Unreachable())
    await made.run(OperatorRequest("ca.rotate"))
    assert authority.ids == [leader.params[0]["request_id"]]


async def test_a_server_that_the_lost_attempt_took_out_is_not_missed() -> None:
    made, _, leader, _ = verbs("s1", Unreachable())
    await made.run(OperatorRequest("raft.remove_peer", {"id": "s9"}))
    assert len(leader.params) == 1
    made, replica, _, _ = verbs("s1", Unreachable())
    replica.elect("s1")
    with pytest.raises(Refused, match="no such server"):
        await made.run(OperatorRequest("raft.remove_peer", {"id": "s9"}))
