"""Backups: the state as a checksummed stream, and its way back through the log (`raft_backup.py`)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable

from raftstate.errors import UnknownOutcome
from raftstate.raft_backup import BEGIN, END, PAD_ENTRIES, parts_of
from raftstate.replica_types import Machine
from raftstate.snapshot_format import SnapshotDecoder, SnapshotEncoder, SnapshotHeader


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
    propose: Callable[[bytes | None], Awaitable[object]],
    last_index: Callable[[], int],
) -> None:
    """Check a backup whole, then send it through the log; `propose(None)` proposes a no-op.

    Raises SnapshotDamaged before anything has changed; UnknownOutcome if leadership was lost on the way.
    """
    decoder = SnapshotDecoder("the backup", advice="take another backup, or use an older one")
    chunks: list[bytes] = []
    async for piece in pieces:
        chunks.extend(decoder.feed(piece))
    header = decoder.finish().header
    while last_index() < header.index:
        missing = header.index - last_index()
        await asyncio.gather(*(propose(None) for _ in range(min(PAD_ENTRIES, missing))))
    await propose(BEGIN)
    for chunk in chunks:
        await asyncio.gather(*(propose(part) for part in parts_of(chunk)))
    if not await propose(END):
        raise UnknownOutcome("another leader took over during the restore, so it is void: start it again")
