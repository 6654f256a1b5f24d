"""Snapshots on the wire and in the log: sending in chunks with a window, receiving, installing, compacting.

The core never waits for a disk here: the driver makes a received snapshot durable and restores it (`Install`), and
makes local snapshots (`raft_snapshotter.py`).
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from raftstate.errors import SnapshotDamaged
from raftstate.messages import InstallSnapshot, SnapshotReply
from raftstate.raft_members import Member, Members, decode_members, encode_members
from raftstate.raft_ports import Outside
from raftstate.raft_progress import Progress, SnapshotSend
from raftstate.raft_replication import Replication

log = logging.getLogger(__name__)


@dataclass
class Install:
    """A snapshot that has fully arrived. The driver commits the writer, restores the machine from it, and then
    calls `installed`; on failure, `install_failed`."""

    writer: Any
    index: int
    term: int
    members: Members
    leader: str
    chunks: int


@dataclass
class _Receiving:
    leader: str
    leader_term: int
    index: int
    snapshot_term: int
    writer: Any
    next_chunk: int = 0
    ahead: dict[int, tuple[bytes, bool]] = field(default_factory=dict)
    """Chunks that overtook others, (data, whether it is the last) by number: no more than may be under way."""


class Installing(Replication):
    """What happens when a follower is so far behind that its next entry is compacted away."""

    def __init__(self, outside: Outside) -> None:
        self._snapshots = outside.snapshots
        self._receiving: _Receiving | None = None
        self._install: Install | None = None
        self.snapshot_wanted = False
        """A follower needs a snapshot, and there is none that is whole and new enough: the driver should make one."""
        super().__init__(outside)

    # -- leader ----------------------------------------------------------------------------------------------------

    def _newest(self) -> Any:
        """The newest good snapshot."""
        try:
            return self._snapshots.latest()
        except SnapshotDamaged:
            return None  # which the store has said; the state in memory is well, and can be written down anew

    def _begin_snapshot(self, peer: str, progress: Progress) -> None:
        meta = self._newest()
        if meta is None or meta.index < self.first_index:
            self._want_snapshot(progress)
            return
        members = encode_members(members_of(meta))
        progress.snapshot = SnapshotSend(meta.index, meta.term, members, meta, self._snapshots.open(meta))
        self._pump_snapshot(peer, progress)

    def _want_snapshot(self, progress: Progress) -> None:
        self.snapshot_wanted = True
        progress.snapshot = None
        progress.probe()
        progress.probe_sent = True  # asked again at a later heartbeat

    def _pump_snapshot(self, peer: str, progress: Progress) -> None:
        send = progress.snapshot
        assert send is not None
        assert self._reads is not None
        while not send.finished and send.next_chunk - send.acked < self.config.snapshot_chunks_inflight:
            number = send.next_chunk
            try:
                data, last = send.take()
            except SnapshotDamaged as error:
                log.warning("raft: %s cannot be sent this snapshot, another is made: %s", peer, error.what)
                self._want_snapshot(progress)
                return
            message = InstallSnapshot(
                self.term,
                send.index,
                send.term,
                send.members,
                number,
                last,
                self._reads.round,
                data,
            )
            self._free.append((peer, message))

    def _on_snapshot_reply(self, peer: str, message: SnapshotReply, now: float) -> None:
        progress = self._on_heard(peer, message.round, now)
        if progress is None or progress.snapshot is None or progress.snapshot.index != message.index:
            return
        send = progress.snapshot
        progress.silent_rounds = 0
        if message.done:
            progress.snapshot = None
            progress.accepted(message.index)
            self._advance_commit()
            self._send_append(peer)
        elif message.next_chunk < send.acked:
            self._rewind_snapshot(progress, message.next_chunk)  # it lost what it had: it was started anew
            self._pump_snapshot(peer, progress)
        elif message.next_chunk <= send.next_chunk:
            send.acknowledged(message.next_chunk)
            self._pump_snapshot(peer, progress)

    def _nudge_snapshot(self, peer: str, progress: Progress) -> None:
        """Called at heartbeats: chunks that no one answers were lost, so send them again."""
        send = progress.snapshot
        assert send is not None
        progress.silent_rounds += 1
        if progress.silent_rounds >= 4 and progress.heard_at > self._clock() - self.config.election_timeout_max_s:
            progress.silent_rounds = 0
            self._rewind_snapshot(progress, send.acked)
            self._pump_snapshot(peer, progress)

    def _rewind_snapshot(self, progress: Progress, chunk: int) -> None:
        old = progress.snapshot
        assert old is not None
        newest = self._newest()
        if newest is not None and newest.index > old.index:
            progress.snapshot = SnapshotSend(
                newest.index, newest.term, encode_members(members_of(newest)), newest, self._snapshots.open(newest)
            )
            return
        # From the last acknowledged chunk on: when all are, its answer is what was lost.
        chunk = max(0, chunk - 1)
        if not old.rewind(chunk):
            old.reopen(islice(self._snapshots.open(old.meta), chunk, None), chunk)

    # -- follower --------------------------------------------------------------------------------------------------

    def _on_install(self, peer: str, message: InstallSnapshot, now: float) -> None:
        if not self._follow(peer, message.term, now):
            self._free.append((peer, SnapshotReply(self.term, message.index, 0, False, message.round)))
            return
        if self._install is not None:
            self._answer(peer, message, self._install.chunks)
            return
        if message.index <= self.commit:
            # What is committed here is held here; but only what is durable may be promised.
            self._drop_receiving()
            self._held.append((peer, SnapshotReply(self.term, message.index, 0, True, message.round)))
            return
        receiving = self._receiving
        if receiving is None or (receiving.leader, receiving.leader_term, receiving.index) != (
            peer,
            message.term,
            message.index,
        ):
            self._drop_receiving()
            if message.chunk:
                self._answer(peer, message, 0)
                return
            members = decode_members(message.members)
            writer = self._snapshots.begin(message.index, message.snapshot_term, members_dict(members))
            receiving = _Receiving(peer, message.term, message.index, message.snapshot_term, writer)
            self._receiving = receiving
        # Sent again only after some heartbeats, a chunk that came too early would cost more than its place here.
        if 0 <= message.chunk - receiving.next_chunk < self.config.snapshot_chunks_inflight:
            receiving.ahead[message.chunk] = message.data, message.last
        while (ready := receiving.ahead.pop(receiving.next_chunk, None)) is not None:
            data, last = ready
            receiving.writer.write(data)
            receiving.next_chunk += 1
            if last:
                self._receiving = None
                self._installing = True
                self._install = Install(
                    receiving.writer,
                    message.index,
                    message.snapshot_term,
                    decode_members(message.members),
                    peer,
                    receiving.next_chunk,
                )
        self._answer(peer, message, receiving.next_chunk)

    def _answer(self, peer: str, message: InstallSnapshot, next_chunk: int) -> None:
        self._free.append((peer, SnapshotReply(self.term, message.index, next_chunk, False, message.round)))

    def _drop_receiving(self) -> None:
        if self._receiving is not None:
            self._receiving.writer.abort()
            self._receiving = None

    @property
    def install(self) -> Install | None:
        """A received snapshot that waits for the driver."""
        return self._install

    def installed(self) -> None:
        """The driver has made the snapshot durable and restored the state machine from it."""
        self.enter()
        install = self._install
        assert install is not None
        self._install, self._installing = None, False
        if self.term_at(install.index) == install.term:
            self.log.compact_to(install.index)
            later = [kept for kept in self._memberships if kept[0] > install.index]
        else:
            self.log.reset_to(install.index, install.term)
            later = []
        self._memberships = [(install.index, install.members), *later]
        self._set_commit(max(self.commit, install.index))
        self._set_applied(install.index)
        self.backup.forget()
        if self.leader is not None:
            self._held.append((self.leader, SnapshotReply(self.term, install.index, 0, True, 0)))

    def install_failed(self) -> None:
        """The received snapshot was no good; the leader will be asked to start again."""
        self._install, self._installing = None, False

    # -- compaction ------------------------------------------------------------------------------------------------

    def members_at(self, index: int) -> Members:
        """The membership in force at an index at or above the newest snapshot's."""
        return next(members for start, members in reversed(self._memberships) if start <= index)

    def compact(self, index: int) -> None:
        """A snapshot up to `index` is durable: forget the log behind it, but for `trailing_entries`."""
        self.enter()
        self.snapshot_wanted = False
        if index <= self.first_index:
            return  # the leader's, which is newer, was put in place while this one was written
        keep = self._trailing_from(min(index, self.applied))
        if keep > self.first_index:
            self.log.compact_to(keep)
        while len(self._memberships) > 1 and self._memberships[1][0] <= index:
            self._memberships.pop(0)

    def _trailing_from(self, index: int) -> int:
        """Where the log may begin when a snapshot has it up to `index`."""
        start = max(self.first_index, index - self.config.trailing_entries)
        size = 0
        for command, at, _ in reversed(self.entries(start + 1, index - start)):
            size += len(command)
            if size > self.config.trailing_bytes:
                return at
        return start


def members_dict(members: Members) -> dict[str, Any]:
    """The form that a snapshot's header keeps: {id: [address, voter]}."""
    return {member.id: [member.address, member.voter] for member in members.all}


def members_of(meta: Any) -> Members:
    """The membership of a snapshot, from its header."""
    return Members.of(Member(server, row[0], bool(row[1])) for server, row in meta.members.items())
