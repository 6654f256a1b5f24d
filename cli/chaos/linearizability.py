"""Whether a history of one register is linearizable.

Wing and Gong's search (1993) with Lowe's memoization (2017): try to linearize any operation whose invocation
precedes the first return among those still open; remember (set of linearized operations, value) pairs that led
nowhere. Keys are independent objects, and linearizability is local (Herlihy & Wing, theorem 1), so each key is
checked on its own, which keeps the search small.

Pure: no I/O, no clock.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import msgspec

from cli.chaos.history import CAS, FOREVER, READ, WRITE, Operation


class Verdict(msgspec.Struct, frozen=True):
    """The answer for one key. When not ``linearizable``, ``stuck`` holds the operations of which none could be next
    at the furthest point that the search reached. ``undecided`` means that the step budget ran out."""

    key: str
    linearizable: bool
    operations: int
    undecided: bool = False
    stuck: tuple[Operation, ...] = ()


def _step(op: Operation, value: str | None) -> tuple[bool, str | None]:
    """Return (whether ``op`` may happen at ``value``, the value after it)."""
    if op.kind == READ:
        return op.value == value, value
    if op.kind == WRITE:
        return True, op.value
    matches = op.expected == value
    if op.known and op.succeeded != matches:
        return False, value
    return True, op.value if matches else value


class _Event:
    """A node of the doubly linked list of invocations and returns, in time order."""

    __slots__ = ("call", "next", "op", "prev", "ret")

    def __init__(self, op: int, call: bool) -> None:
        self.op = op
        self.call = call
        self.ret: _Event | None = None
        self.prev: _Event | None = None
        self.next: _Event | None = None


def _events(ops: list[Operation]) -> _Event:
    """Link the invocations and returns of ``ops`` in time order behind a sentinel and return it."""
    moments: list[tuple[float, int, _Event]] = []
    for number, op in enumerate(ops):
        call, ret = _Event(number, True), _Event(number, False)
        call.ret = ret
        # At equal times an invocation stands before a return: the weaker claim, hence never a false alarm.
        moments.append((op.invoked_s, 0, call))
        moments.append((op.returned_s, 1, ret))
    moments.sort(key=lambda moment: moment[:2])
    head = last = _Event(-1, True)
    for _, _, event in moments:
        last.next, event.prev = event, last
        last = event
    return head


def _lift(event: _Event) -> None:
    """Take an operation's invocation and return out of the list."""
    for item in (event, event.ret):
        assert item is not None
        assert item.prev is not None
        item.prev.next = item.next
        if item.next is not None:
            item.next.prev = item.prev


def _unlift(event: _Event) -> None:
    """Put back what :func:`_lift` took out; calls must nest."""
    for item in (event.ret, event):
        assert item is not None
        assert item.prev is not None
        item.prev.next = item
        if item.next is not None:
            item.next.prev = item


def check_key(key: str, operations: Iterable[Operation], *, max_steps: int = 2_000_000) -> Verdict:
    """Decide whether the operations on one key, an absent register at first, are linearizable."""
    ops = [op for op in operations if op.kind in (WRITE, CAS) or op.known]
    head = _events(ops)
    value: str | None = None
    done = 0
    seen: set[tuple[int, str | None]] = set()
    trail: list[tuple[_Event, str | None]] = []
    best = -1
    stuck: tuple[Operation, ...] = ()
    open_known = sum(1 for op in ops if op.known)
    entry = head.next
    for _ in range(max_steps):
        if open_known == 0:
            return Verdict(key=key, linearizable=True, operations=len(ops))
        assert entry is not None
        if entry.call:
            op = ops[entry.op]
            possible, after = _step(op, value)
            mark = done | (1 << entry.op)
            if possible and (mark, after) not in seen:
                seen.add((mark, after))
                trail.append((entry, value))
                _lift(entry)
                done, value = mark, after
                open_known -= op.known
                entry = head.next
            else:
                entry = entry.next
            continue
        # A return is reached before its operation was linearized: nothing from here on can go first.
        if len(trail) > best:
            best = len(trail)
            stuck = tuple(ops[n] for n in _open_before(head, entry))
        if not trail:
            return Verdict(key=key, linearizable=False, operations=len(ops), stuck=stuck)
        undone, value = trail.pop()
        done &= ~(1 << undone.op)
        open_known += ops[undone.op].known
        _unlift(undone)
        entry = undone.next
    return Verdict(key=key, linearizable=False, operations=len(ops), undecided=True)


def _open_before(head: _Event, end: _Event) -> list[int]:
    """Return the operations invoked, and not yet linearized, before the return ``end``."""
    numbers = []
    event = head.next
    while event is not None and event is not end:
        if event.call:
            numbers.append(event.op)
        event = event.next
    return numbers


def check(operations: Iterable[Operation], *, max_steps_per_key: int = 2_000_000) -> list[Verdict]:
    """Check every key on its own; stale reads promise less and are left out (see :func:`session_violations`)."""
    by_key: dict[str, list[Operation]] = defaultdict(list)
    for op in operations:
        if op.mode != "stale":
            by_key[op.key].append(op)
    return [check_key(key, ops, max_steps=max_steps_per_key) for key, ops in sorted(by_key.items())]


def session_violations(operations: Iterable[Operation]) -> list[str]:
    """Return what breaks the promise of every read mode: answers come from real writes, and are never older than
    what the same client saw of that key through the same node (by the answer's index)."""
    ops = sorted(operations, key=lambda op: op.invoked_s)
    written: dict[str, dict[str | None, float]] = defaultdict(dict)
    for op in ops:
        if op.kind in (WRITE, CAS):
            written[op.key][op.value] = op.invoked_s
    found = []
    newest: dict[tuple[str, str, str], tuple[float, int]] = {}
    for op in sorted((op for op in ops if op.kind == READ and op.known), key=lambda op: op.returned_s):
        if op.value is not None and written[op.key].get(op.value, FOREVER) > op.returned_s:
            found.append(f"{op.client} read {op.value!r} from {op.key}, which nobody had written")
        seat = (op.client, op.node, op.key)
        _, index = newest.get(seat, (0.0, 0))
        if op.index < index:
            found.append(f"{op.client} at {op.node} saw index {index} of {op.key}, then {op.index}")
        newest[seat] = (op.returned_s, max(index, op.index))
    return found
