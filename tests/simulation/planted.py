"""Bugs on purpose: each is something a Raft implementation, pysyncobj among them, can get wrong.

The simulation has to catch every one of them within `SEEDS` seeds; that shows that it can fail. What chance finds
too seldom (figure 8 of the paper, a stale reply of the same leader's older term, the lease without stickiness) is
played move by move in `tests/unit/test_raft_core.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from raftstate.messages import AppendEntries, RequestVote
from raftstate.raft import RaftCore
from raftstate.raft_backup import RestoreInLog
from raftstate.raft_driven import CANDIDATE
from raftstate.raft_election import Outbox
from tests.simulation.server import Bugs
from tests.support.raft_machine import RegisterMachine
from tests.support.simdisk import SimDisk, _SimFile

SEEDS = 400
"""A bug that no seed below this finds is not caught."""


class _LyingFile(_SimFile):
    def _flush(self) -> None:
        """A sync that writes nothing."""


class LyingDisk(SimDisk):
    def create(self, path: str, room: int = 0) -> _SimFile:
        file = super().create(path, room)
        return _LyingFile(self, file._inode, room)

    def open_append(self, path: str, room: int = 0) -> _SimFile:
        return _LyingFile(self, self._inode(path), room)


class AckBeforeQuorum(RaftCore):
    """The leader commits what it alone holds."""

    def _advance_commit(self) -> None:
        if self.last_term == self.term:
            self._set_commit(self.last_index)


class StaleLease(RaftCore):
    """Whoever believes that it leads answers default reads."""

    def lease_valid(self) -> bool:
        return self.is_leader


class LeaseWithoutNoop(RaftCore):
    """A new leader answers reads before it knows what is committed."""

    @property
    def noop_index(self) -> int:
        return 0


class LeaseKeptInTransfer(RaftCore):
    """A leader that has asked another to take over still trusts its lease."""

    @property
    def _lease_given_up(self) -> bool:
        return False

    @_lease_given_up.setter
    def _lease_given_up(self, _value: bool) -> None: ...


class TruncatesMatching(RaftCore):
    """pysyncobj: every append cuts off what stands behind its first entry, matching or not."""

    def _on_append(self, peer: str, message: AppendEntries, now: float) -> None:
        matches = message.term >= self.term and self.term_at(message.prev_index) == message.prev_term
        if matches and self.first_index <= message.prev_index < self.last_index:
            self._SyncObj__deleteEntriesFrom(message.prev_index + 1)
            self._forget_memberships(message.prev_index + 1)
        super()._on_append(peer, message, now)


class CountsVotesTwice(RaftCore):
    """pysyncobj: votes are counted, so that a duplicated message is one more vote."""

    def _count_vote(self, voter: str) -> None:
        self._votes.add(f"{voter} {len(self._votes)}")
        if self.role == CANDIDATE and 2 * len(self._votes) > len(self.members.voters):
            self._lead()


class VotesBeforeSync(RaftCore):
    """Votes and acknowledgements do not wait for the disk."""

    def take_outbox(self) -> Outbox:
        out = super().take_outbox()
        return Outbox(out.free + out.held, [], out.term)


class CountsItselfUnsynced(RaftCore):
    """The leader counts its own copy before its disk has it."""

    def _held_by(self, server: str) -> int:
        return self.last_index if server == self.id else super()._held_by(server)


class VotesForShorterLogs(RaftCore):
    """Does not ask whether the candidate has everything."""

    def _is_up_to_date(self, message: object) -> bool:
        return True


class CommitsBeyondMatch(RaftCore):
    """A follower commits up to the leader's index even where its log was not compared."""

    def _follow_commit(self, index: int, told: int) -> None:
        super()._follow_commit(self.last_index if index > self.commit else index, told)


class BelievesItsWholeLog(RaftCore):
    """A server that starts takes all that its journal holds for committed."""

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named)
        self._set_commit(self.last_index)


class ForgetsItsVote(RaftCore):
    """Votes again in the same term."""

    def _on_request_vote(self, peer: str, message: RequestVote, now: float) -> None:
        if message.term == self.term and not self.is_leader and self.role != CANDIDATE:
            self._SyncObj__votedForNodeId = None
        super()._on_request_vote(peer, message, now)


class UncheckedMembership(RaftCore):
    """A new membership is used although the one before is not committed: two steps at once."""

    def change_members(self, change: object, done: object) -> None:
        self._append_members(change(self.members), done)  # type: ignore[operator, arg-type]


class ReadsWithoutRound(RaftCore):
    """A consistent read is answered without asking a quorum."""

    def read_index(self, done: Callable[[int | None], None]) -> None:
        self._refuse_unless_leading()
        done(self.commit)


class KeepsMembershipAfterTruncation(RaftCore):
    """A membership entry that was taken back still counts."""

    def _forget_memberships(self, start: int) -> None: ...


class SnapshotsAmidRestore(RestoreInLog):
    """Writes the state down while a restore is on its way: its parts so far are in no log that is kept."""

    def under_way(self, term: int) -> bool:
        return False


PLANTED: dict[str, Bugs] = {
    "skips the fsync": Bugs(disk=LyingDisk),
    "acknowledges before a quorum": Bugs(core=AckBeforeQuorum),
    "default read from a stale leader": Bugs(core=StaleLease),
    "applies a retry twice": Bugs(machine=partial(RegisterMachine, dedup=False)),
    "truncates matching entries": Bugs(core=TruncatesMatching),
    "counts a vote twice": Bugs(core=CountsVotesTwice),
    "answers before the sync": Bugs(core=VotesBeforeSync),
    "counts itself before its sync": Bugs(core=CountsItselfUnsynced),
    "votes for shorter logs": Bugs(core=VotesForShorterLogs),
    "commits beyond the match": Bugs(core=CommitsBeyondMatch),
    "believes its whole log": Bugs(core=BelievesItsWholeLog),
    "forgets its vote": Bugs(core=ForgetsItsVote),
    "consistent read without a round": Bugs(core=ReadsWithoutRound),
    "reads before its no-op": Bugs(core=LeaseWithoutNoop),
    "keeps its lease in a transfer": Bugs(core=LeaseKeptInTransfer),
    "keeps a membership taken back": Bugs(core=KeepsMembershipAfterTruncation),
    "two membership changes at once": Bugs(core=UncheckedMembership),
    "makes a snapshot amid a restore": Bugs(restore=SnapshotsAmidRestore),
}
