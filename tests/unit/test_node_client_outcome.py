"""What a client agent's backend says of a write whose attempts ended differently."""

from __future__ import annotations

import random
from typing import Any, cast

import pytest

from node.client import RpcBackend
from node.errors import Busy, NodeError, UnknownOutcome, Unreachable
from node.faults import FaultFilter
from raftstate.state.commands import KVSet


class Link:
    """A link to servers that answer by a script, the last line for ever."""

    server = "server-1"

    def __init__(self, *script: NodeError) -> None:
        self.script = list(script)

    async def connection(self, timeout_s: float) -> Link:
        return self

    async def call(self, method: str, body: bytes, timeout_s: float) -> bytes:
        raise self.script.pop(0) if len(self.script) > 1 else self.script[0]


def backend(*script: NodeError) -> RpcBackend:
    return RpcBackend(
        cast(Any, Link(*script)), node="client-1", faults=FaultFilter(enabled=False), rng=random.Random(1)
    )


async def test_a_full_queue_does_not_undo_an_attempt_that_may_have_arrived() -> None:
    with pytest.raises(UnknownOutcome):
        await backend(Unreachable(), Busy("full")).apply(KVSet(key="k", value=b"v"), timeout_s=10)


async def test_a_full_queue_alone_is_told_as_such() -> None:
    with pytest.raises(Busy):
        await backend(Busy("full")).apply(KVSet(key="k", value=b"v"), timeout_s=10)
