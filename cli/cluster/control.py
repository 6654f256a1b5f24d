"""The local cluster as :mod:`cli.chaos` wants it: the supervisor's methods, off the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from cli.chaos.harm import SmallDisks, skewed
from cli.cluster.supervisor import Supervisor


class LocalControl:
    """Implements :class:`cli.chaos.runner.ClusterControl` over a :class:`Supervisor`."""

    def __init__(self, supervisor: Supervisor) -> None:
        self._supervisor = supervisor
        self._disks = SmallDisks(supervisor)
        self.servers: Sequence[str] = [name for name in supervisor.names if supervisor.config.nodes[name].is_server]
        self.addresses = {name: supervisor.http_addr(name) for name in supervisor.names}

    async def kill(self, node: str) -> None:
        """Kill a node."""
        await asyncio.to_thread(self._supervisor.kill, node)

    async def start(self, node: str, skew_s: float = 0.0) -> None:
        """Start a node, without waiting until it is ready: the clients' waiting is part of the run.

        Its wall clock is ``skew_s`` seconds ahead of this machine's.
        """
        await asyncio.to_thread(self._supervisor.start, [node], skewed(skew_s) if skew_s else ())

    async def pause(self, node: str) -> None:
        """Pause a node."""
        await asyncio.to_thread(self._supervisor.pause, node)

    async def resume(self, node: str) -> None:
        """Resume a node."""
        await asyncio.to_thread(self._supervisor.resume, node)

    async def partition(self, nodes: Sequence[str], *, one_way: bool = False) -> None:
        """Cut nodes off; with ``one_way`` they only hear nothing."""
        await asyncio.to_thread(self._supervisor.partition, nodes, one_way=one_way)

    async def fill_disk(self, node: str) -> None:
        """Leave a node no room to write."""
        await asyncio.to_thread(self._disks.fill, node)

    async def free_disk(self, node: str) -> None:
        """Make room again, and start the node anew: it has stopped, or is about to, if it wrote meanwhile."""
        await asyncio.to_thread(self._disks.free, node)
        await asyncio.to_thread(self._supervisor.stop, [node])
        await asyncio.to_thread(self._supervisor.start, [node])

    async def heal(self) -> None:
        """Undo partitions."""
        await asyncio.to_thread(self._supervisor.heal)

    async def leader(self) -> tuple[str, int]:
        """Return (node, term) of the leader as the reachable nodes tell, or ``("", 0)``."""
        found = await asyncio.to_thread(self._supervisor.status)
        leading = max((one for one in found if one.raft == "leader"), key=lambda one: one.term, default=None)
        return (leading.name, leading.term) if leading else ("", 0)
