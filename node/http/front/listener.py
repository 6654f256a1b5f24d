"""The listener: what its connections share, and the runner that puts it in aiohttp's place."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

from aiohttp import web

from node.backend import QueryResult
from node.http.context import CONTEXT
from node.http.front.connection import Connection
from node.http.front.guards import Admission, Deadlines, FrontOptions
from node.http.front.heads import Head, HeadCache
from node.http.front.parking import Newer, Parking
from node.http.front.repeats import Ask, Body
from node.http.front.routing import Router
from node.http.front.writes import Maker, Writes
from node.http.middleware import guard

if TYPE_CHECKING:
    pass

LINGER_S = 2.0
LINGERING_MAX = 256
SLOW_IDLE_S = 120.0
"""aiohttp closes a connection of its own so long after its last answer if no whole head has come since."""


def _never(name: str, params: Mapping[str, Any]) -> QueryResult | None:
    return None


class Front:
    """Makes the protocol of each connection; called as a protocol factory."""

    def __init__(
        self,
        app: web.Application,
        server: web.Server,
        options: FrontOptions,
        streams: tuple[str, ...],
        ask: Ask | None,
        newer: Newer,
        writes: Writes | None,
        *,
        plain: bool,
    ) -> None:
        self.plain = plain
        """A request's verdict follows from its head: no token is asked for."""
        self.loop = asyncio.get_running_loop()
        self.handle = Router(app).handle
        self.make_slow = server
        self._make_request = cast(Any, server.request_factory)
        self.repeats = ask is not None
        self.ask: Ask = ask or _never
        self.parking = Parking(newer)
        self.writes = writes
        self.heads = HeadCache(streams)
        self.closing = False
        self.connections: set[Connection] = set()
        self.admission = Admission(options)
        self.heads_due = Deadlines(options.head_timeout_s, lambda late: late.time_out("head"))
        self.bodies_due = Deadlines(options.body_timeout_s, lambda late: late.time_out("body"))
        self.idle_due = Deadlines(options.idle_timeout_s, Connection.close)
        self.writes_due = Deadlines(options.write_timeout_s, Connection.abort)
        self._lingering = Deadlines(LINGER_S, Connection.close)

    def __call__(self) -> Connection:
        return Connection(self)

    def request(self, head: Head, body: Body, connection: Connection) -> web.Request:
        """Return the request as handlers take it."""
        return cast(web.Request, self._make_request(head.message, body, connection, None, None))

    def enter(self, connection: Connection, address: str) -> tuple[int, str, str] | None:
        """Count a connection; return why it is turned away (status, reason, text), or None."""
        self.connections.add(connection)
        return self.admission.enter(address)

    def left(self, connection: Connection, address: str | None) -> None:
        """Forget a connection; ``address``: where it was counted."""
        self.connections.discard(connection)
        for due in (self.heads_due, self.bodies_due, self.idle_due, self.writes_due, self._lingering):
            due.end(connection)
        if address is not None:
            self.admission.leave(address)

    def linger(self, connection: Connection) -> bool:
        """Give an answered connection a moment to end; False: there are too many of them."""
        if len(self._lingering) >= LINGERING_MAX:
            return False
        self._lingering.begin(connection)
        return True

    async def shutdown(self, timeout_s: float) -> None:
        """End all connections but aiohttp's; a request that is being answered has ``timeout_s`` for it."""
        self.closing = True
        await self.parking.close()
        own = [one for one in self.connections if not one.is_slow()]
        tasks = [one.task for one in own if one.task is not None]
        for connection in own:
            if connection.task is None and not (self.writes and self.writes.pending(connection)):
                connection.close()
        ends_at = self.loop.time() + timeout_s
        if tasks:
            await asyncio.wait(tasks, timeout=timeout_s)
        if self.writes:
            await self.writes.settled(ends_at - self.loop.time())
        for connection in own:
            connection.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=timeout_s)
        for due in (self.heads_due, self.bodies_due, self.idle_due, self.writes_due, self._lingering):
            due.close()


class FrontRunner(web.AppRunner):
    """aiohttp's runner of an application, with the front as the protocol of its sites."""

    def __init__(
        self,
        app: web.Application,
        options: FrontOptions,
        streams: tuple[str, ...],
        makers: Mapping[tuple[str, str], Maker],
    ) -> None:
        # A handler is cancelled when its client hangs up: a blocking query parks no longer, and a sidecar that is
        # gone shows at once by the end of its stream.
        super().__init__(
            app, handler_cancellation=True, access_log=None, shutdown_timeout=1.0, keepalive_timeout=SLOW_IDLE_S
        )
        self._options, self._streams, self._makers = options, streams, makers
        self._front: Front | None = None

    @property
    def server(self) -> Any:
        """The protocol factory that sites listen with."""
        return self._front

    @property
    def front(self) -> Front:
        """The listener. Call `setup` before."""
        assert self._front is not None
        return self._front

    async def setup(self) -> None:
        """Make ready to listen."""
        await super().setup()
        # A write may be begun past the handler only if nothing but the API's own guard, whose verdict follows from
        # the head, stands before it. So may an answer be sent again, but where tokens are asked for as well, as long
        # as the token's part in it can be asked for anew.
        ctx = self.app[CONTEXT]
        backend = ctx.backend
        own = [guard] if ctx.access is None else [guard, ctx.enforcer]
        known = list(self.app.middlewares) == own
        plain = known and ctx.access is None
        ask = backend.query_now if known else None
        writes = Writes(ctx, self._makers) if plain else None
        server = cast(web.Server, super().server)
        self._front = Front(self.app, server, self._options, self._streams, ask, backend.newer, writes, plain=plain)

    async def shutdown(self) -> None:
        """End streams, then the connections that are not aiohttp's."""
        await super().shutdown()
        if self._front is not None:
            await self._front.shutdown(1.0)
