"""The journal's files: groups of records appended and synced, segments begun and removed."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable

from raftstate.disk import Disk, DiskFile
from raftstate.errors import JournalFailed
from raftstate.journal_format import (
    CERTIFICATE_BYTES,
    FIRST_SEGMENT,
    RECORD_OVERHEAD,
    Certificate,
    Header,
    Kind,
    Record,
    closing_mark,
    encode_record,
    segment_name,
)
from raftstate.journal_recovery import TEMPORARY_SUFFIX, Recovered

log = logging.getLogger(__name__)

ROOM_BYTES = 4 << 20
"""What the newest segment is longer than its records at most: zeros that wait to be written over."""
QUICK_BYTES = 128 << 10
"""A group up to this size is encoded and written to the page cache in less time than a thread takes to begin."""


class Writer:
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
        self._uncertified = False
        """Whether something is durable that no certificate says so of."""
        self._to_close: tuple[str, bytes] | None = None
        """The segment before the newest, and what ends it, until that has been written."""
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

    def commit(
        self, records: list[Record], commit_index: int, known_index: int, on_durable: Callable[[], None]
    ) -> None:
        """Append, sync, and call `on_durable`; blocks. Raises JournalFailed.

        Up to `known_index` entries are committed and durable already; up to `commit_index` they are then.
        """
        with self._busy:
            if self.failed is not None:
                raise self.failed
            try:
                made = self._file is None or self._bytes >= self._segment_bytes
                data = self._begin_segment(commit_index) if made else self._due_certificate(known_index)
                data += self._encode(records)
                assert self._file is not None
                self._file.append(data)
                self._file.sync()
                if made:
                    self._disk.sync_dir(self._directory)
                    self._close_previous()
                self._bytes += len(data)
                self._durable(on_durable)
                self._certify(commit_index)
                self._remove_old()
            except OSError as error:
                raise self._fail(error) from error

    def begin(self, records: list[Record], known_index: int) -> int:
        """Append what needs no wait; return the file to sync before `finish`, or -1: `commit` these instead."""
        if self.failed is not None:
            raise self.failed
        file = self._file
        if file is None or self._bytes >= self._segment_bytes:
            return -1
        size = 2 * CERTIFICATE_BYTES  # that of the group before, and one for this group
        for record in records:
            if record.kind is Kind.COMPACT:
                return -1  # files may have to go
            size += RECORD_OVERHEAD + len(record.payload)
        if size > QUICK_BYTES or (fd := file.descriptor(size)) < 0:
            return -1
        try:
            data = self._due_certificate(known_index) + self._encode(records)
            file.append(data)
        except OSError as error:
            raise self._fail(error) from error
        self._bytes += len(data)
        return fd

    def finish(self, error: OSError | None, on_durable: Callable[[], None]) -> None:
        """What `begin` appended is durable, unless there is an error."""
        if self.failed is not None:
            raise self.failed
        if error is not None:
            raise self._fail(error) from error
        self._durable(on_durable)

    def rest(self, known_index: int) -> None:
        """Certify what is durable, and what of it is committed. Not while a group is under way."""
        if self.failed is not None or self._file is None:
            return
        try:
            self._certify(known_index)
        except OSError as error:
            raise self._fail(error) from error

    def _durable(self, on_durable: Callable[[], None]) -> None:
        self._durable_bytes = self._bytes
        self._uncertified = True
        on_durable()

    def _certify(self, known_index: int) -> None:
        # Not synced: it reaches the disk with the next group or when the kernel writes back.
        certificate = self._due_certificate(known_index)
        if certificate:
            assert self._file is not None
            self._file.append(certificate)
            self._bytes += len(certificate)

    def _due_certificate(self, known_index: int) -> bytes:
        """What certifies the group before, to be written where its records end; b"" if that is done.

        Never a second one before the next sync: behind a first that was torn it would make a torn tail look damaged.
        """
        if not self._uncertified:
            return b""
        self._uncertified = False
        return self._certificate(known_index).encode()

    def close(self, known_index: int = 0) -> None:
        """Certify as `rest` does, and release the files; nothing is written any more."""
        with self._busy:
            if self._file is not None:
                try:
                    self.rest(known_index)
                except JournalFailed as error:
                    log.warning("raft journal %s: closed without its last certificate: %s", self._directory, error)
                self._file.close()
                self._file = None
            if self.failed is None:
                self.failed = JournalFailed("the journal is closed")

    def _begin_segment(self, commit_index: int) -> bytes:
        """A new segment. Only called when the one before is durable as far as `_durable_bytes`: it certifies that."""
        self._uncertified = False
        if self._file is not None:
            self._file.close()
        if self._header is not None:
            self._to_close = self._path(segment_name(self._header.segment)), closing_mark(self._header, self._bytes)
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

    def _close_previous(self) -> None:
        # Not synced, as certificates are not. Never before the new segment is durable: without that it is no loss.
        if self._to_close is not None:
            path, mark = self._to_close
            self._to_close = None
            file = self._disk.open_append(path)
            try:
                file.append(mark)
            finally:
                file.close()

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
