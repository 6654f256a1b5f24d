"""A whole backend in one process: a state machine and its watches, no raft, no network. For tests and trials."""

from __future__ import annotations

import asyncio
import datetime
import uuid
from collections.abc import AsyncIterator, Mapping
from typing import TYPE_CHECKING, Any

from node.acl_writes import decode_write
from node.acl_writes import outcome as acl_outcome
from node.backend import APPLY_TIMEOUT_S, Applied, Contact, QueryResult, ReadMode, Told, ViewEvent
from node.errors import Refused
from node.store_reads import StoreReads, outcome
from raftstate.state.commands import Envelope, MalformedCommand, decode_envelope, encode_envelope
from raftstate.state.machine import StateMachine
from raftstate.watch import Watches

if TYPE_CHECKING:
    from raftstate.state.commands import Command

_ALL = (1 << 64) - 1
"""As the applied index: nothing that one process has not applied exists, so a greater index is of another past."""


class LocalBackend:
    """Backend over a state machine of its own. `node` is the name that leaves are signed for."""

    def __init__(self, node: str = "local", *, address: str = "127.0.0.1:8300") -> None:
        self.machine = StateMachine()
        self.watches = Watches()
        self.reads = StoreReads(self.machine, self.watches)
        self._node, self._address = node, address
        self._index = 1  # as raft's own first entry: an empty query's index is 1, and a first command must exceed it

    async def apply(
        self, command: Command, *, request_id: str | None = None, timeout_s: float = APPLY_TIMEOUT_S
    ) -> Applied:
        """Apply at once; the bytes take the way they take through raft."""
        return self._apply(command, request_id)

    def submit(self, command: Command, told: Told) -> bool:
        """See Backend.submit."""
        try:
            applied = self._apply(command, None)
        except (OverflowError, MalformedCommand):
            return False
        asyncio.get_running_loop().call_soon(told, applied)
        return True

    def _apply(self, command: Command, request_id: str | None) -> Applied:
        now = datetime.datetime.now(datetime.UTC)
        data = encode_envelope(Envelope(request_id or str(uuid.uuid4()), now.isoformat(), command))
        decode_envelope(data)
        self._index += 1
        applied = self.machine.apply(self._index, data)
        self.watches.notify(applied.touched)
        return outcome(applied)

    async def query(
        self,
        name: str,
        params: Mapping[str, Any] | None = None,
        *,
        mode: ReadMode = "default",
        min_index: int = 0,
        wait_s: float = 0.0,
    ) -> QueryResult:
        """Read; every mode is as good as `consistent` here."""
        answer = await self.reads.blocking(name, params or {}, min_index, wait_s)
        return QueryResult(answer.index, True, 0, answer.value, mode, _ALL)

    async def newer(self, name: str, params: Mapping[str, Any], min_index: int, wait_s: float) -> None:
        """See Backend.newer."""
        await self.reads.park(name, params, min_index, wait_s)

    def contact(self) -> Contact:
        """See Backend.contact."""
        return Contact(True, 0)

    def query_now(self, name: str, params: Mapping[str, Any]) -> QueryResult | None:
        """See Backend.query_now."""
        answer = self.reads.ask(name, params)
        return QueryResult(answer.index, True, 0, answer.value, "stale", _ALL)

    def subscribe(self, name: str, params: Mapping[str, Any] | None = None) -> AsyncIterator[ViewEvent]:
        """Follow a query's rows."""
        return self.reads.subscribe(name, params)

    async def sign_leaf(self, csr_pem: str, *, service: str, instance: str = "") -> str:
        """Not yet there."""
        raise Refused("no certificate authority in this process", http_status=501)

    async def operator(self, verb: str, params: Mapping[str, Any] | None = None) -> Any:
        """The verbs that make sense for one process."""
        if verb == "status.leader":
            return self._address
        if verb == "acl.write":
            _, command, request_id = decode_write(dict(params or {}))
            return acl_outcome(await self.apply(command, request_id=request_id or None))
        if verb == "status.peers":
            return [self._address]
        raise Refused(
            f"operator verb {verb!r} needs a cluster; this process is a single local backend", http_status=501
        )

    async def snapshot_save(self) -> AsyncIterator[bytes]:
        """Yield the state in chunks."""
        snapshot = self.machine.snapshot()
        try:
            for chunk in snapshot:
                yield chunk
        finally:
            snapshot.close()

    async def snapshot_restore(self, chunks: AsyncIterator[bytes], *, foreign: bool = False) -> None:
        """Replace the state."""
        self.machine.restore([chunk async for chunk in chunks])
        self._index = self.machine.store.index
        self.watches.notify_all()

    async def close(self) -> None:
        """Stop following views."""
        await self.reads.hub.close()
