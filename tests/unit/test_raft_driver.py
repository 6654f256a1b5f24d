"""The driver on a core and a loop of the test's own: what it does in one turn, and what it leaves for later."""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import pytest

from raftstate.errors import JournalFailed
from raftstate.journal import Journal
from raftstate.journal_sync import Group, SyncDone
from raftstate.messages import AppendReply, Message
from raftstate.raft import RaftCore
from raftstate.raft_driver import APPLY_LATER_S, Driver
from raftstate.raft_election import Outbox
from tests.support.simdisk import SimDisk


@dataclass
class Timer:
    at: float
    callback: Callable[[], None]
    cancelled: bool = False

    def cancel(self) -> None:
        self.cancelled = True


class Loop:
    """A loop whose timers count whole milliseconds from the nearest, as libuv's do under uvloop."""

    def __init__(self) -> None:
        self.now = 0.0
        self._soon: list[Timer] = []
        self._timers: list[tuple[float, int, Timer]] = []
        self.turns = 0

    def clock(self) -> float:
        return self.now

    def call_soon(self, callback: Callable[[], None]) -> Timer:
        self._soon.append(timer := Timer(self.now, callback))
        return timer

    def call_later(self, delay: float, callback: Callable[[], None]) -> Timer:
        if round(delay * 1000) == 0:
            return self.call_soon(callback)
        timer = Timer(self.now + round(delay * 1000) / 1000, callback)
        heapq.heappush(self._timers, (timer.at, id(timer), timer))
        return timer

    def turn(self) -> None:
        """Run what is ready."""
        self.turns += 1
        ready, self._soon = self._soon, []
        for handle in ready:
            if not handle.cancelled:
                handle.callback()

    def run_until(self, time: float) -> None:
        """Let time pass; each turn of the loop takes 10 µs."""
        while True:
            while self._timers and self._timers[0][0] <= self.now:
                timer = heapq.heappop(self._timers)[2]
                if not timer.cancelled:
                    timer.callback()
            if self._soon:
                self.turn()
                self.now += 1e-5
            elif self._timers and self._timers[0][0] <= time:
                self.now = self._timers[0][0]
            else:
                self.now = max(self.now, time)
                return


@dataclass
class Core:
    """A core that does what the test says."""

    is_leader: bool = False
    term: int = 1
    applied: int = 0
    commit: int = 0
    deadline: float = 1e6
    out: Outbox = field(default_factory=Outbox)
    did: list[str] = field(default_factory=list)

    def next_deadline(self) -> float:
        return self.deadline

    def tick(self) -> None:
        self.did.append("tick")
        self.deadline = 1e6

    @property
    def silent(self) -> bool:
        return not (self.out.free or self.out.held)

    @property
    def at_rest(self) -> bool:
        return self.is_leader and self.silent and self.applied >= self.commit

    def take_outbox(self) -> Outbox:
        out, self.out = self.out, Outbox(term=self.term)
        return out

    def apply_some(self) -> bool:
        if self.applied < self.commit:
            self.did.append("apply")
        self.applied = self.commit
        return False

    def synced(self, term: int) -> None:
        self.did.append("synced")


class Rig:
    """A driver with everything around it."""

    def __init__(self) -> None:
        self.core, self.loop = Core(), Loop()
        self.journal = Journal(SimDisk(1), "/raft", entropy=random.Random(1).randbytes)
        self.syncs: list[tuple[Group, SyncDone]] = []
        self.failures: list[BaseException] = []
        self.pumps = 0
        self.quick = False
        """Whether the loop may wait for the disk."""
        self.broken = False
        self.driver = Driver(
            cast(RaftCore, self.core),
            self.journal,
            self.loop,
            clock=self.loop.clock,
            run_sync=self._run_sync,
            send=self._send,
            after=self._after,
            on_failure=self.failures.append,
        )

    def _run_sync(self, group: Group, done: SyncDone, *, here: bool) -> bool:
        if here and self.quick:
            if self.broken:
                raise JournalFailed("input/output error")
            group.sync()
            self.core.did.append("waited")
            return True
        self.syncs.append((group, done))
        return False

    def _send(self, peer: str, message: Message) -> None:
        self.core.did.append(f"send {peer}")

    def _after(self) -> None:
        self.pumps += 1

    def append(self, index: int, commit: int) -> None:
        """As a follower takes an entry: an acknowledgement waits for the disk."""
        self.journal.add(b"entry", index, 1)
        self.core.commit = commit
        reply: Any = AppendReply(1, 1, True, index)
        self.core.out.held.append(("leader", reply))
        self.driver.poke()

    def end_sync(self) -> None:
        group, done = self.syncs.pop(0)
        group.sync()
        done(None)


def test_a_deadline_between_two_milliseconds_is_not_waited_for_by_spinning() -> None:
    rig = Rig()
    rig.core.deadline = 0.0034
    rig.driver.poke()
    rig.loop.run_until(0.02)
    assert rig.core.did == ["tick"]
    assert rig.pumps <= 4


def test_a_follower_lets_the_sync_begin_before_it_applies() -> None:
    rig = Rig()
    rig.append(1, commit=0)
    rig.loop.turn()
    rig.end_sync()
    rig.core.did.clear()
    rig.append(2, commit=1)
    rig.loop.turn()
    assert len(rig.syncs) == 1
    assert rig.core.did == []
    rig.end_sync()
    assert rig.core.did == ["send leader", "synced", "apply"]


def test_a_follower_waits_for_a_quick_disk_and_acknowledges_before_it_applies() -> None:
    rig = Rig()
    rig.quick = True
    rig.append(1, commit=1)
    rig.loop.turn()
    assert rig.core.did == ["waited", "send leader", "synced", "apply"]
    assert rig.journal.durable_index == 1
    assert not rig.driver.syncing
    rig.append(2, commit=2)
    rig.loop.turn()
    assert rig.core.did[4:] == ["waited", "send leader", "synced", "apply"]


def test_a_leader_waits_for_no_disk() -> None:
    rig = Rig()
    rig.quick = rig.core.is_leader = True
    rig.append(1, commit=0)
    rig.loop.turn()
    assert len(rig.syncs) == 1
    assert rig.core.did == []


def test_what_a_vote_of_its_own_brought_about_leaves_in_the_next_turn() -> None:
    """The only voter leads as soon as its vote is durable, and then has entries and messages to see to."""
    rig = Rig()
    rig.quick = True
    synced = rig.core.synced

    def becomes_leader(term: int) -> None:
        synced(term)
        rig.core.is_leader = True
        rig.core.out.free.append(("learner", cast(Any, None)))

    rig.core.synced = becomes_leader  # type: ignore[method-assign]
    rig.append(1, commit=0)
    rig.loop.turn()
    rig.loop.turn()
    assert rig.core.did == ["waited", "send leader", "synced", "send learner"]


def test_a_disk_that_fails_while_it_is_waited_for_stops_the_driver_and_nothing_is_acknowledged() -> None:
    rig = Rig()
    rig.quick = rig.broken = True
    rig.append(1, commit=0)
    rig.loop.turn()
    assert [type(failure) for failure in rig.failures] == [JournalFailed]
    assert rig.core.did == []


def test_a_promise_made_during_a_sync_waits_for_the_next_one() -> None:
    rig = Rig()
    rig.journal.add(b"entry", 1, 1)
    rig.driver.poke()
    rig.loop.turn()
    rig.append(2, commit=0)
    rig.loop.turn()
    assert len(rig.syncs) == 1
    rig.end_sync()
    assert rig.core.did == ["synced"]
    rig.end_sync()
    assert rig.core.did == ["synced", "send leader", "synced"]


def test_a_follower_on_a_slow_disk_applies_meanwhile() -> None:
    rig = Rig()
    rig.append(1, commit=1)
    rig.loop.run_until(3 * APPLY_LATER_S)
    assert len(rig.syncs) == 1
    assert rig.core.did == ["apply"]


def test_a_message_during_the_sync_is_seen_to_with_all_that_is_due() -> None:
    rig = Rig()
    rig.append(1, commit=1)
    rig.loop.turn()
    rig.core.out.free.append(("leader", cast(Any, None)))
    rig.driver.poke()
    rig.loop.turn()
    assert len(rig.syncs) == 1
    assert rig.core.did == ["send leader", "apply"]


def test_a_leader_applies_at_once() -> None:
    rig = Rig()
    rig.core.is_leader = True
    rig.append(1, commit=1)
    rig.loop.turn()
    assert len(rig.syncs) == 1
    assert rig.core.did == ["apply"]


def test_what_the_end_of_a_sync_has_seen_to_is_not_seen_to_twice() -> None:
    rig = Rig()
    rig.append(1, commit=0)
    rig.loop.turn()
    rig.driver.poke()  # a message came in the same turn of the loop
    rig.end_sync()
    seen = rig.pumps
    rig.loop.turn()
    assert rig.pumps == seen
    rig.driver.poke()
    rig.loop.turn()
    assert rig.pumps == seen + 1


def test_a_leader_does_nothing_about_a_message_that_made_nothing_due() -> None:
    rig = Rig()
    rig.core.is_leader = True
    rig.core.commit = 1
    rig.driver.heard()
    rig.loop.turn()
    assert rig.core.did == ["apply"]
    seen = rig.pumps
    rig.core.deadline = 0.004  # what it heard is to be told to others later
    rig.driver.heard()
    rig.loop.turn()
    assert rig.pumps == seen
    rig.loop.run_until(0.01)
    assert rig.core.did == ["apply", "tick"]


def test_the_end_of_a_sync_that_commits_nothing_is_not_acted_upon_but_for_what_waited() -> None:
    rig = Rig()
    rig.core.is_leader = True
    rig.journal.add(b"entry", 1, 1)
    rig.driver.poke()
    rig.loop.turn()
    seen = rig.pumps
    rig.end_sync()
    assert rig.pumps == seen
    rig.journal.add(b"entry", 2, 1)
    rig.driver.poke()
    rig.loop.turn()
    rig.journal.add(b"entry", 3, 1)  # during the sync
    rig.driver.poke()
    rig.loop.turn()
    assert len(rig.syncs) == 1
    rig.end_sync()
    assert len(rig.syncs) == 1
    rig.core.commit = 3
    rig.end_sync()
    assert rig.core.did[-1] == "apply"
    assert not rig.journal.dirty


def test_a_timer_that_came_too_early_is_only_set_anew() -> None:
    rig = Rig()
    rig.core.deadline = 0.004
    rig.driver.poke()
    rig.loop.turn()
    seen = rig.pumps
    rig.core.deadline = 0.008
    rig.loop.run_until(0.006)
    assert (rig.pumps, rig.core.did) == (seen, [])
    rig.loop.run_until(0.02)
    assert rig.core.did == ["tick"]


def test_a_quiet_driver_lets_the_journal_rest_but_not_during_a_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig()
    rests: list[bool] = []
    monkeypatch.setattr(rig.journal, "rest", lambda: rests.append(rig.driver.syncing))
    rig.core.deadline = 0.005
    rig.append(1, commit=0)
    rig.loop.run_until(0.01)
    assert rig.core.did[-1] == "tick"
    assert rests == []
    rig.end_sync()
    rig.core.deadline = 0.02
    rig.driver.poke()
    rig.loop.run_until(0.03)
    assert rests == [False]


def test_a_journal_that_cannot_rest_stops_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig()

    def fail() -> None:
        raise JournalFailed("no space left")

    monkeypatch.setattr(rig.journal, "rest", fail)
    rig.core.deadline = 0.005
    rig.driver.poke()
    rig.loop.run_until(0.01)
    assert [type(failure) for failure in rig.failures] == [JournalFailed]
