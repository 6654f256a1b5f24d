"""Snapshots of the state: written in small chunks while commands go on, read back into fresh tables.

Format 2, a sequence of MessagePack chunks: ``["lictor-state", {"format", "index", "clock_us", "offset"}]``, then
``[table, [row, …]]`` with tables in order and rows of at most `CHUNK_BYTES` (or one larger row), then
``["end", {"rows": count}]``. A row is in its table's packed form.
Format 1, which is read too, has no fingerprints of commands in its remembered requests.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import msgspec

from raftstate.errors import SnapshotDamaged
from raftstate.model.connect import CAConfig
from raftstate.state.policy_tables import CA_CONFIG
from raftstate.state.store import Store
from raftstate.state.table import TableCursor

FORMAT = 2
FORMATS_READ = (1, 2)
CHUNK_BYTES = 48 * 1024
CHUNK_ROWS = 500

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(tuple[str, msgspec.Raw])


class _Header(msgspec.Struct, frozen=True):
    format: int
    index: int
    clock_us: int
    offset: int = 0


class _End(msgspec.Struct, frozen=True):
    rows: int


_header_decoder = msgspec.msgpack.Decoder(_Header)
_end_decoder = msgspec.msgpack.Decoder(_End)
_config_decoder = msgspec.msgpack.Decoder(CAConfig)
_rows_decoder = msgspec.msgpack.Decoder(list[msgspec.Raw])


class Snapshot:
    """The state as it was when this was made. Iterate once for the chunks; close it, or use it in a ``with``."""

    def __init__(self, store: Store) -> None:
        self.index = store.index
        self._clock_us, self._offset = store.clock_us, store.offset
        self._cursors: list[TableCursor[Any, Any]] = [table.cursor() for table in store.tables()]

    def __iter__(self) -> Iterator[bytes]:
        yield _encoder.encode(("lictor-state", _Header(FORMAT, self.index, self._clock_us, self._offset)))
        count = 0
        for cursor in self._cursors:
            name, pack = cursor.table.name, cursor.table.pack
            rows: list[msgspec.Raw] = []
            size = 0
            for key, row in cursor:
                data = _encoder.encode(pack(key, row))
                if rows and (size + len(data) > CHUNK_BYTES or len(rows) >= CHUNK_ROWS):
                    yield _encoder.encode((name, rows))
                    rows, size = [], 0
                rows.append(msgspec.Raw(data))
                size += len(data)
                count += 1
            if rows:
                yield _encoder.encode((name, rows))
            cursor.close()
        yield _encoder.encode(("end", _End(count)))

    def close(self) -> None:
        """Forget what was kept for this snapshot; applies pay nothing for it any more."""
        for cursor in self._cursors:
            cursor.close()

    def __enter__(self) -> Snapshot:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Restorer:
    """Reads a snapshot chunk by chunk into a fresh store. All of it may run in another thread than the queries.

    `feed` and `finish` raise SnapshotDamaged.
    """

    def __init__(self, install: Callable[[Store, int | None], Store]) -> None:
        """``install`` is given the store when it is whole, and returns the one that it replaces."""
        self._install, self._fresh = install, Store()
        self._tables = {table.name: table for table in self._fresh.tables()}
        self._header: _Header | None = None
        self._count = 0
        self._ended = self._checked = False

    def feed(self, chunk: bytes) -> None:
        """Read one chunk."""
        try:
            name, body = _decoder.decode(chunk)
            if self._header is None:
                self._begin(name, body)
            elif self._ended:
                raise _damaged("something follows its end")
            elif name == "end":
                if _end_decoder.decode(body).rows != self._count:
                    raise _damaged("rows are missing")
                self._ended = True
            else:
                self._rows(name, body)
        except (msgspec.DecodeError, ValueError, TypeError, KeyError) as error:
            raise _damaged(f"a chunk cannot be read ({error})") from error

    def _begin(self, name: str, body: msgspec.Raw) -> None:
        if name != "lictor-state":
            raise _damaged("it does not begin as a snapshot of the state")
        header = _header_decoder.decode(body)
        if header.format not in FORMATS_READ:
            raise _damaged(f"its format is {header.format}, and this version reads {FORMAT}: use a newer version")
        self._header = header

    def _rows(self, name: str, body: msgspec.Raw) -> None:
        table = self._tables.get(name)
        if table is None:
            raise _damaged(f"it holds the table {name!r}, which this version does not know: use a newer version")
        for data in _rows_decoder.decode(body):
            key, row = table.unpack(data)
            table.put(key, row)
            self._count += 1
        self._fresh.journal.clear()

    @property
    def store(self) -> Store:
        """What has been read so far, to be looked at only."""
        return self._fresh

    def check(self) -> None:
        """Raise SnapshotDamaged unless all was read. What is long is done here, so that `finish` is short."""
        if self._header is None or not self._ended:
            raise _damaged("it ends early")
        if self._checked:
            return
        self._checked = True
        # A walk that ran beside writes yields removed rows last; the oldest must stand first to be forgotten first.
        requests = self._fresh.requests.rows
        found = list(requests.values())
        ordered = sorted(found, key=lambda request: request.index)
        if ordered != found:
            requests.clear()
            requests.update((request.request_id, request) for request in ordered)

    def finish(self, at: int | None = None) -> Store:
        """Hand over what was read; return what it replaced, for `raftstate.state.retire`. Wake every watcher then.

        ``at`` is the log index at which a backup replaces the state; without it, this log's own state comes back.
        """
        self.check()
        assert self._header is not None
        fresh, header = self._fresh, self._header
        fresh.index, fresh.clock_us, fresh.offset = header.index, header.clock_us, header.offset
        return self._install(fresh, at)


def trust_domain_of(store: Store) -> str:
    """Return the trust domain of a state's authority; empty if it has none yet."""
    config = store.ca_config.rows.get("")
    return config.trust_domain if config is not None else ""


def trust_domain_in(chunk: bytes) -> str:
    """Return the trust domain that a chunk of a snapshot tells; empty for most chunks, and for any other bytes."""
    try:
        name, body = _decoder.decode(chunk)
        if name != CA_CONFIG:
            return ""
        return next((_config_decoder.decode(row).trust_domain for row in _rows_decoder.decode(body)), "")
    except msgspec.DecodeError:
        return ""


def _damaged(what: str) -> SnapshotDamaged:
    return SnapshotDamaged(
        "snapshot of the state", what, advice="use another snapshot, or rejoin from a healthy peer"
    )
