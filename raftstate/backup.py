"""Backups: the state as a checksummed stream, and its way back through the log (`raft_backup.py`)."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import IO, Any

from raftstate.errors import UnknownOutcome
from raftstate.raft_backup import BEGIN, END, Restoring, parts_of
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


async def restore(
    pieces: AsyncIterator[bytes],
    propose: Callable[[bytes], Awaitable[object]],
    trial: Callable[[], Restoring],
    admit: Callable[[Any], None] = lambda _trial: None,
) -> None:
    """Check a backup whole, then send it through the log. `trial` begins a state that is read and thrown away.

    `admit` is given that state when all is read, and raises what it will if this one must not be restored. Raises
    SnapshotDamaged before anything has changed; UnknownOutcome if leadership was lost on the way.
    """
    with tempfile.SpooledTemporaryFile(SPOOL_BYTES) as spool:
        async for piece in pieces:
            spool.write(piece)
        admit(await asyncio.to_thread(_check, spool, trial))
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
    await asyncio.gather(*(propose(part) for part in batch))  # gather starts them in order
    batch.clear()


def _check(spool: IO[bytes], trial: Callable[[], Restoring]) -> Restoring:
    """Read all of it as the servers will: one that they cannot read would stop them all."""
    fresh = trial()
    for chunk in _chunks(spool):
        fresh.feed(chunk)
    fresh.check()
    return fresh


def _chunks(spool: IO[bytes]) -> Iterator[bytes]:
    decoder = SnapshotDecoder("the backup", advice="take another backup, or use an older one")
    spool.seek(0)
    while data := spool.read(READ_BYTES):
        yield from decoder.feed(data)
    decoder.finish()
