"""What a journal's records add up to, and reading them back when a server starts.

`LogState` is the meaning of the records; the running journal and the recovery both go through it, so what is
in memory and what a restart finds cannot differ. `recover` reads a directory and changes nothing in it.
"""

from __future__ import annotations

import bisect
import os.path
from dataclasses import dataclass, field

from raftstate.disk import Disk
from raftstate.errors import JournalDamaged
from raftstate.journal_format import (
    CERTIFICATE_BYTES,
    FIRST_SEGMENT,
    Entry,
    Header,
    Kind,
    Record,
    decode_certificate,
    decode_header,
    decode_record,
    decode_vote,
    find_certificates,
    is_closed,
    segment_name,
    segment_number,
    unknown_version,
)

TEMPORARY_SUFFIX = ".tmp"


@dataclass(slots=True)
class LogState:
    """The log, current term and vote."""

    entries: list[Entry] = field(default_factory=list)
    term: int = 0
    voted_for: str | None = None

    def apply(self, record: Record) -> None:
        """Make one change. Raises ValueError if an entry would leave a gap in the log."""
        kind, term, index, payload = record
        entries = self.entries
        if kind is Kind.ENTRY:
            if entries and index != entries[-1][1] + 1:
                raise ValueError(f"entry {index} does not follow entry {entries[-1][1]}")
            entries.append((payload, index, term))
        elif kind is Kind.CUT:
            if entries:
                del entries[max(0, index - entries[0][1]) :]
        elif kind is Kind.COMPACT:
            if entries:
                del entries[: max(0, index - entries[0][1])]
        elif kind is Kind.RESET:
            entries[:] = [(b"", index, term)]
        elif kind is Kind.CLEAR:
            entries.clear()
        else:
            self.term, self.voted_for = term, decode_vote(payload)


@dataclass(slots=True)
class SegmentMap:
    """Which segment holds which entry, and from which segment on the files are needed."""

    first_segment: int = 1
    _first_index: list[int] = field(default_factory=list)  # ascending, one per segment
    _segment: list[int] = field(default_factory=list)
    _next_index: int = 0  # 0: the log is empty and may start anywhere

    def begin(self, segment: int) -> None:
        """Records go to this new segment from now on."""
        self._first_index.append(self._next_index)
        self._segment.append(segment)

    def apply(self, record: Record) -> None:
        """Follow one record written to the newest segment."""
        if record.kind is Kind.ENTRY:
            self._next_index = record.idx + 1
        elif record.kind is Kind.CUT:
            # Entries from here on will be written anew, to the newest segment.
            self._first_index = [min(first, record.idx) for first in self._first_index]
            self._next_index = record.idx
        elif record.kind is Kind.COMPACT:
            self._drop_below(FIRST_SEGMENT.unpack(record.payload)[0])
        elif record.kind in (Kind.RESET, Kind.CLEAR):
            self._drop_below(self._segment[-1])
            self._first_index[-1] = 0
            self._next_index = record.idx + 1 if record.kind is Kind.RESET else 0

    def segment_of(self, index: int) -> int:
        """The segment that holds the live entry `index`."""
        return self._segment[max(0, bisect.bisect_right(self._first_index, index) - 1)]

    def _drop_below(self, segment: int) -> None:
        self.first_segment = max(self.first_segment, segment)
        keep = bisect.bisect_left(self._segment, self.first_segment)
        del self._segment[:keep], self._first_index[:keep]


@dataclass(slots=True)
class Recovered:
    """What a journal's directory holds. `header` None: nothing yet."""

    state: LogState = field(default_factory=LogState)
    segments: SegmentMap = field(default_factory=SegmentMap)
    commit_index: int = 0
    chain: int = 0
    header: Header | None = None  # of the newest segment
    valid: bytes = b""  # the newest segment up to its last whole record
    certified_bytes: int = 0  # how much of that is certified, counting the certificate
    torn_bytes: int = 0  # unreadable bytes behind it
    leftovers: list[str] = field(default_factory=list)  # names of files that mean nothing any more


def recover(disk: Disk, directory: str) -> Recovered:
    """Read a journal back. Raises JournalDamaged if something that was once durable is not as it was written."""
    names = disk.listdir(directory)
    numbers = sorted(number for name in names if (number := segment_number(name)) is not None)
    found = Recovered(leftovers=[name for name in names if name.endswith(TEMPORARY_SUFFIX)])
    run = _newest_run(disk, directory, numbers, found)
    if not run:
        return found
    _replay(disk, directory, run, found)
    if run[0] > found.segments.first_segment:
        missing = segment_name(run[0] - 1)
        raise JournalDamaged(os.path.join(directory, missing), 0, "the segment is missing")
    found.leftovers += [segment_name(number) for number in numbers if number < found.segments.first_segment]
    last_index = found.state.entries[-1][1] if found.state.entries else 0
    found.commit_index = min(found.commit_index, last_index)
    return found


def _newest_run(disk: Disk, directory: str, numbers: list[int], found: Recovered) -> list[int]:
    """The segments without a gap that end with the newest, leaving out a newest one torn while it was made."""
    if not numbers:
        return []
    newest = os.path.join(directory, segment_name(numbers[-1]))
    data = disk.read(newest)
    if decode_header(data) is None:
        _refuse_unknown_version(newest, data)
        if any(find_certificates(data, 0, numbers[-1], None)):
            raise JournalDamaged(newest, 0, "the header fails its checksum")
        found.leftovers.append(segment_name(numbers[-1]))
        found.torn_bytes += len(data.rstrip(b"\0"))
        numbers = numbers[:-1]
    start = len(numbers) - 1
    while start > 0 and numbers[start - 1] == numbers[start] - 1:
        start -= 1
    return numbers[max(0, start) :]


def _refuse_unknown_version(path: str, data: bytes) -> None:
    if (version := unknown_version(data)) is not None:
        raise JournalDamaged(path, 0, f"format version {version} is not one this Lictor can read")


def _replay(disk: Disk, directory: str, run: list[int], found: Recovered) -> None:
    def load(number: int) -> tuple[bytes, Header, int]:
        path = os.path.join(directory, segment_name(number))
        data = disk.read(path)
        _refuse_unknown_version(path, data)
        decoded = decode_header(data)
        if decoded is None or decoded[0].segment != number:
            raise JournalDamaged(path, 0, "the header fails its checksum")
        return data, *decoded

    # Segments that the newest header no longer needs may be there still, in any condition.
    needed = load(run[-1])[1].first_segment
    run[:] = [number for number in run if number >= needed] or run[-1:]
    data, header, offset = load(run[0])
    found.chain = header.chain
    found.state.term, found.state.voted_for = header.term, header.voted_for
    for number, following in zip(run, [*run[1:], None], strict=True):
        path = os.path.join(directory, segment_name(number))
        found.segments.first_segment = max(found.segments.first_segment, header.first_segment)
        found.segments.begin(number)
        found.commit_index = max(found.commit_index, header.commit_index)
        if following is None:
            end, found.certified_bytes = _replay_segment(path, data, header, offset, None, found)
            if any(find_certificates(data, end, number, header.nonce)):
                raise JournalDamaged(path, end, "a record fails its checksum")
            if is_closed(data, end, header):
                gone = segment_name(number + 1)
                what = "the header fails its checksum" if gone in found.leftovers else "the segment is missing"
                raise JournalDamaged(os.path.join(directory, gone), 0, what)
            found.header, found.valid = header, data[:end]
            found.torn_bytes += len(data[end:].rstrip(b"\0"))  # zeros are room that was never written
            return
        next_data, next_header, next_offset = load(following)
        end, _ = _replay_segment(path, data, header, offset, next_header.previous_bytes, found)
        if end != next_header.previous_bytes or found.chain != next_header.chain:
            raise JournalDamaged(path, end, "a record fails its checksum")
        data, header, offset = next_data, next_header, next_offset


def _replay_segment(
    path: str, data: bytes, header: Header, offset: int, limit: int | None, found: Recovered
) -> tuple[int, int]:
    """Apply the records up to `limit`, or to the first that is not whole. -> (end, certified end)."""
    certified = 0
    while limit is None or offset < limit:
        if (decoded := decode_record(data, offset, found.chain)) is not None:
            record, offset, found.chain = decoded
            try:
                found.state.apply(record)
            except ValueError as error:
                raise JournalDamaged(path, offset, str(error)) from error
            found.segments.apply(record)
            continue
        certificate = decode_certificate(data, offset)
        if (
            certificate is None
            or (certificate.segment, certificate.nonce) != (header.segment, header.nonce)
            or certificate.chain != found.chain
        ):
            break
        offset += CERTIFICATE_BYTES
        certified = offset
        found.commit_index = max(found.commit_index, certificate.commit_index)
    return offset, certified
