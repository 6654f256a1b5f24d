"""RaftCore: one server's Raft, sans I/O, in the manner of etcd's raft library, with pysyncobj's state inside.

The caller moves everything: it calls `tick` at `next_deadline`, hands in messages with `receive`, takes messages out
with `take_outbox`, syncs the journal, and tells so with `synced`. Nothing here sleeps, blocks, opens or draws from a
global clock or random source, so the same code runs in a server and in the deterministic simulation.

    raft_driven.py       pysyncobj's state, driven from outside
    raft_election.py     who leads
    raft_replication.py  the log, commit, apply, reads
    raft_install.py      snapshots on the wire
    raft.py              the public face: dispatch, time, membership, leadership transfer
"""

from __future__ import annotations

import random
from collections.abc import Callable

from raftstate.errors import MembershipRefused, TooBusy, TransferFailed
from raftstate.messages import (
    AppendEntries,
    AppendReply,
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
)
from raftstate.raft_config import RaftConfig
from raftstate.raft_driven import prepare_log
from raftstate.raft_election import Outbox
from raftstate.raft_install import Installing, members_of
from raftstate.raft_members import Member, Members
from raftstate.raft_ports import Apply, Log, Outside, Snapshots
from raftstate.raft_reads import ReadDone
from raftstate.raft_replication import ProposeDone

__all__ = ["Member", "Members", "Outbox", "RaftConfig", "RaftCore"]

TransferDone = Callable[[TransferFailed | None], None]


class RaftCore(Installing):
    """One server's Raft.

    `log` is the journal, `snapshots` the store whose newest snapshot the state machine was already restored from;
    `apply(index, data)` is the state machine. `bootstrap` is the first membership of a new cluster; it is ignored
    once there is a log, and empty for a server that joins an existing cluster. `silent_since`: since when, by
    `clock`, no earlier process of this server can have promised anything: this one has had the lock on its data.
    """

    def __init__(
        self,
        server: str,
        log: Log,
        snapshots: Snapshots,
        apply: Apply,
        *,
        bootstrap: Members,
        clock: Callable[[], float],
        rng: random.Random,
        config: RaftConfig | None = None,
        silent_since: float | None = None,
    ) -> None:
        self._transfer: tuple[str, float, TransferDone] | None = None
        """(target, give up at, done)"""
        self._timeout_now_sent = False
        self._apply_waiters: list[tuple[int, ReadDone]] = []
        """Confirmed reads that wait for the state machine."""
        snapshot = snapshots.latest()
        prepare_log(log, snapshot, bootstrap)
        base = (snapshot.index, members_of(snapshot)) if snapshot else (0, Members())
        timings = config or RaftConfig()
        super().__init__(Outside(server, log, snapshots, apply, timings, clock, rng, base, silent_since))

    # -- time ------------------------------------------------------------------------------------------------------

    def tick(self) -> None:
        """Do what is due. Call it at `next_deadline`; earlier or later does no harm."""
        now = self.enter()
        if not self.is_leader:
            self._tick_follower(now)
            return
        if now - self._quorum_heard(now) > self.config.election_timeout_max_s:
            self._step_down(self.term, now)  # a leader without a quorum must not go on believing that it leads
            return
        if self._notice_at is not None and now >= self._notice_at:
            self._tell_commit(now)
        if now >= self._heartbeat_at:
            self._beat(now)
            for peer, progress in self._progress.items():
                if progress.snapshot is not None:
                    self._nudge_snapshot(peer, progress)
            self._promote_learner()
        if self._transfer is not None and now >= self._transfer[1]:
            self._end_transfer(TransferFailed(f"{self._transfer[0]!r} did not take over in time: try again"))

    def next_deadline(self) -> float:
        """When `tick` has something to do, by this core's clock."""
        if not self.is_leader:
            return self._deadline
        return self._heartbeat_at if self._notice_at is None else min(self._heartbeat_at, self._notice_at)

    def _quorum_heard(self, now: float) -> float:
        def heard(server: str) -> float:
            if server == self.id:
                return now
            progress = self._progress.get(server)
            return progress.heard_at if progress else 0.0

        return self.members.quorum_value(heard)

    # -- messages --------------------------------------------------------------------------------------------------

    def receive(self, peer: str, message: Message) -> None:
        """Take in a message from the server named `peer` (the transport has authenticated that name)."""
        now = self.enter()
        match message:
            case AppendEntries():
                self._on_append(peer, message, now)
            case Heartbeat():
                self._on_heartbeat(peer, message, now)
            case InstallSnapshot():
                self._on_install(peer, message, now)
            case AppendReply() | HeartbeatReply() | SnapshotReply():
                if message.term > self.term:
                    self._step_down(message.term, now)
                elif message.term == self.term and self.is_leader:
                    self._on_reply(peer, message, now)
            case PreVote():
                self._on_pre_vote(peer, message, now)
            case PreVoteReply():
                self._on_pre_vote_reply(peer, message, now)
            case RequestVote():
                self._on_request_vote(peer, message, now)
            case VoteReply():
                self._on_vote_reply(peer, message, now)
            case TimeoutNow():
                self._on_timeout_now(peer, message, now)

    def _on_reply(self, peer: str, message: AppendReply | HeartbeatReply | SnapshotReply, now: float) -> None:
        match message:
            case AppendReply():
                self._on_append_reply(peer, message, now)
            case HeartbeatReply():
                self._on_heartbeat_reply(peer, message, now)
            case SnapshotReply():
                self._on_snapshot_reply(peer, message, now)
        self._finish_transfer()

    def peer_lost(self, peer: str) -> None:
        """The connection to a peer broke, so what was under way to it may be lost."""
        progress = self._progress.get(peer)
        if progress is not None:
            progress.lost()

    @property
    def silent(self) -> bool:
        """Whether `take_outbox` would hand over nothing."""
        if self._free or self._held:
            return False
        return not (self.is_leader and (self._fresh or (self._reads is not None and self._reads.wants_round)))

    @property
    def at_rest(self) -> bool:
        """Whether this server leads and has nothing to send or to apply."""
        return self.is_leader and self.silent and self.applied >= self.commit

    def take_outbox(self) -> Outbox:
        """Hand over what is to be sent; see `Outbox` for when."""
        if self.is_leader:
            if self._reads is not None and self._reads.wants_round:
                self._beat(self.enter())
            if self._fresh:
                self.enter()
                self._send_appends()
        out = Outbox(self._free, self._held, self.term)
        self._free, self._held = [], []
        return out

    def synced(self, term: int) -> None:
        """Every journal write pending when an Outbox of this `term` was taken is durable now."""
        self.enter()
        if term == self.term and self.voted_for == self.id:
            self._count_vote(self.id)
        if self.is_leader:
            self._advance_commit()

    # -- membership ------------------------------------------------------------------------------------------------

    def change_members(self, change: Callable[[Members], Members], done: ProposeDone) -> None:
        """Propose the membership that `change` makes of the present one; `done` comes when it is committed.

        Raises NotLeader, or MembershipRefused if another change is under way or the step is not allowed.
        """
        self.enter()
        self._refuse_unless_leading()
        if self.commit < self.noop_index or self.membership_index > self.commit:
            raise MembershipRefused("another change of membership is still under way: wait for it and try again")
        after = change(self.members)
        why = self.members.refuse_step(after)
        if why is not None:
            raise MembershipRefused(why)
        self._append_members(after, done)

    def _promote_learner(self) -> None:
        """Give the vote to a learner that has caught up, one at a time."""
        if self.commit < self.noop_index or self.membership_index > self.commit or self._transfer is not None:
            return
        for member in self.members.all:
            progress = self._progress.get(member.id)
            if member.voter or progress is None or progress.probing or progress.snapshot is not None:
                continue
            if progress.match and progress.match + self.config.learner_lag_max >= self.last_index:
                voter = Member(member.id, member.address, True)
                self._append_members(self.members.put(voter), lambda _value, _error: None)
                return

    def _after_apply(self) -> None:
        if self._apply_waiters:
            waiters, self._apply_waiters = self._apply_waiters, []
            for index, done in waiters:
                if index <= self.applied:
                    done(index)
                else:
                    self._apply_waiters.append((index, done))
        if self.is_leader:
            if not self._is_voter and self.membership_index <= self.commit:
                self._step_down(self.term, self._clock())  # our own removal is committed
                return
            self._finish_transfer()

    # -- leadership transfer ---------------------------------------------------------------------------------------

    def transfer(self, to: str | None, done: TransferDone) -> None:
        """Hand leadership to `to`, or to the voter whose log is longest. New proposals are refused meanwhile.

        `done(None)` comes when this server no longer leads. Raises NotLeader or TransferFailed.
        """
        now = self.enter()
        self._refuse_unless_leading()
        others = [server for server in self.members.voters if server != self.id]
        if self._transfer is not None:
            raise TransferFailed("leadership is being transferred already: wait for it")
        if to is None:
            live = [peer for peer in others if now - self._progress[peer].heard_at < 3 * self.config.heartbeat_s]
            to = max(live, key=lambda peer: self._progress[peer].match, default=None)
        if to is None or to not in others:
            raise TransferFailed(f"no other voter {to or 'is reachable'}: see `lictor operator raft list-peers`")
        self._transfer = (to, now + self.config.election_timeout_min_s * 2, done)
        self._timeout_now_sent = False
        self._finish_transfer()

    @property
    def transferring(self) -> bool:
        """Whether leadership is being handed over."""
        return self._transfer is not None

    def propose(self, command: bytes, done: ProposeDone) -> int:
        """As `Replication.propose`; raises TooBusy also while leadership is handed over."""
        if self._transfer is not None and self.is_leader:
            raise TooBusy("leadership is being handed over: try again after a short wait")
        return super().propose(command, done)

    def _finish_transfer(self) -> None:
        if self._transfer is None or not self.is_leader or self._timeout_now_sent:
            return
        target = self._transfer[0]
        if target not in self._progress:
            self._end_transfer(TransferFailed(f"{target!r} is no member any more"))
        elif self._progress[target].match == self.last_index == self.applied:
            # From here on another leader may be elected at any time, even after a give-up: no more lease this term.
            self._lease_given_up = self._timeout_now_sent = True
            self._free.append((target, TimeoutNow(self.term)))

    def _end_transfer(self, error: TransferFailed | None) -> None:
        transfer, self._transfer = self._transfer, None
        if transfer is not None:
            transfer[2](error)

    def _on_leadership_lost(self) -> None:
        super()._on_leadership_lost()
        self._end_transfer(None)

    # -- reads -----------------------------------------------------------------------------------------------------

    def read(self, *, lease: bool, done: ReadDone) -> None:
        """Have `done(index)` called once the state machine may be read; `done(None)` if leadership was lost.

        With `lease` a valid lease answers without a quorum round. Raises NotLeader.
        """
        self.enter()
        self._refuse_unless_leading()

        def confirmed(index: int | None) -> None:
            if index is None or index <= self.applied:
                done(index)
            else:
                self._apply_waiters.append((index, done))

        if lease and self.lease_valid():
            confirmed(self.commit)
        else:
            self.read_index(confirmed)

    # -- looking in ------------------------------------------------------------------------------------------------

    def lag(self) -> dict[str, int]:
        """How many entries each other member still lacks; empty unless leading."""
        return {peer: self.last_index - progress.match for peer, progress in self._progress.items()}
