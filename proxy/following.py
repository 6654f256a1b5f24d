"""Following the stream of configuration for as long as a sidecar runs, in one process or in several."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable

from proxy.tasks import Tasks
from raftstate.model.sidecar import SidecarUpdate


async def follow_until(
    drained: asyncio.Event,
    updates: AsyncIterator[SidecarUpdate],
    apply: Callable[[SidecarUpdate], Awaitable[None]],
    tasks: Tasks,
    log: logging.Logger,
) -> None:
    """Apply updates until ``drained``; when they end before that, go on with what is known. A failure is raised."""
    following = tasks.spawn(_follow(updates, apply))
    waiting = tasks.spawn(drained.wait())
    try:
        await asyncio.wait([following, waiting], return_when=asyncio.FIRST_COMPLETED)
        if following.done() and not drained.is_set():
            following.result()
            log.warning("the configuration stream ended; going on with what is known")
            await drained.wait()
    finally:
        following.cancel()


async def _follow(updates: AsyncIterator[SidecarUpdate], apply: Callable[[SidecarUpdate], Awaitable[None]]) -> None:
    async for update in updates:
        await apply(update)
