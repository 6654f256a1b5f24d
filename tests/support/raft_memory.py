"""A log and a snapshot store in memory, for tests of the Raft core that are not about disks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from raftstate.raft_ports import Entry


class MemoryPending:
    def __init__(self, log: MemoryLog) -> None:
        self._log, self._last = log, log.last_index

    def sync(self) -> None:
        self._log.durable_index = self._last


class MemoryLog:
    """`Journal` without a disk. Durable once a taken `MemoryPending` is synced, so tests decide when."""

    def __init__(self) -> None:
        self.list: list[Entry] = []
        self.durable_index = 0
        self.term: int = 0
        self.vote: str | None = None
        self.dirty = False
        self._commit_index = 0

    @property
    def first_index(self) -> int:
        return self.list[0][1] if self.list else 0

    @property
    def last_index(self) -> int:
        return self.list[-1][1] if self.list else 0

    def term_at(self, index: int) -> int | None:
        return next((term for _, at, term in self.list if at == index), None)

    def add(self, command: bytes, idx: int, term: int) -> None:
        assert not self.list or idx == self.last_index + 1
        self.list.append((command, idx, term))
        self.dirty = True

    def clear(self) -> None:
        self.list, self.durable_index, self.dirty = [], 0, True

    def deleteEntriesFrom(self, entryFrom: int) -> None:
        del self.list[entryFrom:]
        self.durable_index = min(self.durable_index, self.last_index)
        self.dirty = True

    def compact_to(self, index: int) -> None:
        self.list = [entry for entry in self.list if entry[1] >= index]

    def reset_to(self, index: int, term: int) -> None:
        self.list, self.dirty = [(b"", index, term)], True

    def __getitem__(self, item: Any) -> Any:
        return self.list[item]

    def __len__(self) -> int:
        return len(self.list)

    def setCurrentTerm(self, term: int, votedForNodeId: str | None) -> None:
        self.term, self.vote, self.dirty = term, votedForNodeId, True

    def getCurrentTerm(self) -> int:
        return self.term

    def getVotedForNodeId(self) -> str | None:
        return self.vote

    def getRaftCommitIndex(self) -> int:
        return max(1, self._commit_index)

    def setRaftCommitIndex(self, raftCommitIndex: int) -> None:
        self._commit_index = min(raftCommitIndex, self.durable_index)

    def onOneSecondTimer(self) -> None: ...

    def take_pending(self) -> MemoryPending | None:
        if not self.dirty:
            return None
        self.dirty = False
        return MemoryPending(self)

    def close(self) -> None: ...

    def _destroy(self) -> None: ...


@dataclass
class MemoryMeta:
    index: int
    term: int
    members: dict[str, Any]
    chunks: list[bytes] = field(default_factory=list)


class MemoryWriter:
    def __init__(self, store: MemorySnapshots, meta: MemoryMeta) -> None:
        self._store, self._meta = store, meta

    def write(self, chunk: bytes) -> None:
        self._meta.chunks.append(bytes(chunk))

    def commit(self) -> None:
        self._store.metas.append(self._meta)

    def abort(self) -> None: ...


class MemorySnapshots:
    """`SnapshotStore` without a disk."""

    def __init__(self) -> None:
        self.metas: list[MemoryMeta] = []

    def begin(self, index: int, term: int, members: dict[str, Any]) -> MemoryWriter:
        return MemoryWriter(self, MemoryMeta(index, term, members))

    def latest(self, min_index: int = 0) -> MemoryMeta | None:
        found = max(self.metas, key=lambda meta: meta.index, default=None)
        return found if found is not None and found.index >= min_index else None

    def open(self, meta: MemoryMeta) -> Iterator[bytes]:
        return iter(list(meta.chunks))
