"""When a replica's state is written down, and how a snapshot takes the state's place: at a start, from the leader."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable, Coroutine, Iterable
from typing import Any

from raftstate.errors import JournalDamaged
from raftstate.raft import RaftCore
from raftstate.raft_backup import Restoring
from raftstate.raft_install import Install
from raftstate.raft_ports import Snapshots
from raftstate.raft_snapshotter import SnapshotMaker
from raftstate.replica_types import Machine
from raftstate.state.retire import retire
from raftstate.state.store import Store

SLICE_S, REST_S = 0.002, 0.001
"""How long a snapshot may hold the loop, and how long it then leaves it to others."""


class SnapshotWork:
    """The snapshots of one replica. One is made or installed at a time.

    ``on_made()`` is called when a snapshot was written, so that the log may be cut; ``on_replaced(old)`` when another
    state has taken the old one's place, with what the old one held.
    """

    def __init__(
        self,
        machine: Machine,
        store: Snapshots,
        *,
        entries: int,
        bytes_: int,
        clock: Callable[[], float],
        on_made: Callable[[], None],
        on_replaced: Callable[[Any], None],
    ) -> None:
        self.index = 0
        """Of the newest snapshot."""
        self.logged = 0
        """Bytes of commands applied since then; the replica counts them."""
        self._machine, self._store, self._clock = machine, store, clock
        self._entries, self._bytes = entries, bytes_
        self._on_made, self._on_replaced = on_made, on_replaced
        self._size = 0
        self._making = self._installing = False

    async def load(self, first_entry: int) -> None:
        """Read the newest snapshot, at a start. ``first_entry``: index of the journal's first entry, 0 without one.

        Raises JournalDamaged: entries before the first are in a snapshot only, and none reaches that far.
        """
        meta = await asyncio.to_thread(self._store.latest, first_entry)
        if meta is not None:
            fresh = self._machine.restorer()
            await asyncio.to_thread(_feed, fresh, self._store.open(meta))
            fresh.finish()
            self.index = meta.index
        elif first_entry:
            raise JournalDamaged(
                "the journal", 0, f"it begins at index {first_entry}, and no snapshot reaches that far"
            )

    def due(self, core: RaftCore) -> Coroutine[Any, Any, None] | None:
        """Return what is to be done now, if anything: to install what the leader sent, or to write the state down."""
        if core.install is not None and not self._installing:
            self._installing = True
            return self._install(core, core.install)
        if not self._making and not self._installing and self._grown(core):
            self._making = True
            return self._make(core)
        return None

    def due_soon(self) -> None:
        """The log is no short way to this state: a snapshot is due."""
        self.logged = self._bytes + self._size

    def _grown(self, core: RaftCore) -> bool:
        """Whether the log has grown enough; a large state is written again only for a log of some size beside it."""
        new = core.applied - self.index
        grown = new >= self._entries or self.logged >= self._bytes
        if not core.snapshot_wanted and not (grown and self.logged >= self._size // 4):
            return False
        term = core.term_at(core.applied)
        # One that is wanted may be wanted in the place of one that is damaged.
        return (new > 0 or core.snapshot_wanted) and term is not None and not core.backup.under_way(term)

    async def _make(self, core: RaftCore) -> None:
        self.logged = 0
        maker = SnapshotMaker(core, self._machine, self._store)
        try:
            turn_until = self._clock() + SLICE_S
            while maker.step():
                if self._clock() >= turn_until:
                    await asyncio.sleep(REST_S)
                    turn_until = self._clock() + SLICE_S
            await asyncio.to_thread(maker.commit)
        except BaseException:
            maker.abort()
            raise
        finally:
            self._making = False
        maker.finish()
        self.index, self._size = max(self.index, maker.index), maker.bytes
        self._on_made()

    async def _install(self, core: RaftCore, install: Install) -> None:
        try:
            await asyncio.to_thread(install.writer.commit)
            meta = await asyncio.to_thread(self._store.latest, install.index)
            fresh = self._machine.restorer()
            await asyncio.to_thread(_feed, fresh, self._store.open(meta))
        finally:
            self._installing = False
        # Stale reads have seen the old state until now. From here on nothing may come in between.
        replaced = fresh.finish()
        core.installed()
        self.index = install.index
        self._on_replaced(replaced)


def _feed(fresh: Restoring, chunks: Iterable[bytes]) -> None:
    """Read a snapshot into a new state, in a thread. The collector would walk all of it, again and again."""
    collected = gc.isenabled()
    gc.disable()
    try:
        for chunk in chunks:
            fresh.feed(chunk)
        fresh.check()
    finally:
        # Before the collector runs again: the new rows would all be young to it, and the loop would pay for that.
        gc.freeze()
        if collected:
            gc.enable()


async def let_go(replaced: Any) -> None:
    """Free a state that was replaced, off the loop: a large one takes its time."""
    if isinstance(replaced, Store):
        held = [replaced]
        del replaced
        await asyncio.to_thread(lambda: retire(held.pop()))
