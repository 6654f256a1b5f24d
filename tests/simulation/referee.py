"""What must hold, checked as it happens.

Election safety: one leader per term, one vote per server and term, whatever crashed in between.
Log matching: an (index, term) names one command and one predecessor, everywhere, for ever.
Leader completeness: a new leader's log has every entry that any server ever applied.
State machine safety: every server applies the same command at an index, in order, without gaps.
Durability: an acknowledged write stays applied; promises name only what the sender's disk holds.
Linearizability: the log's order is the witness. A write or read that began after another had ended comes later, and
a read returns what the log up to its index says. (Until a backup is restored: from there on it is the end that is
judged, by replaying the whole log on a machine of the referee's own.)
"""

from __future__ import annotations

from bisect import bisect_right
from typing import Any

import msgspec

from raftstate.messages import AppendReply, Message, RequestVote, VoteReply
from raftstate.raft import RaftCore
from raftstate.raft_backup import RestoreInLog
from raftstate.raft_driven import MEMBERS, REGULAR, RESTORE
from raftstate.raft_members import encode_members
from raftstate.raft_ports import Entry
from tests.simulation.world import Violation, World


class Referee:
    """Sees everything and raises Violation."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.leaders: dict[int, str] = {}
        self.votes: dict[tuple[int, str], str] = {}
        self._known: dict[tuple[int, int], tuple[bytes, int]] = {}
        """(index, term) -> (command, term of the entry before)"""
        self._last_applied = 0
        self._applied_at: dict[int, tuple[int, bytes]] = {}
        self.terms_applied: dict[int, int] = {}
        """index -> term of every applied entry, no-ops and memberships too."""
        self._values: dict[str, tuple[list[int], list[str]]] = {}
        """key -> (indexes, values), by replaying what was applied."""
        self._effective: dict[str, int] = {}
        """request id -> index where it was applied first."""
        self.floor = 0
        """The highest index that any finished operation has seen or made."""
        self.acknowledged: dict[str, int] = {}
        self._committed_in: dict[int, int] = {}
        """index -> the term that its first applier was in, which is no lower than the one it was committed in."""
        self._checked: dict[str, int] = {}
        """server -> applied index up to which its terms were checked."""
        self._log: dict[int, tuple[int, bytes]] = {}
        """index -> (term, command) of every applied entry."""
        self.restores = 0
        """How often a backup took the state's place, counted at each server."""

    # -- the log ---------------------------------------------------------------------------------------------------

    def entry_added(self, server: str, before: Entry | None, command: bytes, index: int, term: int) -> None:
        previous = before[2] if before is not None else 0
        known = self._known.setdefault((index, term), (command, previous))
        if known != (command, previous) and before is not None:
            raise Violation(f"log matching: {server} has another entry at index {index} term {term}")

    def term_applied(self, server: str, index: int, term: int) -> None:
        seen = self.terms_applied.setdefault(index, term)
        if seen != term:
            raise Violation(f"state machine safety: {server} applied term {term} at index {index}, others {seen}")

    def entry_applied(self, server: str, index: int, term: int, data: bytes) -> None:
        self.term_applied(server, index, term)
        first = self._applied_at.setdefault(index, (term, data))
        if first != (term, data):
            raise Violation(f"state machine safety: {server} applied another command at index {index}")
        if index <= self._last_applied:
            return
        self._last_applied = index
        request, key, value = msgspec.msgpack.decode(data)
        if request in self._effective:
            return
        self._effective[request] = index
        indexes, values = self._values.setdefault(key, ([], []))
        indexes.append(index)
        values.append(value if value is not None else str(int(values[-1] if values else "0") + 1))

    def value_at(self, key: str, index: int) -> str | None:
        """What the log up to `index` says of `key`."""
        indexes, values = self._values.get(key, ([], []))
        position = bisect_right(indexes, index)
        return values[position - 1] if position else None

    # -- servers ---------------------------------------------------------------------------------------------------

    def check_server(self, server: str, core: RaftCore) -> None:
        """After every event at a server, which is why it asks for each figure once."""
        term, applied, first = core.term, core.applied, core.first_index
        if core.is_leader:
            known = self.leaders.get(term)
            if known is None:
                self.leaders[term] = server
                self._world.note(server, f"LEADS term {term}")
                self._check_complete(server, core)
            elif known != server:
                raise Violation(f"election safety: {server} and {known} both lead term {term}")
        checked = self._checked.get(server, 0)
        if applied != checked:
            for index in range(max(checked, first) + 1, applied + 1):
                term_there = core.term_at(index)
                assert term_there is not None
                self.term_applied(server, index, term_there)
                self._committed_in.setdefault(index, term)
                if index not in self._log:
                    self._log[index] = term_there, core.entries(index, 1)[0][0]
            self._checked[server] = applied
        commit, at = core.commit, core.membership_index
        if at > commit:
            found = core.entries(at, 1)
            if (not found or found[0][0] != MEMBERS + encode_members(core.members)) and not core.install:
                raise Violation(f"{server} goes by a membership at index {at} that its log does not hold")
        if not first <= applied <= commit <= core.last_index and not core.install:
            raise Violation(f"{server}: first {first}, applied {applied}, commit {commit}, last {core.last_index}")

    def _check_complete(self, server: str, core: RaftCore) -> None:
        """Paper, figure 3: what was committed in a term is in the log of the leader of every later term.

        An entry of an old term may be committed in a late one, so its own term says nothing: a server that was
        elected for a term in between, and slept until now, need not have it.
        """
        for index, committed_in in self._committed_in.items():
            mine, term = core.term_at(index), self.terms_applied[index]
            if committed_in < core.term and mine != term and index > core.first_index:
                raise Violation(
                    f"leader completeness: {server} leads term {core.term} with term {mine} "
                    f"at applied index {index}, which has term {term}"
                )

    def message_sent(self, source: str, target: str, message: Message, journal: Any) -> None:
        """At the moment a message leaves a server."""
        match message:
            case VoteReply(granted=True):
                self._voted(source, message.term, target)
            case RequestVote():
                self._voted(source, message.term, source)
            case _:
                return
        if journal.durable_term < message.term:
            raise Violation(f"{source} sent {message} before term {message.term} was durable")

    def ack_sent(self, source: str, message: AppendReply, durable_index: int) -> None:
        if message.success and message.match > durable_index:
            raise Violation(f"{source} acknowledged index {message.match}, durable is {durable_index}")

    def _voted(self, voter: str, term: int, candidate: str) -> None:
        known = self.votes.setdefault((term, voter), candidate)
        if known != candidate:
            raise Violation(f"{voter} voted for {known} and {candidate} in term {term}")

    # -- clients ---------------------------------------------------------------------------------------------------

    def write_acknowledged(self, request: str, index: int, value: str | None, floor: int) -> None:
        """`floor` is this referee's floor when the write was first sent; `value` may be unknown after a retry."""
        if self.restores:
            return
        first = self._effective.get(request)
        if first is None:
            raise Violation(f"write {request} was acknowledged at index {index} and applied nowhere")
        if first != index and first > index:
            raise Violation(f"write {request} was acknowledged at index {index}, applied at {first}")
        if first <= floor:
            raise Violation(
                f"write {request} came at index {first}, before what was finished when it began ({floor})"
            )
        _, key, _ = msgspec.msgpack.decode(self._applied_at[first][1])
        expected = self.value_at(key, first)
        if value is not None and value != expected:
            raise Violation(f"write {request} left {value!r} behind, the log says {expected!r}")
        self.acknowledged[request] = first
        self.floor = max(self.floor, first)

    def read_answered(self, key: str, value: str | None, index: int, floor: int, *, stale: bool) -> None:
        """`floor` is this referee's floor when the read began."""
        if self.restores:
            return
        expected = self.value_at(key, index)
        if value != expected:
            raise Violation(f"a read of {key} at index {index} returned {value!r}, the log says {expected!r}")
        if stale:
            return
        if index < floor:
            raise Violation(f"a read of {key} saw index {index}; {floor} was finished before it began")
        self.floor = max(self.floor, index)

    # -- the end ---------------------------------------------------------------------------------------------------

    def check_end(self, states: dict[str, tuple[int, str, dict[str, str]]], machine: Any) -> None:
        """`states`: server -> (applied index, digest, registers), once all has settled. `machine`: a new one."""
        if len({state[:2] for state in states.values()}) > 1:
            raise Violation(f"states differ at the end: { {name: state[:2] for name, state in states.items()} }")
        replayed = self._replay(machine)
        for name, (_, digest, _) in states.items():
            if digest != replayed:
                raise Violation(f"{name} ends in another state than the log leads to")
        if self.restores:
            return
        for name, (_, _, registers) in states.items():
            for key in self._values:
                if registers.get(key) != self._values[key][1][-1]:
                    raise Violation(
                        f"{name} ends with {key}={registers.get(key)!r}, not {self._values[key][1][-1]!r}"
                    )
        for request, index in self.acknowledged.items():
            if self._effective.get(request) != index:
                raise Violation(f"the acknowledged write {request} is lost")

    def _replay(self, machine: Any) -> str:
        restores = RestoreInLog(machine.restorer, lambda _replaced: None)
        for index, (term, command) in sorted(self._log.items()):
            if command[:1] == REGULAR:
                machine.apply(index, command[1:])
            elif command[:1] == RESTORE:
                restores.apply(index, term, command[1:])
        digest: str = machine.digest()
        return digest
