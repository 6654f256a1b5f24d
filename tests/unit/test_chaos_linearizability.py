"""The checker is itself checked, on histories whose verdict is known, and against brute force."""

from __future__ import annotations

from itertools import permutations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cli.chaos.history import CAS, FOREVER, READ, WRITE, Operation
from cli.chaos.linearizability import _step, check, check_key, session_violations


def op(kind: str, begin: float, end: float, value: str | None, **more: object) -> Operation:
    return Operation(client="c", key="k", kind=kind, invoked_s=begin, returned_s=end, value=value, **more)  # type: ignore[arg-type]


GOOD = {
    "empty": [],
    "read nothing": [op(READ, 0, 1, None)],
    "write then read": [op(WRITE, 0, 1, "a"), op(READ, 2, 3, "a")],
    "concurrent read sees either": [op(WRITE, 0, 5, "a"), op(READ, 1, 2, None), op(READ, 3, 4, "a")],
    "unknown write takes effect late": [op(WRITE, 0, FOREVER, "a"), op(READ, 1, 2, None), op(READ, 8, 9, "a")],
    "unknown write never takes effect": [op(WRITE, 0, FOREVER, "a"), op(READ, 1, 2, None), op(READ, 8, 9, None)],
    "cas": [
        op(WRITE, 0, 1, "a"),
        op(CAS, 2, 3, "b", expected="a"),
        op(CAS, 2, 3, "c", expected="a", succeeded=False),
        op(READ, 4, 5, "b"),
    ],
    "two writes overlap, order told by reads": [
        op(WRITE, 0, 9, "a"),
        op(WRITE, 0, 9, "b"),
        op(READ, 2, 3, "b"),
        op(READ, 4, 5, "a"),
    ],
}
BAD = {
    "stale read after acknowledged write": [op(WRITE, 0, 1, "a"), op(READ, 2, 3, None)],
    "lost write": [op(WRITE, 0, 1, "a"), op(WRITE, 2, 3, "b"), op(READ, 4, 5, "a")],
    "value goes back": [op(WRITE, 0, 9, "a"), op(READ, 1, 2, "a"), op(READ, 3, 4, None)],
    "both cas win": [
        op(WRITE, 0, 1, "a"),
        op(CAS, 2, 3, "b", expected="a"),
        op(CAS, 2, 3, "c", expected="a"),
    ],
    "unknown write seen, then unseen": [
        op(WRITE, 0, FOREVER, "a"),
        op(READ, 1, 2, "a"),
        op(READ, 3, 4, None),
    ],
    "a write applied twice": [
        op(WRITE, 0, 1, "a"),
        op(WRITE, 2, 3, "b"),
        op(READ, 4, 5, "b"),
        op(READ, 6, 7, "a"),
    ],
}


@pytest.mark.parametrize("name", GOOD)
def test_linearizable_history_is_accepted(name: str) -> None:
    assert check_key("k", GOOD[name]).linearizable


@pytest.mark.parametrize("name", BAD)
def test_known_bad_history_is_refused_and_shown(name: str) -> None:
    verdict = check_key("k", BAD[name])
    assert not verdict.linearizable
    assert not verdict.undecided
    assert verdict.stuck


def test_keys_are_independent_and_stale_reads_left_out() -> None:
    history = [op(WRITE, 0, 1, "a"), op(READ, 2, 3, None, mode="stale")]
    assert all(verdict.linearizable for verdict in check(history))


def test_session_violations_find_invented_values_and_older_answers() -> None:
    history = [
        op(WRITE, 0, 1, "a"),
        op(READ, 2, 3, "x", mode="stale", node="n", index=7),
        op(READ, 4, 5, "a", mode="stale", node="n", index=6),
    ]
    found = session_violations(history)
    assert len(found) == 2
    assert "nobody had written" in found[0]
    assert "saw index 7" in found[1]


def brute_force(ops: list[Operation]) -> bool:
    """The definition itself: some order, compatible with time, explains every known answer."""
    unknown = [o for o in ops if not o.known and o.kind != READ]
    known = [o for o in ops if o.known]
    for mask in range(1 << len(unknown)):
        chosen = known + [o for bit, o in enumerate(unknown) if mask >> bit & 1]
        for order in permutations(chosen):
            if any(a.invoked_s > b.returned_s for i, a in enumerate(order) for b in order[i + 1 :]):
                continue
            value: str | None = None
            for item in order:
                possible, value = _step(item, value)
                if not possible:
                    break
            else:
                return True
    return False


@st.composite
def histories(draw: st.DrawFn) -> list[Operation]:
    ops = []
    for number in range(draw(st.integers(0, 5))):
        begin = draw(st.integers(0, 8))
        kind = draw(st.sampled_from([READ, WRITE, CAS]))
        end = begin + draw(st.integers(0, 6)) if kind == READ or draw(st.booleans()) else FOREVER
        past = st.sampled_from([None, *(f"v{n}" for n in range(6))])
        if kind == READ:
            ops.append(op(READ, begin, end, draw(past)))
        elif kind == WRITE:
            ops.append(op(WRITE, begin, end, f"v{number}"))
        else:
            ops.append(op(CAS, begin, end, f"v{number}", expected=draw(past), succeeded=draw(st.booleans())))
    return ops


@given(histories())
@settings(max_examples=400, deadline=None)
def test_search_agrees_with_brute_force(ops: list[Operation]) -> None:
    assert check_key("k", ops).linearizable == brute_force(ops)


def test_a_long_concurrent_history_is_decided() -> None:
    ops: list[Operation] = []
    for number in range(400):
        ops.append(op(WRITE, number, number + 1.5, f"v{number}"))
        ops.append(op(READ, number + 1.6, number + 1.9, f"v{number}" if number % 2 else f"v{number + 1}"))
    verdict = check_key("k", ops)
    assert verdict.linearizable
