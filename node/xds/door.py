"""The port on which Envoys find the xDS server, which is started by the first of them.

gRPC and Envoy's messages take some 17 MiB of an agent's memory and a fifth of a second: most agents have no Envoy and
shall not pay for it. So a plain listener holds the port, and carries bytes to the server behind it. It answers the
Envoys' checks of instances itself (:mod:`node.xds.checks`).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Protocol, cast

from node.errors import NodeError
from node.xds.checks import Checks
from proxy.logs import LimitedLog
from proxy.relay import SocketChannel, as_protocol, dial
from proxy.stream import Early, join

log = logging.getLogger("lictor.xds")

VISITORS_MAX = 1024
"""Connections at a time; more are dropped."""
FIRST_BYTES_S = 10.0
"""Within which a connection must say what it is."""
_CHECK = b"GET "
"""What an Envoy's check of an instance begins with; its streams are HTTP/2."""
_LOOPBACK = "127.0.0.1"


class Inner(Protocol):
    """The server behind the door."""

    async def start(self, address: str, port: int) -> int: ...
    async def stop(self) -> None: ...


class XdsDoor:
    """Holds the port. ``make`` returns the server, not started yet; it is called once, when the first Envoy comes."""

    def __init__(self, make: Callable[[], Awaitable[Inner]], checks: Checks | None = None) -> None:
        """``checks``: what answers Envoys that ask about instances, by HTTP/1.1 on the same port."""
        self._make = make
        self._checks = checks or Checks()
        self._inner: Inner | None = None
        self._inner_port = 0
        self._opening = asyncio.Lock()
        self._listener: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self.channels: set[_End] = set()
        self._log = LimitedLog(log)

    async def start(self, address: str, port: int) -> int:
        """Listen; returns the port. Raises OSError when it is taken."""
        self._listener = await asyncio.get_running_loop().create_server(
            lambda: as_protocol(_Visitor(self)), address, port
        )
        bound: int = self._listener.sockets[0].getsockname()[1]
        return bound

    async def stop(self) -> None:
        """End the streams and give the port back."""
        if self._listener is not None:
            self._listener.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._inner is not None:
            await self._inner.stop()
        for channel in list(self.channels):
            channel.abort()
        self._checks.close()
        await asyncio.sleep(0)  # sockets are closed on the loop's next turn

    def visited(self, visitor: _Visitor) -> None:
        """Take a connection, or drop it because there are too many."""
        if len(self.channels) > 2 * VISITORS_MAX:
            self._log.warning("full", f"more than {VISITORS_MAX} connections to the xDS port: one is dropped")
            visitor.abort()

    def sort(self, visitor: _Visitor, early: bytes) -> None:
        """Lead a connection to the server behind, or to the checks of instances, by its first bytes."""
        if early.startswith(_CHECK):
            self.channels.discard(visitor)
            self._checks.take(cast(asyncio.Transport, visitor.transport), early)
            return
        task = asyncio.get_running_loop().create_task(self._lead(visitor))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _lead(self, visitor: _Visitor) -> None:
        try:
            port = await self._open()
            inside = _End(self)
            await dial(inside, _LOOPBACK, port)
        except (OSError, NodeError, ImportError) as error:
            log.warning("an Envoy gets no configuration: the xDS server does not start: %s", error)
            visitor.abort()
            return
        join(visitor, inside)
        visitor.early.release(inside)
        inside.early.release(visitor)

    async def _open(self) -> int:
        async with self._opening:
            if self._inner is None:
                inner = await self._make()
                self._inner_port = await inner.start(_LOOPBACK, 0)
                self._inner = inner
            return self._inner_port


class _End(SocketChannel):
    """One of the two connections of an Envoy's way to the server."""

    __slots__ = ("_door", "early")

    def __init__(self, door: XdsDoor) -> None:
        super().__init__()
        self._door = door
        self.peer = self.early = Early(self)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._door.channels.add(self)

    def on_closed(self) -> None:
        self._door.channels.discard(self)


class _Visitor(_End):
    """The end that the Envoy opened."""

    __slots__ = ("_first", "_sorted", "_timer")

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._first, self._sorted = b"", False
        self._timer = asyncio.get_running_loop().call_later(FIRST_BYTES_S, self.abort)
        self._door.visited(self)

    def data_received(self, data: bytes) -> None:
        if self._sorted:
            super().data_received(data)
            return
        self._first += data
        if len(self._first) >= len(_CHECK):
            self._sort()

    def eof_received(self) -> bool:
        if not self._sorted:
            self._sort()
        return super().eof_received()

    def on_closed(self) -> None:
        self._timer.cancel()
        super().on_closed()

    def _sort(self) -> None:
        self._timer.cancel()
        self._sorted = True
        first, self._first = self._first, b""
        if not first.startswith(_CHECK):
            super().data_received(first)
        self._door.sort(self, first)
