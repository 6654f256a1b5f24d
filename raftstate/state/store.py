"""All tables of the replicated state. Whoever is not the state machine only reads it."""

from __future__ import annotations

from typing import Any

from raftstate.state.acl_tables import Bootstraps, Policies, Roles, Tokens
from raftstate.state.catalog_tables import Checks, Nodes, Services
from raftstate.state.changes import Changes, Floors, WatchKey
from raftstate.state.kv_tables import Entries, LockDelays, Sessions, Tombstones
from raftstate.state.policy_tables import (
    Autopilot,
    CAConfigs,
    CARoots,
    ConfigEntries,
    Intentions,
    Requests,
    Revocations,
    SealedKeys,
)
from raftstate.state.table import Journal, Table


class Store:
    """The tables, and the index and time of the last command that was applied."""

    def __init__(self) -> None:
        self.index = 0
        """Index of the last command applied."""
        self.offset = 0
        """How far indexes of the state are ahead of the log's, since backups of further logs were restored here."""
        self.clock_us = 0
        """Log time: the latest proposal time seen, microseconds since the epoch. Never goes back."""
        self.journal: Journal = []
        self.nodes = Nodes(self.journal)
        self.services = Services(self.journal)
        self.checks = Checks(self.journal)
        self.intentions = Intentions(self.journal)
        self.autopilot = Autopilot(self.journal)
        self.ca_config = CAConfigs(self.journal)
        self.ca_roots = CARoots(self.journal)
        self.sealed_keys = SealedKeys(self.journal)
        self.revocations = Revocations(self.journal)
        self.kv = Entries(self.journal)
        self.kv_tombstones = Tombstones(self.journal)
        self.sessions = Sessions(self.journal)
        self.lock_delays = LockDelays(self.journal)
        self.config_entries = ConfigEntries(self.journal)
        self.tokens = Tokens(self.journal)
        self.acl_policies = Policies(self.journal)
        self.acl_roles = Roles(self.journal)
        self.acl_bootstrap = Bootstraps(self.journal)
        self.requests = Requests(self.journal)
        self.changes = Changes(self.journal)
        self.floors = Floors(self.journal)

    def tables(self) -> list[Table[Any, Any]]:
        """Return every table, in the order of a snapshot."""
        return [value for value in vars(self).values() if isinstance(value, Table)]

    def changed_at(self, key: WatchKey) -> int:
        """Return the index at which what ``key`` stands for last changed; 0 when never. Not for ``kv`` families."""
        index = self.changes.rows.get(key)
        return self.floors.rows.get(key[0], 0) if index is None else abs(index)

    def kv_changed_at(self, key: str) -> int:
        """Return the index at which a KV key was last set or deleted."""
        entry = self.kv.rows.get(key)
        if entry is not None:
            return entry.modify_index
        return self.kv_tombstones.rows.get(key) or self.floors.rows.get("kv", 0)
