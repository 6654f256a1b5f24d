"""The backend in one process: writes once, reads, blocks, and follows views by deltas."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any, cast

import pytest

from node.backend import ViewEvent
from node.errors import BadRequest, Refused
from node.local_backend import LocalBackend
from node.view_hub import BACKLOG_EVENTS_MAX, HISTORY_EVENTS, ViewHub
from node.views import merge
from raftstate.model.catalog import Check, InstanceHealth, Node, ServiceInstance
from raftstate.model.intention import Intention
from raftstate.state.commands import (
    CatalogRegister,
    DeregisterService,
    KVSet,
    RegisterCheck,
    RegisterService,
    UpsertIntention,
)
from tests.support.promises import PATIENCE_S


def follow(backend: LocalBackend, name: str, **params: Any) -> Any:
    return aclosing(cast("Any", backend.subscribe(name, params)))


async def step(events: AsyncIterator[ViewEvent]) -> ViewEvent:
    async with asyncio.timeout(PATIENCE_S):
        return await anext(events)


async def register(backend: LocalBackend, name: str, node: str = "n1") -> int:
    command = CatalogRegister(
        Node(node=node, address="10.0.0.1"), ServiceInstance(node=node, id=f"{name}-1", service=name, port=80)
    )
    return (await backend.apply(command)).index


async def test_a_write_is_applied_once_and_read_in_every_form() -> None:
    backend = LocalBackend()
    first = await backend.apply(KVSet("a", b"1"), request_id="r1")
    assert first.unwrap() is True
    await backend.apply(KVSet("a", b"2"))
    assert (await backend.apply(KVSet("a", b"1"), request_id="r1")).index == first.index
    result = await backend.query("kv.get", {"key": "a"})
    assert result.value["Value"] == b"2"
    assert b'"Value":"Mg=="' in result.json()
    assert (result.known_leader, result.last_contact_ms) == (True, 0)


async def test_a_refusal_is_a_value_until_it_is_unwrapped() -> None:
    backend = LocalBackend()
    applied = await backend.apply(RegisterService(ServiceInstance(node="none", id="x", service="x")))
    assert applied.refusal is not None
    with pytest.raises(Refused) as refused:
        applied.unwrap()
    assert refused.value.http_status == applied.refusal.http_status


async def test_a_blocking_query_sleeps_through_what_does_not_concern_it() -> None:
    backend = LocalBackend()
    index = await register(backend, "web")
    before = (await backend.query("health.service", {"service": "web"})).index
    assert before == index
    parked = asyncio.ensure_future(backend.query("health.service", {"service": "web"}, min_index=index, wait_s=5))
    await asyncio.sleep(0)
    await register(backend, "db")
    await asyncio.sleep(0)
    assert not parked.done()
    await backend.apply(RegisterCheck(Check(node="n1", check_id="c", service_id="web-1", status="critical")))
    result = await parked
    assert result.index > index
    (health,) = result.decode(tuple[InstanceHealth, ...])
    assert health.status() == "critical"


async def test_a_blocking_query_ends_with_the_same_index_when_nothing_happens() -> None:
    backend = LocalBackend()
    index = await register(backend, "web")
    result = await backend.query("health.service", {"service": "web"}, min_index=index, wait_s=0.02)
    assert result.index == index


async def test_unknown_queries_and_secrets_are_refused() -> None:
    backend = LocalBackend()
    for name, params in (("nope", {}), ("kv.get", {"kee": 1}), ("kv.get", {}), ("internal.ca_signing_material", {})):
        with pytest.raises(BadRequest):
            await backend.query(name, params)


async def test_a_view_begins_whole_and_goes_on_by_rows() -> None:
    backend = LocalBackend()
    await register(backend, "web", "n1")
    async with follow(backend, "health.service", service="web") as events:
        first = await step(events)
        assert first.reset
        assert [row.service.id for row in first.decode(InstanceHealth).values()] == ["web-1"]
        await register(backend, "web", "n2")
        second = await step(events)
        assert not second.reset
        assert [row.node.node for row in second.decode(InstanceHealth).values()] == ["n2"]
        await backend.apply(DeregisterService("n1", "web-1"))
        third = await step(events)
        assert (third.upserts, len(third.deletes)) == ({}, 1)
        rows = merge(merge(merge({}, first), second), third)
        assert [row.node.node for row in rows.values()] == ["n2"]
    await backend.close()


async def test_every_kind_of_view_has_distinct_keys() -> None:
    backend = LocalBackend()
    for name in ("web", "db"):
        for node in ("n1", "n2"):
            await register(backend, name, node)
    for source in ("a", "b"):
        intention = Intention(id=f"00000000-0000-0000-0000-00000000000{source}", source_name=source,
                              destination_name="web", action="allow")  # fmt: skip
        (await backend.apply(UpsertIntention(intention))).unwrap()
    await backend.apply(KVSet("k/1"))
    await backend.apply(KVSet("k/2"))
    for name, params, count in (
        ("catalog.nodes", {}, 2),
        ("catalog.services", {}, 2),
        ("catalog.service", {"service": "web"}, 2),
        ("health.service", {"service": "db"}, 2),
        ("intentions.list", {}, 2),
        ("kv.list", {"prefix": "k/"}, 2),
        ("connect.roots", {}, 1),
    ):
        async with follow(backend, name, **params) as events:
            event = await step(events)
            assert len(event.upserts) == count, name
            assert ViewEvent.unpack(event.packed).upserts.keys() == event.upserts.keys()
    await backend.close()


async def test_views_are_shared_and_closed_with_their_last_subscriber() -> None:
    backend = LocalBackend()
    async with follow(backend, "catalog.nodes") as one, follow(backend, "catalog.nodes") as two:
        assert (await step(one)).reset
        assert (await step(two)).reset
        assert len(backend.reads.hub) == 1
        await register(backend, "web")
        event_one, event_two = await step(one), await step(two)
        assert event_one is event_two
    assert len(backend.reads.hub) == 0
    await backend.close()


async def resume(hub: ViewHub, index: int) -> Any:
    return aclosing(cast("Any", hub.subscribe("catalog.nodes", {}, from_index=index)))


async def test_a_subscriber_from_elsewhere_gets_only_what_it_lacks() -> None:
    backend = LocalBackend()
    hub = backend.reads.hub
    await register(backend, "web", "n0")
    async with follow(backend, "catalog.nodes") as keeps_open:
        start = (await step(keeps_open)).index
        for number in (1, 2):
            await register(backend, "web", f"n{number}")
            await step(keeps_open)
        async with await resume(hub, start) as events:
            assert [(await step(events)).upserts.keys() for _ in range(2)] == [{"n1"}, {"n2"}]
        now = backend.machine.store.index
        async with await resume(hub, now) as events:
            waiting = asyncio.ensure_future(step(events))
            await asyncio.sleep(0)
            assert not waiting.done()
            await register(backend, "web", "n3")
            event = await waiting
            assert (event.reset, set(event.upserts)) == (False, {"n3"})
        async with await resume(hub, start - 1) as events:
            assert (await step(events)).reset
        ahead = asyncio.ensure_future(
            anext(hub.subscribe("catalog.nodes", {}, from_index=backend.machine.store.index + 1))
        )
        await asyncio.sleep(0)
        await register(backend, "web", "n4")
        await register(backend, "web", "n5")
        event = await ahead
        assert not event.reset
        assert set(event.upserts) >= {"n5"}
    await backend.close()


async def test_a_slow_subscriber_gets_the_whole_view_instead_of_a_backlog() -> None:
    backend = LocalBackend()
    async with follow(backend, "catalog.nodes") as slow, follow(backend, "catalog.nodes") as quick:
        held = dict((await step(slow)).upserts)
        await step(quick)
        for number in range(max(BACKLOG_EVENTS_MAX, HISTORY_EVENTS) + 5):
            await register(backend, "web", f"n{number}")
            await step(quick)
        seen: list[ViewEvent] = []
        while len(held) < BACKLOG_EVENTS_MAX + 5:
            seen.append(await step(slow))
            held = merge(held, seen[-1])
        assert seen[0].reset
        assert len(seen) < BACKLOG_EVENTS_MAX
        assert set(held) == {f"n{number}" for number in range(BACKLOG_EVENTS_MAX + 5)}
    await backend.close()


async def test_a_snapshot_carries_the_whole_state() -> None:
    backend, other = LocalBackend(), LocalBackend()
    await register(backend, "web")
    async with follow(other, "catalog.nodes") as events:
        await step(events)
        await other.snapshot_restore(backend.snapshot_save())
        assert other.machine.digest() == backend.machine.digest()
        assert set(merge({}, await step(events))) == {"n1"}
    await register(other, "db")
    await other.close()
