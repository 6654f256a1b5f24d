"""Starting tasks: the one place that does, so that none is lost and none fails unseen."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any

log = logging.getLogger("lictor.proxy")


class Tasks:
    """The running tasks of one owner: references are kept, failures are logged, :meth:`close` ends them."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._live: set[asyncio.Task[Any]] = set()
        self.failures = 0
        """Tasks that ended with an exception; each is a bug."""

    def __len__(self) -> int:
        return len(self._live)

    def spawn(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Run ``work`` in the background."""
        task = asyncio.get_running_loop().create_task(work)
        self._live.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._live.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self.failures += 1
            log.error("%s: a background task failed: %r", self._name, error, exc_info=error)

    async def close(self) -> None:
        """Cancel what runs and wait for it."""
        live = [task for task in self._live if task is not asyncio.current_task()]
        for task in live:
            task.cancel()
        await asyncio.gather(*live, return_exceptions=True)
