"""Requests that only write: proposed and answered with no task, no aiohttp request, no handler.

What a write costs a server is mostly what surrounds it. Where this node leads, or is linked to the server that does,
and a request's command follows from its path and body alone, it is begun here and answered when the backend tells its
outcome. Everything else takes the way through middleware and handler, which makes its command by the same function: a
request with a query, with headers that mean something for a write, with a body that is refused, on an agent. Where
tokens are asked for nothing is written here.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING

from aiohttp import web

from node.backend import Applied
from node.errors import NodeError
from node.http.context import Context
from node.http.errors import HttpError
from node.http.front.answers import encode, json_ok
from node.http.front.heads import Fields, Head
from node.http.middleware import foreign_head, node_error
from node.http.respond import JSON_TYPE
from node.http.writing import REQUEST_ID_HEADER
from node.loose_json import BadJson
from raftstate.loop_load import LOOP
from raftstate.model.wire import to_json

if TYPE_CHECKING:
    from node.http.front.connection import Connection
    from raftstate.state.commands import Command

Maker = Callable[[Context, str, bytes], "Command"]
"""Makes the command of a request from the path's last parameter (or an empty text) and the body.

Raises HttpError or BadJson: the handler has the words.
"""


class Writes:
    """The writes of a listener. ``makers``: by method and path; a path may end with one parameter, ``{key}``."""

    def __init__(self, ctx: Context, makers: Mapping[tuple[str, str], Maker]) -> None:
        self._ctx = ctx
        self._fixed = {at: make for at, make in makers.items() if "{" not in at[1]}
        self._below = [
            (method, path.partition("{")[0], make) for (method, path), make in makers.items() if "{" in path
        ]
        self._methods = frozenset(method for method, _ in makers)
        self._pending: set[Connection] = set()
        self._idle = asyncio.Event()

    def begin(self, head: Head, body: bytes, connection: Connection) -> bool:
        """Begin to write; ``connection.take`` gets the answer later. False: nothing has begun."""
        if head.method not in self._methods:
            return False
        found = self._find(head)
        if found is None or not self._may_write(head.fields):
            return False
        ctx = self._ctx
        if len(body) > ctx.options.body_bytes_max:
            return False
        make, key = found
        try:
            command = make(ctx, key, body)
        except (HttpError, BadJson):
            return False
        if not ctx.backend.submit(command, partial(self._told, connection)):
            return False
        self._pending.add(connection)
        LOOP.requests -= 1  # it was counted when it came, and waits for raft itself
        return True

    def _find(self, head: Head) -> tuple[Maker, str] | None:
        target = head.target
        make = self._fixed.get((head.method, target))
        if make is not None:
            return make, ""
        if "%" not in target and "?" not in target:
            for method, prefix, make in self._below:
                if target.startswith(prefix) and head.method == method:
                    return make, target[len(prefix) :]
        return None

    def _may_write(self, fields: Fields) -> bool:
        if fields.may_write is None:
            headers = fields.headers
            allowed = self._ctx.options.allowed_hosts
            fields.may_write = REQUEST_ID_HEADER not in headers and not foreign_head("PUT", headers, allowed)
        return fields.may_write

    def _told(self, connection: Connection, outcome: Applied | NodeError) -> None:
        self._pending.discard(connection)
        if not self._pending:
            self._idle.set()
        answer, ends = self._answer(outcome, closing=connection.closing)
        connection.take(answer, ends=ends)

    @staticmethod
    def _answer(outcome: Applied | NodeError, *, closing: bool) -> tuple[bytes, bool]:
        try:
            if isinstance(outcome, NodeError):
                raise outcome
            body = to_json(outcome.unwrap())
        except NodeError as error:
            return encode(node_error(error), closing=closing)
        if closing:
            return encode(web.Response(body=body, content_type=JSON_TYPE), closing=True)
        return json_ok(body), False

    def pending(self, connection: Connection) -> bool:
        """Whether a write of this connection's is under way."""
        return connection in self._pending

    async def settled(self, timeout_s: float) -> None:
        """Return when no write is under way, or after ``timeout_s``."""
        if not self._pending:
            return
        self._idle.clear()
        try:
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        except TimeoutError:
            pass
