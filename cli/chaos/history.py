"""The record of a chaos run: operations by clients, faults done to nodes, leaders seen."""

from __future__ import annotations

import math

import msgspec

READ, WRITE, CAS = "read", "write", "cas"
OK, UNKNOWN = "ok", "unknown"
FOREVER = math.inf


class Operation(msgspec.Struct, frozen=True):
    """One call on one key. An operation that certainly had no effect is left out of the history.

    Values are unique per write, so that a value names the write it came from.
    """

    client: str
    key: str
    kind: str
    """``read``, ``write`` or ``cas``."""
    invoked_s: float
    """Monotonic seconds since the run began."""
    returned_s: float = FOREVER
    """:data:`FOREVER` when the outcome was never known: it may take effect at any later time."""
    value: str | None = None
    """Read: what was answered (None: no such key). Write and cas: the new value."""
    expected: str | None = None
    """Cas only: the value that must be there."""
    succeeded: bool = True
    """Cas only: the answer; without meaning while the outcome is unknown."""
    mode: str = ""
    """Read only: ``default``, ``consistent`` or ``stale``."""
    node: str = ""
    index: int = 0
    """Read only: the answer's X-Consul-Index."""

    @property
    def known(self) -> bool:
        """Whether the caller learnt the outcome."""
        return self.returned_s != FOREVER


class Fault(msgspec.Struct, frozen=True):
    """Something done to the cluster, from ``begin_s`` until it was undone at ``end_s``."""

    kind: str
    nodes: tuple[str, ...]
    begin_s: float
    end_s: float


class LeaderSpan(msgspec.Struct, frozen=True):
    """From ``since_s`` on, ``leader`` led ``term``, as a poll of the nodes saw it (empty: none)."""

    since_s: float
    leader: str
    term: int


class History(msgspec.Struct):
    """Everything a run recorded; what the checker and the report read."""

    seed: int
    duration_s: float
    operations: list[Operation]
    faults: list[Fault]
    leaders: list[LeaderSpan]
    tried_s: float = 0.0
    """When the last client ended. Reads that got no answer are not among the operations, so these do not tell it."""
