"""The durable log: pysyncobj's journal interface, with a group sync that runs off the event loop.

The event loop changes the log in memory (`add`, `deleteEntriesFrom`, `setCurrentTerm`, …) and calls
`take_pending`; some thread calls `Pending.sync`, which writes everything taken in one go and returns when it
is durable. Or, with no thread (`journal_sync.py`): `Pending.write`, an fdatasync that the kernel does beside the
loop, `Pending.synced`. Nothing that depends on a change may leave the server before that.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import overload

from raftstate.disk import Disk
from raftstate.errors import JournalDamaged, JournalFailed
from raftstate.journal_format import Entry, Kind, Record, encode_vote
from raftstate.journal_recovery import recover
from raftstate.journal_writer import Writer

__all__ = ["Entry", "Journal", "JournalDamaged", "JournalFailed", "Pending"]

SEGMENT_BYTES = 16 << 20


class Journal:
    """One server's raft log, current term and vote, in a directory of its own.

    Opening reads the directory back: a torn tail that was never certified durable is cut with a log line;
    damage before that raises JournalDamaged. Everything found at opening is durable when the constructor
    returns. All methods belong to the event loop's thread; only `Pending.sync` may run in another.

    Positions in `deleteEntriesFrom`, `deleteEntriesTo` and `[]` count from the first kept entry, as pysyncobj's.
    """

    def __init__(
        self,
        disk: Disk,
        directory: str,
        *,
        segment_bytes: int = SEGMENT_BYTES,
        entropy: Callable[[int], bytes] = os.urandom,
    ) -> None:
        try:
            disk.make_dir(directory)
            found = recover(disk, directory)
        except OSError as error:
            raise JournalFailed(error) from error
        self._state = found.state
        self._commit_index = found.commit_index
        self._writer = Writer(disk, directory, found, segment_bytes, entropy)
        self._buffer: list[Record] = []
        self._lock = threading.Lock()  # guards the three below: the loop's and the syncing thread's
        self._outstanding: list[Pending] = []
        self._durable_index = self.last_index
        self._durable_vote = (self._state.term, self._state.voted_for)
        self.torn_bytes = found.torn_bytes
        """Bytes of an unfinished write that opening cut off."""

    # --- reading ---

    def __len__(self) -> int:
        return len(self._state.entries)

    @overload
    def __getitem__(self, item: int) -> Entry: ...
    @overload
    def __getitem__(self, item: slice) -> list[Entry]: ...
    def __getitem__(self, item: int | slice) -> Entry | list[Entry]:
        return self._state.entries[item]

    @property
    def first_index(self) -> int:
        """Index of the first kept entry, the base; 0 if the log is empty."""
        entries = self._state.entries
        return entries[0][1] if entries else 0

    @property
    def last_index(self) -> int:
        """Index of the last entry; 0 if the log is empty."""
        entries = self._state.entries
        return entries[-1][1] if entries else 0

    def term_at(self, index: int) -> int | None:
        """Term of the entry at `index`; None if it is compacted away or not there yet."""
        entries = self._state.entries
        if not entries:
            return None
        position = index - entries[0][1]
        return entries[position][2] if 0 <= position < len(entries) else None

    def getCurrentTerm(self) -> int:
        """Current term; durable or not."""
        return self._state.term

    def getVotedForNodeId(self) -> str | None:
        """Who got the vote in the current term."""
        return self._state.voted_for

    def getRaftCommitIndex(self) -> int:
        """A lower bound of the commit index, never above the last entry; at least 1, as pysyncobj expects."""
        return max(1, self._commit_index)

    # --- changing ---

    def add(self, command: bytes, idx: int, term: int) -> None:
        """Append an entry. Raises ValueError if it leaves a gap."""
        self._change(Record(Kind.ENTRY, term, idx, command))

    def deleteEntriesFrom(self, entryFrom: int) -> None:
        """Remove the entries from this position on: the leader has others in their place."""
        if entryFrom <= 0:
            self.clear()  # an empty log may start anew at any index
        elif entryFrom < len(self._state.entries):
            self._forget_from(self._state.entries[entryFrom][1])
            self._change(Record(Kind.CUT, 0, self._state.entries[entryFrom][1]))

    def deleteEntriesTo(self, entryTo: int) -> None:
        """Remove the entries before this position: a snapshot has them."""
        if entryTo >= len(self._state.entries):
            self.clear()
        elif entryTo > 0:
            self._change(Record(Kind.COMPACT, 0, self._state.entries[entryTo][1]))

    def compact_to(self, index: int) -> None:
        """Remove the entries below `index`, which stays as the base so that its term is known.

        Files go once the next group is durable. Does nothing below the base; raises ValueError above the log.
        """
        if index > self.last_index:
            raise ValueError(f"cannot compact to {index}: the log ends at {self.last_index}")
        if index > self.first_index:
            self._change(Record(Kind.COMPACT, 0, index))

    def reset_to(self, index: int, term: int) -> None:
        """Start the log anew behind (index, term): a snapshot up to there is installed, and durable already."""
        self._forget_from(index)
        self._change(Record(Kind.RESET, term, index))

    def clear(self) -> None:
        """Remove every entry."""
        self._forget_from(0)
        self._change(Record(Kind.CLEAR, 0, 0))

    def setCurrentTerm(self, term: int, votedForNodeId: str | None) -> None:
        """Set term and vote. A vote may leave only when this is durable."""
        if (term, votedForNodeId) != (self._state.term, self._state.voted_for):
            self._change(Record(Kind.VOTE, term, 0, encode_vote(votedForNodeId)))

    def setRaftCommitIndex(self, raftCommitIndex: int) -> None:
        """A hint that travels with the next group; it never makes the journal dirty."""
        self._commit_index = max(self._commit_index, raftCommitIndex)

    def onOneSecondTimer(self) -> None:
        """Part of pysyncobj's interface; nothing is left for it to do."""

    # --- durability ---

    @property
    def dirty(self) -> bool:
        """Whether a change is not yet durable: buffered, or taken and not yet synced."""
        return bool(self._buffer or self._outstanding)

    @property
    def failed(self) -> JournalFailed | None:
        """Why this journal takes no more writes; None while it is well."""
        return self._writer.failed

    @property
    def durable_index(self) -> int:
        """Up to here the log in memory is on disk."""
        return self._durable_index

    @property
    def durable_term(self) -> int:
        """The current term that a restart would find."""
        return self._durable_vote[0]

    @property
    def durable_voted_for(self) -> str | None:
        """The vote that a restart would find."""
        return self._durable_vote[1]

    def take_pending(self) -> Pending | None:
        """Hand over the changes made since the last call; None if there are none.

        What is taken must be synced, in the order taken. Raises JournalFailed after a failed sync.
        """
        if self._writer.failed is not None:
            raise self._writer.failed
        if not self._buffer:
            return None
        records, self._buffer = self._buffer, []
        vote = (self._state.term, self._state.voted_for)
        commit_index = min(self._commit_index, self.last_index)
        pending = Pending(self, records, self.last_index, vote, commit_index, self._known_index())
        with self._lock:
            self._outstanding.append(pending)
        return pending

    def rest(self) -> None:
        """Write what the next group would take along, since there is none now; nothing while one is outstanding.

        Raises JournalFailed.
        """
        if not self._outstanding:
            self._writer.rest(self._known_index())

    def close(self) -> None:
        """Sync what is left and release the files. A journal that has failed is just released."""
        try:
            if self._writer.failed is None:
                pending = self.take_pending()
                if pending is not None and len(self._outstanding) == 1:
                    pending.sync()
        finally:
            self._writer.close(0 if self._outstanding else self._known_index())

    def _destroy(self) -> None:
        self.close()

    def _change(self, record: Record) -> None:
        self._state.apply(record)
        self._buffer.append(record)

    def _known_index(self) -> int:
        """Up to here entries are committed, and durable here."""
        return min(self._commit_index, self._durable_index)

    def _forget_from(self, index: int) -> None:
        """Entries from `index` on are no longer what the disk holds, whatever is being synced now."""
        with self._lock:
            self._durable_index = min(self._durable_index, max(0, index - 1))
            for pending in self._outstanding:
                pending.covers_index = min(pending.covers_index, max(0, index - 1))

    def _sync(self, pending: Pending) -> None:
        self._writer.commit(pending.records, pending.commit_index, pending.known_index, lambda: self._synced(pending))

    def _write(self, pending: Pending) -> int:
        return self._writer.begin(pending.records, pending.known_index)

    def _finish(self, pending: Pending, error: OSError | None) -> None:
        self._writer.finish(error, lambda: self._synced(pending))

    def _synced(self, pending: Pending) -> None:
        with self._lock:
            self._outstanding.remove(pending)
            self._durable_index = max(self._durable_index, pending.covers_index)
            self._durable_vote = pending.vote


class Pending:
    """Changes taken from a journal, to be made durable together."""

    def __init__(
        self,
        journal: Journal,
        records: list[Record],
        covers_index: int,
        vote: tuple[int, str | None],
        commit_index: int,
        known_index: int,
    ) -> None:
        self._journal = journal
        self.records = records
        self.covers_index = covers_index
        self.vote = vote
        self.commit_index = commit_index
        """Committed once this group is durable, as far as was known when it was taken …"""
        self.known_index = known_index
        """… and before it is."""

    def sync(self) -> None:
        """Write and fdatasync; blocks. Raises JournalFailed, after which the server must stop."""
        self._require_turn()
        self._journal._sync(self)

    def write(self) -> int:
        """Write without syncing, if the page cache takes it at once; return the file that then must be synced.

        `synced` must follow once it is. Returns -1, and nothing has been done, for a group that only `sync` can
        write. Raises JournalFailed.
        """
        self._require_turn()
        return self._journal._write(self)

    def synced(self, error: OSError | None = None) -> None:
        """The file that `write` named is synced, or failed with `error`. Raises JournalFailed in that case."""
        self._require_turn()
        self._journal._finish(self, error)

    def _require_turn(self) -> None:
        if self._journal._outstanding[:1] != [self]:
            raise RuntimeError("journal groups must be synced once each, in the order they were taken")
