"""The durable log: pysyncobj's journal interface, with a group sync that runs off the event loop.

The event loop changes the log in memory (`add`, `deleteEntriesFrom`, `setCurrentTerm`, …) and calls
`take_pending`; some thread calls `Pending.sync`, which writes everything taken in one go and returns when it
is durable. Nothing that depends on a change may leave the server before that.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from typing import overload

from raftstate.disk import Disk, DiskFile
from raftstate.errors import JournalDamaged, JournalFailed
from raftstate.journal_format import (
    CERTIFICATE_BYTES,
    FIRST_SEGMENT,
    Certificate,
    Entry,
    Header,
    Kind,
    Record,
    encode_record,
    encode_vote,
    segment_name,
)
from raftstate.journal_recovery import TEMPORARY_SUFFIX, Recovered, recover

__all__ = ["Entry", "Journal", "JournalDamaged", "JournalFailed", "Pending"]

log = logging.getLogger(__name__)

SEGMENT_BYTES = 16 << 20
ROOM_BYTES = 4 << 20
"""What the newest segment is longer than its records at most: zeros that wait to be written over."""


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
        self._writer = _Writer(disk, directory, found, segment_bytes, entropy)
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
        return self._state.entries[0][1] if self._state.entries else 0

    @property
    def last_index(self) -> int:
        """Index of the last entry; 0 if the log is empty."""
        return self._state.entries[-1][1] if self._state.entries else 0

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
        pending = Pending(self, records, self.last_index, vote, min(self._commit_index, self.last_index))
        with self._lock:
            self._outstanding.append(pending)
        return pending

    def close(self) -> None:
        """Sync what is left and release the files. A journal that has failed is just released."""
        try:
            if self._writer.failed is None:
                pending = self.take_pending()
                if pending is not None and len(self._outstanding) == 1:
                    pending.sync()
        finally:
            self._writer.close()

    def _destroy(self) -> None:
        self.close()

    def _change(self, record: Record) -> None:
        self._state.apply(record)
        self._buffer.append(record)

    def _forget_from(self, index: int) -> None:
        """Entries from `index` on are no longer what the disk holds, whatever is being synced now."""
        with self._lock:
            self._durable_index = min(self._durable_index, max(0, index - 1))
            for pending in self._outstanding:
                pending.covers_index = min(pending.covers_index, max(0, index - 1))

    def _sync(self, pending: Pending) -> None:
        self._writer.commit(pending.records, pending.commit_index, lambda: self._synced(pending))

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
    ) -> None:
        self._journal = journal
        self.records = records
        self.covers_index = covers_index
        self.vote = vote
        self.commit_index = commit_index

    def sync(self) -> None:
        """Write and fdatasync; blocks. Raises JournalFailed, after which the server must stop."""
        if self._journal._outstanding[:1] != [self]:
            raise RuntimeError("journal groups must be synced once each, in the order they were taken")
        self._journal._sync(self)


class _Writer:
    """The files. After opening it belongs to whichever thread syncs, one at a time."""

    def __init__(
        self, disk: Disk, directory: str, found: Recovered, segment_bytes: int, entropy: Callable[[int], bytes]
    ) -> None:
        self._disk, self._directory = disk, directory
        self._segment_bytes, self._entropy = segment_bytes, entropy
        self._room_bytes = min(ROOM_BYTES, segment_bytes)
        self._segments, self._chain = found.segments, found.chain
        self._term, self._voted_for = found.state.term, found.state.voted_for
        self._busy = threading.Lock()
        self.failed: JournalFailed | None = None
        self._file: DiskFile | None = None
        self._header = found.header
        self._bytes = len(found.valid)
        # Without the certificate at the end, which is not synced.
        self._durable_bytes = self._bytes - (
            CERTIFICATE_BYTES if self._bytes and found.certified_bytes == self._bytes else 0
        )
        self._oldest = found.segments.first_segment
        try:
            self._open(found)
        except OSError as error:
            raise self._fail(error) from error

    def _open(self, found: Recovered) -> None:
        for name in found.leftovers:
            self._disk.remove(self._path(name))
        header = found.header
        if found.torn_bytes:
            log.warning(
                "raft journal %s: cut %d bytes of a write that was never finished", self._directory, found.torn_bytes
            )
        if header is not None:
            name = segment_name(header.segment)
            if found.certified_bytes < len(found.valid) or self._disk.size(self._path(name)) > len(found.valid):
                self._rewrite(name, found)
            self._file = self._disk.open_append(self._path(name), self._room_bytes)
        self._disk.sync_dir(self._directory)

    def _rewrite(self, name: str, found: Recovered) -> None:
        """Put a clean copy of the newest segment in its place.

        Records that no certificate covers may be in the page cache only, and after a failed sync the cache may
        even call them clean: syncing the old file would prove nothing. A copy that is written anew does.
        """
        certificate = self._certificate(found.commit_index).encode()
        copy = self._disk.create(self._path(name + TEMPORARY_SUFFIX))
        try:
            copy.append(found.valid + certificate)
            copy.sync()
        finally:
            copy.close()
        self._disk.rename(self._path(name + TEMPORARY_SUFFIX), self._path(name))
        self._durable_bytes = self._bytes
        self._bytes += len(certificate)

    def commit(self, records: list[Record], commit_index: int, on_durable: Callable[[], None]) -> None:
        with self._busy:
            if self.failed is not None:
                raise self.failed
            try:
                made = self._file is None or self._bytes >= self._segment_bytes
                data = self._begin_segment(commit_index) if made else b""
                data += self._encode(records)
                assert self._file is not None
                self._file.append(data)
                self._file.sync()
                if made:
                    self._disk.sync_dir(self._directory)
                self._bytes += len(data)
                self._durable_bytes = self._bytes
                on_durable()
                # Not synced: it reaches the disk with the next group or when the kernel writes back.
                certificate = self._certificate(commit_index).encode()
                self._file.append(certificate)
                self._bytes += len(certificate)
                self._remove_old()
            except OSError as error:
                raise self._fail(error) from error

    def close(self) -> None:
        with self._busy:
            if self._file is not None:
                self._file.close()
                self._file = None
            if self.failed is None:
                self.failed = JournalFailed("the journal is closed")

    def _begin_segment(self, commit_index: int) -> bytes:
        """A new segment. Only called when the one before is durable as far as `_durable_bytes`."""
        if self._file is not None:
            self._file.close()
        number = 1 if self._header is None else self._header.segment + 1
        self._header = Header(
            number,
            self._entropy(16),
            self._segments.first_segment,
            self._durable_bytes,
            self._chain,
            self._term,
            self._voted_for,
            commit_index,
        )
        self._file = self._disk.create(self._path(segment_name(number)), self._room_bytes)
        self._bytes = 0
        self._segments.begin(number)
        return self._header.encode()

    def _encode(self, records: list[Record]) -> bytes:
        parts: list[bytes] = []
        chain = self._chain
        for record in records:
            if record.kind is Kind.COMPACT:
                needed = max(self._segments.first_segment, self._segments.segment_of(record.idx))
                record = record._replace(payload=FIRST_SEGMENT.pack(needed))
            elif record.kind is Kind.VOTE:
                self._term, self._voted_for = record.term, record.payload[1:].decode() if record.payload else None
            self._segments.apply(record)
            part, chain = encode_record(record, chain)
            parts.append(part)
        self._chain = chain
        return b"".join(parts)

    def _certificate(self, commit_index: int) -> Certificate:
        assert self._header is not None
        return Certificate(self._header.nonce, self._header.segment, self._bytes, self._chain, commit_index)

    def _remove_old(self) -> None:
        if self._oldest < self._segments.first_segment:
            for number in range(self._oldest, self._segments.first_segment):
                self._disk.remove(self._path(segment_name(number)))
            self._disk.sync_dir(self._directory)
            self._oldest = self._segments.first_segment

    def _path(self, name: str) -> str:
        return os.path.join(self._directory, name)

    def _fail(self, error: OSError) -> JournalFailed:
        self.failed = JournalFailed(error)
        return self.failed
