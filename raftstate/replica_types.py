"""What a Replica needs from outside, and the values it answers with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol

from raftstate.raft import Member
from raftstate.raft_backup import Restoring
from raftstate.raft_driver import Syncing
from raftstate.raft_ports import Log

ReadMode = Literal["stale", "default", "consistent"]


class Machine(Protocol):
    """The pure state machine (`raftstate.state.machine.StateMachine`). `apply` returns an Applied."""

    @property
    def offset(self) -> int:
        """How far the state's indexes are ahead of the log's."""

    def apply(self, index: int, data: bytes) -> Any: ...
    def snapshot(self) -> Any: ...
    def restorer(self) -> Restoring: ...


class JournalLike(Log, Syncing, Protocol):
    def close(self) -> None: ...


class Peers(Protocol):
    """What the replica asks of the peer transport."""

    def send(self, peer: str, data: bytes) -> None:
        """Send one message, without blocking; drop it if there is no connection or its buffer is full."""

    def set_peers(self, addresses: dict[str, str]) -> None:
        """The other members now, id -> host:port: connect to these, drop the rest."""


@dataclass(frozen=True)
class ReadStamp:
    """What a read may say of itself: it sees all up to `index` (the state's, as rows carry it)."""

    index: int
    known_leader: bool
    last_contact_ms: int


@dataclass(frozen=True)
class RaftStatus:
    """One server's view; its indexes are the log's.

    `role` is follower, candidate or leader; `lag` maps followers to entries not yet held.
    """

    id: str
    role: str
    term: int
    leader: str | None
    commit_index: int
    applied_index: int
    first_index: int
    last_index: int
    durable_index: int
    snapshot_index: int
    last_contact_ms: int
    members: tuple[Member, ...]
    lag: dict[str, int]
    failure: str | None
