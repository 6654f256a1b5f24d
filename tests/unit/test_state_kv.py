from __future__ import annotations

from typing import Any

import msgspec
import pytest

from raftstate.model.catalog import Check, Node, ServiceInstance
from raftstate.model.kv import ServiceCheck, Session
from raftstate.model.wire import to_json
from raftstate.state import commands as c
from raftstate.state import kv_tables
from raftstate.state.kv import KEY_MAX, VALUE_MAX
from tests.unit.support_state import Log


@pytest.fixture
def log() -> Log:
    log = Log()
    log.node("n1")
    return log


def session(log: Log, id: str = "s1", **fields: Any) -> str:
    created = log.do(c.SessionCreate(Session(id, "n1", **fields)))
    assert isinstance(created, str)
    return created


def row(log: Log, key: str) -> Any:
    return log.ask("kv.get", key=key).value


def test_json_is_consuls() -> None:
    log = Log()
    log.do(c.KVSet("k", b"hello", 42))
    log.do(c.KVSet("empty"))
    assert to_json(log.ask("kv.list").value) == (
        b'[{"LockIndex":0,"Key":"empty","Flags":0,"Value":null,"CreateIndex":2,"ModifyIndex":2},'
        b'{"LockIndex":0,"Key":"k","Flags":42,"Value":"aGVsbG8=","CreateIndex":1,"ModifyIndex":1}]'
    )


def test_a_keys_index_is_its_modify_index_and_an_equal_write_leaves_it() -> None:
    log = Log()
    log.do(c.KVSet("k", b"1"))
    log.do(c.KVSet("other", b"1"))
    assert not log.apply(c.KVSet("k", b"1")).touched
    assert log.ask("kv.get", key="k").index == row(log, "k").modify_index == 1
    log.do(c.KVSet("k", b"2"))
    assert log.ask("kv.get", key="k").index == row(log, "k").modify_index == log.index
    assert row(log, "k").create_index == 1


def test_cas() -> None:
    log = Log()
    assert log.do(c.KVCas("k", b"1", 5)) is False
    assert log.do(c.KVCas("k", b"1", 0)) is True
    assert log.do(c.KVCas("k", b"2", 0)) is False
    before = log.ask("kv.get", key="k")
    assert before.value.value == b"1"
    assert log.do(c.KVCas("k", b"2", before.index)) is True
    assert log.do(c.KVDelete("k", before.index)) is False
    assert log.do(c.KVDelete("k", log.index - 1)) is True
    assert row(log, "k") is None


def test_deletes_keep_indexes_growing() -> None:
    log = Log()
    for key in ("a/1", "a/2", "b/1"):
        log.do(c.KVSet(key, b"x"))
    log.do(c.KVDelete("a/2"))
    assert log.ask("kv.get", key="a/2").index == 4
    assert log.ask("kv.list", prefix="a/").index == 4
    assert log.ask("kv.list", prefix="b/").index == 3
    log.do(c.KVDeleteTree("a/"))
    assert log.ask("kv.list", prefix="a/").value == []
    assert log.ask("kv.list", prefix="a/").index == 5
    assert not log.apply(c.KVDelete("a/2")).touched
    assert not log.apply(c.KVDeleteTree("a/")).touched


def test_reaped_tombstones_leave_a_floor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_tables, "TOMBSTONES_MAX", 4)
    log = Log()
    for number in range(10):
        log.do(c.KVSet(f"k{number}", b"x"))
    for number in range(10):
        before = log.ask("kv.list", prefix="k").index
        log.do(c.KVDelete(f"k{number}"))
        assert log.ask("kv.list", prefix="k").index == log.index > before
        assert log.ask("kv.get", key="k0").index >= 11
        assert len(log.machine.store.kv_tombstones.rows) <= 4


def test_keys_are_cut_at_the_separator_after_the_prefix() -> None:
    log = Log()
    for key in ("app", "app/a/1", "app/a/2", "app/b", "apple", "other"):
        log.do(c.KVSet(key))
    assert log.ask("kv.keys", prefix="app").value == ["app", "app/a/1", "app/a/2", "app/b", "apple"]
    assert log.ask("kv.keys", prefix="app", separator="/").value == ["app", "app/", "apple"]
    assert log.ask("kv.keys", prefix="app/", separator="/").value == ["app/a/", "app/b"]
    assert log.ask("kv.keys", separator="/").value == ["app", "app/", "apple", "other"]


def test_many_keys_stay_in_order_while_they_come_and_go() -> None:
    log = Log()
    keys = [f"{number * 7919 % 4001:05}" for number in range(4001)]
    for key in keys:
        log.do(c.KVSet(key))
    for key in keys[::3]:
        log.do(c.KVDelete(key))
    left = sorted(set(keys) - set(keys[::3]))
    assert log.ask("kv.keys").value == left
    assert log.ask("kv.keys", prefix="012").value == [key for key in left if key.startswith("012")]


def test_bounds() -> None:
    log = Log()
    assert log.refused(c.KVSet("", b"")) == ("invalid", "Missing key name")
    assert log.refused(c.KVSet("k" * (KEY_MAX + 1)))[0] == "too-large"
    assert log.refused(c.KVSet("k", b"x" * (VALUE_MAX + 1)))[0] == "too-large"
    assert log.refused(c.KVSet("k", b"", -1))[0] == "invalid"


def test_lock_and_unlock(log: Log) -> None:
    code, text = log.refused(c.KVLock("k", b"", "nobody"))
    assert code == "unknown-session"
    assert text.startswith('invalid session "nobody"')
    session(log, "s1", lock_delay=0)
    session(log, "s2", lock_delay=0)
    assert log.do(c.KVLock("k", b"1", "s1")) is True
    assert (row(log, "k").lock_index, row(log, "k").session) == (1, "s1")
    assert log.do(c.KVLock("k", b"2", "s1")) is True
    assert (row(log, "k").lock_index, row(log, "k").value) == (1, b"2")
    assert log.do(c.KVLock("k", b"3", "s2")) is False
    log.do(c.KVSet("k", b"4"))
    assert row(log, "k").session == "s1"
    assert log.do(c.KVUnlock("k", b"5", "s2")) is False
    assert log.do(c.KVUnlock("k", b"5", "s1")) is True
    assert row(log, "k").session is msgspec.UNSET
    assert log.do(c.KVLock("k", b"6", "s2")) is True
    assert row(log, "k").lock_index == 2


def test_an_ended_session_releases_with_delay(log: Log) -> None:
    session(log, "s1", lock_delay=10_000_000_000)
    session(log, "s2")
    log.do(c.KVLock("k", b"1", "s1"))
    log.do(c.SessionDestroy("s1"))
    assert row(log, "k").session is msgspec.UNSET
    assert log.ask("kv.get", key="k").index == log.index
    assert log.do(c.KVLock("k", b"2", "s2")) is False
    log.pass_time(9)
    assert log.do(c.KVLock("k", b"2", "s2")) is False
    log.pass_time(1)
    assert log.do(c.KVLock("k", b"2", "s2")) is True
    assert not log.machine.store.lock_delays.rows


def test_a_leader_whose_clock_is_behind_does_not_shorten_a_delay(log: Log) -> None:
    session(log, "s1", lock_delay=10_000_000_000)
    session(log, "s2")
    log.do(c.KVLock("k", b"1", "s1"))
    log.pass_time(100)
    log.do(c.SessionDestroy("s1"))
    log.pass_time(-50)
    assert log.do(c.KVLock("k", b"2", "s2")) is False


def test_delete_behaviour_removes_what_was_held(log: Log) -> None:
    session(log, "s1", behavior="delete")
    log.do(c.KVLock("held", b"1", "s1"))
    log.do(c.KVSet("free", b"1"))
    log.do(c.SessionDestroy("s1"))
    assert log.ask("kv.keys").value == ["free"]
    assert log.ask("kv.get", key="held").index == log.index


@pytest.mark.parametrize(
    "ending",
    [
        c.RegisterCheck(Check("n1", "serfHealth", status="critical")),
        c.RegisterCheck(Check("n1", "web", status="critical", service_id="web")),
        c.DeregisterCheck("n1", "web"),
        c.DeregisterService("n1", "web"),
        c.DeregisterNode("n1"),
        c.Txn((c.TxnCheck("set", Check("n1", "web", status="critical", service_id="web")),)),
    ],
)
def test_a_session_ends_with_its_checks_service_or_node(log: Log, ending: c.Command) -> None:
    log.service("n1", "web", "web")
    log.do(c.RegisterCheck(Check("n1", "web", status="passing", service_id="web")))
    session(log, service_checks=(ServiceCheck("web"),))
    log.do(c.KVLock("k", b"1", "s1"))
    assert log.apply(ending).refusal is None
    assert log.ask("session.list").value == []
    assert log.ask("session.info", id="s1").value == []
    assert log.ask("session.info", id="s1").index == log.index
    assert row(log, "k").session is msgspec.UNSET


def test_sessions_that_cannot_be(log: Log) -> None:
    log.do(c.RegisterCheck(Check("n1", "bad", status="critical")))
    session(log, "taken")
    for made, code, text in (
        (Session("s", "n9"), "unknown-node", "Missing node registration"),
        (Session("s", "n1", node_checks=("nope",)), "check-fails", "Missing check 'nope' registration"),
        (Session("s", "n1", node_checks=("bad",)), "check-fails", "Check 'bad' is in critical state"),
        (Session("s", "n1", behavior="explode"), "invalid", "Invalid Behavior setting"),
        (Session("s", "n1", lock_delay=61_000_000_000), "invalid", "LockDelay"),
        (Session("taken", "n1"), "conflict", "exists already"),
        (Session("", "n1"), "invalid", "session id"),
    ):
        refused = log.refused(c.SessionCreate(made))
        assert refused[0] == code
        assert text in refused[1]


def test_sessions_are_shown_and_renewed(log: Log) -> None:
    session(log, ttl="10s", name="mine")
    (shown,) = log.ask("session.node", node="n1").value
    assert log.ask("session.info", id="s1").value == [shown]
    assert log.do(c.SessionRenew("s1"))["TTL"] == "10s"
    assert log.do(c.SessionRenew("gone")) is None
    assert log.do(c.SessionDestroy("gone")) is True


def test_txn_is_all_or_nothing(log: Log) -> None:
    log.do(c.KVSet("k", b"1"))
    index = log.index
    good = log.do(
        c.Txn(
            (
                c.TxnKV("check-index", "k", index=index),
                c.TxnKV("set", "k", b"2", 9),
                c.TxnKV("get", "k"),
                c.TxnKV("get-or-empty", "none"),
                c.TxnKV("check-not-exists", "none"),
                c.TxnKV("delete", "none"),
                c.TxnNode("get", Node("n1", "")),
                c.TxnService("set", ServiceInstance("n1", "web", "web")),
                c.TxnCheck("set", Check("n1", "c", status="passing", service_id="web")),
            )
        )
    )
    assert good["Errors"] is None
    kinds = [next(iter(result)) for result in good["Results"]]
    assert kinds == ["KV", "KV", "KV", "KV", "Node", "Service", "Check"]
    assert good["Results"][1]["KV"]["Value"] is None
    assert (good["Results"][2]["KV"]["Value"], good["Results"][2]["KV"]["ModifyIndex"]) == (b"2", log.index)
    before = log.ask("kv.get", key="k")
    applied = log.apply(
        c.Txn(
            (
                c.TxnKV("set", "k", b"3"),
                c.TxnKV("delete-tree", ""),
                c.TxnService("delete", ServiceInstance("n1", "web", "web")),
                c.TxnKV("get", "missing"),
                c.TxnKV("cas", "other", b"x", index=99),
                c.TxnNode("set", Node("", "")),
                c.TxnKV("jump", "k"),
            )
        )
    )
    assert not applied.touched
    assert applied.value["Results"] is None
    assert [(error["OpIndex"], error["What"].split(",")[0]) for error in applied.value["Errors"]] == [
        (3, 'key "missing" doesn\'t exist'),
        (4, 'failed to set key "other"'),
        (5, "node name must not be empty"),
        (6, 'unknown KV verb "jump"'),
    ]
    assert log.ask("kv.get", key="k") == before
    assert [found.service.id for found in log.ask("health.service", service="web").value] == ["web"]


def test_txn_has_a_bound() -> None:
    log = Log()
    assert log.do(c.Txn((c.TxnKV("set", "k", b"1"),) * 64))["Errors"] is None
    assert log.refused(c.Txn((c.TxnKV("set", "k", b"1"),) * 65))[0] == "too-large"


def test_txn_checks_of_sessions_and_locks(log: Log) -> None:
    session(log, "s1")
    assert log.do(c.Txn((c.TxnKV("lock", "k", b"1", session="s1"),)))["Errors"] is None
    assert log.do(c.Txn((c.TxnKV("check-session", "k", session="s1"),)))["Errors"] is None
    assert log.do(c.Txn((c.TxnKV("check-session", "k", session="s2"),)))["Errors"]
    assert log.do(c.Txn((c.TxnKV("unlock", "k", b"1", session="s2"),)))["Errors"]
    assert log.do(c.Txn((c.TxnKV("unlock", "k", b"1", session="s1"),)))["Errors"] is None
    index = log.ask("kv.get", key="k").index
    assert log.do(c.Txn((c.TxnKV("delete-cas", "k", index=1),)))["Errors"]
    assert log.do(c.Txn((c.TxnKV("delete-cas", "k", index=index),))) == {"Results": [], "Errors": None}
