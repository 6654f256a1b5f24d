"""What a server that starts again knows before it hears anyone, and when its state is as new as what it showed."""

from __future__ import annotations

import random

from raftstate.journal import Journal
from raftstate.messages import AppendEntries, Heartbeat, PreVote, PreVoteReply
from raftstate.raft import Member, Members, RaftConfig, RaftCore
from raftstate.raft_driven import NO_OP, REGULAR
from tests.support.raft_memory import MemorySnapshots
from tests.support.simdisk import SimDisk

CONFIG = RaftConfig(heartbeat_s=0.1, election_timeout_min_s=0.5, election_timeout_max_s=1.0)
THREE = Members.of(Member(name, name) for name in ("a", "b", "c"))


class Life:
    """A follower from its start to its end, on a disk that outlives it."""

    def __init__(self, disk: SimDisk, now: float = 100.0, silent_since: float | None = None) -> None:
        self.now = now
        self.applied: list[bytes] = []
        self.journal = Journal(disk, "raft", entropy=random.Random(1).randbytes)
        self.core = RaftCore(
            "a",
            self.journal,
            MemorySnapshots(),
            lambda _index, data: self.applied.append(data),
            bootstrap=THREE,
            clock=lambda: self.now,
            rng=random.Random(1),
            config=CONFIG,
            silent_since=silent_since,
        )
        self.settle()

    def settle(self) -> None:
        """Sync what is pending, apply what is committed."""
        if (pending := self.journal.take_pending()) is not None:
            pending.sync()
        while self.core.apply_some():
            pass

    def append(self, term: int, index: int, command: bytes, commit: int, previous_term: int | None = None) -> None:
        previous = index - 1
        known = self.core.term_at(previous) if previous_term is None else previous_term
        assert known is not None
        message = AppendEntries(term, previous, known, commit, 0, ((term, command),))
        self.core.receive("b", message)
        self.settle()


def led(disk: SimDisk) -> Life:
    """A follower that has applied `x` and `y`; `z` is in its log, and the group that says that `y` is committed."""
    life = Life(disk)
    life.append(1, 2, NO_OP, 1)
    life.append(1, 3, REGULAR + b"x", 2)
    life.append(1, 4, REGULAR + b"y", 4)
    life.append(1, 5, REGULAR + b"z", 4)
    assert life.applied == [b"x", b"y"]
    return life


def test_server_that_hears_no_leader_still_stands_where_it_stood() -> None:
    disk = SimDisk(random.Random(1))
    led(disk)
    again = Life(disk)
    assert again.core.leader is None
    assert again.applied == [b"x", b"y"]
    assert again.core.last_index == 5


def test_what_was_not_known_to_be_committed_may_still_be_replaced() -> None:
    disk = SimDisk(random.Random(1))
    led(disk)
    again = Life(disk)
    again.append(2, 5, NO_OP, 5)
    assert (again.core.term_at(5), again.applied) == (2, [b"x", b"y"])


def test_state_is_as_new_as_before_once_the_leaders_own_term_is_applied() -> None:
    disk = SimDisk(random.Random(1))
    led(disk)
    again = Life(disk)
    assert not again.core.caught_up
    again.append(2, 6, NO_OP, 4)  # a new leader, which does not know yet that more was committed before its term
    assert not again.core.caught_up
    again.core.receive("b", Heartbeat(2, 6, 1))
    assert not again.core.caught_up, "told, and not applied"
    again.settle()
    assert again.core.caught_up
    assert again.applied == [b"x", b"y", b"z"]


def test_leader_of_an_old_term_vouches_only_for_what_this_server_holds() -> None:
    disk = SimDisk(random.Random(1))
    led(disk)
    again = Life(disk)
    again.core.receive("b", Heartbeat(1, 9, 1))  # committed up to 9: our log ends at 5
    again.settle()
    assert not again.core.caught_up
    again.core.receive("b", Heartbeat(1, 5, 2))
    again.settle()
    assert again.core.caught_up


def test_promise_of_an_earlier_process_is_over_when_this_one_had_the_lock_for_long_enough() -> None:
    disk = SimDisk(random.Random(1))
    led(disk)
    ask = PreVote(2, 5, 1)
    for held_s, granted in ((0.1, False), (0.6, True)):
        again = Life(disk, now=200.0, silent_since=200.0 - held_s)
        again.core.receive("c", ask)
        sent = [message for _, message in again.core.take_outbox().free if isinstance(message, PreVoteReply)]
        assert [message.granted for message in sent] == ([True] if granted else [])


def test_lock_taken_in_the_future_is_no_longer_ago_than_now() -> None:
    disk = SimDisk(random.Random(1))
    led(disk)
    again = Life(disk, now=200.0, silent_since=300.0)
    assert again.core.heard_at == 200.0


def test_first_election_after_a_start_comes_within_the_shortest_timeout() -> None:
    disk = SimDisk(random.Random(1))
    led(disk)
    again = Life(disk)
    assert 2 * CONFIG.heartbeat_s <= again.core.next_deadline() - again.now <= CONFIG.election_timeout_min_s
