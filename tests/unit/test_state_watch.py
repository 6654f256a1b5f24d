from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable

import pytest

from raftstate.state import commands as c
from raftstate.watch import Watches, blocking_query
from tests.unit.support_state import Log


class Live:
    """A log whose changes wake watchers."""

    def __init__(self) -> None:
        self.log, self.watches = Log(), Watches()

    def do(self, command: c.Command) -> int:
        self.watches.notify(self.log.apply(command).touched)
        return self.log.index


async def parked(watches: Watches, coroutine: Awaitable[object], keys: int = 1) -> asyncio.Task[object]:
    """Start a coroutine and return once it waits."""
    before = len(watches)
    task: asyncio.Task[object] = asyncio.ensure_future(coroutine)
    await asyncio.sleep(0)
    assert len(watches) == before + keys
    return task


async def test_a_change_wakes_its_watcher_and_no_other() -> None:
    watches = Watches()
    web = await parked(watches, watches.changed([("service", "web")]))
    database = await parked(watches, watches.changed([("service", "db"), ("nodes",)]), keys=2)
    watches.notify([("service", "web")])
    assert await web is True
    assert not database.done()
    watches.notify([("nodes",)])
    assert await database is True
    assert len(watches) == 0


@pytest.mark.parametrize(
    ("prefix", "wakes"), [("", True), ("a", True), ("a/b", True), ("a/b/c", False), ("b", False)]
)
async def test_a_key_wakes_the_watchers_of_its_prefixes(prefix: str, wakes: bool) -> None:
    watches = Watches()
    task = await parked(watches, watches.changed([("kv-prefix", prefix)]))
    watches.notify([("kv", "a/b")])
    await asyncio.sleep(0)
    assert task.done() is wakes
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert (len(watches), watches._prefix_lengths) == (0, {})


async def test_time_runs_out() -> None:
    watches = Watches()
    assert await watches.changed([("nodes",)], 0.001) is False
    assert await watches.changed([("nodes",)], 0) is False
    assert await watches.wait([("nodes",)], lambda: 5, 5, 0.001) is False
    assert await watches.wait([("nodes",)], lambda: 6, 5, 0) is True
    assert len(watches) == 0


async def test_cancelling_leaves_nothing_behind() -> None:
    watches = Watches()
    task = await parked(watches, watches.changed([("nodes",), ("kv-prefix", "a")], 60), keys=2)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert len(watches) == 0
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.001):
            await watches.changed([("nodes",)], 60)
    assert len(watches) == 0


async def test_wait_goes_on_while_the_index_has_not_passed() -> None:
    watches, index = Watches(), 5
    task = await parked(watches, watches.wait([("nodes",)], lambda: index, 5))
    watches.notify([("nodes",)])
    for _ in range(3):
        await asyncio.sleep(0)
    assert not task.done()
    index = 6
    watches.notify([("nodes",)])
    assert await task is True


async def test_a_replaced_state_ends_every_wait() -> None:
    watches, index = Watches(), 5
    task = await parked(watches, watches.wait([("nodes",)], lambda: index, 5))
    index = 2
    watches.notify_all()
    assert await task is True


async def test_blocking_query_answers_at_a_change_of_its_own() -> None:
    live = Live()
    live.do(c.KVSet("a/x", b"1"))
    task = await parked(
        live.watches, blocking_query(live.log.machine, live.watches, "kv.list", {"prefix": "a/"}, 1, 60)
    )
    live.do(c.KVSet("b", b"1"))
    live.do(c.KVSet("a/x", b"1"))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert not task.done()
    changed = live.do(c.KVSet("a/y", b"1"))
    answer = await task
    assert answer.index == changed  # type: ignore[attr-defined]


async def test_blocking_query_returns_the_same_index_when_time_runs_out() -> None:
    live = Live()
    live.do(c.KVSet("k"))
    answer = await blocking_query(live.log.machine, live.watches, "kv.get", {"key": "k"}, 1, 0.001)
    assert answer.index == 1
    assert (await blocking_query(live.log.machine, live.watches, "kv.get", {"key": "k"})).index == 1
    assert (await blocking_query(live.log.machine, live.watches, "kv.get", {"key": "k"}, 99, 60)).index == 1


async def test_ten_thousand_parked_watchers_cost_nothing_while_nothing_changes() -> None:
    watches = Watches()
    tasks = [asyncio.ensure_future(watches.changed([("service", f"s{number}")], 600)) for number in range(10_000)]
    await asyncio.sleep(0)
    assert len(watches) == 10_000
    # Nothing runs: an idle loop does not call back, and a change of another service visits none of them.
    before = time.process_time()
    watches.notify([("service", "other")] * 1000)
    await asyncio.sleep(0.05)
    assert time.process_time() - before < 0.05
    assert not any(task.done() for task in tasks)
    watches.notify_all()
    assert all(await asyncio.gather(*tasks))
    assert len(watches) == 0


def test_a_listener_is_called_for_each_touch_until_it_stops() -> None:
    watches, calls = Watches(), list[str]()
    stop_one = watches.listen([("service", "web"), ("kv-prefix", "a/")], lambda: calls.append("one"))
    stop_two = watches.listen([("service", "web")], lambda: calls.append("two"))
    watches.notify([("service", "web")])
    assert sorted(calls) == ["one", "two"]
    watches.notify([("kv", "a/b"), ("kv", "b"), ("service", "db")])
    watches.notify_all()
    assert (calls.count("one"), calls.count("two")) == (4, 2)
    stop_one()
    stop_one()
    watches.notify([("kv", "a/b"), ("service", "web")])
    assert (calls.count("one"), calls.count("two")) == (4, 3)
    stop_two()
    assert len(watches) == 0
    watches.notify([("kv", "a/b"), ("service", "web")])
    assert len(calls) == 7
