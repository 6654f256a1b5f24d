"""Elections: pre-vote, leader stickiness, votes that are durable before they count.

Rules are the Raft paper's 5.2 and 5.4.1, pre-vote is thesis 9.6; stickiness (a voter that has heard from a leader
within the minimum election timeout helps no other candidate) is thesis 4.2.3 and also what the read lease rests on.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from raftstate.messages import Message, PreVote, PreVoteReply, RequestVote, TimeoutNow, VoteReply
from raftstate.raft_driven import CANDIDATE, FOLLOWER, LEADER, MEMBERS, Driven
from raftstate.raft_members import Members, decode_members
from raftstate.raft_ports import Outside

NEVER = float("-inf")


@dataclass
class Outbox:
    """What `take_outbox` hands to the driver.

    `free` promises nothing about this server's disk and may be sent at once. `held` may be sent only when all
    journal writes pending at this moment are synced; then `synced` must be called with `term`.
    """

    free: list[tuple[str, Message]] = field(default_factory=list)
    held: list[tuple[str, Message]] = field(default_factory=list)
    term: int = 0


class Election(Driven):
    """Who leads: campaigning, voting, following, stepping down."""

    def __init__(self, outside: Outside) -> None:
        self.config = outside.config
        self._free: list[tuple[str, Message]] = []
        self._held: list[tuple[str, Message]] = []
        self._pre_votes: set[str] | None = None
        """Who granted the pre-vote under way."""
        self._votes: set[str] = set()
        """Who voted for us in this term; a set, because a message may be delivered twice."""
        self._memberships: list[tuple[int, Members]] = [outside.base]
        """(index, membership from there on), oldest first; the last one counts."""
        self._slack_given = False
        self._heard_at = NEVER
        super().__init__(outside.server, outside.log, outside.clock, outside.rng, outside.base[0])
        self._min_timeout_s = self.config.election_timeout_min_s
        self._max_timeout_s = self.config.election_timeout_max_s
        for command, index, _ in self.entries(outside.base[0] + 1, len(outside.log)):
            if command[:1] == MEMBERS:
                self._memberships.append((index, decode_members(command[1:])))
        now = self.enter()
        # A promise not to vote may have been given just before a crash; only a new server has given none.
        since = now if outside.silent_since is None else min(now, outside.silent_since)
        self._heard_at = since if self.term or self.first_index else NEVER
        # Servers that start together have waited long enough; a leader that lives is protected by the pre-vote.
        first_s = self._rng.uniform(2 * self.config.heartbeat_s, self.config.election_timeout_min_s)
        self._deadline = now if self.members.voters == (self.id,) else now + first_s

    @property
    def members(self) -> Members:
        """The membership that counts: the newest in the log, committed or not."""
        return self._memberships[-1][1]

    @property
    def heard_at(self) -> float:
        """When a leader was last heard, by this core's clock; minus infinity if never."""
        return self._heard_at

    @property
    def _is_voter(self) -> bool:
        member = self.members.get(self.id)
        return member is not None and member.voter

    def _to_voters(self, message: Message, lane: list[tuple[str, Message]]) -> None:
        lane.extend((voter, message) for voter in self.members.voters if voter != self.id)

    def _on_leadership_lost(self) -> None:
        raise NotImplementedError

    # -- candidate -------------------------------------------------------------------------------------------------

    def _tick_follower(self, now: float) -> None:
        if now < self._deadline:
            return
        if not self._is_voter:
            self._deadline = now + self._election_timeout()
            return
        if now - self._deadline > self.config.heartbeat_s and not self._slack_given and self._heard_at != NEVER:
            # We were stopped (SIGSTOP, a busy machine), so silence proves nothing: first read what has come in.
            self._slack_given = True
            self._deadline = now + self.config.heartbeat_s * self._rng.uniform(1, 2)
            return
        self._set_role(FOLLOWER)
        self._set_leader(None)
        self._votes = set()
        self._pre_votes = {self.id}
        self._deadline = now + self._election_timeout()
        if self.members.is_quorum(self._pre_votes):
            self._campaign(now, transfer=False)
        else:
            self._to_voters(PreVote(self.term + 1, self.last_index, self.last_term), self._free)

    def _campaign(self, now: float, *, transfer: bool) -> None:
        self._pre_votes = None
        self._set_term(self.term + 1, self.id)
        self._set_role(CANDIDATE)
        self._set_leader(None)
        # Our own vote is counted by `synced`, like anyone's: once it is durable.
        self._votes = set()
        self._deadline = now + self._election_timeout()
        self._to_voters(RequestVote(self.term, self.last_index, self.last_term, transfer), self._held)

    def _count_vote(self, voter: str) -> None:
        self._votes.add(voter)
        if self.role == CANDIDATE and self.members.is_quorum(self._votes):
            self._lead()

    def _on_pre_vote_reply(self, peer: str, message: PreVoteReply, now: float) -> None:
        if not message.granted:
            if message.term > self.term:
                self._step_down(message.term, now)
            return
        if self._pre_votes is not None and message.term == self.term + 1:
            self._pre_votes.add(peer)
            if self.members.is_quorum(self._pre_votes):
                self._campaign(now, transfer=False)

    def _on_vote_reply(self, peer: str, message: VoteReply, now: float) -> None:
        if message.term > self.term:
            self._step_down(message.term, now)
        elif message.granted and message.term == self.term and self.role == CANDIDATE:
            self._count_vote(peer)

    def _on_timeout_now(self, peer: str, message: TimeoutNow, now: float) -> None:
        if message.term == self.term and peer == self.leader and self._is_voter and not self.is_leader:
            self._campaign(now, transfer=True)

    # -- voter -----------------------------------------------------------------------------------------------------

    def _has_live_leader(self, now: float) -> bool:
        return self.is_leader or now - self._heard_at < self.config.election_timeout_min_s

    def _is_up_to_date(self, message: PreVote | RequestVote) -> bool:
        return (message.last_term, message.last_index) >= (self.last_term, self.last_index)

    def _on_pre_vote(self, peer: str, message: PreVote, now: float) -> None:
        if message.term <= self.term:
            self._free.append((peer, PreVoteReply(self.term, False)))
        elif self.members.all and not self._has_live_leader(now) and self._is_up_to_date(message):
            self._free.append((peer, PreVoteReply(message.term, True)))

    def _on_request_vote(self, peer: str, message: RequestVote, now: float) -> None:
        if not self.members.all:
            return  # not yet told who votes: this server may be one that lost its disk and its vote with it
        if message.term > self.term:
            if not message.transfer and self._has_live_leader(now):
                return
            self._step_down(message.term, now)
        granted = (
            message.term == self.term
            and self.role == FOLLOWER
            and self.leader is None
            and self.voted_for in (None, peer)
            and self._is_up_to_date(message)
        )
        if granted:
            if self.voted_for is None:
                self._set_term(self.term, peer)
            self._pre_votes = None
            self._deadline = now + self._election_timeout()
        self._held.append((peer, VoteReply(self.term, granted)))

    # -- follower --------------------------------------------------------------------------------------------------

    def _follow(self, peer: str, term: int, now: float) -> bool:
        """Accept `peer` as the leader of `term`. False if the term is stale: it must be told ours."""
        if term < self.term or (self.is_leader and term == self.term):
            return False
        if term > self.term or self.role != FOLLOWER:
            self._step_down(term, now)
        if self.leader != peer:
            self._set_leader(peer)
        self._pre_votes = None
        self._slack_given = False
        self._heard_at = now
        self._deadline = now + self._election_timeout()
        return True

    def _step_down(self, term: int, now: float) -> None:
        """Be a follower in `term`, of no one yet."""
        led = self.role == LEADER
        if term > self.term:
            self._set_term(term, None)
        self._pre_votes = None
        self._votes = set()
        self._set_leader(None)
        if self.role != FOLLOWER:
            self._set_role(FOLLOWER)
            self._deadline = now + self._election_timeout()
        if led:
            self._on_leadership_lost()
