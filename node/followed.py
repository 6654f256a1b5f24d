"""An agent's local answers: a query that is asked again and again is followed by one blocking query to the servers.

Stale reads of it are answered here at once, and any number of parked readers share its one place on the server. When
every server is lost, what was last known is still answered, with its age.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from node.backend import QueryResult
from node.errors import BadRequest, NodeError
from node.tasks import Tasks
from node.views import canonical

log = logging.getLogger("lictor.rpc")

FOLLOWED_MAX = 2048
IDLE_S = 60.0
"""A query that nobody has asked for so long is followed no more."""
FOLLOW_AFTER_S = 10.0
"""A second read within this time makes a query worth following."""
WAIT_S = 300.0

Ask = Callable[[str, Mapping[str, Any], int, float], Awaitable[tuple[QueryResult, int]]]
"""(name, params, min_index, wait_s) -> (a stale answer from a server, the log index that server had applied)."""


class Followed:
    """One query that is followed. `result` and `applied_index` are changed only by `run` and `refresh`."""

    def __init__(self, name: str, params: Mapping[str, Any]) -> None:
        self.name, self.params = name, dict(params)
        self.result: QueryResult | None = None
        self.applied_index = 0
        """The answer is known to hold everything up to this log index that bears on it."""
        self.used_at = 0.0
        self.parked = 0
        self.failure: NodeError | None = None
        self._changed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def take(self, result: QueryResult, applied_index: int) -> None:
        """Note an answer, unless it is older than what is known."""
        self.applied_index = max(self.applied_index, applied_index)
        if self.result is not None and result.index == self.result.index:
            return
        if self.result is not None and result.index < self.result.index and applied_index < self.applied_index:
            return
        self.result = result
        self.wake()

    def wake(self) -> None:
        """Let everyone who is parked look again."""
        changed, self._changed = self._changed, asyncio.get_running_loop().create_future()
        changed.set_result(None)

    async def newer_than(self, min_index: int, timeout_s: float) -> None:
        """Return once the answer's index is not `min_index` or below any more, or when the time is up."""
        self.parked += 1
        try:
            async with asyncio.timeout(timeout_s):
                while self.failure is None and (self.result is None or self.result.index <= min_index):
                    await asyncio.shield(self._changed)
        except TimeoutError:
            pass
        finally:
            self.parked -= 1


class FollowedQueries:
    """All queries that an agent follows."""

    def __init__(self, ask: Ask) -> None:
        self._ask = ask
        self._followed: dict[str, tuple[Followed, asyncio.Task[None]]] = {}
        self._asked_once: OrderedDict[str, float] = OrderedDict()
        self._tasks = Tasks("followed queries")

    def __len__(self) -> int:
        return len(self._followed)

    def get(self, name: str, params: Mapping[str, Any], *, follow: bool = False) -> Followed | None:
        """Return the query if it is followed; `follow`: begin to, if there is room. A second ask soon begins too."""
        now = asyncio.get_running_loop().time()
        key = canonical(name, params)
        held = self._followed.get(key)
        if held is not None:
            held[0].used_at = now
            return held[0]
        if not follow:
            asked_at = self._asked_once.pop(key, None)
            if asked_at is None or now - asked_at > FOLLOW_AFTER_S:
                self._asked_once[key] = now
                if len(self._asked_once) > FOLLOWED_MAX:
                    self._asked_once.popitem(last=False)
                return None
        if len(self._followed) >= FOLLOWED_MAX:
            return None
        followed = Followed(name, params)
        followed.used_at = now
        self._followed[key] = (followed, self._tasks.spawn(self._run(key, followed)))
        return followed

    def peek(self, name: str, params: Mapping[str, Any]) -> Followed | None:
        """Return the query if it is followed already, and note that it is used."""
        held = self._followed.get(canonical(name, params))
        if held is None:
            return None
        held[0].used_at = asyncio.get_running_loop().time()
        return held[0]

    async def _run(self, key: str, followed: Followed) -> None:
        loop = asyncio.get_running_loop()
        try:
            while followed.parked or loop.time() - followed.used_at < IDLE_S:
                index = followed.result.index if followed.result is not None else 0
                # An idle query is noticed at the end of a wait; those that no one uses are few and cheap.
                result, applied = await self._ask(followed.name, followed.params, index, WAIT_S if index else 0.0)
                followed.take(result, applied)
        except BadRequest as error:
            followed.failure = error
        except NodeError as error:
            followed.failure = error
            log.debug("rpc: %s is followed no more: %s", followed.name, error)
        finally:
            self._followed.pop(key, None)
            followed.failure = followed.failure or NodeError("followed no more")
            followed.wake()

    async def close(self) -> None:
        """Follow nothing any more."""
        await self._tasks.close()
