"""The core move by move: what chance finds too seldom, and what pysyncobj 0.3.17 gets wrong (decision 10)."""

from __future__ import annotations

import random
from typing import Any

import pytest

from raftstate.errors import CommandTooLarge, MembershipRefused, NotLeader, StateDiverged, TooBusy
from raftstate.messages import (
    AppendEntries,
    AppendReply,
    BadMessage,
    Heartbeat,
    HeartbeatReply,
    InstallSnapshot,
    Message,
    PreVote,
    PreVoteReply,
    RequestVote,
    SnapshotReply,
    TimeoutNow,
    VoteReply,
    decode_message,
    encode_message,
)
from raftstate.raft import Member, Members, RaftConfig, RaftCore
from raftstate.raft_driven import NO_OP, REGULAR
from raftstate.raft_members import encode_members
from tests.support.raft_memory import MemoryLog, MemorySnapshots

CONFIG = RaftConfig(heartbeat_s=0.1, election_timeout_min_s=0.5, election_timeout_max_s=1.0)
THREE = Members.of(Member(name, name) for name in ("a", "b", "c"))
FIVE = Members.of(Member(name, name) for name in ("a", "b", "c", "d", "e"))


class Lone:
    """One core under a clock that the test moves; what it sends is looked at, not delivered."""

    def __init__(self, members: Members = THREE, log: MemoryLog | None = None, config: RaftConfig = CONFIG) -> None:
        self.now = 100.0
        self.log = MemoryLog() if log is None else log
        self.applied: list[tuple[int, bytes]] = []
        self.core = RaftCore(
            "a",
            self.log,
            MemorySnapshots(),
            self._apply,
            bootstrap=members,
            clock=lambda: self.now,
            rng=random.Random(1),
            config=config,
        )

    def _apply(self, index: int, data: bytes) -> bytes:
        self.applied.append((index, data))
        return data

    def sync(self) -> None:
        """Take what is sent, and sync the disk."""
        term = self.core.term
        pending = self.log.take_pending()
        if pending is not None:
            pending.sync()
        self.core.synced(term)

    def out(self) -> list[tuple[str, Message]]:
        while self.core.apply_some():
            pass
        box = self.core.take_outbox()
        return box.free + box.held

    def sent(self, kind: type[Message]) -> list[tuple[str, Any]]:
        return [(peer, message) for peer, message in self.out() if isinstance(message, kind)]

    def lead(self) -> None:
        """Win an election by the vote of `b`."""
        self.now += 2
        self.core.tick()
        self.now += 2 * self.core.config.heartbeat_s  # a server that was stopped listens for a moment first
        self.core.tick()
        self.out()
        for voter in self.core.members.voters[1 : 1 + len(self.core.members.voters) // 2]:
            self.core.receive(voter, PreVoteReply(self.core.term + (self.core.role == 0), True))
        self.out()
        self.sync()
        for voter in self.core.members.voters[1 : 1 + len(self.core.members.voters) // 2]:
            self.core.receive(voter, VoteReply(self.core.term, True))
        assert self.core.is_leader
        self.sync()


def entries(*terms: int) -> tuple[tuple[int, bytes], ...]:
    return tuple((term, REGULAR + b"x%d" % number) for number, term in enumerate(terms))


# -- 1: truncation ---------------------------------------------------------------------------------------------------


def test_an_overlapping_append_truncates_nothing_that_matches() -> None:
    node = Lone()
    node.core.receive("b", AppendEntries(1, 1, 0, 0, 0, entries(1, 1, 1)))
    assert node.core.last_index == 4
    # A delayed duplicate of the first part arrives.
    node.core.receive("b", AppendEntries(1, 1, 0, 0, 0, entries(1)))
    assert node.core.last_index == 4
    replies = [message for _, message in node.sent(AppendReply)]
    assert [reply.match for reply in replies] == [4, 2]


def test_only_what_conflicts_is_removed() -> None:
    node = Lone()
    node.core.receive("b", AppendEntries(1, 1, 0, 2, 0, entries(1, 1, 1)))
    node.core.receive("c", AppendEntries(2, 1, 0, 2, 0, entries(1, 2)))
    assert [node.core.term_at(index) for index in range(2, 5)] == [1, 2, None]


def test_what_is_committed_is_never_removed() -> None:
    node = Lone()
    node.core.receive("b", AppendEntries(1, 1, 0, 3, 0, entries(1, 1)))
    node.out()
    with pytest.raises(StateDiverged, match="index 3, which is committed here"):
        node.core.receive("c", AppendEntries(2, 1, 0, 3, 0, entries(1, 2)))


def test_commit_stays_within_what_is_known_to_match() -> None:
    node = Lone()
    node.core.receive("b", AppendEntries(1, 1, 0, 0, 0, entries(1, 1, 1)))
    # A new leader whose log may differ behind index 2 has committed up to 4.
    node.core.receive("c", AppendEntries(2, 2, 1, 4, 0))
    assert node.core.commit == 2


# -- 2 to 4: replies -------------------------------------------------------------------------------------------------


def test_a_stale_acknowledgement_of_an_older_term_counts_for_nothing() -> None:
    node = Lone()
    node.lead()
    first_term = node.core.term
    node.core.propose(b"w", lambda _value, _error: None)
    index = node.core.last_index
    node.sync()
    # It loses the lead and wins it again; the old acknowledgement was under way all that time.
    node.core.receive("c", AppendReply(first_term + 1, 0, False, 0))
    assert not node.core.is_leader
    node.lead()
    node.core.receive("b", AppendReply(first_term, 0, True, index))
    assert node.core.commit < index


def test_a_duplicated_vote_is_one_vote() -> None:
    node = Lone(FIVE)
    node.now += 2
    node.core.tick()
    node.core.tick()
    for voter in ("b", "c"):
        node.core.receive(voter, PreVoteReply(1, True))
    node.out()
    node.sync()
    for _ in range(3):
        node.core.receive("b", VoteReply(1, True))
    assert not node.core.is_leader
    node.core.receive("c", VoteReply(1, True))
    assert node.core.is_leader


def test_a_stale_leader_is_told_of_the_higher_term() -> None:
    node = Lone()
    node.core.receive("b", Heartbeat(5, 0, 1))
    node.out()
    node.core.receive("c", AppendEntries(3, 1, 0, 0, 0))
    node.core.receive("c", Heartbeat(3, 0, 1))
    assert [(peer, message.term) for peer, message in node.out()] == [("c", 5), ("c", 5)]
    leader = Lone()
    leader.lead()
    leader.core.receive("b", HeartbeatReply(9, 0))
    assert not leader.core.is_leader
    assert leader.core.term == 9


# -- 5: pre-vote and stickiness --------------------------------------------------------------------------------------


def test_a_returning_server_deposes_no_one() -> None:
    """Cut off for long, it asks first, so neither its own term nor anyone's has grown."""
    node = Lone()
    term = node.core.term
    for _ in range(10):
        node.now += 2
        node.core.tick()
    assert node.core.term == term
    assert {type(message) for _, message in node.out()} == {PreVote}


def test_a_voter_that_hears_a_leader_helps_no_one_else() -> None:
    node = Lone()
    node.core.receive("b", Heartbeat(1, 0, 1))
    node.out()
    node.now += CONFIG.election_timeout_min_s - 0.01
    node.core.receive("c", PreVote(2, 9, 1))
    node.core.receive("c", RequestVote(2, 9, 1))
    assert node.out() == []
    assert node.core.term == 1
    # A transfer is the leader's own wish.
    node.core.receive("c", RequestVote(2, 9, 1, True))
    assert node.out() == [("c", VoteReply(2, True))]


def test_a_restarted_server_keeps_the_promise_it_may_have_given() -> None:
    log = MemoryLog()
    first = Lone(log=log)
    first.core.receive("b", Heartbeat(1, 0, 1))
    second = Lone(log=log)
    second.core.receive("c", RequestVote(2, 9, 1))
    assert second.out() == []
    second.now += CONFIG.election_timeout_min_s
    second.core.receive("c", RequestVote(2, 9, 1))
    assert second.out() == [("c", VoteReply(2, True))]


def test_the_lease_ends_before_any_other_can_be_elected() -> None:
    node = Lone()
    node.lead()
    asked = node.now
    round_ = max(message.round for _, message in node.sent(Heartbeat))
    node.core.receive("b", AppendReply(node.core.term, 0, True, node.core.last_index))
    node.now += 0.1
    node.core.receive("b", HeartbeatReply(node.core.term, round_))
    assert node.core.lease_valid()
    # It counts from when the round began, not from when the answer came.
    node.now = asked + CONFIG.lease_s + 0.001
    assert not node.core.lease_valid()
    assert CONFIG.lease_s < CONFIG.election_timeout_min_s


def test_a_transfer_gives_up_the_lease_for_good() -> None:
    node = Lone()
    node.lead()
    round_ = max(message.round for _, message in node.sent(Heartbeat))
    node.core.receive("b", AppendReply(node.core.term, round_, True, node.core.last_index))
    node.out()
    assert node.core.lease_valid()
    node.core.transfer("b", lambda _error: None)
    assert [peer for peer, _ in node.sent(TimeoutNow)] == ["b"]
    assert not node.core.lease_valid()
    with pytest.raises(TooBusy):
        node.core.propose(b"w", lambda _value, _error: None)


# -- 6: quorum check -------------------------------------------------------------------------------------------------


def test_a_leader_without_a_quorum_steps_down_within_one_election_timeout() -> None:
    node = Lone()
    node.lead()
    lost: list[Any] = []
    node.core.propose(b"w", lambda value, error: lost.append(error))
    heard = node.now
    while node.core.is_leader and node.now < heard + 5:
        node.now += 0.05
        node.core.tick()
    assert node.now - heard <= CONFIG.election_timeout_max_s + 0.1
    assert "retry with the same request id" in str(lost[0])
    with pytest.raises(NotLeader):
        node.core.propose(b"w", lambda _value, _error: None)


# -- 7 and 12: durability --------------------------------------------------------------------------------------------


def test_nothing_counts_before_it_is_synced() -> None:
    node = Lone(Members.of([Member("a", "a")]))
    node.core.tick()
    node.out()
    assert not node.core.is_leader, "its own vote is not on disk yet"
    node.sync()
    assert node.core.is_leader
    node.sync()
    done: list[Any] = []
    node.core.propose(b"w", lambda value, error: done.append(value))
    node.out()
    assert done == []
    node.sync()
    node.out()
    assert done == [b"w"]


def test_promises_are_held_and_the_rest_is_not() -> None:
    node = Lone()
    node.core.receive("b", AppendEntries(1, 1, 0, 0, 0, entries(1)))
    node.core.receive("b", Heartbeat(1, 0, 1))
    box = node.core.take_outbox()
    assert [type(message) for _, message in box.held] == [AppendReply]
    assert [type(message) for _, message in box.free] == [HeartbeatReply]
    node.now += 5
    node.core.receive("c", RequestVote(2, 9, 9))
    assert [type(message) for _, message in node.core.take_outbox().held] == [VoteReply]


# -- commit ----------------------------------------------------------------------------------------------------------


def test_an_older_terms_entry_is_not_committed_by_counting() -> None:
    """Figure 8 of the paper."""
    log = MemoryLog()
    log.add(NO_OP, 0, 0)
    log.add(NO_OP, 1, 0)
    log.setCurrentTerm(3, None)
    node = Lone(log=log)
    node.core.receive("b", AppendEntries(3, 1, 0, 0, 0, entries(2)))
    node.core._memberships = [(0, THREE)]
    node.out()
    node.sync()
    node.lead()
    noop = node.core.last_index
    node.core.receive("b", AppendReply(node.core.term, 0, True, noop - 1))
    assert node.core.commit == 0
    node.core.receive("b", AppendReply(node.core.term, 0, True, noop))
    assert node.core.commit == noop


def test_reads_wait_for_the_leaders_own_entry_and_a_round_after_they_came() -> None:
    node = Lone()
    node.lead()
    answers: list[int | None] = []
    round_ = max(message.round for _, message in node.sent(Heartbeat))
    node.core.read(lease=True, done=answers.append)
    node.core.receive("b", HeartbeatReply(node.core.term, round_))
    assert answers == []
    node.core.receive("b", AppendReply(node.core.term, round_, True, node.core.last_index))
    later = max(message.round for _, message in node.sent(Heartbeat))
    assert later > round_
    node.core.receive("b", HeartbeatReply(node.core.term, round_))
    assert answers == []
    node.core.receive("b", HeartbeatReply(node.core.term, later))
    assert answers == [node.core.commit]


# -- membership ------------------------------------------------------------------------------------------------------


def test_membership_changes_one_at_a_time() -> None:
    node = Lone()
    node.lead()
    with pytest.raises(MembershipRefused, match="under way"):
        node.core.change_members(lambda members: members.without("c"), lambda _value, _error: None)
    node.core.receive("b", AppendReply(node.core.term, 0, True, node.core.last_index))
    with pytest.raises(MembershipRefused, match="one voter"):
        node.core.change_members(lambda members: members.without("b").without("c"), lambda _value, _error: None)
    node.core.change_members(lambda members: members.without("c"), lambda _value, _error: None)
    with pytest.raises(MembershipRefused, match="under way"):
        node.core.change_members(lambda members: members.without("b"), lambda _value, _error: None)


def test_the_last_voter_cannot_be_removed() -> None:
    assert "needs a voter" in str(Members.of([Member("a")]).refuse_step(Members()))


def test_a_membership_that_is_taken_back_counts_no_more() -> None:
    node = Lone()
    node.lead()
    node.core.receive("b", AppendReply(node.core.term, 0, True, node.core.last_index))
    node.sync()
    node.out()
    committed = node.core.last_index
    node.core.change_members(lambda members: members.put(Member("d", "d", False)), lambda _value, _error: None)
    assert node.core.members.get("d") is not None
    node.core.receive("c", AppendEntries(9, committed, node.core.term, 0, 0, entries(9)))
    assert node.core.members == THREE


def test_a_server_that_knows_no_membership_votes_for_no_one() -> None:
    """It may be one that lost its disk, and with it the vote it gave."""
    node = Lone(Members())
    node.core.receive("b", PreVote(1, 9, 9))
    node.core.receive("b", RequestVote(1, 9, 9))
    node.now += 10
    node.core.tick()
    assert node.out() == []


# -- bounds and wire -------------------------------------------------------------------------------------------------


def test_proposals_are_bounded() -> None:
    config = RaftConfig(
        heartbeat_s=0.1, election_timeout_min_s=0.5, election_timeout_max_s=1.0, proposals_max=2, command_bytes_max=10
    )
    node = Lone(config=config)
    node.lead()
    with pytest.raises(CommandTooLarge):
        node.core.propose(b"x" * 11, lambda _value, _error: None)
    node.core.propose(b"x", lambda _value, _error: None)
    node.core.propose(b"x", lambda _value, _error: None)
    with pytest.raises(TooBusy):
        node.core.propose(b"x", lambda _value, _error: None)


def test_snapshot_chunks_that_overtake_one_another_are_kept_within_a_bound() -> None:
    node = Lone()
    members = encode_members(THREE)

    def chunk(number: int, *, last: bool = False) -> int:
        node.core.receive("b", InstallSnapshot(3, 9, 2, members, number, last, 1, bytes([number]) * 3))
        return int(node.sent(SnapshotReply)[-1][1].next_chunk)

    assert chunk(0) == 1
    assert chunk(2, last=True) == 1
    assert chunk(1 + node.core.config.snapshot_chunks_inflight) == 1
    assert chunk(1) == 3
    assert node.core.install is not None
    assert (node.core.install.index, node.core.install.chunks) == (9, 3)
    node.core.install.writer.commit()
    assert node.core.install.writer._meta.chunks == [b"\0\0\0", b"\1\1\1", b"\2\2\2"]


def test_a_snapshot_that_the_log_has_overtaken_is_not_put_in_place() -> None:
    """Entries that were slow on their way came after all: the state would go back, and its readers with it."""
    node = Lone()
    members = encode_members(THREE)
    node.core.receive("b", InstallSnapshot(3, 3, 3, members, 0, False, 1, b"old"))
    node.core.receive("b", AppendEntries(3, 1, 0, 5, 1, entries(3, 3, 3, 3)))
    node.sync()
    node.out()
    assert node.core.applied == 5
    node.core.receive("b", InstallSnapshot(3, 3, 3, members, 1, True, 1, b"state"))
    assert node.core.install is None
    assert node.core.applied == 5
    assert node.sent(SnapshotReply)[-1][1].done, "the leader goes on with entries"
    node.core.receive("b", AppendEntries(3, 5, 3, 6, 1, entries(3)))
    node.out()
    assert node.core.applied == 6


def test_entries_that_come_while_a_snapshot_is_put_in_place_do_not_go_lost_behind_it() -> None:
    node = Lone()
    members = encode_members(THREE)
    node.core.receive("b", InstallSnapshot(3, 3, 3, members, 0, True, 1, b"state"))
    install = node.core.install
    assert install is not None
    node.core.receive("b", AppendEntries(3, 1, 0, 5, 1, entries(3, 3, 3, 3)))
    node.out()
    assert node.core.applied <= 1, "nothing is applied to a state that is being replaced"
    install.writer.commit()
    node.core.installed()
    node.sync()
    node.out()
    assert node.core.applied == 3
    node.core.receive("b", AppendEntries(3, 3, 3, 5, 1, entries(3, 3)))
    node.out()
    assert node.core.applied == 5


def test_a_follower_far_behind_is_sent_what_it_can_take_in_one_turn_of_its_loop() -> None:
    config = RaftConfig(
        heartbeat_s=0.1,
        election_timeout_min_s=0.5,
        election_timeout_max_s=1.0,
        append_entries_max=10,
        inflight_entries_max=40,
    )
    node = Lone(config=config)
    node.lead()
    for _ in range(200):
        node.core.propose(b"x", lambda _value, _error: None)
    node.out()
    node.core.receive("b", AppendReply(node.core.term, 0, True, 1))

    def sent() -> int:
        return sum(len(message.entries) for peer, message in node.sent(AppendEntries) if peer == "b")

    assert sent() == 40
    assert sent() == 0
    node.core.receive("b", AppendReply(node.core.term, 0, True, 11))
    assert sent() == 10


def test_a_silent_follower_is_sent_a_bounded_amount() -> None:
    config = RaftConfig(
        heartbeat_s=0.1, election_timeout_min_s=0.5, election_timeout_max_s=1.0, inflight_messages_max=3
    )
    node = Lone(config=config)
    node.lead()
    node.core.receive("b", AppendReply(node.core.term, 0, True, node.core.last_index))
    node.out()
    sent = 0
    for _ in range(20):
        node.core.propose(b"x", lambda _value, _error: None)
        sent += len(node.sent(AppendEntries))
    assert sent == 3


@pytest.mark.parametrize(("size", "kept"), [(1, 20), (100, 4)])
def test_what_stays_behind_a_snapshot_is_bounded_in_entries_and_in_bytes(size: int, kept: int) -> None:
    config = RaftConfig(
        heartbeat_s=0.1,
        election_timeout_min_s=0.5,
        election_timeout_max_s=1.0,
        trailing_entries=20,
        trailing_bytes=450,
    )
    node = Lone(config=config)
    commands = tuple((1, REGULAR + b"x" * (size - 1)) for _ in range(60))
    node.core.receive("b", AppendEntries(1, 1, 0, 51, 0, commands))
    node.out()
    node.core.compact(51)
    # The first entry that is kept only tells its term.
    assert 51 - node.core.first_index == kept
    assert node.core.last_index == 61


def test_an_own_snapshot_that_ends_after_a_newer_one_came_takes_nothing_from_the_log() -> None:
    """The leader's snapshot was put in place while this server still wrote one of its own, of an older state."""
    config = RaftConfig(
        heartbeat_s=0.1,
        election_timeout_min_s=0.5,
        election_timeout_max_s=1.0,
        trailing_entries=0,
        trailing_bytes=450,
    )
    node = Lone(config=config)
    node.core.receive("b", InstallSnapshot(1, 40, 1, encode_members(THREE), 0, True, 1, b"state"))
    install = node.core.install
    assert install is not None
    install.writer.commit()
    node.core.installed()
    commands = tuple((1, REGULAR + b"x" * 99) for _ in range(60))
    node.core.receive("b", AppendEntries(1, 40, 1, 42, 0, commands))
    node.out()
    node.core.compact(20)
    assert node.core.first_index == 40
    assert node.core.applied == 42


@pytest.mark.parametrize(
    "message",
    [
        PreVote(1, 2, 3),
        PreVoteReply(1, True),
        RequestVote(4, 5, 6, True),
        VoteReply(1, False),
        Heartbeat(1, 2, 3),
        HeartbeatReply(1, 2),
        AppendEntries(1, 2, 3, 4, 5, ((1, b"\x00x"), (2, b"\x01"))),
        AppendReply(1, 2, False, 0, 3, 4, 5),
        TimeoutNow(7),
    ],
)
def test_messages_survive_the_wire(message: Message) -> None:
    assert decode_message(encode_message(message)) == message


@pytest.mark.parametrize(
    "data", [b"", b"\x80", b"\x92\x05\x01", b"\x94\x05\xff\x01\x01", b"\x91" * 5000, b"cos\nsystem\n"]
)
def test_bad_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(BadMessage, match="same version"):
        decode_message(data)
