"""pysyncobj's Raft state, driven from outside. The only module that imports pysyncobj.

What of pysyncobj runs: the state (role, term, vote, leader, log, commit and applied index, callbacks that wait for
a commit), how it is restored from the journal, term and vote persistence, role changes with the no-op of a new
leader, and log access. What does not: its thread, poller, pipe, sockets, clock, randomness, files, fork, pickle, and
the message handlers, whose faults `docs/decisions/0010-what-pysyncobj-gets-wrong.md` lists. Each would raise here.

The adapter reaches private names (`self._SyncObj__raftLog`), so it is written against exactly one version.
"""

from __future__ import annotations

import _socket
import random
import socket
from collections.abc import Callable
from typing import Any, NoReturn

import pysyncobj.syncobj as _syncobj
from pysyncobj import SyncObj, SyncObjConf
from pysyncobj.node import Node
from pysyncobj.transport import Transport
from pysyncobj.version import VERSION

from raftstate.errors import JournalDamaged, StateDiverged
from raftstate.raft_members import Members, encode_members
from raftstate.raft_ports import Entry, Log, Position

# pysyncobj's import replaces this function, for everyone and on every system, by one that works on Windows only.
socket.inet_ntop = _socket.inet_ntop

_PINNED = "0.3.17"
if VERSION != _PINNED:
    raise ImportError(f"the raft adapter overrides private parts of pysyncobj {_PINNED}, found {VERSION}: install it")

REGULAR, NO_OP, MEMBERS, RESTORE = b"\x00", b"\x01", b"\x02", b"\x04"
"""First byte of a command in the log; the values are pysyncobj's, but for RESTORE (`raft_backup.py`)."""
FOLLOWER, CANDIDATE, LEADER = 0, 1, 2
ROLES = ("follower", "candidate", "leader")

_create_journal = _syncobj.createJournal
_monotonic = _syncobj.monotonicTime
_current_clock: Callable[[], float] = _monotonic


def _journal_of(source: Any) -> Any:
    return _create_journal(source) if source is None or isinstance(source, str) else source


def _clock_of_current_core() -> float:
    return _current_clock()


_syncobj.createJournal = _journal_of
_syncobj.monotonicTime = _clock_of_current_core


class _NoTransport(Transport):  # type: ignore[misc]
    """Always ready and never used: messages leave through the outbox."""

    def __init__(self) -> None:
        super().__init__(None, None, [])

    def send(self, node: object, message: object) -> NoReturn:
        raise AssertionError("pysyncobj tried to send a message of its own")

    def addNode(self, node: object) -> None: ...
    def dropNode(self, node: object) -> None: ...
    def destroy(self) -> None: ...


def _disused(name: str) -> Callable[..., NoReturn]:
    def refuse(*_: object, **__: object) -> NoReturn:
        raise AssertionError(f"pysyncobj's own {name} must not run")

    return refuse


def prepare_log(log: Log, snapshot: Position | None, bootstrap: Members) -> None:
    """Make `log` continue `snapshot`, or begin a new one; call before the core is made.

    The log's first record only names a position (index and term) that is already in the snapshot. A new cluster's
    members begin with the same membership at index 1; a server that joins begins with nothing and is sent all.
    """
    if not len(log):
        index, term = (snapshot.index, snapshot.term) if snapshot else (0, 0)
        log.add(NO_OP, index, term)
        if snapshot is None and bootstrap.all:
            log.add(MEMBERS + encode_members(bootstrap), 1, 0)
        return
    first, last = log[0][1], log[-1][1]
    base = snapshot.index if snapshot else 0
    if first > base:
        raise JournalDamaged("the journal", 0, f"it begins at index {first}, but the newest snapshot ends at {base}")
    if snapshot and (last < base or log[base - first][2] != snapshot.term):
        # A crash came between installing the leader's snapshot and resetting the log behind it.
        log.reset_to(snapshot.index, snapshot.term)


class Driven(SyncObj):  # type: ignore[misc]
    """SyncObj's state under plain names, with our log, clock and randomness. `log` is never empty.

    `applied` is the index that the state machine stands at: the newest snapshot's, or 0.
    """

    def __init__(self, server: str, log: Log, clock: Callable[[], float], rng: random.Random, applied: int) -> None:
        self.id = server
        self.log = log
        self._clock = clock
        self._rng = rng
        self._min_timeout_s, self._max_timeout_s = 1.0, 2.0
        conf = SyncObjConf(autoTick=False, journalFile=log, pollerType="select", commandsQueueSize=1)
        self.enter()
        super().__init__(Node(server), [], conf, nodeClass=Node, transport=_NoTransport())
        self._SyncObj__raftLastApplied = applied
        # Unlike pysyncobj's, the journal's index of what is committed was certified with the entries it speaks of
        # (etcd's HardState keeps one for the same end): a server that hears no leader still stands where it stood.
        known = log.getRaftCommitIndex()
        self._SyncObj__raftCommitIndex = max(applied, min(known, self.last_index) if known > 1 else 0)

    def enter(self) -> float:
        """Make this core's clock the one that pysyncobj reads; return the time."""
        global _current_clock
        _current_clock = self._clock
        return self._clock()

    # -- state under plain names -----------------------------------------------------------------------------------

    @property
    def role(self) -> int:
        """FOLLOWER, CANDIDATE or LEADER."""
        role: int = self._SyncObj__raftState
        return role

    @property
    def is_leader(self) -> bool:
        """Whether this core believes that it leads; only a confirmed round or the lease proves it."""
        leads: bool = self._SyncObj__raftState == LEADER
        return leads

    @property
    def leader(self) -> str | None:
        """Id of the leader of this term, if known."""
        node = self._SyncObj__raftLeader
        return None if node is None else str(node.id)

    @property
    def term(self) -> int:
        """The current term."""
        term: int = self._SyncObj__raftCurrentTerm
        return term

    @property
    def voted_for(self) -> str | None:
        """Whom this server voted for in this term."""
        vote: str | None = self._SyncObj__votedForNodeId
        return vote

    @property
    def commit(self) -> int:
        """Greatest index known to be committed."""
        index: int = self._SyncObj__raftCommitIndex
        return index

    @property
    def applied(self) -> int:
        """Greatest index handed to the state machine."""
        index: int = self._SyncObj__raftLastApplied
        return index

    @property
    def first_index(self) -> int:
        """Index of the log's first record, which is a position only: its entry may be gone."""
        return self.log.first_index

    @property
    def last_index(self) -> int:
        """Index of the log's last entry."""
        return self.log.last_index

    @property
    def last_term(self) -> int:
        """Term of the log's last entry."""
        return self.log[-1][2]

    @property
    def noop_index(self) -> int:
        """Index of the no-op that this leadership began with."""
        return int(self._SyncObj__noopIDx or 0)

    # -- log -------------------------------------------------------------------------------------------------------

    def term_at(self, index: int) -> int | None:
        """Term of the entry at `index`; None if it is compacted away or not there yet."""
        return self.log.term_at(index)

    def entries(self, start: int, count: int) -> list[Entry]:
        """Up to `count` entries from index `start`."""
        log = self.log
        position = start - log.first_index
        return log[position : position + count] if position >= 0 else []

    def _append_own(self, command: bytes) -> int:
        """Add an entry of this term at the end; return its index."""
        index = self.last_index + 1
        self.log.add(command, index, self.term)
        return index

    def _truncate(self, index: int) -> None:
        if index <= self.commit:
            raise StateDiverged(index, self.commit)
        self._SyncObj__deleteEntriesFrom(index)

    def _set_commit(self, index: int) -> None:
        self._SyncObj__raftCommitIndex = index
        self.log.setRaftCommitIndex(index)

    def _set_applied(self, index: int) -> None:
        self._SyncObj__raftLastApplied = index

    # -- term, vote, role ------------------------------------------------------------------------------------------

    def _set_term(self, term: int, vote: str | None) -> None:
        assert term >= self.term, "a term never falls"
        self._SyncObj__setCurrentTerm(term, vote)

    def _set_role(self, role: int) -> None:
        self._SyncObj__setState(role)

    def _set_leader(self, server: str | None) -> None:
        self._SyncObj__raftLeader = None if server is None else Node(server)

    def _lead(self) -> None:
        """Take the lead; pysyncobj adds the no-op and asks for appends to be sent."""
        self._SyncObj__onBecomeLeader()

    @property
    def _deadline(self) -> float:
        at: float = self._SyncObj__raftElectionDeadline
        return at

    @_deadline.setter
    def _deadline(self, at: float) -> None:
        self._SyncObj__raftElectionDeadline = at

    def _election_timeout(self) -> float:
        return self._rng.uniform(self._min_timeout_s, self._max_timeout_s)

    def _send_appends(self) -> None:
        raise NotImplementedError

    # -- waiting for a commit --------------------------------------------------------------------------------------

    def _wait_commit(self, index: int, done: Callable[[Any, Any], None]) -> None:
        self._SyncObj__commandsWaitingCommit[index].append((self.term, done))

    def _take_waiting(self, index: int) -> list[tuple[int, Callable[[Any, Any], None]]]:
        found: list[tuple[int, Callable[[Any, Any], None]]] = self._SyncObj__commandsWaitingCommit.pop(index, [])
        return found

    def _take_all_waiting(self) -> list[Callable[[Any, Any], None]]:
        waiting = self._SyncObj__commandsWaitingCommit
        found = [done for index in sorted(waiting) for _, done in waiting[index]]
        waiting.clear()
        return found

    # -- pysyncobj's hooks, and the doors that stay shut -----------------------------------------------------------

    def _SyncObj__generateRaftTimeout(self) -> float:
        return self._election_timeout()

    def _SyncObj__sendAppendEntries(self) -> None:
        self._send_appends()

    def _SyncObj__onSetCodeVersion(self, _version: int) -> None:
        """We replicate no methods, so there are no versions of them."""

    _onTick = _disused("tick")
    _applyCommand = _disused("command queue")
    _checkCommandsToApply = _disused("command queue")
    _SyncObj__onMessageReceived = _disused("message handler")
    _SyncObj__doApplyCommand = _disused("unpickling of commands")
    _SyncObj__parseChangeClusterRequest = _disused("unpickling of memberships")
    _SyncObj__doChangeCluster = _disused("membership change")
    _SyncObj__loadDumpFile = _disused("dump file")
    _SyncObj__tryLogCompaction = _disused("fork")
