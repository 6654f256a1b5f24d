"""Deadlines against a naive twin, and views: differences applied one after another give the whole."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from node.backend import ViewEvent
from node.liveness import EXCUSE_S_MAX, Deadlines, Excuse, Losses, beat_every_s
from node.views import ROW_KEYS, as_delta, canonical, difference, merge, rows_of
from raftstate.model.catalog import Check, InstanceHealth, Node, ServiceInstance
from raftstate.model.connect import Revocation
from raftstate.model.intention import Intention
from raftstate.model.kv import KVEntry, Session

names = st.sampled_from(["a", "b", "c", "d"])
steps = st.lists(
    st.one_of(
        st.tuples(st.just("beat"), names, st.floats(0.1, 9.0)),
        st.tuples(st.just("forget"), names, st.just(0.0)),
        st.tuples(st.just("pass"), names, st.floats(0.0, 7.0)),
        st.tuples(st.just("keep"), names, st.just(0.0)),
    ),
    max_size=60,
)


@given(steps)
def test_deadlines_expire_once_and_only_when_due(script: list[tuple[str, str, float]]) -> None:
    deadlines, naive, now = Deadlines(5.0), dict[str, float](), 100.0
    for what, name, amount in script:
        if what == "beat":
            deadlines.beat(name, now, amount)
            naive[name] = now + amount
        elif what == "forget":
            deadlines.forget(name)
            naive.pop(name, None)
        elif what == "keep":
            deadlines.keep_only({name}, now)
            naive = {name: naive.get(name, now + 5.0)}
        else:
            now += amount
            due = {known for known, at in naive.items() if at <= now}
            assert set(deadlines.expired(now)) == due
            naive = {known: at for known, at in naive.items() if known not in due}
        assert len(deadlines) == len(naive)
        assert deadlines.next_due() == min(naive.values(), default=None)


def test_a_new_leader_gives_everyone_a_full_deadline() -> None:
    deadlines = Deadlines(5.0)
    deadlines.beat("a", 0.0)
    deadlines.begin(["a", "b"], 4.0)
    assert deadlines.expired(8.9) == []
    assert sorted(deadlines.expired(9.0)) == ["a", "b"]


def test_agents_beat_seldomer_the_more_there_are_but_never_too_seldom() -> None:
    assert beat_every_s(300, 3, 5.0) == 0.1, "less than their own interval, which counts then"
    assert beat_every_s(5000, 3, 5.0) == pytest.approx(1.667, abs=0.001)
    assert beat_every_s(20_000, 3, 5.0) == beat_every_s(10**6, 1, 5.0) == 2.0, "two in a deadline, whatever comes"
    assert beat_every_s(5, 0, 5.0) > 0.0


def test_silence_is_excused_while_servers_are_crowded_but_not_for_ever() -> None:
    excuse = Excuse(5.0)
    assert not excuse.holds(0.0)
    excuse.note(100.0)
    assert excuse.holds(104.9)
    assert not excuse.holds(105.0)
    held = []
    for now in range(101, 240):  # crowded by strangers, all the time
        excuse.note(float(now))
        if excuse.holds(float(now)):
            held.append(now)
    assert held == [*range(101, 165), *range(225, 240)]
    excuse = Excuse(5.0)
    excuse.note(100.0)
    excuse.note(105.0 + EXCUSE_S_MAX)
    assert excuse.holds(109.0 + EXCUSE_S_MAX), "it had been quiet"


def test_many_connections_that_break_together_are_told_from_a_few_and_from_the_slow_coming_and_going() -> None:
    losses = Losses()
    for _ in range(15):
        losses.note(10.0)
    assert not losses.many(10.0, 0), "a few agents of few"
    losses.note(11.0)
    assert losses.many(11.0, 144)
    assert not losses.many(11.0, 145), "less than a tenth"
    assert losses.many(15.0, 0)
    assert not losses.many(15.1, 0), "the rest is long ago"
    for tick in range(1000):  # 1,700 agents that move to another server every five minutes
        losses.note(20.0 + tick * 0.18)
        assert not losses.many(20.0 + tick * 0.18, 1700)


def test_many_beats_take_bounded_room() -> None:
    deadlines = Deadlines(5.0)
    for number in range(10_000):
        deadlines.beat("a", float(number))
    assert len(deadlines._heap) < 200


rows = st.dictionaries(st.text(max_size=3), st.integers(0, 3) | st.lists(st.integers(0, 2), max_size=2), max_size=6)


@given(st.lists(rows, min_size=1, max_size=6))
def test_deltas_add_up_to_the_whole(versions: list[dict[str, object]]) -> None:
    held = merge({}, ViewEvent(1, True, versions[0]))
    for index, version in enumerate(versions[1:], 2):
        upserts, deletes = difference(held, version)
        assert not any(key in held and held[key] == row for key, row in upserts.items()), "only what changed"
        held = merge(held, ViewEvent.unpack(ViewEvent(index, False, upserts, deletes).packed))
        assert held == version


@given(rows, rows)
def test_a_reset_seen_by_a_holder_is_the_difference(held: dict[str, object], now: dict[str, object]) -> None:
    event = as_delta(held, ViewEvent(9, True, now))
    if event is None:
        assert held == now
    else:
        assert not event.reset
        assert merge(held, event) == now


def test_equal_parameters_share_a_view_whatever_their_order() -> None:
    assert canonical("q", {"a": 1, "b": ["x"]}) == canonical("q", {"b": ("x",), "a": 1})
    assert canonical("q", {"a": {"y": 1, "x": 2}}) == canonical("q", {"a": {"x": 2, "y": 1}})
    assert (
        len({canonical("q", None), canonical("q", {"a": 1}), canonical("q", {"a": "1"}), canonical("r", None)}) == 4
    )


_NODE, _SERVICES = Node("n1", "10.0.0.1"), [ServiceInstance("n1", name, "web") for name in ("a", "b")]
_ROWS: dict[str, list[object]] = {
    "catalog.nodes": [_NODE, Node("n2", "10.0.0.2")],
    "catalog.node_rows": [_NODE, *_SERVICES],
    "catalog.services_by_port": list(_SERVICES),
    "health.service": [InstanceHealth(_NODE, row) for row in _SERVICES],
    "health.node": [Check("n1", "serfHealth"), Check("n1", "service:a", service_id="a")],
    "intentions.list": [Intention("web", "db", id="1", action="allow"), Intention("*", "db", id="2", action="deny")],
    "connect.revocations": [Revocation("service", "web", "web"), Revocation("instance", "web", "web-1")],
    "kv.list": [KVEntry(0, "a", 0, b""), KVEntry(0, "b", 0, b"")],
    "session.list": [Session("s1", "n1"), Session("s2", "n1")],
}


@pytest.mark.parametrize("query", _ROWS)
def test_a_row_has_the_same_key_as_it_is_stored_and_as_it_came_over_rpc(query: str) -> None:
    assert query in ROW_KEYS
    stored = rows_of(query, _ROWS[query])
    assert len(stored) == len(_ROWS[query]), "each row its own key"
    assert list(rows_of(query, msgspec.to_builtins(_ROWS[query]))) == list(stored)
