"""What a server answers to over RPC: each method of `node.protocol`, put before its backend."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from typing import Any, cast

import msgspec

from node import protocol
from node.backend import READ_MODES, QueryResult
from node.config import SERVER
from node.errors import BadRequest, NodeError, Refused
from node.leader_duties import LeaderDuties
from node.liveness import beat_every_s
from node.operator_verbs import OperatorVerbs
from node.protocol import (
    QUERIES_SERVERS_ONLY,
    SERVERS_ONLY,
    VERBS_SERVERS_ONLY,
    ApplyRequest,
    HeartbeatReply,
    OperatorRequest,
    QueryRequest,
    RestoreRequest,
    SignRequest,
    SubscribeRequest,
    command_name,
    decode,
    encode,
)
from node.rpc.server import Call, Feed, Methods, Reply
from node.server import ServerBackend
from node.tasks import Tasks
from raftstate.errors import RaftError

BATCH_S = 0.1
"""How long heartbeats are gathered before they go to the leader together."""
REPLY_S = 0.02
"""How long the answer to a heartbeat serves for all agents: thousands a second need not be told more exactly."""


class ServerRpc:
    """The methods. `start` also begins to pass heartbeats on."""

    def __init__(self, backend: ServerBackend, verbs: OperatorVerbs, duties: LeaderDuties) -> None:
        self._backend, self._verbs, self._duties = backend, verbs, duties
        self._beats: set[str] = set()
        self._beaten = asyncio.Event()
        self._reply, self._reply_until = b"", 0.0
        self.crowded: Callable[[], bool] = lambda: False
        """Whether more agents want to get in than this server can see to."""
        self._tasks = Tasks("server rpc")
        self.methods = Methods()
        for name, unary in (
            (protocol.APPLY, self.apply),
            (protocol.QUERY, self.query),
            (protocol.SIGN, self.sign),
            (protocol.OPERATOR, self.operator),
            (protocol.SNAPSHOT_RESTORE, self.snapshot_restore),
        ):
            self.methods.add(name, unary)
        self.methods.add_immediate(protocol.HEARTBEAT, self.heartbeat)
        self.methods.add_immediate(protocol.HEARTBEATS, self.heartbeats)
        self.methods.add_immediate(protocol.CROWDED, self.crowded_server)
        self.methods.add_direct(protocol.APPLY, self.apply_directly)
        self.methods.add_stream(protocol.SUBSCRIBE, self.subscribe)
        self.methods.add_feed(protocol.SUBSCRIBE, self.feed)
        self.methods.add_stream(protocol.SNAPSHOT_SAVE, self.snapshot_save)

    def start(self) -> None:
        """Begin to pass heartbeats on to the leader."""
        self._tasks.spawn(self._pass_on())

    async def stop(self) -> None:
        """Pass nothing on any more."""
        await self._tasks.close()

    async def apply(self, call: Call) -> bytes:
        """Write."""
        request = decode(call.body, ApplyRequest)
        _for_agents_too(call, command_name(request.command), SERVERS_ONLY)
        return await self._backend.apply_raw(request, call.left_s())

    def apply_directly(self, call: Call, reply: Reply) -> bool:
        """Write, if this server leads: a quorum's disks are all that is waited for."""
        if not self._backend.replica.is_leader:
            return False
        request = decode(call.body, ApplyRequest)
        _for_agents_too(call, command_name(request.command), SERVERS_ONLY)
        return self._backend.submit_raw(request, call.left_s(), reply.send)

    async def query(self, call: Call) -> bytes:
        """Read; a forwarded read is answered by the leader only."""
        request = decode(call.body, QueryRequest)
        _for_agents_too(call, request.name, QUERIES_SERVERS_ONLY)
        if request.forwarded:
            return await self._backend.query_leader(request, forwarded=True)
        mode = protocol.read_mode(request.mode)
        if mode == READ_MODES[1]:
            await self._backend.catch_up(request.seen_index)
        elif request.min_index <= 0 and not self._backend.replica.is_leader:
            forward = msgspec.structs.replace(request, forwarded=True)
            return await self._backend.query_leader(forward, forwarded=False)
        result: QueryResult = await self._backend.query(
            request.name, request.params, mode=mode, min_index=request.min_index, wait_s=request.wait_s
        )
        return self._backend.reply_of(result)

    def feed(self, call: Call, feed: Feed) -> bool:
        """Follow a query on this server, pushed as it changes."""
        request = decode(call.body, SubscribeRequest)
        _for_agents_too(call, request.name, QUERIES_SERVERS_ONLY)
        return self._backend.reads.hub.feed(request.name, request.params, request.from_index, feed)

    async def subscribe(self, call: Call) -> AsyncIterator[bytes]:
        """Follow a query on this server."""
        request = decode(call.body, SubscribeRequest)
        _for_agents_too(call, request.name, QUERIES_SERVERS_ONLY)
        events = self._backend.reads.subscribe(request.name, request.params, from_index=request.from_index)
        async with aclosing(cast(Any, events)):
            async for event in events:
                yield event.packed

    async def sign(self, call: Call) -> bytes:
        """Sign a leaf for the asking node, as its certificate names it; a server speaks for its agents."""
        request = decode(call.body, SignRequest)
        if call.peer.role == SERVER:
            return await self._backend.sign_raw(request, forwarded=True)
        request = msgspec.structs.replace(request, node=call.peer.node)
        return await self._backend.sign_raw(request, forwarded=False)

    async def operator(self, call: Call) -> bytes:
        """Run an operator's verb."""
        request = decode(call.body, OperatorRequest)
        _for_agents_too(call, request.verb, VERBS_SERVERS_ONLY)
        if request.verb == "faults.block":
            raise BadRequest("faults are set on each node by its own API, not over RPC")
        return await self._verbs.run(request)

    async def snapshot_save(self, call: Call) -> AsyncIterator[bytes]:
        """Stream a snapshot."""
        async for piece in self._verbs.snapshot_save(forwarded=call.peer.role == SERVER):
            yield piece

    async def snapshot_restore(self, call: Call) -> bytes:
        """Take a snapshot in."""
        # Older nodes send a mere true, which consents to nothing.
        foreign = call.body != encode(True) and decode(call.body, RestoreRequest).foreign
        await self._verbs.snapshot_restore(call.upload(), forwarded=call.peer.role == SERVER, foreign=foreign)
        return encode(True)

    # -- heartbeats ------------------------------------------------------------------------------------------------

    def heartbeat(self, call: Call) -> bytes:
        """Note an agent's sign of life, and tell it which servers there are and how this one fares."""
        self.beat(call.peer.node)
        now = asyncio.get_running_loop().time()
        if now >= self._reply_until:
            self._reply_until = now + REPLY_S
            status = self._backend.replica.status()
            servers = tuple((member.id, member.address) for member in status.members)
            nodes = len(cast(Any, self._backend.replica.machine).store.nodes.rows)
            every_s = beat_every_s(nodes, len(servers), self._duties.node_ttl_s)
            self._reply = encode(HeartbeatReply(status.leader is not None, status.last_contact_ms, servers, every_s))
        return self._reply

    def heartbeats(self, call: Call) -> bytes:
        """Take in what another server gathered."""
        if call.peer.role != SERVER:
            raise BadRequest("only a server passes heartbeats on")
        self._duties.beats(decode(call.body, list[str]))
        return encode(True)

    def crowded_server(self, call: Call) -> bytes:
        """Take in that another server is crowded."""
        if call.peer.role != SERVER:
            raise BadRequest("only a server says that it is crowded")
        self._duties.excuse()
        return encode(True)

    def beat(self, node: str) -> None:
        """Note one sign of life."""
        self._beats.add(node)
        self._beaten.set()

    async def _pass_on(self) -> None:
        while True:
            await self._beaten.wait()
            await asyncio.sleep(BATCH_S)
            self._beaten.clear()
            beats, self._beats = sorted(self._beats), set()
            crowded = self.crowded()
            if self._backend.replica.is_leader:
                self._duties.beats(beats)
                if crowded:
                    self._duties.excuse()
                continue
            try:
                connection = await self._backend.route.connection(1.0)
                await connection.call(protocol.HEARTBEATS, encode(beats), 1.0)
                if crowded:
                    await connection.call(protocol.CROWDED, encode(True), 1.0)
            except (NodeError, RaftError):
                pass  # the next beats come soon, and a new leader gives everyone a full deadline


def _for_agents_too(call: Call, asked: str, servers_only: frozenset[str]) -> None:
    """Raises Refused when an agent asks for what only servers may."""
    if call.peer.role != SERVER and asked in servers_only:
        raise Refused(
            f"{asked} is for servers: {call.peer.node} has a {call.peer.role}'s certificate", http_status=403
        )
