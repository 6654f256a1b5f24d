"""Replicas in one process on one event loop: real core, driver, journal and snapshots; peers hand over in memory."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import Any

from raftstate.disk import RealDisk
from raftstate.errors import NotLeader, UnknownOutcome
from raftstate.journal import Journal
from raftstate.raft import Member, Members, RaftConfig
from raftstate.replica import Replica
from raftstate.snapshots import SnapshotStore
from raftstate.state.machine import Applied
from tests.support.promises import PATIENCE_S
from tests.support.raft_machine import RegisterMachine

FAST = RaftConfig(heartbeat_s=0.05, election_timeout_min_s=0.3, election_timeout_max_s=0.6)


class Wire:
    """The memory network. `cut` holds pairs (from, to) that lose everything."""

    def __init__(self) -> None:
        self.replicas: dict[str, Replica] = {}
        self.cut: set[tuple[str, str]] = set()

    def peers(self, server: str) -> WirePeers:
        return WirePeers(self, server)

    def isolate(self, server: str) -> None:
        for other in self.replicas:
            self.cut |= {(server, other), (other, server)}


class WirePeers:
    def __init__(self, wire: Wire, server: str) -> None:
        self._wire, self._server = wire, server
        self.addresses: dict[str, str] = {}

    def send(self, peer: str, data: bytes) -> None:
        target = self._wire.replicas.get(peer)
        if target is not None and (self._server, peer) not in self._wire.cut:
            asyncio.get_running_loop().call_soon(target.deliver, self._server, data)

    def set_peers(self, addresses: dict[str, str]) -> None:
        self.addresses = addresses


class ReplicaCluster:
    """`async with ReplicaCluster(tmp_path, 3) as cluster`."""

    def __init__(
        self, path: Path, size: int, *, config: RaftConfig = FAST, machine: Any = RegisterMachine, **options: Any
    ) -> None:
        self._path, self._config, self._options = path, config, options
        self._machine = machine
        self.wire = Wire()
        self.names = [f"server-{number}" for number in range(1, size + 1)]
        self.bootstrap = Members.of(Member(name, f"{name}:8300") for name in self.names)
        self.failures: asyncio.Queue[BaseException] = asyncio.Queue()

    @property
    def replicas(self) -> dict[str, Replica]:
        return self.wire.replicas

    def make(self, name: str, bootstrap: Members | None = None, disk: Any = None) -> Replica:
        disk = disk or RealDisk()
        journal = Journal(disk, str(self._path / name / "journal"))
        return Replica(
            name,
            journal=journal,
            snapshots=SnapshotStore(disk, str(self._path / name / "snapshots")),
            machine=self._machine(),
            peers=self.wire.peers(name),
            bootstrap=self.bootstrap if bootstrap is None else bootstrap,
            config=self._config,
            rng=random.Random(name),
            on_failure=self.failures.put_nowait,
            **self._options,
        )

    async def start(self, name: str, bootstrap: Members | None = None) -> Replica:
        replica = self.make(name, bootstrap)
        self.wire.replicas[name] = replica
        await replica.start()
        return replica

    async def crash(self, name: str) -> None:
        """The process is gone: what was not synced may be lost, nothing is said to anyone."""
        replica = self.wire.replicas.pop(name)
        driver = replica._driver
        replica._driver = None
        assert driver is not None
        driver.stop()
        # What a sync under way has begun may land or not; here it lands, since the file is real.
        await replica._syncs.close()

    async def leader(self, timeout_s: float = PATIENCE_S) -> Replica:
        async with asyncio.timeout(timeout_s):
            while True:
                for replica in self.wire.replicas.values():
                    if replica.is_leader and replica.failure is None:
                        await replica.wait_leader(timeout_s)
                        if replica.is_leader:
                            return replica
                await asyncio.sleep(0.01)

    async def apply(self, data: bytes, timeout_s: float = PATIENCE_S) -> Applied:
        """Write as a client does: at whoever leads, and again under the same request id when that came to an end.

        All servers share one loop here. When the machine lets that wait for longer than an election timeout, the
        leader steps down, as it should; a test that is not about the leader need not fail for it.
        """
        async with asyncio.timeout(timeout_s):
            while True:
                leader = await self.leader(timeout_s)
                try:
                    return await leader.apply(data)
                except (NotLeader, UnknownOutcome):
                    continue

    async def __aenter__(self) -> ReplicaCluster:
        for name in self.names:
            await self.start(name)
        return self

    async def __aexit__(self, *_: object) -> None:
        for replica in list(self.wire.replicas.values()):
            if replica.failure is None:
                await replica.stop()
