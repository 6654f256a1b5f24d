"""The way to the leader: do it here if this server leads, else ask the one who does, and wait out elections.

What is retried and what is not is decided here, once for reads, writes and operator verbs.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import TypeVar

from node.errors import Busy, NodeError, NoLeader, Stopped, TimedOut, UnknownOutcome, Unreachable
from node.peers import PeerConnections
from node.raft_errors import translate
from node.rpc.client import ClientConnection
from raftstate.errors import RaftError
from raftstate.replica import Replica

RETRY_S_MIN, RETRY_S_MAX = 0.01, 0.15
BUSY_TRIES = 4

T = TypeVar("T")
Here = Callable[[float], Awaitable[T]]
"""Do it on this server, the leader, within so many seconds."""
There = Callable[[ClientConnection, float], Awaitable[T]]
"""Ask the leader over this connection."""


class LeaderRoute:
    """Runs work on the leader, wherever that is."""

    def __init__(self, replica: Replica, peers: PeerConnections, *, rng: random.Random | None = None) -> None:
        self._replica, self._peers = replica, peers
        self._rng = rng or random.Random()
        self._changed = asyncio.Event()
        replica.on_leader(self._on_leader)

    def _on_leader(self, leader: str | None) -> None:
        self._changed.set()
        if leader is not None:
            # Whoever waits for an answer of the old leader, which may be paused or cut off, asks the new one now.
            self._peers.drop_all_but(leader)

    def address_of(self, server: str) -> str | None:
        """Return ``host:port`` of a member."""
        return next((member.address for member in self._replica.members() if member.id == server), None)

    async def run(
        self,
        here: Here[T],
        there: There[T],
        *,
        timeout_s: float,
        write: bool,
        forwarded: bool = False,
        begun: bool = False,
    ) -> T:
        """Run until it succeeded or the time is up.

        `forwarded`: the request has been forwarded already; then this server answers or says that it does not lead.
        `begun`: an attempt before this call may have reached the log.
        For a `write` an attempt that may have reached the log turns a final failure into UnknownOutcome.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_s
        open_outcome = begun
        busy = failures = 0
        while True:
            left_s = deadline - loop.time()
            if left_s <= 0:
                raise UnknownOutcome() if open_outcome else NoLeader()
            self._changed.clear()
            try:
                if self._replica.is_leader:
                    return await here(left_s)
                leader = self._replica.leader
                if forwarded or leader is None or (address := self.address_of(leader)) is None:
                    raise NoLeader(leader=leader)
                try:
                    connection = await self._peers.get(leader, address)
                except Unreachable as error:
                    raise NoLeader(str(error), leader=leader) from None  # nothing was sent
                return await there(connection, left_s)
            except (RaftError, NodeError) as error:
                failure = translate(error) if isinstance(error, RaftError) else error
            if isinstance(failure, Busy):
                busy += 1
                if busy >= BUSY_TRIES:
                    raise _final(failure, open_outcome)
            elif isinstance(failure, (UnknownOutcome, TimedOut, Unreachable)):
                open_outcome = open_outcome or write
            elif isinstance(failure, Stopped):
                if self._replica.failure is not None:
                    raise _final(failure, open_outcome)
            elif not isinstance(failure, NoLeader):
                raise failure
            if forwarded:
                raise failure
            failures += 1
            await self._pause(failures, deadline - loop.time())

    def connection_now(self) -> ClientConnection | None:
        """Return the connection to the leader, another server, if both are known at this moment."""
        leader = self._replica.leader
        if leader is None or leader == self._replica.id or (address := self.address_of(leader)) is None:
            return None
        return self._peers.held(leader, address)

    async def connection(self, timeout_s: float) -> ClientConnection:
        """Return a connection to the leader, another server. Raises NoLeader, Unreachable."""
        try:
            leader = await self._replica.wait_leader(timeout_s)
        except RaftError as error:
            raise translate(error) from None
        address = self.address_of(leader)
        if leader == self._replica.id or address is None:
            raise NoLeader("leadership is changing: try again", leader=leader)
        return await self._peers.get(leader, address)

    async def _pause(self, failures: int, left_s: float) -> None:
        """Wait for news of the leader, or a little, whichever is first."""
        pause_s = min(RETRY_S_MAX, RETRY_S_MIN * 2 ** min(failures, 6)) * self._rng.uniform(0.5, 1.0)
        try:
            async with asyncio.timeout(max(0.0, min(pause_s, left_s))):
                await self._changed.wait()
        except TimeoutError:
            pass


def _final(failure: NodeError, open_outcome: bool) -> NodeError:
    """Return what the caller is told at the end: of a write that an earlier attempt may have made, that."""
    return UnknownOutcome() if open_outcome else failure
