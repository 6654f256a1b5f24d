"""Writes that a server begins for a caller without a task: told once, done once, through elections too."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from node.backend import Applied
from node.errors import NodeError
from raftstate.state.commands import KVCas, KVLock, KVSet, SessionRenew
from tests.support.cluster import cluster
from tests.support.promises import PATIENCE_S
from tests.support.rpc import eventually


class Caller:
    """Keeps what it was told."""

    def __init__(self) -> None:
        self.told: list[Applied | NodeError] = []

    def __call__(self, outcome: Applied | NodeError) -> None:
        self.told.append(outcome)

    async def outcome(self, timeout_s: float = PATIENCE_S) -> Applied:
        await eventually(lambda: bool(self.told), timeout_s)
        (outcome,) = self.told
        assert isinstance(outcome, Applied), outcome
        return outcome


async def test_the_leader_begins_a_write_and_tells_its_outcome(tmp_path: Path) -> None:
    async with cluster(tmp_path, clients=1) as running:
        leader, follower = await running.leader(), await running.follower()
        caller = Caller()
        assert leader.backend.submit(KVSet("k", b"v"), caller)
        assert not caller.told, "a later turn of the loop tells it"
        applied = await caller.outcome()
        assert (applied.value, applied.refusal) == (True, None)
        found = await follower.backend.query("kv.get", {"key": "k"}, mode="consistent")
        assert found.value["ModifyIndex"] == applied.index
        assert not running.clients["client-1"].backend.submit(KVSet("k", b"w"), caller)
        assert len(caller.told) == 1


async def test_a_follower_that_is_linked_to_the_leader_begins_a_write_there(tmp_path: Path) -> None:
    async with cluster(tmp_path) as running:
        follower = await running.follower()
        await eventually(lambda: follower.backend.route.connection_now() is not None)
        caller = Caller()
        assert follower.backend.submit(KVSet("k", b"v"), caller)
        assert not caller.told, "a later turn of the loop tells it"
        applied = await caller.outcome()
        assert (applied.value, applied.refusal) == (True, None)
        # A read of the same server sees what was written through it.
        found = await follower.backend.query("kv.get", {"key": "k"}, mode="stale")
        assert found.value["ModifyIndex"] == applied.index
        for command in (KVLock("k", b"v", "no-such-session"), KVCas("k", b"v", 7), SessionRenew("no-such-session")):
            caller = Caller()
            assert follower.backend.submit(command, caller)
            told, applied = await caller.outcome(), await follower.backend.apply(command)
            assert (told.value, told.refusal) == (applied.value, applied.refusal)
        caller = Caller()
        assert not follower.backend.submit(KVSet("k", b"v", flags=1 << 70), caller), "it cannot be encoded"
        assert not caller.told


async def test_a_write_that_was_on_its_way_to_a_leader_that_is_gone_is_done_by_the_next(tmp_path: Path) -> None:
    async with cluster(tmp_path) as running:
        leader, follower = await running.leader(), await running.follower()
        await eventually(lambda: follower.backend.route.connection_now() is not None)
        others = [name for name in running.servers if name != leader.node.name]
        leader.faults.block(others)
        for name in others:
            running.servers[name].faults.block([leader.node.name])
        caller = Caller()
        assert follower.backend.submit(KVSet("k", b"v"), caller)
        applied = await caller.outcome()
        assert applied.value is True
        found: Any = (await follower.backend.query("kv.get", {"key": "k"}, mode="consistent")).value
        assert (found["Value"], found["CreateIndex"], found["ModifyIndex"]) == (b"v", applied.index, applied.index)
        assert len(caller.told) == 1


async def test_a_refusal_is_told_as_apply_returns_it(tmp_path: Path) -> None:
    async with cluster(tmp_path, servers=1) as running:
        backend = (await running.leader()).backend
        for command in (KVLock("k", b"v", "no-such-session"), KVCas("k", b"v", 7), SessionRenew("no-such-session")):
            caller = Caller()
            assert backend.submit(command, caller)
            told, applied = await caller.outcome(), await backend.apply(command)
            assert (told.value, told.refusal) == (applied.value, applied.refusal)
        caller = Caller()
        assert not backend.submit(KVSet("k", b"v", flags=1 << 70), caller), "it cannot be encoded: apply says so"
        assert not backend.submit(KVSet("k", b"v" * (4 << 20)), caller), "it is too large: apply says so"
        assert not caller.told


async def test_a_write_whose_leader_is_cut_off_is_told_when_a_new_one_has_done_it(tmp_path: Path) -> None:
    async with cluster(tmp_path) as running:
        leader = await running.leader()
        others = [name for name in running.servers if name != leader.node.name]
        leader.faults.block(others)
        for name in others:
            running.servers[name].faults.block([leader.node.name])
        caller = Caller()
        assert leader.backend.submit(KVSet("k", b"v"), caller)

        def another_leads() -> bool:
            return any(running.servers[name].replica.is_leader for name in others)

        await eventually(lambda: another_leads() and not leader.replica.is_leader)
        assert not caller.told
        leader.faults.block([])
        for name in others:
            running.servers[name].faults.block([])
        applied = await caller.outcome()
        assert applied.value is True
        found: Any = (await leader.backend.query("kv.get", {"key": "k"}, mode="consistent")).value
        assert (found["Value"], found["CreateIndex"]) == (b"v", applied.index)
        await asyncio.sleep(0)
        assert len(caller.told) == 1
