"""Reads on a state machine held in this process: plain, blocking, and followed. Shared by server and LocalBackend."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from typing import TYPE_CHECKING, Any

from node.backend import Applied, RefusalInfo, ViewEvent
from node.errors import BadRequest
from node.view_hub import Answered, ViewHub
from raftstate.state.queries import run_query

if TYPE_CHECKING:
    from raftstate.state.machine import Applied as MachineApplied
    from raftstate.state.machine import StateMachine
    from raftstate.watch import Watches

WAIT_S_MAX = 660.0
"""Consul's longest blocking query: ten minutes, and a sixteenth of jitter."""

REFUSAL_STATUS: dict[str, int] = {}
"""Consul's HTTP status by refusal code; any other is 400."""


def outcome(applied: MachineApplied) -> Applied:
    """Return the state machine's outcome in the form that crosses RPC."""
    if applied.refusal is None:
        return Applied(applied.index, applied.value)
    code = str(applied.refusal.code)
    return Applied(applied.index, None, RefusalInfo(code, applied.refusal.message, REFUSAL_STATUS.get(code, 400)))


class StoreReads:
    """Queries, blocking queries and views over one state machine."""

    def __init__(self, machine: StateMachine, watches: Watches) -> None:
        self._machine, self._watches = machine, watches
        self.hub = ViewHub(self.ask, self._changed)

    def ask(self, name: str, params: Mapping[str, Any]) -> Answered:
        """Run a query. Raises BadRequest for an unknown name or a bad parameter."""
        try:
            return run_query(self._machine.store, name, dict(params))
        except (KeyError, TypeError, ValueError) as error:
            raise BadRequest(f"query {name!r}: {error}") from error

    async def ask_blocking(self, name: str, params: Mapping[str, Any], min_index: int, wait_s: float) -> Answered:
        """Answer once the query's index exceeds `min_index`, or when `wait_s` has passed."""
        answer = self.ask(name, params)
        if min_index <= 0 or wait_s <= 0 or answer.index > min_index:
            return answer
        if answer.index < min_index:
            return answer  # an index from the future of a restored state: the client starts over
        loop = asyncio.get_running_loop()
        deadline = loop.time() + min(wait_s, WAIT_S_MAX)
        while answer.index <= min_index and (left := deadline - loop.time()) > 0:
            await self._wait(name, params, answer, left)
            answer = self.ask(name, params)
        return answer

    def subscribe(
        self, name: str, params: Mapping[str, Any] | None = None, *, from_index: int = 0
    ) -> AsyncIterator[ViewEvent]:
        """Follow a query; see `ViewHub.subscribe`."""
        return self.hub.subscribe(name, params, from_index=from_index)

    async def _changed(self, name: str, params: Mapping[str, Any], answer: Answered) -> None:
        await self._wait(name, params, answer, None)

    async def _wait(self, name: str, params: Mapping[str, Any], answer: Any, timeout_s: float | None) -> None:
        await self._watches.wait(answer.watch, lambda: self.ask(name, params).index, answer.index, timeout_s)
