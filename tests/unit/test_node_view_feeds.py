"""Views pushed over RPC: begun, resumed, held back for a slow peer, ended, and freed with their connection."""

from __future__ import annotations

import asyncio
import gc
import time
import weakref
from contextlib import aclosing
from pathlib import Path
from typing import Any, cast

import pytest

from node.backend import ViewEvent
from node.errors import BadRequest, NodeError, Unreachable
from node.local_backend import LocalBackend
from node.rpc.server import Call, Feed, Methods
from node.views import Rows, merge
from raftstate.model.catalog import Node, ServiceInstance
from raftstate.state.commands import CatalogRegister, DeregisterService, KVDelete, KVSet
from tests.support.both_loops import both_loops
from tests.support.rpc import eventually, rpc_ends

PARAMS = {"prefix": "k/"}


class FakeFeed:
    """A peer that reads or does not."""

    def __init__(self) -> None:
        self.writable = True
        self.sent: list[ViewEvent] = []
        self.failed: NodeError | None = None
        self.on_close: Any = None
        self.on_writable: Any = None

    def send(self, body: bytes) -> None:
        self.sent.append(ViewEvent.unpack(body))

    def fail(self, error: NodeError) -> None:
        self.failed = error
        self.on_close()

    def rows(self) -> Rows:
        rows: Rows = {}
        for event in self.sent:
            rows = merge(rows, event)
        return rows


def feed_of(backend: LocalBackend, from_index: int = 0) -> FakeFeed:
    feed = FakeFeed()
    assert backend.reads.hub.feed("kv.list", PARAMS, from_index, cast(Feed, feed))
    return feed


async def put(backend: LocalBackend, key: str) -> int:
    return (await backend.apply(KVSet(f"k/{key}", b"1"))).index


async def test_a_feed_begins_whole_and_goes_on_by_rows() -> None:
    backend = LocalBackend()
    await put(backend, "a")
    feed = feed_of(backend)
    assert [event.reset for event in feed.sent] == [True]
    await put(backend, "b")
    await eventually(lambda: len(feed.sent) == 2)
    assert (feed.sent[1].reset, set(feed.sent[1].upserts)) == (False, {"k/b"})
    await backend.close()


async def test_a_feed_goes_on_where_its_peer_left_off() -> None:
    backend = LocalBackend()
    await put(backend, "a")
    first = feed_of(backend)
    held = first.sent[0].index
    await put(backend, "b")
    await eventually(lambda: len(first.sent) == 2)
    again = feed_of(backend, held)
    assert [(event.reset, set(event.upserts)) for event in again.sent] == [(False, {"k/b"})]
    assert feed_of(backend, again.sent[-1].index).sent == []
    assert [event.reset for event in feed_of(backend, held - 1).sent] == [True]
    ahead = backend.machine.store.index + 1
    assert not backend.reads.hub.feed("kv.list", PARAMS, ahead, cast(Feed, FakeFeed())), "catching up takes a task"
    await backend.close()


@pytest.mark.parametrize("changes", [3, 200])
async def test_a_peer_that_does_not_read_gets_what_it_missed_once_it_does(changes: int) -> None:
    backend = LocalBackend()
    await put(backend, "a")
    slow, quick = feed_of(backend), feed_of(backend)
    slow.writable = False
    for number in range(changes):
        await put(backend, str(number))
        await eventually(lambda: quick.sent[-1].index == backend.machine.store.index)
    await backend.apply(KVDelete("k/a"))
    await eventually(lambda: "k/a" not in quick.rows())
    assert len(slow.sent) == 1, "nothing is kept for it"
    slow.writable = True
    slow.on_writable()
    assert slow.rows() == quick.rows()
    assert slow.sent[1].reset == (changes > 64), "deltas while they are known, else the whole"
    await backend.close()


async def test_a_restored_past_is_not_mistaken_for_the_present() -> None:
    backend = LocalBackend()
    await put(backend, "a")
    saved = [piece async for piece in backend.snapshot_save()]
    await put(backend, "b")
    feed = feed_of(backend)
    held = feed.sent[-1].index

    async def pieces() -> Any:
        for piece in saved:
            yield piece

    await backend.snapshot_restore(pieces())
    await eventually(lambda: set(feed.rows()) == {"k/a"})
    assert feed.sent[-1].reset
    for key in ("c", "d"):
        await put(backend, key)
    await eventually(lambda: set(feed.rows()) == {"k/a", "k/c", "k/d"})
    late = feed_of(backend, held)
    assert late.sent[0].reset, "its index is of another past"
    await backend.close()


async def test_a_view_that_fails_tells_its_followers(caplog: pytest.LogCaptureFixture) -> None:
    backend = LocalBackend()
    await put(backend, "a")
    feed = feed_of(backend)
    events = backend.subscribe("kv.list", PARAMS)
    await anext(events)
    hub = backend.reads.hub

    def broken(name: str, params: object) -> Any:
        raise RuntimeError("a bug")

    view = next(iter(hub._views.values()))
    view._ask = broken
    await put(backend, "b")
    await eventually(lambda: feed.failed is not None)
    assert isinstance(feed.failed, Unreachable)
    with pytest.raises(Unreachable, match="see its log"):
        await anext(events)
    assert len(hub) == 0
    assert "a bug" in caplog.text
    await backend.close()


def methods_of(backend: LocalBackend) -> Methods:
    async def never(call: Call) -> Any:
        raise AssertionError("fed, not streamed")
        yield b""

    methods = Methods()
    methods.add_stream("follow", never)
    methods.add_feed("follow", lambda call, feed: backend.reads.hub.feed(call.body.decode(), PARAMS, 0, feed))
    return methods


async def test_feeds_over_rpc_end_with_their_reader_and_with_their_connection(tmp_path: Path) -> None:
    backend = LocalBackend()
    async with rpc_ends(tmp_path, methods_of(backend)) as ends:
        connection = await ends.dial()
        async with aclosing(connection.stream("follow", b"kv.list")) as items:
            assert ViewEvent.unpack(await anext(items)).reset
            await put(backend, "a")
            assert set(ViewEvent.unpack(await anext(items)).upserts) == {"k/a"}
        await eventually(lambda: len(backend.reads.hub) == 0)
        with pytest.raises(BadRequest, match="there is no query"):
            await anext(connection.stream("follow", b"nope"))
        items = connection.stream("follow", b"kv.list")
        await anext(items)
        assert len(backend.reads.hub) == 1
        (server_side,) = ends.listener.connections
        assert len(server_side) == 1
        connection.close()
        await eventually(lambda: len(backend.reads.hub) == 0)
        with pytest.raises(Unreachable):
            await anext(items)
    await backend.close()


async def test_many_feeds_share_one_view(tmp_path: Path) -> None:
    backend = LocalBackend()
    async with rpc_ends(tmp_path, methods_of(backend)) as ends:
        connection = await ends.dial()
        streams = [connection.stream("follow", b"kv.list") for _ in range(100)]
        for stream in streams:
            await anext(stream)
        assert len(backend.reads.hub) == 1
        await put(backend, "a")
        events = await asyncio.gather(*(anext(stream) for stream in streams))
        assert len(set(events)) == 1
        for stream in streams:
            await stream.aclose()
        await eventually(lambda: len(backend.reads.hub) == 0)
        connection.close()
    await backend.close()


async def test_what_a_node_gains_is_sent_without_what_it_has() -> None:
    backend = LocalBackend()
    node = Node("n1", "10.0.0.1")
    await backend.apply(CatalogRegister(node, ServiceInstance("n1", "web-1", "web")))
    feed = FakeFeed()
    assert backend.reads.hub.feed("catalog.node_rows", {"node": "n1"}, 0, cast(Feed, feed))
    await backend.apply(CatalogRegister(node, ServiceInstance("n1", "web-2", "web"), skip_node_update=True))
    await eventually(lambda: len(feed.sent) == 2)
    await backend.apply(CatalogRegister(Node("n1", "10.0.0.9")))
    await eventually(lambda: len(feed.sent) == 3)
    await backend.apply(DeregisterService("n1", "web-1"))
    await eventually(lambda: len(feed.sent) == 4)
    changes = [(set(event.upserts), event.deletes) for event in feed.sent]
    assert changes == [({"", "web-1"}, ()), ({"web-2"}, ()), ({""}, ()), (set(), ("web-1",))]
    assert feed.rows()[""]["Address"] == "10.0.0.9"
    await backend.close()


class SlowFeed(FakeFeed):
    """A peer to which it takes a while to send."""

    def send(self, body: bytes) -> None:
        ends = time.perf_counter() + 0.0005
        while time.perf_counter() < ends:
            pass
        super().send(body)


async def test_a_change_that_many_follow_leaves_the_loop_to_others_in_between() -> None:
    backend = LocalBackend()
    await put(backend, "a")
    feeds = [SlowFeed() for _ in range(200)]
    for feed in feeds:
        assert backend.reads.hub.feed("kv.list", PARAMS, 0, cast(Feed, feed))
    turns = 0

    async def others() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    await put(backend, "b")
    task = asyncio.create_task(others())
    await eventually(lambda: all(len(feed.sent) == 2 for feed in feeds))
    # 100 ms of sending in slices of 4 to 12 ms: SLICE_S, and at most one round of subscribers more.
    assert turns >= 8
    task.cancel()
    await backend.close()


async def first_of(feeds: list[SlowFeed]) -> SlowFeed:
    """Return one that has been told of the first change while others are still to be."""
    while not (told := [feed for feed in feeds if len(feed.sent) == 2]):  # noqa: ASYNC110 - turns of the loop count
        await asyncio.sleep(0)
    assert len(told) < len(feeds)
    return told[0]


async def test_changes_that_come_while_one_is_handed_round_are_handed_round_together() -> None:
    backend = LocalBackend()
    await put(backend, "a")
    feeds = [SlowFeed() for _ in range(100)]
    for feed in feeds:
        assert backend.reads.hub.feed("kv.list", PARAMS, 0, cast(Feed, feed))
    await put(backend, "b")
    await first_of(feeds)
    for number in range(50):
        await put(backend, str(number))
    await eventually(lambda: all(len(feed.rows()) == 52 for feed in feeds))
    assert all(len(feed.sent) <= 4 for feed in feeds), "whole rounds, not one for each change"
    assert all(not event.reset for feed in feeds for event in feed.sent[1:])
    await backend.close()


async def test_who_leaves_while_a_change_is_handed_round_holds_nobody_up() -> None:
    backend = LocalBackend()
    await put(backend, "a")
    feeds = [SlowFeed() for _ in range(100)]
    for feed in feeds:
        assert backend.reads.hub.feed("kv.list", PARAMS, 0, cast(Feed, feed))
    await put(backend, "b")
    stays = await first_of(feeds)
    gone = [feed for feed in feeds if feed is not stays]
    for feed in gone:
        feed.on_close()
    await put(backend, "c")
    await eventually(lambda: len(stays.rows()) == 3)
    assert any(len(feed.sent) == 1 for feed in gone)
    stays.on_close()
    assert (len(backend.reads.hub), len(backend.watches)) == (0, 0), "nothing is left behind"
    await backend.close()


@both_loops
async def test_a_connection_that_ended_is_freed_without_the_collector(tmp_path: Path) -> None:
    """The collector's last generation comes late in a process with a large state, and each holds 30 KiB of TLS."""
    backend = LocalBackend()
    async with rpc_ends(tmp_path, methods_of(backend)) as ends:
        connection = await ends.dial()
        streams = [connection.stream("follow", b"kv.list") for _ in range(3)]
        for stream in streams:
            await anext(stream)
        await streams.pop().aclose()
        (server_side,) = ends.listener.connections
        ended = [weakref.ref(server_side), *map(weakref.ref, backend.reads.hub._views.values())]
        del server_side
        gc.collect()
        gc.disable()
        try:
            connection.close()
            await eventually(lambda: [one() for one in ended] == [None, None])
        finally:
            gc.enable()
    await backend.close()
