"""What a leader knows of one follower's log, and how much it may send without an answer.

The three states are etcd's: *probe* (one message at a time until a matching point is known), *replicate* (a
pipeline with a bound), *snapshot* (its next entry is compacted away).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from raftstate.raft_config import RaftConfig


@dataclass
class SnapshotSend:
    """A snapshot on its way to one follower.

    Chunks are kept until they are acknowledged: to send them again must not mean to read the file from its start.
    """

    index: int
    term: int
    members: bytes
    meta: Any
    chunks: Iterator[bytes]
    next_chunk: int = 0
    """Number of the chunk that is sent next."""
    acked: int = 0
    """Chunks the follower has written."""
    finished: bool = False
    _kept: deque[bytes] = field(default_factory=deque)
    _first_kept: int = 0
    """Number of the first kept chunk."""

    def take(self) -> tuple[bytes, bool]:
        """Return the next chunk and whether it is the last one, which only a look ahead tells."""
        at = self.next_chunk - self._first_kept
        while len(self._kept) < at + 2 and (chunk := next(self.chunks, None)) is not None:
            self._kept.append(chunk)
        self.next_chunk += 1
        self.finished = at + 1 >= len(self._kept)
        return (self._kept[at] if at < len(self._kept) else b""), self.finished

    def acknowledged(self, chunks: int) -> None:
        """The follower has so many. The last of them is kept: its answer may be what was lost."""
        self.acked = chunks
        while self._first_kept < chunks - 1 and self._kept:
            self._kept.popleft()
            self._first_kept += 1

    def rewind(self, chunk: int) -> bool:
        """Go on from this chunk; False if it is not kept any more."""
        if chunk < self._first_kept:
            return False
        self.next_chunk = self.acked = chunk
        self.finished = False
        return True

    def reopen(self, chunks: Iterator[bytes], chunk: int) -> None:
        """Go on from this chunk, the first of `chunks`."""
        self._kept.clear()
        self.chunks, self._first_kept = chunks, chunk
        self.rewind(chunk)


@dataclass
class Progress:
    """Mutated only by the core, while it leads."""

    config: RaftConfig
    next: int
    match: int = 0
    probing: bool = True
    probe_sent: bool = False
    snapshot: SnapshotSend | None = None
    heard_at: float = 0.0
    """Our clock when its last answer of our term came."""
    acked_round: int = 0
    silent_rounds: int = 0
    """Heartbeat answers since its last answer to an append."""
    commit_told: int = 0
    _inflight: deque[tuple[int, int]] = field(default_factory=deque)
    _inflight_bytes: int = 0

    def can_send(self) -> bool:
        """Whether one more append may go out now."""
        if self.snapshot is not None:
            return False
        if self.probing:
            return not self.probe_sent
        return (
            len(self._inflight) < self.config.inflight_messages_max
            and self.next - self.match <= self.config.inflight_entries_max
            and self._inflight_bytes < self.config.inflight_bytes_max
        )

    def sent(self, last_index: int, size: int) -> None:
        """An append ending at `last_index` went out."""
        if self.probing:
            self.probe_sent = True
            return
        self.next = last_index + 1
        self._inflight.append((last_index, size))
        self._inflight_bytes += size

    def accepted(self, match: int) -> bool:
        """It holds everything up to `match`. Returns whether that is news."""
        self.silent_rounds = 0
        news = match > self.match
        if news:
            self.match = match
        self.next = max(self.next, match + 1)
        while self._inflight and self._inflight[0][0] <= match:
            self._inflight_bytes -= self._inflight.popleft()[1]
        if self.probing:
            # Whatever was optimistic before is forgotten: the pipeline starts at the known matching point.
            self.probing, self.probe_sent, self.next = False, False, self.match + 1
        return news

    def refused(self, prev_index: int, candidate: int) -> bool:
        """It lacks `prev_index`; the logs may agree at `candidate`. Returns whether to send again (not stale)."""
        self.silent_rounds = 0
        if prev_index <= self.match or prev_index >= self.next:
            return False
        if self.probing and prev_index != self.next - 1:
            return False
        self.next = max(self.match + 1, min(prev_index, candidate + 1))
        self.probe()
        return True

    def probe(self) -> None:
        """Back to one message at a time, from `next`."""
        self.probing, self.probe_sent = True, False
        self._inflight.clear()
        self._inflight_bytes = 0

    def lost(self) -> None:
        """Messages to it were lost (connection broke, or no answer): start again from what it surely holds."""
        self.next = self.match + 1
        self.probe()
