"""Exactly-once, refusals, snapshots and their damage, the query front."""

from __future__ import annotations

from typing import Any

import pytest

from raftstate.errors import SnapshotDamaged
from raftstate.model.wire import to_msgpack
from raftstate.state import commands as c
from raftstate.state import kv, machine
from raftstate.state.queries import BadQuery, run_query
from tests.unit.support_state import Log


def test_a_retry_is_applied_once_also_after_a_snapshot() -> None:
    log = Log()
    log.do(c.KVSet("counter", b"0"))
    first = log.apply(c.KVCas("counter", b"1", 1), "request")
    assert first.value is True
    log.machine.restore(list(log.machine.snapshot()))
    log.do(c.KVSet("counter", b"2"))
    again = log.apply(c.KVCas("counter", b"1", 1), "request")
    assert (again.index, again.value, again.touched) == (first.index, True, frozenset())
    assert log.ask("kv.get", key="counter").value.value == b"2"


def test_a_refusal_is_remembered_as_well() -> None:
    log = Log()
    first = log.apply(c.KVLock("k", b"", "nobody"), "request")
    again = log.apply(c.KVLock("k", b"", "nobody"), "request")
    assert again.refusal == first.refusal
    assert again.index == first.index


def test_requests_without_an_id_are_not_remembered() -> None:
    log = Log()
    log.do(c.KVSet("k"))
    assert not log.machine.store.requests.rows


def test_what_is_remembered_is_bounded_by_count_age_and_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "REQUESTS_MAX", 64)
    monkeypatch.setattr(machine, "REQUESTS_KEPT", 4)
    monkeypatch.setattr(machine, "_SWEEP_EVERY", 8)
    log = Log()
    for number in range(200):
        log.apply(c.KVSet("k"), f"r{number}")
        assert len(log.machine.store.requests.rows) <= 64
    assert list(log.machine.store.requests.rows)[-1] == "r199"
    log.pass_time(601)
    for _ in range(8):
        log.apply(c.KVSet("k"))
    assert list(log.machine.store.requests.rows) == ["r196", "r197", "r198", "r199"]
    monkeypatch.setattr(machine, "REQUEST_WEIGHT_MAX", 1000)
    log.do(c.KVSet("big", b"x" * 400))
    for number in range(10):
        log.apply(c.Txn((c.TxnKV("get", "big"),)), f"t{number}")
        assert log.machine.store.requests.weight <= 1000
    assert "t9" in log.machine.store.requests.rows


def test_forget_requests() -> None:
    log = Log()
    log.apply(c.KVSet("k"), "old")
    log.pass_time(10)
    log.apply(c.KVSet("k"), "new")
    assert log.do(c.ForgetRequests("2026-01-01T00:00:10Z")) == 1
    assert list(log.machine.store.requests.rows) == ["new"]
    assert log.refused(c.ForgetRequests("yesterday"))[0] == "invalid"


def test_an_index_that_does_not_grow_is_an_error_of_the_caller() -> None:
    log = Log()
    log.do(c.KVSet("k"))
    with pytest.raises(ValueError, match="not above 1"):
        log.machine.apply(1, b"")


def test_values_are_builtins_that_survive_rpc() -> None:
    log = Log()
    log.node("n1")

    def plain(value: Any) -> bool:
        if isinstance(value, dict):
            return all(isinstance(key, str) and plain(item) for key, item in value.items())
        return all(map(plain, value)) if isinstance(value, list) else isinstance(value, (str, int, bytes, type(None)))

    from raftstate.model.catalog import Node, ServiceInstance
    from raftstate.model.intention import Intention

    for command in (
        c.UpsertIntention(Intention("a", "b", id="x", action="allow")),
        c.Txn((c.TxnNode("get", Node("n1", "")), c.TxnService("set", ServiceInstance("n1", "w", "w", tags=("t",))))),
    ):
        value = log.do(command)
        assert plain(value), value
        assert to_msgpack(value)


def test_a_bug_in_one_command_is_undone_and_told(monkeypatch: pytest.MonkeyPatch) -> None:
    log = Log()
    log.do(c.KVSet("k", b"1"))

    def broken(step: Any, command: Any) -> bool:
        kv.kv_set(step, command)
        raise KeyError("a bug")

    monkeypatch.setitem(machine.HANDLERS, c.KVSet, broken)
    code, text = log.refused(c.KVSet("k", b"2"))
    assert code == "internal"
    assert "KVSet" in text
    assert log.ask("kv.get", key="k").value.value == b"1"


def test_deeply_nested_values_are_refused_long_before_the_decoder_gives_up() -> None:
    log = Log()
    for depth, refused in ((20, False), (40, True), (100_000, True)):
        entry: Any = "leaf"
        envelope = c.encode_envelope(
            c.Envelope("", "2026-01-01T00:00:00Z", c.SetConfigEntry("proxy-defaults", "global", {"Config": {"X": 0}}))
        )
        at = envelope.index(b"\xa1X\x00") + 2
        data = envelope[:at] + b"\x91" * depth + envelope[at:]
        log.index += 1
        applied = log.machine.apply(log.index, data)
        assert (applied.refusal is not None) is refused, entry
        if refused:
            assert applied.refusal is not None
            assert "nested deeper" in applied.refusal.message


@pytest.mark.parametrize(
    "at", ["", "2026-01-01", "2026-01-01T00:00:00", "9999-99-99T00:00:00Z", "0001-01-01T00:00:00+23:59"]
)
def test_a_strange_time_does_not_stop_a_command_nor_turn_back_the_clock(at: str) -> None:
    log = Log()
    log.do(c.KVSet("k"))
    clock = log.machine.store.clock_us
    applied = log.machine.apply(2, c.encode_envelope(c.Envelope("r", at, c.KVSet("k", b"1"))))
    assert applied.value is True
    assert log.machine.store.clock_us == clock


def saved() -> list[bytes]:
    log = Log()
    for number in range(1200):
        log.do(c.KVSet(f"k{number:05}", b"x" * 100))
    return list(log.machine.snapshot())


def test_chunks_are_bounded() -> None:
    sizes = [len(chunk) for chunk in saved()]
    assert len(sizes) > 4
    assert max(sizes) <= 64 * 1024


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda chunks: chunks[:-1], "ends early"),
        (lambda chunks: [], "ends early"),
        (lambda chunks: chunks[1:], "does not begin"),
        (lambda chunks: [*chunks[:1], *chunks[2:]], "rows are missing"),
        (lambda chunks: [*chunks, chunks[-1]], "follows its end"),
        (lambda chunks: [chunks[0], chunks[1][:-5]], "cannot be read"),
        (lambda chunks: [chunks[0], b"garbage"], "cannot be read"),
        (lambda chunks: [chunks[0], to_msgpack(("kv", [{"Key": 5}]))], "cannot be read"),
        (lambda chunks: [chunks[0], to_msgpack(("starships", []))], "'starships'"),
        (lambda chunks: [to_msgpack(("lictor-state", {"format": 3, "index": 1, "clock_us": 1}))], "format is 3"),
    ],
)
def test_a_damaged_snapshot_is_refused_and_changes_nothing(damage: Any, told: str) -> None:
    log = Log()
    log.do(c.KVSet("k", b"mine"))
    digest = log.machine.digest()
    with pytest.raises(SnapshotDamaged, match=told):
        log.machine.restore(damage(saved()))
    assert log.machine.digest() == digest


def test_a_query_that_runs_while_the_state_is_replaced_sees_one_state() -> None:
    log = Log()
    log.do(c.KVSet("k", b"mine"))
    held = log.machine.store
    log.machine.restore(saved())
    assert run_query(held, "kv.get", {"key": "k"}).value.value == b"mine"
    assert run_query(log.machine.store, "kv.get", {"key": "k00000"}).value.value == b"x" * 100
    assert log.machine.store.index == 1200


def test_a_closed_snapshot_costs_nothing_more() -> None:
    log = Log()
    log.do(c.KVSet("k", b"1"))
    half_read, whole = log.machine.snapshot(), log.machine.snapshot()
    next(iter(half_read))
    list(whole)
    half_read.close()
    assert all(not table._cursors for table in log.machine.store.tables())


def test_bad_queries_say_what_there_is() -> None:
    log = Log()
    for name, params, told in (
        ("nope", {}, "known: catalog.datacenters"),
        ("kv.get", {}, "needs the parameter 'key'"),
        ("kv.get", {"key": "k", "kee": 1}, "no parameter 'kee'; known: key"),
        ("intentions.match", {"by": "colour", "name": "x"}, "source or destination"),
    ):
        with pytest.raises(ValueError, match=told) as error:
            run_query(log.machine.store, name, params)
        assert name == "intentions.match" or isinstance(error.value, BadQuery)
