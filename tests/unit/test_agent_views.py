"""Views: shared, kept for a while after their last reader, and true to what they follow."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from node.agent.views import Views
from node.backend import ViewEvent
from node.errors import NodeError, Unreachable
from raftstate.model.catalog import Node
from tests.support.http_api import eventually


class Feed:
    """A backend whose one stream is fed by hand."""

    def __init__(self) -> None:
        self.queue: asyncio.Queue[ViewEvent | Exception] = asyncio.Queue()
        self.opened = self.closed = 0

    async def subscribe(self, name: str, params: Any = None) -> AsyncIterator[ViewEvent]:
        self.opened += 1
        try:
            while True:
                item = await self.queue.get()
                if isinstance(item, Exception):
                    raise item
                yield item
        finally:
            self.closed += 1


def event(index: int, *names: str, reset: bool = False, gone: tuple[str, ...] = ()) -> ViewEvent:
    return ViewEvent(index, reset, {name: Node(name, "127.0.0.1") for name in names}, gone)


async def test_readers_share_one_stream_and_it_ends_after_the_last() -> None:
    feed = Feed()
    views = Views(feed, idle_s=0.02)  # type: ignore[arg-type]
    one, two = views.acquire("catalog.nodes"), views.acquire("catalog.nodes", {})
    assert one is two
    feed.queue.put_nowait(event(5, "a", "b", reset=True))
    assert await one.ready(2.0)
    assert [row.node for row in one.typed(Node)] == ["a", "b"]
    views.release(one)
    views.release(two)
    again = views.acquire("catalog.nodes")
    assert again is one
    views.release(again)
    await eventually(lambda: feed.closed == 1)
    assert (feed.opened, len(views)) == (1, 0)
    await views.close()


async def test_changes_wake_and_a_lost_stream_keeps_what_is_known() -> None:
    feed = Feed()
    views = Views(feed)  # type: ignore[arg-type]
    view = views.acquire("catalog.nodes")
    calls: list[int] = []
    stop = view.listen(lambda: calls.append(view.index))
    feed.queue.put_nowait(event(5, "a", reset=True))
    await view.ready(2.0)
    waiting = asyncio.create_task(view.wait(5, 5.0))
    feed.queue.put_nowait(event(7, "b", gone=("a",)))
    await waiting
    assert (calls, list(view.rows)) == ([5, 7], ["b"])
    feed.queue.put_nowait(Unreachable())
    await eventually(lambda: not view.connected)
    assert list(view.rows) == ["b"]
    feed.queue.put_nowait(event(6, "b", reset=True))
    await eventually(lambda: view.connected)
    assert (view.index, calls) == (7, [5, 7])
    stop()
    await views.close()


async def test_unchanged_rows_are_not_made_again() -> None:
    feed = Feed()
    views = Views(feed)  # type: ignore[arg-type]
    view = views.acquire("catalog.nodes")
    rows = {name: {"Node": name, "Address": "127.0.0.1"} for name in "ab"}
    feed.queue.put_nowait(ViewEvent(1, True, rows))
    await view.ready(2.0)
    before = view.typed(Node)
    feed.queue.put_nowait(ViewEvent(2, False, {"c": {"Node": "c", "Address": "127.0.0.1"}}))
    await view.wait(1, 2.0)
    after = view.typed(Node)
    assert [row.node for row in after] == ["a", "b", "c"]
    assert after[0] is before[0]
    await views.close()


async def test_holding_says_when_nothing_is_known() -> None:
    views = Views(Feed())  # type: ignore[arg-type]
    with pytest.raises(NodeError, match="No cluster leader"):
        async with views.holding("catalog.nodes", timeout_s=0.01):
            pass
    await views.close()
