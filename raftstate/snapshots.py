"""Snapshot files of one server: written in chunks, published atomically, the newest good one found again.

All methods block on the disk; large ones belong off the event loop. A store may be used from several threads.
"""

from __future__ import annotations

import logging
import os.path
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import msgspec

from raftstate.disk import Disk, DiskFile
from raftstate.errors import RaftError, SnapshotDamaged
from raftstate.snapshot_format import SnapshotDecoder, SnapshotEncoder, SnapshotHeader, SnapshotSummary

__all__ = ["SnapshotMeta", "SnapshotStore", "SnapshotSummary", "SnapshotWriter", "inspect"]

log = logging.getLogger(__name__)

READ_BYTES = 1 << 20
KEPT = 2
_SUFFIX = ".snapshot"
_TEMPORARY = ".tmp"
_INSPECT_ADVICE = "take another backup with `lictor snapshot save`, or use an older one"


class SnapshotMeta(msgspec.Struct, frozen=True):
    """A published snapshot: the log position it stands for, the members then, and its file."""

    index: int
    term: int
    members: dict[str, Any]
    name: str


class SnapshotStore:
    """The snapshots in one directory. Keeps the newest two, and older ones only while they are being read."""

    def __init__(self, disk: Disk, directory: str, *, clock: Callable[[], float] = time.time) -> None:
        self._disk, self._directory, self._clock = disk, directory, clock
        self._lock = threading.Lock()  # guards the three below
        self._good: dict[str, SnapshotMeta] = {}  # verified by this process
        self._bad: set[str] = set()
        self._readers: dict[str, int] = {}
        self._begun = 0
        disk.make_dir(directory)
        for name in disk.listdir(directory):
            if name.endswith(_TEMPORARY):
                disk.remove(self._path(name))
        # A process that was killed may have left a snapshot whose name only the cache knows: the journal will be cut
        # behind what is found here, so that must outlive a power cut.
        disk.sync_dir(directory)

    def begin(self, index: int, term: int, members: dict[str, Any]) -> SnapshotWriter:
        """Start a snapshot of the state right after log entry (index, term). Raises OSError."""
        name = f"{index:020d}-{term:020d}{_SUFFIX}"
        self._begun += 1
        header = SnapshotHeader(index, term, members, self._clock())
        return SnapshotWriter(self, header, name, f"{name}.{self._begun}{_TEMPORARY}")

    def latest(self, min_index: int = 0) -> SnapshotMeta | None:
        """The newest whole snapshot at or above `min_index`; None if there is none.

        `min_index` is the journal's base: entries below it are only in a snapshot, so an older snapshot would
        leave a hole in history. Raises SnapshotDamaged if the only ones that new are damaged. The first look at
        a file reads all of it.
        """
        damage: SnapshotDamaged | None = None
        for name in self._names():
            try:
                meta = self._verify(name)
            except SnapshotDamaged as error:
                damage = damage or error
                continue
            if meta.index >= min_index:
                if damage is not None:
                    log.warning("snapshot %s is used because a newer one is damaged: %s", name, damage.what)
                return meta
        if damage is not None:
            raise damage
        return None

    def open(self, meta: SnapshotMeta) -> Iterator[bytes]:
        """The snapshot's chunks, each verified; the whole is verified when the iterator ends.

        The file stays as long as the iterator is not exhausted or closed. Raises SnapshotDamaged, OSError.
        """
        chunks = self._chunks(meta.name)
        next(chunks)  # from here on, closing or losing the iterator releases the file
        return chunks

    def _chunks(self, name: str) -> Iterator[bytes]:
        with self._lock:
            self._readers[name] = self._readers.get(name, 0) + 1
        try:
            yield b""
            decoder = SnapshotDecoder(self._path(name))
            yield from _read(self._disk, self._path(name), decoder)
            decoder.finish()
        except SnapshotDamaged:
            with self._lock:
                self._good.pop(name, None)
                self._bad.add(name)
            raise
        finally:
            with self._lock:
                self._readers[name] -= 1
                if not self._readers[name]:
                    del self._readers[name]
            self._prune()

    def _names(self) -> list[str]:
        names = self._disk.listdir(self._directory)
        return sorted((name for name in names if name.endswith(_SUFFIX)), reverse=True)

    def _verify(self, name: str) -> SnapshotMeta:
        path = self._path(name)
        with self._lock:
            if name in self._good:
                return self._good[name]
            if name in self._bad:
                raise SnapshotDamaged(path, "it was found damaged before")
        try:
            summary = inspect(self._disk, path, advice=None)
        except SnapshotDamaged as error:
            with self._lock:
                self._bad.add(name)
            log.warning("%s", error)
            raise
        header = summary.header
        meta = SnapshotMeta(header.index, header.term, header.members, name)
        with self._lock:
            self._good[name] = meta
        return meta

    def _published(self, header: SnapshotHeader, temporary: str, name: str) -> SnapshotMeta:
        self._disk.rename(self._path(temporary), self._path(name))
        self._disk.sync_dir(self._directory)
        meta = SnapshotMeta(header.index, header.term, header.members, name)
        with self._lock:
            self._good[name] = meta
            self._bad.discard(name)
        self._prune()
        return meta

    def _prune(self) -> None:
        """Remove all but the newest two good ones, sparing what is being read. Damaged ones count for nothing."""
        with self._lock:
            kept = 0
            for name in self._names():
                if kept < KEPT:
                    kept += name not in self._bad
                elif name not in self._readers:
                    self._good.pop(name, None)
                    self._bad.discard(name)
                    self._disk.remove(self._path(name))

    def _path(self, name: str) -> str:
        return os.path.join(self._directory, name)


class SnapshotWriter:
    """A snapshot being written. Nothing shows until `commit`; a crash before leaves only what the store removes."""

    def __init__(self, store: SnapshotStore, header: SnapshotHeader, name: str, temporary: str) -> None:
        self._store, self._header, self._name, self._temporary = store, header, name, temporary
        self._encoder = SnapshotEncoder(header)
        self._file: DiskFile | None = store._disk.create(store._path(temporary))
        self.bytes = 0
        """Bytes of state written so far."""
        self._file.append(self._encoder.start())

    def write(self, chunk: bytes) -> None:
        """Append one chunk of state. Raises OSError; then call `abort`."""
        self._require().append(self._encoder.chunk(chunk))
        self.bytes += len(chunk)

    def commit(self) -> SnapshotMeta:
        """Make it durable and give it its name; once this returns, a restart finds it. Raises OSError."""
        file = self._require()
        file.append(self._encoder.finish())
        file.sync()
        file.close()
        self._file = None
        return self._store._published(self._header, self._temporary, self._name)

    def abort(self) -> None:
        """Give up; harmless after `commit`."""
        if self._file is not None:
            self._file.close()
            self._file = None
            self._store._disk.remove(self._store._path(self._temporary))

    def _require(self) -> DiskFile:
        if self._file is None:
            raise RaftError("the snapshot is committed or aborted already; begin another")
        return self._file


def inspect(disk: Disk, path: str, *, advice: str | None = _INSPECT_ADVICE) -> SnapshotSummary:
    """Read and verify a whole snapshot file. Raises SnapshotDamaged, OSError."""
    decoder = SnapshotDecoder(path, advice=advice)
    for _ in _read(disk, path, decoder):
        pass
    return decoder.finish()


def _read(disk: Disk, path: str, decoder: SnapshotDecoder) -> Iterator[bytes]:
    offset = 0
    while data := disk.read(path, offset, READ_BYTES):
        offset += len(data)
        yield from decoder.feed(data)
