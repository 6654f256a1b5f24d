"""Replication: appends in a pipeline, matching without truncating what matches, commit, apply, reads.

Raft paper 5.3 and 5.4.2; flow control as in etcd's raft. Replies carry a term and are dropped when it is not ours.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

from raftstate.errors import CommandTooLarge, NotLeader, RaftError, TooBusy, UnknownOutcome
from raftstate.messages import AppendEntries, AppendReply, Heartbeat, HeartbeatReply
from raftstate.raft_backup import RestoreInLog
from raftstate.raft_driven import MEMBERS, REGULAR, RESTORE
from raftstate.raft_election import Election
from raftstate.raft_members import Members, decode_members, encode_members
from raftstate.raft_ports import Outside
from raftstate.raft_progress import Progress
from raftstate.raft_reads import ReadDone, Reads

NEVER_TOLD = 1 << 62

ProposeDone = Callable[[Any, Any], None]
"""Called once with (value, None) when applied, or (None, error) when the outcome cannot be known here."""


def _no_restore(*_: object) -> NoReturn:
    raise RaftError("this state machine cannot be replaced by a backup")


class Replication(Election):
    """The log: the leader's sending of it, the follower's taking of it, and what becomes of committed entries."""

    def __init__(self, outside: Outside) -> None:
        self._apply = outside.apply
        self.backup = RestoreInLog(_no_restore, _no_restore)
        """Replaced by the driver if its state machine can be replaced."""
        self._progress: dict[str, Progress] = {}
        """Every other member's, while this server leads."""
        self._reads: Reads | None = None
        self._early_reads: list[ReadDone] = []
        """Reads that came before this leadership's no-op was committed."""
        self._heartbeat_at = 0.0
        self._notice_at: float | None = None
        """When followers that have had no append since are told of the commit index."""
        self._fresh = False
        """Whether the log has grown since appends were last sent."""
        self._waiting_bytes = 0
        self._waiting_count = 0
        self._lease_given_up = False
        self._told_since_start = NEVER_TOLD
        """What the leader says is committed, once what it says covers all that may have been applied here before."""
        self._installing = False
        """Whether a snapshot is being restored: nothing may be applied meanwhile."""
        super().__init__(outside)

    # -- leader: taking proposals ----------------------------------------------------------------------------------

    def propose(self, command: bytes, done: ProposeDone) -> int:
        """Put a command in the log; return its index. `done` comes when it is committed and applied here.

        Raises NotLeader, TooBusy or CommandTooLarge; then nothing was proposed.
        """
        self.enter()
        self._refuse_unless_leading()
        size = len(command)
        if size > self.config.command_bytes_max:
            raise CommandTooLarge(
                f"the command has {size} bytes, the bound is {self.config.command_bytes_max}: split it"
            )
        if (
            self._waiting_count >= self.config.proposals_max
            or self._waiting_bytes + size > self.config.proposal_bytes_max
        ):
            raise TooBusy(f"{self._waiting_count} writes wait for a quorum already: try again after a short wait")
        return self._propose(REGULAR + command, done)

    def propose_restore(self, payload: bytes, done: ProposeDone) -> int:
        """Put a step of a restore in the log (`raft_backup.py`). Raises NotLeader."""
        self.enter()
        self._refuse_unless_leading()
        return self._propose(RESTORE + payload, done)

    def _refuse_unless_leading(self) -> None:
        if not self.is_leader:
            raise NotLeader(self.leader)

    def _propose(self, command: bytes, done: ProposeDone) -> int:
        size = len(command)
        self._waiting_count += 1
        self._waiting_bytes += size

        def settled(value: Any, error: Any) -> None:
            self._waiting_count -= 1
            self._waiting_bytes -= size
            done(value, error)

        index = self._append_own(command)
        self._wait_commit(index, settled)
        self._fresh = True
        return index

    def _lead(self) -> None:
        now = self._clock()
        self._reads = Reads(now)
        self._lease_given_up = False
        self._progress = {
            member.id: Progress(self.config, next=self.last_index + 1, heard_at=now)
            for member in self.members.all
            if member.id != self.id
        }
        super()._lead()
        self._beat(now)

    def _on_leadership_lost(self) -> None:
        reads, self._reads = self._reads, None
        self._progress = {}
        self._notice_at = None
        self._fresh = False
        lost_reads = self._early_reads + (reads.fail() if reads else [])
        self._early_reads = []
        for read in lost_reads:
            read(None)
        for done in self._take_all_waiting():
            done(
                None,
                UnknownOutcome("leadership was lost while the write was on its way: retry with the same request id"),
            )

    # -- leader: sending -------------------------------------------------------------------------------------------

    def _beat(self, now: float) -> None:
        """Begin a round: tell every member that the leader lives."""
        assert self._reads is not None
        self._heartbeat_at = now + self.config.heartbeat_s
        round_ = self._reads.begin_round(now)
        for peer, progress in self._progress.items():
            commit = min(self.commit, progress.match)
            progress.commit_told = max(progress.commit_told, commit)
            self._free.append((peer, Heartbeat(self.term, commit, round_)))
        if not self._progress:
            self._confirm_round()

    def _send_appends(self) -> None:
        self._fresh = False
        made: dict[int, tuple[AppendEntries, int]] = {}
        for peer in list(self._progress):
            self._send_append(peer, made)
        if self._notice_at is not None and not any(self._is_untold(told) for told in self._progress.values()):
            self._notice_at = None  # the appends have told it

    def _send_append(self, peer: str, made: dict[int, tuple[AppendEntries, int]] | None = None) -> None:
        """Send what this follower lacks and may get. `made`: messages of this moment with their sizes, by index.

        Followers that stand at the same index are sent one and the same message, which is then encoded once.
        """
        progress = self._progress[peer]
        last = self.last_index
        while progress.can_send() and (progress.probing or progress.next <= last):
            previous = progress.next - 1
            if made is None or (ready := made.get(previous)) is None:
                previous_term = self.term_at(previous)
                if previous_term is None:
                    self._begin_snapshot(peer, progress)
                    return
                entries, size = self._batch(progress.next)
                assert self._reads is not None
                message = AppendEntries(self.term, previous, previous_term, self.commit, self._reads.round, entries)
                if made is not None:
                    made[previous] = message, size
            else:
                message, size = ready
            end = previous + len(message.entries)
            self._free.append((peer, message))
            progress.commit_told = max(progress.commit_told, min(self.commit, end))
            progress.sent(end, size)

    def _batch(self, start: int) -> tuple[tuple[tuple[int, bytes], ...], int]:
        batch: list[tuple[int, bytes]] = []
        size = 0
        for command, _, term in self.entries(start, self.config.append_entries_max):
            size += len(command)
            if batch and size > self.config.append_bytes_max:
                size -= len(command)
                break
            batch.append((term, command))
        return tuple(batch), size

    def _begin_snapshot(self, peer: str, progress: Progress) -> None:
        raise NotImplementedError

    def _on_heard(self, peer: str, round_: int, now: float) -> Progress | None:
        """Note that a follower answered in our term. None if it is no member any more."""
        progress = self._progress.get(peer)
        if progress is None:
            return None
        progress.heard_at = now
        if round_ > progress.acked_round:
            progress.acked_round = round_
            self._confirm_round()
        return progress

    def _on_append_reply(self, peer: str, message: AppendReply, now: float) -> None:
        progress = self._on_heard(peer, message.round, now)
        if progress is None or progress.snapshot is not None:
            return
        if message.success:
            if progress.accepted(message.match):
                self._advance_commit()
            if not self.is_leader:
                return
            if progress.next <= self.last_index:
                self._send_append(peer)
            if self._notice_at is None and self._is_untold(progress):
                self._notice_at = now + self.config.commit_notice_s
        elif progress.refused(message.prev_index, self._agreement(message.hint_index, message.hint_term)):
            progress.probe()
            self._send_append(peer)

    def _agreement(self, hint_index: int, hint_term: int) -> int:
        """The greatest index up to the hint where our term is not above the follower's there."""
        index = min(hint_index, self.last_index)
        first = self.first_index
        while index > first and (self.term_at(index) or 0) > hint_term:
            index -= 1
        return index

    def _on_heartbeat_reply(self, peer: str, message: HeartbeatReply, now: float) -> None:
        progress = self._on_heard(peer, message.round, now)
        if progress is None or progress.snapshot is not None or not self.is_leader:
            return
        if progress.probing:
            if progress.probe_sent:
                progress.silent_rounds += 1
                if progress.silent_rounds < 2:
                    return
            progress.silent_rounds, progress.probe_sent = 0, False
            self._send_append(peer)
        elif progress.match < progress.next - 1:
            # It answers heartbeats but not appends: they were lost, or its disk is slow; one probe finds out.
            progress.silent_rounds += 1
            if progress.silent_rounds >= 3:
                progress.lost()
                self._send_append(peer)

    # -- leader: commit --------------------------------------------------------------------------------------------

    def _held_by(self, server: str) -> int:
        """Up to where a server's log is durable and equal to ours."""
        if server == self.id:
            # What other voters hold can be committed before our own disk has it; what only we hold cannot.
            return min(self.log.durable_index, self.last_index)
        progress = self._progress.get(server)
        return progress.match if progress else 0

    def _advance_commit(self) -> None:
        """Commit what a majority holds durably, if it is of this term (paper 5.4.2)."""
        if self.commit >= self.last_index:
            return
        index = int(self.members.quorum_value(self._held_by))
        if index > self.commit and self.term_at(index) == self.term:
            self._set_commit(index)
            if self._notice_at is None and self._progress:
                self._notice_at = self._clock() + self.config.commit_notice_s
            if self.commit >= self.noop_index and self._early_reads:
                early, self._early_reads = self._early_reads, []
                for done in early:
                    self.read_index(done)

    def _is_untold(self, progress: Progress) -> bool:
        return min(self.commit, progress.match) > progress.commit_told

    def _tell_commit(self, now: float) -> None:
        self._notice_at = None
        assert self._reads is not None
        for peer, progress in self._progress.items():
            if self._is_untold(progress):
                progress.commit_told = commit = min(self.commit, progress.match)
                self._free.append((peer, Heartbeat(self.term, commit, self._reads.round)))

    # -- leader: reads ---------------------------------------------------------------------------------------------

    def read_index(self, done: ReadDone) -> None:
        """Ask for a linearizable read; `done` gets the index to have applied before answering, or None.

        All reads asked for before the next round begins share it. Raises NotLeader.
        """
        self.enter()
        self._refuse_unless_leading()
        if self.commit < self.noop_index:
            self._early_reads.append(done)
        elif self.members.voters == (self.id,):
            done(self.commit)
        else:
            assert self._reads is not None
            self._reads.add(self.commit, done)

    def lease_valid(self) -> bool:
        """Whether no other leader can exist at this moment, and everything ever acknowledged is committed here."""
        now = self.enter()
        if not self.is_leader or self.commit < self.noop_index or self._lease_given_up:
            return False
        if self.members.voters == (self.id,):
            return True
        start = self._reads.lease_start() if self._reads else None
        return start is not None and now < start + self.config.lease_s

    def _confirm_round(self) -> None:
        reads = self._reads
        assert reads is not None
        for index, done in reads.confirm(self.members, self._echoed):
            done(index)

    def _echoed(self, server: str) -> int:
        if server == self.id:
            return self._reads.round if self._reads else 0
        progress = self._progress.get(server)
        return progress.acked_round if progress else 0

    # -- follower --------------------------------------------------------------------------------------------------

    def _on_heartbeat(self, peer: str, message: Heartbeat, now: float) -> None:
        if not self._follow(peer, message.term, now):
            self._free.append((peer, HeartbeatReply(self.term, message.round)))
            return
        # The leader never names more than it knows us to hold.
        self._follow_commit(min(message.commit, self.last_index), told=message.commit)
        self._free.append((peer, HeartbeatReply(self.term, message.round)))

    def _follow_commit(self, index: int, told: int) -> None:
        """Commit up to `index`, as far as our log is known to match; the leader has committed up to `told`."""
        if index > self.commit:
            self._set_commit(index)
        # Committed in its own term, all of earlier terms is below; and in its term it never says less than before.
        if self._told_since_start == NEVER_TOLD and told <= index and self.term_at(told) == self.term:
            self._told_since_start = told

    @property
    def caught_up(self) -> bool:
        """Whether the state is no older than any that an earlier process of this server may have shown."""
        if self.is_leader:
            return self.applied >= self.noop_index
        return self.applied >= self._told_since_start

    def _on_append(self, peer: str, message: AppendEntries, now: float) -> None:
        if not self._follow(peer, message.term, now):
            self._free.append((peer, AppendReply(self.term, message.round, False, 0)))
            return
        if self._installing:
            return
        previous, match = message.prev_index, message.prev_index + len(message.entries)
        first = self.first_index
        if previous >= first and self.term_at(previous) != message.prev_term:
            hint = self._hint(previous, message.prev_term)
            reply = AppendReply(self.term, message.round, False, 0, previous, hint, self.term_at(hint) or 0)
            self._free.append((peer, reply))
            return
        # Entries below `first` are committed, so they match.
        index = previous
        for term, command in message.entries:
            index += 1
            if index <= first:
                continue
            known = self.term_at(index)
            if known == term:
                continue
            if known is not None:
                self._truncate(index)
                self._forget_memberships(index)
            self.log.add(command, index, term)
            if command[:1] == MEMBERS:
                self._adopt_members(index, decode_members(command[1:]))
        match = max(match, first)
        self._follow_commit(min(message.commit, match), told=message.commit)
        self._held.append((peer, AppendReply(self.term, message.round, True, match)))

    def _hint(self, previous: int, previous_term: int) -> int:
        """The greatest index below `previous` that may match: its term is not above the leader's (never < commit)."""
        index = min(previous - 1, self.last_index)
        while index > self.commit and (self.term_at(index) or 0) > previous_term:
            index -= 1
        return max(index, self.first_index)

    # -- membership in the log -------------------------------------------------------------------------------------

    def _append_members(self, members: Members, done: ProposeDone) -> None:
        index = self._propose(MEMBERS + encode_members(members), done)
        self._adopt_members(index, members)

    def _adopt_members(self, index: int, members: Members) -> None:
        self._memberships.append((index, members))
        self._members_changed()

    def _forget_memberships(self, start: int) -> None:
        if self._memberships[-1][0] >= start:
            while len(self._memberships) > 1 and self._memberships[-1][0] >= start:
                self._memberships.pop()
            self._members_changed()

    def _members_changed(self) -> None:
        if not self.is_leader:
            return
        now = self._clock()
        wanted = {member.id for member in self.members.all if member.id != self.id}
        for gone in set(self._progress) - wanted:
            del self._progress[gone]
        for new in sorted(wanted - set(self._progress)):
            self._progress[new] = Progress(self.config, next=self.last_index + 1, heard_at=now)

    @property
    def membership_index(self) -> int:
        """Index of the log entry that made the present membership."""
        return self._memberships[-1][0]

    # -- applying --------------------------------------------------------------------------------------------------

    def apply_some(self) -> bool:
        """Apply up to `apply_batch` committed entries or `apply_bytes`; return whether more are left."""
        count = min(self.commit - self.applied, self.config.apply_batch)
        if count <= 0 or self._installing:
            return False
        self.enter()
        size = 0
        for command, index, term in self.entries(self.applied + 1, count):
            size += len(command)
            if size > self.config.apply_bytes and size > len(command):
                break
            value: Any = None
            if command[:1] == REGULAR:
                value = self._apply(index, command[1:])
            elif command[:1] == RESTORE:
                value = self.backup.apply(index, term, command[1:])
            self._set_applied(index)
            for waiting_term, done in self._take_waiting(index):
                if waiting_term == term:
                    done(value, None)
                else:
                    done(None, UnknownOutcome("another leader's entry took the write's place: retry it"))
        self._after_apply()
        return self.applied < self.commit

    def _after_apply(self) -> None:
        raise NotImplementedError
