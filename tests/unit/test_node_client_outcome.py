"""What a client agent's backend says of a write whose attempts ended differently."""

from __future__ import annotations

import random
from typing import Any, cast

import msgspec
import pytest

from node.client import RpcBackend
from node.errors import Busy, NodeError, Refused, UnknownOutcome, Unreachable
from node.faults import FaultFilter
from node.protocol import OperatorRequest
from raftstate.state.commands import KVSet


class Link:
    """A link to servers that answer by a script, the last line for ever."""

    server = "server-1"

    def __init__(self, *script: NodeError) -> None:
        self.script = list(script)
        self.bodies: list[bytes] = []

    async def connection(self, timeout_s: float) -> Link:
        return self

    async def call(self, method: str, body: bytes, timeout_s: float) -> bytes:
        self.bodies.append(body)
        raise self.script.pop(0) if len(self.script) > 1 else self.script[0]


def backend(*script: NodeError) -> RpcBackend:
    return backend_on(Link(*script))


def backend_on(link: Link) -> RpcBackend:
    return RpcBackend(cast(Any, link), node="client-1", faults=FaultFilter(enabled=False), rng=random.Random(1))


async def test_a_full_queue_does_not_undo_an_attempt_that_may_have_arrived() -> None:
    with pytest.raises(UnknownOutcome):
        await backend(Unreachable(), Busy("full")).apply(KVSet(key="k", value=b"v"), timeout_s=10)


async def test_a_full_queue_alone_is_told_as_such() -> None:
    with pytest.raises(Busy):
        await backend(Busy("full")).apply(KVSet(key="k", value=b"v"), timeout_s=10)


async def test_a_transfer_that_may_have_moved_leadership_is_not_sent_again() -> None:
    link = Link(Unreachable(), Refused("the second attempt"))
    with pytest.raises(UnknownOutcome):
        await backend_on(link).operator("raft.transfer_leader")
    assert len(link.bodies) == 1


async def test_a_transfer_to_a_named_server_is_sent_again() -> None:
    link = Link(Unreachable(), Refused("the second attempt"))
    with pytest.raises(Refused):
        await backend_on(link).operator("raft.transfer_leader", {"id": "server-2"})


async def test_a_rotation_is_sent_again_under_one_request_id() -> None:
    link = Link(Unreachable(), Refused("the second attempt"))
    with pytest.raises(Refused):
        await backend_on(link).operator("ca.rotate")
    first, second = (msgspec.msgpack.decode(body, type=OperatorRequest).params["request_id"] for body in link.bodies)
    assert first == second
