"""A request id stands for one command: repeated it is answered alike, used for another one it is refused."""

from __future__ import annotations

import msgspec
import pytest

from raftstate.state import commands as c
from raftstate.state.machine import StateMachine
from raftstate.state.refusal import REUSED
from raftstate.state.snapshot import FORMAT


def send(machine: StateMachine, index: int, request_id: str, at: str, command: c.Command) -> object:
    applied = machine.apply(index, c.encode_envelope(c.Envelope(request_id, at, command)))
    return applied.refusal.code if applied.refusal else (applied.index, applied.value)


def test_the_same_command_again_is_answered_alike_whenever_it_comes() -> None:
    machine = StateMachine()
    put = c.KVSet("k", b"1")
    assert send(machine, 10, "one-write", "2026-01-01T00:00:00+00:00", put) == (10, True)
    assert send(machine, 11, "one-write", "2026-01-01T00:00:09.123456+00:00", put) == (10, True)
    assert machine.store.kv.rows["k"].modify_index == 10


@pytest.mark.parametrize("request_id", ["short", "x" * 31, "x" * 32, "é" * 100, "x" * 300])
def test_another_command_under_the_same_id_is_refused_and_changes_nothing(request_id: str) -> None:
    machine = StateMachine()
    at = "2026-01-01T00:00:00+00:00"
    assert send(machine, 10, request_id, at, c.KVSet("k", b"1")) == (10, True)
    before = machine.store.kv.rows["k"]
    assert send(machine, 11, request_id, at, c.KVSet("k", b"2")) == REUSED
    assert send(machine, 12, request_id, at, c.KVDelete("k")) == REUSED
    assert machine.store.kv.rows["k"] is before
    # The first command keeps its answer.
    assert send(machine, 13, request_id, "2026-01-01T00:00:00.5+00:00", c.KVSet("k", b"1")) == (10, True)


def test_the_refusal_says_what_to_do() -> None:
    machine = StateMachine()
    at = "2026-01-01T00:00:00+00:00"
    send(machine, 10, "r1", at, c.KVSet("k", b"1"))
    refusal = machine.apply(11, c.encode_envelope(c.Envelope("r1", at, c.KVSet("k", b"2")))).refusal
    assert refusal is not None
    assert refusal.http_status == 409
    assert "index 10" in refusal.message
    assert "use a new id" in refusal.message


def test_the_binding_survives_a_snapshot() -> None:
    machine, again = StateMachine(), StateMachine()
    at = "2026-01-01T00:00:00+00:00"
    send(machine, 10, "r1", at, c.KVSet("k", b"1"))
    with machine.snapshot() as snapshot:
        again.restore(snapshot)
    assert again.digest() == machine.digest()
    assert send(again, 11, "r1", at, c.KVSet("k", b"2")) == REUSED
    assert send(again, 12, "r1", at, c.KVSet("k", b"1")) == (10, True)


def older(chunk: bytes) -> bytes:
    """The chunk as the version before wrote it: format 1, remembered requests without fingerprints."""
    name, body = msgspec.msgpack.decode(chunk)
    if name == "lictor-state":
        assert body["format"] == FORMAT
        body["format"] = 1
    elif name == "requests":
        body = [row[:5] for row in body]
    return msgspec.msgpack.encode([name, body])


def test_a_snapshot_of_the_version_before_is_read_and_its_requests_are_still_remembered() -> None:
    machine, again = StateMachine(), StateMachine()
    at = "2026-01-01T00:00:00+00:00"
    send(machine, 10, "r1", at, c.KVSet("k", b"1"))
    with machine.snapshot() as snapshot:
        again.restore(older(chunk) for chunk in snapshot)
    assert send(again, 11, "r1", at, c.KVSet("k", b"1")) == (10, True)
    assert send(again, 12, "r2", at, c.KVSet("k", b"3")) == (12, True)
