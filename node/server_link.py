"""An agent's one connection to a server: chosen at random among those there are, replaced at once when it fails.

A *generation* is one connection's life. Whoever waits on a link that failed waits for the next generation.
"""

from __future__ import annotations

import asyncio
import logging
import random
import ssl
from collections.abc import Callable, Iterable

from node.config import Liveness
from node.errors import NodeError, Overloaded, Unreachable
from node.protocol import HEARTBEAT, HeartbeatReply, decode, encode
from node.rpc.client import ClientConnection, dial
from node.tasks import Tasks
from raftstate.transport_link import server_address

log = logging.getLogger("lictor.rpc")

DIAL_TIMEOUT_S = 2.0
RACE_AFTER_S = 0.15
"""A dial to a host that is not there by then gets a rival to another server."""
RACE_AFTER_S_MAX = 1.0
RACE_ANSWER_AFTER_S = 1.0
"""So does one whose host is there, and whose server has not answered. It is most often busy with others who dial: a
rival too soon would double the work of all servers just then."""
PATIENCE_MAX = 4.0
"""A round of dials that brought nothing doubles the time given to the next, up to this factor. Servers to which all
agents come back at once need longer than usual for each: if nobody waited longer, all would give up just before they
were served, and begin anew for ever."""
BACKOFF_S_MIN, BACKOFF_S_MAX = 0.05, 1.0
OVERLOADED_S_MIN, OVERLOADED_S_MAX = 1.0, 4.0
"""Servers that say that they have too much to do are left alone for longer: all the others keep them busy."""
ANSWER_TIMEOUT_S = 1.0
"""A server that does not answer a heartbeat in this time is replaced."""
BEAT_S_MAX = 60.0
NO_LEADER_BEATS_MAX = 2
"""A server that knows no leader for this many heartbeats may be cut off: another is tried."""
REBALANCE_S = 300.0
"""Agents move to another server this often on average, so that servers share them evenly again after a failure.
Moving is cheap: streams go on from the index they have reached."""


class ServerLink:
    """The connection. `servers` are (name, ``host:port``), at first from the configuration, later as servers say."""

    def __init__(
        self,
        servers: Iterable[tuple[str, str]],
        context: ssl.SSLContext,
        datacenter: str,
        liveness: Liveness,
        *,
        blocked: Callable[[str], bool] = lambda node: False,
        rng: random.Random | None = None,
    ) -> None:
        self.servers = dict(servers)
        self._context, self._datacenter, self._liveness = context, datacenter, liveness
        self._blocked, self._rng = blocked, rng or random.Random()
        self._connection: ClientConnection | None = None
        self._up = asyncio.Event()
        self._lost = asyncio.Event()
        self._tasks = Tasks("server link")
        self._avoid = ""
        self._overloaded = False
        """Whether a server turned the last dial away because it was busy."""
        self.known_leader = False
        self._contact_ms = 0
        self._heard_at = asyncio.get_running_loop().time()

    @property
    def server(self) -> str:
        """Name of the server that this agent talks to; empty while it looks for one."""
        return self._connection.peer.node if self._connection is not None else ""

    def last_contact_ms(self) -> int:
        """Age of what the server knew at its last answer, and since."""
        since_ms = int((asyncio.get_running_loop().time() - self._heard_at) * 1000)
        return self._contact_ms + (since_ms if self._connection is None else 0)

    def start(self) -> None:
        """Begin to look for a server."""
        self._tasks.spawn(self._keep())

    async def stop(self) -> None:
        """Close the connection."""
        await self._tasks.close()
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    async def connection(self, timeout_s: float) -> ClientConnection:
        """Return the live connection, waiting for one. Raises Unreachable."""
        if self._connection is not None and not self._connection.closed:
            return self._connection
        try:
            async with asyncio.timeout(timeout_s):
                while True:
                    await self._up.wait()
                    if self._connection is not None and not self._connection.closed:
                        return self._connection
                    self._up.clear()
        except TimeoutError:
            raise Unreachable() from None

    def replace(self, connection: ClientConnection, why: str) -> None:
        """Give this connection up: its server is slow, cut off or stopping."""
        if connection is self._connection and not connection.closed:
            log.info("rpc: leaving server %s: %s", connection.peer.node, why)
            self._avoid = connection.peer.node
            connection.abort()

    # -- keeping one up --------------------------------------------------------------------------------------------

    async def _keep(self) -> None:
        failures = 0
        while True:
            connection = await self._find(min(2.0**failures, PATIENCE_MAX))
            if connection is None:
                failures += 1
                if failures == 1:
                    log.warning("rpc: no server answers (%s); will keep trying", ", ".join(self.servers.values()))
                doubled = 2 ** min(failures, 8)
                ceiling = min(BACKOFF_S_MAX, BACKOFF_S_MIN * doubled)
                if self._overloaded:
                    ceiling = min(OVERLOADED_S_MAX, OVERLOADED_S_MIN * doubled)
                await asyncio.sleep(ceiling * self._rng.uniform(0.5, 1.0))
                continue
            failures = 0
            self._lost.clear()
            self._connection = connection
            self._up.set()
            log.info("rpc: talking to server %s", connection.peer.node)
            beating = self._tasks.spawn(self._beat(connection))
            if not connection.closed:
                await self._lost.wait()
            beating.cancel()
            self._connection = None
            self.known_leader = False
            self._up.clear()
            self._avoid = self._avoid or connection.peer.node
            log.info("rpc: lost server %s; looking for another", connection.peer.node)

    def _ended(self, connection: ClientConnection) -> None:
        if connection is self._connection:
            self._lost.set()

    async def _find(self, patience: float) -> ClientConnection | None:
        """Try all servers, the one just lost last; a slow one gets rivals, and the first that answers wins."""
        race_after_s = min(RACE_AFTER_S * patience**2, RACE_AFTER_S_MAX)
        order = list(self.servers.items())
        self._rng.shuffle(order)
        order.sort(key=lambda item: item[0] == self._avoid)
        self._avoid, self._overloaded = "", False
        running: set[asyncio.Task[ClientConnection]] = set()
        try:
            for name, address in order:
                reached = asyncio.Event()
                dialling = self._dial(name, address, DIAL_TIMEOUT_S * patience, reached.set)
                running.add(asyncio.get_running_loop().create_task(dialling))
                done, running = await asyncio.wait(running, timeout=race_after_s, return_when=asyncio.FIRST_COMPLETED)
                if not done and reached.is_set():
                    more_s = max(0.0, RACE_ANSWER_AFTER_S - race_after_s)
                    done, running = await asyncio.wait(running, timeout=more_s, return_when=asyncio.FIRST_COMPLETED)
                if (winner := self._winner(done)) is not None:
                    return winner
            while running:
                done, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                if (winner := self._winner(done)) is not None:
                    return winner
            return None
        finally:
            for task in running:
                task.cancel()
                task.add_done_callback(_close_late)

    async def _dial(
        self, name: str, address: str, timeout_s: float, on_reached: Callable[[], None] = lambda: None
    ) -> ClientConnection:
        return await dial(
            server_address(address),
            self._context,
            self._datacenter,
            expect_node=name,
            timeout_s=timeout_s,
            blocked=self._blocked,
            on_end=self._ended,
            on_reached=on_reached,
        )

    def _winner(self, done: set[asyncio.Task[ClientConnection]]) -> ClientConnection | None:
        winner: ClientConnection | None = None
        for task in done:
            error = task.exception()
            if error is not None:
                self._overloaded |= isinstance(error, Overloaded)
                log.debug("rpc: %s", error)
            elif winner is None and not task.result().closed:
                winner = task.result()
            else:
                task.result().close()
        return winner

    # -- proving it alive ------------------------------------------------------------------------------------------

    async def _beat(self, connection: ClientConnection) -> None:
        """Heartbeats: this agent lives, and so does the server, and it knows the leader."""
        leaderless = 0
        move_at = asyncio.get_running_loop().time() + REBALANCE_S * self._rng.uniform(0.75, 1.25)
        while not connection.closed:
            try:
                body = await connection.call(HEARTBEAT, encode(True), ANSWER_TIMEOUT_S)
                reply = decode(body, HeartbeatReply)
            except NodeError as error:
                self.replace(connection, str(error))
                return
            if reply.servers:
                self.servers = dict(reply.servers)
            self.known_leader, self._contact_ms = reply.known_leader, reply.last_contact_ms
            self._heard_at = asyncio.get_running_loop().time()
            leaderless = 0 if reply.known_leader else leaderless + 1
            if leaderless >= NO_LEADER_BEATS_MAX and await self._better_than(connection):
                self.replace(connection, "it knows no leader, and another server does")
                return
            every_s = max(self._liveness.heartbeat_s, min(reply.beat_every_s, BEAT_S_MAX))
            await asyncio.sleep(every_s * self._rng.uniform(0.8, 1.2))
            if len(self.servers) > 1 and asyncio.get_running_loop().time() > move_at:
                self.replace(connection, "servers take turns")

    async def _better_than(self, connection: ClientConnection) -> bool:
        """Return whether another server knows a leader; until one does, this one's stale reads are all there is."""
        others = [item for item in self.servers.items() if item[0] != connection.peer.node]
        self._rng.shuffle(others)
        for name, address in others:
            other: ClientConnection | None = None
            try:
                other = await self._dial(name, address, ANSWER_TIMEOUT_S)
                reply = decode(await other.call(HEARTBEAT, encode(True), ANSWER_TIMEOUT_S), HeartbeatReply)
            except NodeError:
                continue
            finally:
                if other is not None:
                    other.close()
            if reply.known_leader:
                return True
        return False


def _close_late(task: asyncio.Task[ClientConnection]) -> None:
    """A rival that connected after the race was won."""
    if not task.cancelled() and task.exception() is None:
        task.result().close()
