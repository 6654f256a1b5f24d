"""Backups: the state as a checksummed stream, and its way back through the log (`raft_backup.py`)."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import IO, Any

from raftstate.errors import RaftError, TooBusy, UnknownOutcome
from raftstate.raft_backup import BEGIN, END, VOID, Restoring, parts_of
from raftstate.replica_types import Machine
from raftstate.snapshot_format import SnapshotDecoder, SnapshotEncoder, SnapshotHeader

READ_BYTES = 256 * 1024
SPOOL_BYTES = 4 * 1024 * 1024
"""A backup up to this size is kept in memory while it is restored, a larger one in an unnamed temporary file."""
IN_FLIGHT = 8
"""Parts proposed at a time: enough to keep the disks busy, too few to crowd out other writes."""


async def save(machine: Machine, header: SnapshotHeader) -> AsyncIterator[bytes]:
    """Yield the machine's present state in the snapshot file's form; others get their turn between chunks."""
    encoder = SnapshotEncoder(header)
    frozen = machine.snapshot()
    try:
        yield encoder.start()
        for chunk in frozen:
            yield encoder.chunk(chunk)
            await asyncio.sleep(0)
        yield encoder.finish()
    finally:
        frozen.close()


class OneRestore:
    """Lets one restore at a time into this server's log, and makes void what ends before its end."""

    def __init__(self, abandon: Callable[[bytes], None]) -> None:
        """`abandon` puts a step into the log, if this server still leads, and waits for nothing."""
        self._abandon = abandon
        self._under_way = False

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Raises TooBusy while another restore is in the log."""
        if self._under_way:
            raise TooBusy(
                "another backup is being restored, and this one was not begun: wait until that is done, "
                "then see whether this one is still wanted"
            )
        self._under_way = True
        try:
            yield
        except BaseException:
            self._abandon(VOID)  # else the servers would go on waiting for its end, and make no snapshot
            raise
        finally:
            self._under_way = False


async def restore(
    pieces: AsyncIterator[bytes],
    propose: Callable[[bytes], Awaitable[object]],
    trial: Callable[[], Restoring],
    admit: Callable[[Any], None],
    turn: Callable[[], AbstractContextManager[None]],
) -> None:
    """Check a backup whole, then send it through the log. `trial` begins a state that is read and thrown away.

    `admit` is given that state when all is read, and raises what it will if this one must not be restored; `turn` is
    that of a `OneRestore`. Raises SnapshotDamaged or TooBusy before anything has changed; UnknownOutcome if
    leadership was lost on the way.
    """
    with tempfile.SpooledTemporaryFile(SPOOL_BYTES) as spool:
        # What is no backup is refused with its first bytes, before it has filled the disk.
        decoder = _decoder()
        async for piece in pieces:
            for _ in decoder.feed(piece):
                pass
            _keep(spool, piece)
        decoder.finish()
        admit(await asyncio.to_thread(_check, spool, trial))
        with turn():
            await _propose_all(spool, propose)


def _keep(spool: IO[bytes], piece: bytes) -> None:
    try:
        spool.write(piece)
    except OSError as error:
        raise RaftError(
            f"the leader cannot keep the backup in {tempfile.gettempdir()} until it is checked whole ({error}), and "
            "nothing was changed: make room there, or start the servers with another TMPDIR"
        ) from error


async def _propose_all(spool: IO[bytes], propose: Callable[[bytes], Awaitable[object]]) -> None:
    await propose(BEGIN)
    batch: list[bytes] = []
    for chunk in _chunks(spool):
        for part in parts_of(chunk):
            batch.append(part)
            if len(batch) == IN_FLIGHT:
                await _all(propose, batch)
    await _all(propose, batch)
    if not await propose(END):
        raise UnknownOutcome("another leader took over during the restore, so it is void: start it again")


async def _all(propose: Callable[[bytes], Awaitable[object]], batch: list[bytes]) -> None:
    # They start in order; all have ended before anything else is said of this restore, also after a failure.
    outcomes = await asyncio.gather(*(propose(part) for part in batch), return_exceptions=True)
    batch.clear()
    for outcome in outcomes:
        if isinstance(outcome, BaseException):
            raise outcome


def _check(spool: IO[bytes], trial: Callable[[], Restoring]) -> Restoring:
    """Read all of it as the servers will: one that they cannot read would stop them all."""
    fresh = trial()
    for chunk in _chunks(spool):
        fresh.feed(chunk)
    fresh.check()
    return fresh


def _decoder() -> SnapshotDecoder:
    return SnapshotDecoder("the backup", advice="take another backup, or use an older one")


def _chunks(spool: IO[bytes]) -> Iterator[bytes]:
    decoder = _decoder()
    spool.seek(0)
    while data := spool.read(READ_BYTES):
        yield from decoder.feed(data)
    decoder.finish()
