"""Drives a journal through changes and crashes beside a naive model of what a restart may find."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

from raftstate.errors import JournalFailed
from raftstate.journal import Journal, Pending
from tests.support.simdisk import SimCrash, SimDisk

DIRECTORY = "/raft"
State = tuple[tuple[tuple[bytes, int, int], ...], int, str | None]

OPERATIONS = [
    "add", "add", "add", "add", "cut", "compact", "reset", "clear", "vote", "take", "sync", "sync", "rest", "crash",
]  # fmt: skip


def state_of(journal: Journal) -> State:
    return tuple(journal[:]), journal.getCurrentTerm(), journal.getVotedForNodeId()


@dataclass
class JournalRun:
    """`history` has the state after each change; a restart must find one of these, from `synced` on."""

    disk: SimDisk
    segment_bytes: int = 400
    directory: str = DIRECTORY
    rng: random.Random = field(default_factory=lambda: random.Random(0))
    history: list[State] = field(default_factory=list)
    synced: int = 0
    crashes: int = 0
    taken: list[tuple[Pending, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.journal = self._open()
        self.history = [state_of(self.journal)]

    def step(self, operation: str, number: int) -> None:
        """One operation; `number` is any non-negative integer that chooses its details."""
        getattr(self, f"_{operation}")(number)
        if operation in ("add", "cut", "compact", "reset", "clear", "vote"):
            self.history.append(state_of(self.journal))
        self._check_durable_claims()

    def _add(self, number: int) -> None:
        payload = self.rng.randbytes(number % 90) if number % 11 else self.rng.randbytes(1500)
        self.journal.add(payload, self.journal.last_index + 1, self.journal.getCurrentTerm())

    def _cut(self, number: int) -> None:
        self.journal.deleteEntriesFrom(number % (len(self.journal) + 1))

    def _compact(self, number: int) -> None:
        if len(self.journal):
            self.journal.compact_to(self.journal[number % len(self.journal)][1])

    def _reset(self, number: int) -> None:
        self.journal.reset_to(max(1, self.journal.last_index + number % 5), self.journal.getCurrentTerm())

    def _clear(self, number: int) -> None:
        if number % 8 == 0:
            self.journal.clear()

    def _vote(self, number: int) -> None:
        self.journal.setCurrentTerm(self.journal.getCurrentTerm() + number % 2, [None, "", "s1", "s2"][number % 4])

    def _take(self, number: int) -> None:
        self.journal.setRaftCommitIndex(self.journal.durable_index)
        pending = self.journal.take_pending()
        if pending is not None:
            self.taken.append((pending, len(self.history) - 1))

    def _sync(self, number: int) -> None:
        if not self.taken or number % 3:
            self._take(number)
        if not self.taken:
            return
        if number % 5 == 0:
            self.disk.crash_after(number // 5 % 8)
        elif number % 13 == 0 and isinstance(self.disk, SimDisk):
            self.disk.fail_next_sync()
        pending, reached = self.taken[0]
        try:
            self._make_durable(pending, number)
        except JournalFailed:
            self._restart(number)  # nothing else is left to do for this process
            return
        except SimCrash:
            if self.journal.durable_index >= pending.covers_index and pending not in self.journal._outstanding:
                self.synced = reached  # the power went after the group was said to be durable
            self._restart(number)
            return
        self.taken.pop(0)
        self.synced = reached

    def _make_durable(self, pending: Pending, number: int) -> None:
        """By `sync`, or as the loop does it: write, have the kernel sync, say so."""
        file = pending.write() if number % 2 and isinstance(self.disk, SimDisk) else -1
        if file < 0:
            pending.sync()
            return
        if number % 7 == 0:
            self._add(number)  # the loop goes on meanwhile
            self.history.append(state_of(self.journal))
        try:
            self.disk.fdatasync(file)
        except OSError as error:
            pending.synced(error)
        else:
            pending.synced()

    def _rest(self, number: int) -> None:
        try:
            self.journal.rest()
        except SimCrash:
            self._restart(number)

    def _crash(self, number: int) -> None:
        self._restart(number)

    def _restart(self, number: int) -> None:
        allowed = self.history[self.synced :]
        self.crashes += 1
        if number % 3 == 0:
            # Only the process dies. What its successor finds is then kept, also when the power goes.
            self.disk.kill()
            self.disk.syncs_to_fail = 0
            killed = self._open()
            allowed = [found for found in allowed if found == state_of(killed)]
            assert allowed, f"a process that was killed left something else: {state_of(killed)!r}"
        self.disk.crash()
        self.disk.syncs_to_fail = 0
        if number % 4 == 0:
            self.disk.crash_after(number // 4 % 5)  # and again while it recovers
            try:
                self._open().close()
            except SimCrash:
                pass
            self.disk.crash()
        self.journal = self._open()
        found = state_of(self.journal)
        assert found in allowed, f"a restart lost something synced or invented something: {found!r}"
        self.history, self.synced, self.taken = [found], 0, []
        assert not self.journal.dirty
        assert self.journal.durable_index == self.journal.last_index

    def _check_durable_claims(self) -> None:
        """What is called durable must be in every state that a restart may find."""
        surely = self.history[self.synced][0]
        base = surely[0][1] if surely else 0
        for entry in self.journal[:]:
            if base <= entry[1] <= self.journal.durable_index and surely:
                assert surely[entry[1] - base] == entry

    def _open(self) -> Journal:
        rng = random.Random(self.rng.random())
        return Journal(self.disk, self.directory, segment_bytes=self.segment_bytes, entropy=rng.randbytes)


def built(operations: list[tuple[str, int]], **options: Any) -> JournalRun:
    """A run of these operations with no crash, all of it synced and closed."""
    run = JournalRun(SimDisk(), **options)
    for operation, number in operations:
        run.step(operation, number | 1 if operation != "sync" else number * 5 + 1)
    while run.taken:
        run.taken.pop(0)[0].sync()
    run.journal.close()
    return run


__all__ = ["DIRECTORY", "OPERATIONS", "JournalFailed", "JournalRun", "State", "built", "state_of"]
