"""RpcBackend: the backend of a client agent, over its link to the servers. What can be repeated safely is repeated
on the next server until the time is up; the caller never sees that one was lost."""

from __future__ import annotations

import asyncio
import logging
import random
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, cast

import msgspec

from node import protocol
from node.backend import (
    APPLY_TIMEOUT_S,
    QUERY_TIMEOUT_S,
    WAIT_S_MAX,
    Applied,
    Contact,
    QueryResult,
    ReadMode,
    Told,
    ViewEvent,
)
from node.errors import BadRequest, Busy, NodeError, NoLeader, Stopped, TimedOut, UnknownOutcome, Unreachable
from node.faults import FaultFilter
from node.followed import Followed, FollowedQueries
from node.protocol import (
    ApplyReply,
    ApplyRequest,
    OperatorRequest,
    QueryReply,
    QueryRequest,
    SignRequest,
    SubscribeRequest,
    decode,
    encode,
)
from node.replies import SIGN_TIMEOUT_S, as_applied, as_result
from node.rpc.client import ClientConnection
from node.server_link import ServerLink
from node.views import Rows, as_delta, merge
from raftstate.model.wire import to_msgpack

if TYPE_CHECKING:
    from raftstate.state.commands import Command

log = logging.getLogger("lictor.rpc")

OPERATOR_TIMEOUT_S = 35.0
SNAPSHOT_TIMEOUT_S = 600.0
RETRY_S_MIN, RETRY_S_MAX = 0.02, 0.25
BUSY_TRIES = 4


class RpcBackend:
    """Backend of a client agent. `seen_index` keeps reads from going back when the server changes."""

    def __init__(self, link: ServerLink, *, node: str, faults: FaultFilter, rng: random.Random | None = None) -> None:
        self.link, self.node = link, node
        self._faults = faults
        self._rng = rng or random.Random()
        self._seen_index = 0
        self.followed = FollowedQueries(self._ask_stale)

    async def _repeat(
        self,
        attempt: Callable[[ClientConnection, float], Awaitable[bytes]],
        timeout_s: float,
        *,
        write: bool,
        once: bool = False,
    ) -> bytes:
        """Make attempts until one is answered for good or the time is up.

        With `once` none is made after one whose outcome is unknown.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_s
        open_outcome = False
        failures = busy = 0
        last: NodeError = NoLeader()
        while (left_s := deadline - loop.time()) > 0:
            sent = False
            try:
                connection = await self.link.connection(left_s)
                sent = True
                return await attempt(connection, left_s)
            except (Unreachable, TimedOut, UnknownOutcome, Stopped, NoLeader) as error:
                last = error
                open_outcome = open_outcome or (write and sent and not isinstance(error, NoLeader))
                if once and open_outcome:
                    break
            except Busy as error:
                last = error
                busy += 1
                if busy >= BUSY_TRIES:
                    break
            failures += 1
            pause_s = min(RETRY_S_MAX, RETRY_S_MIN * 2 ** min(failures, 5)) * self._rng.uniform(0.5, 1.0)
            await asyncio.sleep(max(0.0, min(pause_s, deadline - loop.time())))
        raise UnknownOutcome() if open_outcome else last

    async def apply(
        self, command: Command, *, request_id: str | None = None, timeout_s: float = APPLY_TIMEOUT_S
    ) -> Applied:
        """See Backend.apply."""
        try:
            raw = msgspec.Raw(to_msgpack(command))
        except (TypeError, OverflowError) as error:
            raise BadRequest(f"the command cannot be encoded: {error}") from None
        body = encode(ApplyRequest(request_id or uuid.uuid4().hex, raw))
        answer = await self._repeat(
            lambda connection, left_s: connection.call(protocol.APPLY, body, left_s), timeout_s, write=True
        )
        applied = as_applied(decode(answer, ApplyReply))
        self._seen_index = max(self._seen_index, applied.index)
        return applied

    def submit(self, command: Command, told: Told) -> bool:
        """See Backend.submit. An agent writes nothing itself."""
        return False

    async def query(
        self,
        name: str,
        params: Mapping[str, Any] | None = None,
        *,
        mode: ReadMode = "default",
        min_index: int = 0,
        wait_s: float = 0.0,
    ) -> QueryResult:
        """See Backend.query. A blocking query is parked here, on a followed query that all its readers share."""
        params = params or {}
        loop = asyncio.get_running_loop()
        deadline = loop.time() + min(wait_s, WAIT_S_MAX)
        while True:
            result = await self._read(name, params, mode)
            self._seen_index = max(self._seen_index, result.index)
            left_s = deadline - loop.time()
            if min_index <= 0 or left_s <= 0 or result.ends_wait(min_index):
                return result
            followed = self.followed.get(name, params, follow=True)
            if followed is None:
                return (await self._ask_server(name, params, mode, min_index, left_s))[0]
            await followed.newer_than(min_index, left_s)

    async def newer(self, name: str, params: Mapping[str, Any], min_index: int, wait_s: float) -> None:
        """See Backend.newer."""
        followed = self.followed.get(name, params, follow=True)
        if followed is None:
            await self._ask_server(name, params, "stale", min_index, wait_s)
        else:
            await followed.newer_than(min_index, wait_s)

    async def _read(self, name: str, params: Mapping[str, Any], mode: ReadMode) -> QueryResult:
        if mode == "stale" and (followed := self.followed.get(name, params)) is not None:
            if (known := self._known(followed)) is not None:
                return known
            result, applied = await self._ask_server(name, params, mode, 0, 0.0)
            followed.take(result, applied)
            return result
        return (await self._ask_server(name, params, mode, 0, 0.0))[0]

    def contact(self) -> Contact:
        """See Backend.contact."""
        return Contact(self.link.known_leader, self.link.last_contact_ms())

    def query_now(self, name: str, params: Mapping[str, Any]) -> QueryResult | None:
        """See Backend.query_now."""
        followed = self.followed.peek(name, params)
        return None if followed is None else self._known(followed)

    def _known(self, followed: Followed) -> QueryResult | None:
        """Return what is known of a followed query, if that is no older than what this node has seen."""
        known = followed.result
        if known is None or (followed.applied_index < self._seen_index and self.link.server):
            return None
        leader, age_ms = self.link.known_leader, self.link.last_contact_ms()
        return QueryResult(known.index, leader, age_ms, known.raw, "stale", followed.applied_index)

    async def _ask_stale(
        self, name: str, params: Mapping[str, Any], min_index: int, wait_s: float
    ) -> tuple[QueryResult, int]:
        """For what is followed: it goes on for as long as it takes to find a server again."""
        while True:
            try:
                return await self._ask_server(name, params, "stale", min_index, wait_s)
            except BadRequest:
                raise
            except NodeError as error:
                log.debug("rpc: following %s: %s", name, error)
                await asyncio.sleep(RETRY_S_MAX * self._rng.uniform(0.5, 1.0))

    async def _ask_server(
        self, name: str, params: Mapping[str, Any], mode: ReadMode, min_index: int, wait_s: float
    ) -> tuple[QueryResult, int]:
        """Ask; a blocking query that loses its server goes on at the next for what is left of its wait."""
        loop = asyncio.get_running_loop()
        ends = loop.time() + wait_s

        async def attempt(connection: ClientConnection, left_s: float) -> bytes:
            wait_left_s = max(0.0, ends - loop.time())
            request = QueryRequest(name, dict(params), mode, min_index, wait_left_s, self._seen_index)
            return await connection.call(protocol.QUERY, encode(request), left_s)

        reply = decode(await self._repeat(attempt, wait_s + QUERY_TIMEOUT_S, write=False), QueryReply)
        return as_result(reply, mode, name), reply.applied_index

    async def subscribe(self, name: str, params: Mapping[str, Any] | None = None) -> AsyncIterator[ViewEvent]:
        """See Backend.subscribe. Another server's whole view becomes what differs from the rows held."""
        rows: Rows | None = None
        index = failures = 0
        while True:
            try:
                connection = await self.link.connection(3600.0)
                body = encode(SubscribeRequest(name, dict(params or {}), index))
                async with aclosing(cast(Any, connection.stream(protocol.SUBSCRIBE, body))) as items:
                    async for item in items:
                        failures = 0
                        event = ViewEvent.unpack(item)
                        index = event.index
                        delta = event if rows is None else as_delta(rows, event)
                        rows = merge(rows or {}, event)
                        if delta is not None:
                            yield delta
            except BadRequest:
                raise
            except (NodeError, msgspec.ValidationError) as error:
                log.debug("rpc: stream of %s broke: %s", name, error)
            failures += 1
            pause_s = min(RETRY_S_MAX, RETRY_S_MIN * 2 ** min(failures, 5))
            await asyncio.sleep(pause_s * self._rng.uniform(0.2, 1.0))

    async def close(self) -> None:
        """Follow nothing any more."""
        await self.followed.close()

    async def sign_leaf(self, csr_pem: str, *, service: str, instance: str = "") -> str:
        """See Backend.sign_leaf."""
        body = encode(SignRequest(csr_pem, service, instance))
        answer = await self._repeat(
            lambda connection, left_s: connection.call(protocol.SIGN, body, left_s), SIGN_TIMEOUT_S, write=False
        )
        return answer.decode()

    async def operator(self, verb: str, params: Mapping[str, Any] | None = None) -> Any:
        """See Backend.operator. What concerns this node is answered here."""
        params = dict(params or {})
        if verb == "faults.block":
            one_way = params.get("one_way") is True
            return {"Blocked": self._faults.block(params.get("peers", []), one_way=one_way)}
        if verb == "node.servers":
            servers = [{"Node": name, "Address": address} for name, address in self.link.servers.items()]
            return {"Servers": servers, "Connected": self.link.server}
        if verb == "ca.rotate":
            params.setdefault("request_id", uuid.uuid4().hex)  # repeated, it rotates once
        body = encode(OperatorRequest(verb, params))
        answer = await self._repeat(
            lambda connection, left_s: connection.call(protocol.OPERATOR, body, left_s),
            OPERATOR_TIMEOUT_S if verb.startswith(("raft.", "ca.")) else QUERY_TIMEOUT_S,
            write=verb.startswith(("raft.add", "raft.remove", "raft.transfer", "ca.", "acl.")),
            once=verb == "raft.transfer_leader" and not params.get("id"),
        )
        value = msgspec.msgpack.decode(answer)
        if verb == "acl.write":
            self._seen_index = max(self._seen_index, value["index"])
        return value

    async def snapshot_save(self) -> AsyncIterator[bytes]:
        """See Backend.snapshot_save."""
        connection = await self.link.connection(QUERY_TIMEOUT_S)
        async for piece in connection.stream(protocol.SNAPSHOT_SAVE, encode(True)):
            yield piece

    async def snapshot_restore(self, chunks: AsyncIterator[bytes], *, foreign: bool = False) -> None:
        """See Backend.snapshot_restore."""
        connection = await self.link.connection(QUERY_TIMEOUT_S)
        await connection.upload(
            protocol.SNAPSHOT_RESTORE, encode(protocol.RestoreRequest(foreign)), chunks, SNAPSHOT_TIMEOUT_S
        )
