"""Connections from this server to others, for forwarding to the leader: one each, dialled when first needed."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable, Iterable

from node.errors import Unreachable
from node.node_tls import ALPN_PEER, ALPN_RPC
from node.rpc.client import ClientConnection, dial
from raftstate.transport_link import server_address


class PeerConnections:
    """One RPC connection per server. Callers that need the same one at once share the dialling."""

    def __init__(
        self,
        context: ssl.SSLContext,
        datacenter: str,
        *,
        blocked: Callable[[str], bool] = lambda node: False,
        dial_timeout_s: float = 1.0,
    ) -> None:
        context.set_alpn_protocols([ALPN_RPC, ALPN_PEER])
        self._context, self._datacenter, self._blocked = context, datacenter, blocked
        self._dial_timeout_s = dial_timeout_s
        self._open: dict[str, tuple[str, ClientConnection]] = {}
        self._dialling: dict[tuple[str, str], asyncio.Task[ClientConnection]] = {}
        self._closed = False

    async def get(self, node: str, address: str) -> ClientConnection:
        """Return the connection to `node` at ``host:port``. Raises Unreachable."""
        held = self.held(node, address)
        if held is not None:
            return held
        if self._closed:
            raise Unreachable("this node is stopping")
        key = (node, address)
        task = self._dialling.get(key)
        if task is None:
            task = asyncio.get_running_loop().create_task(self._dial(node, address))
            self._dialling[key] = task
            task.add_done_callback(lambda done: self._dialled(key, done))
        # Shielded: one caller's deadline must not fail the others that wait for the same connection.
        return await asyncio.shield(task)

    def held(self, node: str, address: str) -> ClientConnection | None:
        """Return the connection to `node` at ``host:port`` if there is one."""
        held = self._open.get(node)
        return held[1] if held is not None and held[0] == address and not held[1].closed else None

    async def _dial(self, node: str, address: str) -> ClientConnection:
        connection = await dial(
            server_address(address),
            self._context,
            self._datacenter,
            expect_node=node,
            timeout_s=self._dial_timeout_s,
            blocked=self._blocked,
        )
        held = self._open.pop(node, None)
        if held is not None:
            held[1].close()
        self._open[node] = (address, connection)
        return connection

    def _dialled(self, key: tuple[str, str], task: asyncio.Task[ClientConnection]) -> None:
        self._dialling.pop(key, None)
        if not task.cancelled():
            task.exception()  # told to whoever awaits it; nobody need

    async def warm(self, servers: Iterable[tuple[str, str]]) -> None:
        """See that there is a connection to each of these (node, address); those that can't be reached are left."""
        await asyncio.gather(*(self.get(node, address) for node, address in servers), return_exceptions=True)

    def drop_all_but(self, node: str) -> None:
        """Close the connections to all other servers; calls in progress on them fail with Unreachable."""
        for other in [name for name in self._open if name != node]:
            self._open.pop(other)[1].abort()

    async def close(self) -> None:
        """Close all."""
        self._closed = True
        tasks = list(self._dialling.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for _, connection in self._open.values():
            connection.close()
        self._open.clear()
