"""Laws of the state machine on random logs: determinism, growing indexes, exact wake-ups, retries, the naive twin."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raftstate.state import changes, kv_tables, machine
from raftstate.state import commands as c
from raftstate.state.commands import Envelope, encode_envelope
from raftstate.state.machine import Applied, StateMachine
from raftstate.state.queries import Answer, run_query
from tests.support import state_twin as twin

LOGS = st.one_of(
    st.lists(twin.commands, min_size=1, max_size=60),
    st.lists(twin.commands, min_size=1, max_size=60).map(lambda log: [*twin.SETUP, *log]),
)
FEW = settings(max_examples=60, deadline=None)


@contextmanager
def small_bounds(small: bool) -> Iterator[None]:
    """Make tombstones and remembered requests overflow within a short log."""
    with pytest.MonkeyPatch.context() as patch:
        if small:
            patch.setattr(changes, "BURIED_MAX", 2)
            patch.setattr(kv_tables, "TOMBSTONES_MAX", 2)
            patch.setattr(machine, "REQUESTS_MAX", 5)
            patch.setattr(machine, "REQUESTS_KEPT", 2)
            patch.setattr(machine, "_SWEEP_EVERY", 3)
            patch.setattr(machine, "REQUEST_AGE_US_MAX", 4_000_000)
        yield


def encoded(log: list[c.Command]) -> list[bytes]:
    return [
        encode_envelope(Envelope(f"request-{number}", f"2026-01-01T00:{number // 60:02}:{number % 60:02}Z", command))
        for number, command in enumerate(log)
    ]


def chunks(state: StateMachine) -> list[bytes]:
    with state.snapshot() as snapshot:
        return list(snapshot)


def woken(answer: Answer, applied: Applied) -> bool:
    for key in answer.watch:
        if key in applied.touched:
            return True
        if key[0] == "kv-prefix" and any(t[0] == "kv" and t[1].startswith(key[1]) for t in applied.touched):
            return True
    return False


@FEW
@given(LOGS, st.data(), st.booleans())
def test_equal_logs_give_equal_bytes_with_snapshots_in_between(
    log: list[c.Command], data: st.DataObject, small: bool
) -> None:
    with small_bounds(small):
        plain, restored = StateMachine(), StateMachine()
        pauses = data.draw(st.sets(st.integers(0, len(log))))
        for number, command in enumerate(encoded(log)):
            if number in pauses:
                saved = chunks(restored)
                restored = StateMachine()
                restored.restore(saved)
            first, second = plain.apply(number + 1, command), restored.apply(number + 1, command)
            assert first == second
        assert plain.digest() == restored.digest()
        assert chunks(plain) == chunks(restored)


@FEW
@given(LOGS, LOGS, st.data(), st.booleans())
def test_a_snapshot_is_of_its_index_whatever_is_applied_while_it_is_read(
    before: list[c.Command], during: list[c.Command], data: st.DataObject, small: bool
) -> None:
    with small_bounds(small), pytest.MonkeyPatch.context() as patch:
        patch.setattr(kv_tables, "_WALK_KEYS", 2)
        patch.setattr("raftstate.state.snapshot.CHUNK_ROWS", 2)
        live, still = StateMachine(), StateMachine()
        log = encoded(before + during)
        for number, command in enumerate(log[: len(before)]):
            live.apply(number + 1, command)
            still.apply(number + 1, command)
        expected = still.digest()
        saved: list[list[bytes]] = [[], []]
        snapshots = [live.snapshot(), live.snapshot()]
        walks = [iter(snapshot) for snapshot in snapshots]
        for number, command in enumerate(log[len(before) :], len(before)):
            for which in (0, 1):
                for _ in range(data.draw(st.integers(0, 3))):
                    chunk = next(walks[which], None)
                    if chunk is not None:
                        saved[which].append(chunk)
            live.apply(number + 1, command)
        for which in (0, 1):
            saved[which].extend(walks[which])
            snapshots[which].close()
            copy = StateMachine()
            copy.restore(saved[which])
            assert copy.digest() == expected
            for number, command in enumerate(log[len(before) :], len(before)):
                copy.apply(number + 1, command)
            assert copy.digest() == live.digest()


@settings(max_examples=100, deadline=None)
@given(LOGS, st.booleans())
def test_indexes_grow_watchers_wake_exactly_and_the_naive_twin_agrees(log: list[c.Command], small: bool) -> None:
    with small_bounds(small):
        state = StateMachine()
        before = [run_query(state.store, name, params) for name, params in twin.QUERIES]
        for number, command in enumerate(encoded(log)):
            applied = state.apply(number + 1, command)
            assert applied.refusal is None or applied.refusal.code != "internal", applied.refusal
            for at, (name, params) in enumerate(twin.QUERIES):
                old, new = before[at], run_query(state.store, name, params)
                told = (name, params, log[number])
                assert new.index >= old.index >= 1, told
                if new.value != old.value:
                    assert woken(old, applied), ("would sleep through a change", *told)
                    assert new.index == number + 1, told
                elif not twin.may_wake_unchanged(name, params, log[number]):
                    assert not woken(old, applied), ("woken for nothing", *told)
                if name not in ("intentions.exact", "internal.ca_signing_material"):
                    real, expected = twin.shown(name, new.value), twin.naive(state.store, name, params)
                    assert twin.same(name, real, expected), (*told, real, expected)
                before[at] = new


@FEW
@given(LOGS, st.data())
def test_a_retry_has_the_first_outcome_and_no_second_effect(log: list[c.Command], data: st.DataObject) -> None:
    once, retried = StateMachine(), StateMachine()
    commands, outcomes, index = encoded(log), [], 0
    for command in commands:
        index += 1
        outcome = retried.apply(index, command)
        outcomes.append(outcome)
        once.apply(index, command)
        for again in data.draw(st.lists(st.integers(0, len(outcomes) - 1), max_size=2)):
            if any(isinstance(done, c.ForgetRequests) for done in log[: len(outcomes)]):
                continue
            index += 1
            repeated = retried.apply(index, commands[again])
            first = outcomes[again]
            assert (repeated.index, repeated.value, repeated.refusal) == (first.index, first.value, first.refusal)
            assert not repeated.touched
            once.apply(index, b"")
    assert chunks(retried) == chunks(once)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200), st.data())
def test_no_bytes_make_apply_raise_and_refused_bytes_change_nothing(garbage: bytes, data: st.DataObject) -> None:
    state = StateMachine()
    state.apply(1, encode_envelope(Envelope("a", "2026-01-01T00:00:00Z", c.KVSet("k", b"v"))))
    good = encode_envelope(Envelope("b", "2026-01-01T00:00:01Z", data.draw(twin.commands)))
    at = data.draw(st.integers(0, len(good)))
    for number, data_bytes in enumerate((garbage, good[:at], good[:at] + garbage), 2):
        before: Any = chunks(state)[1:]
        applied = state.apply(number, data_bytes)
        if applied.refusal is not None and applied.refusal.code == "malformed":
            assert chunks(state)[1:] == before
            assert not applied.touched
