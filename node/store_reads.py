"""Reads on a state machine held in this process: plain, parked, and followed. Shared by server and LocalBackend."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from typing import TYPE_CHECKING, Any

from node.backend import WAIT_S_MAX, Applied, RefusalInfo, ViewEvent
from node.errors import BadRequest
from node.view_hub import ViewHub
from raftstate.state.queries import Answer, BadQuery, run_query

if TYPE_CHECKING:
    from raftstate.state.machine import Applied as MachineApplied
    from raftstate.state.machine import StateMachine
    from raftstate.watch import Watches

PUBLIC_INTERNAL = frozenset({"internal.digest"})


def outcome(applied: MachineApplied) -> Applied:
    """Return the state machine's outcome in the form that crosses RPC."""
    refusal = applied.refusal
    if refusal is None:
        return Applied(applied.index, applied.value)
    return Applied(applied.index, None, RefusalInfo(refusal.code, refusal.message, refusal.http_status))


class StoreReads:
    """Queries and views over one state machine."""

    def __init__(
        self, machine: StateMachine, watches: Watches, applied_index: Callable[[], int] | None = None
    ) -> None:
        self._machine, self._watches = machine, watches
        self.hub = ViewHub(self.ask, watches.listen, applied_index or (lambda: machine.store.index))

    def ask(self, name: str, params: Mapping[str, Any]) -> Answer:
        """Run a query that may be asked from outside. Raises BadRequest."""
        if name.startswith("internal.") and name not in PUBLIC_INTERNAL:
            raise BadRequest(f"query {name!r} is answered to the server itself only")
        return self.ask_internal(name, params)

    def ask_internal(self, name: str, params: Mapping[str, Any]) -> Answer:
        """Run any query. Raises BadRequest for an unknown name or a bad parameter."""
        try:
            return run_query(self._machine.store, name, params)
        except BadQuery as error:
            raise BadRequest(str(error)) from None
        except (TypeError, ValueError, AttributeError) as error:
            raise BadRequest(f"query {name}: a parameter has the wrong type ({error})") from error

    async def park(self, name: str, params: Mapping[str, Any], min_index: int, timeout_s: float) -> None:
        """Return once the query's index exceeds `min_index` here, or when the time is up."""
        answer = self.ask(name, params)
        if answer.index <= min_index:
            await self._watches.wait(
                answer.watch, lambda: self.ask(name, params).index, min_index, min(timeout_s, WAIT_S_MAX)
            )

    async def blocking(self, name: str, params: Mapping[str, Any], min_index: int, wait_s: float) -> Answer:
        """Answer, after having parked if `min_index` is the query's index now."""
        answer = self.ask(name, params)
        if min_index <= 0 or wait_s <= 0 or answer.index != min_index:
            return answer
        await self.park(name, params, min_index, wait_s)
        return self.ask(name, params)

    def subscribe(
        self, name: str, params: Mapping[str, Any] | None = None, *, from_index: int = 0
    ) -> AsyncIterator[ViewEvent]:
        """Follow a query; see `ViewHub.subscribe`."""
        return self.hub.subscribe(name, params, from_index=from_index)
