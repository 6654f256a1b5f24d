"""Intentions, the authority's rows, configuration entries, and remembered requests."""

from __future__ import annotations

from typing import Any

import msgspec

from raftstate.model.autopilot import AutopilotConfig
from raftstate.model.connect import CAConfig, CARoot, Revocation
from raftstate.model.intention import Intention
from raftstate.model.wire import Wire
from raftstate.state.changes import WatchKey
from raftstate.state.refusal import Refusal
from raftstate.state.table import Journal, Table, group_put, group_remove

CA_CONFIG = "ca-config"
"""Name of the table that tells the cluster's trust domain."""

IntentionKey = tuple[str, str, str, str]
"""(source service, source name, destination service, destination name); a service is named for instances only."""


def intention_key(row: Intention) -> IntentionKey:
    """Return an intention's key: there is one intention for a pair of source and destination."""
    return row.source_service, row.source_name, row.destination_service, row.destination_name


def intention_watch_keys(key: IntentionKey) -> list[WatchKey]:
    """Return the watch keys that an intention stands under: per side its service, or its instance and any."""
    keys: list[WatchKey] = []
    for family, service, name in (("intention-source", *key[:2]), ("intention-destination", *key[2:])):
        keys.extend([(family, service, name), (family, service, "*")] if service else [(family, name)])
    return keys


class Intentions(Table[IntentionKey, Intention]):
    """Intentions by their pair."""

    def __init__(self, journal: Journal) -> None:
        super().__init__("intentions", Intention, journal)
        self.by_id: dict[str, Intention] = {}
        self.by_watch: dict[WatchKey, dict[IntentionKey, Intention]] = {}
        self.by_names: dict[tuple[str, str], dict[IntentionKey, Intention]] = {}
        """By (source name, destination name), whatever their services."""

    def key_of(self, row: Intention) -> IntentionKey:
        return intention_key(row)

    def reindex(self, key: IntentionKey, old: Intention | None, new: Intention | None) -> None:
        if old is not None:
            self.by_id.pop(old.id, None)
            for watch in intention_watch_keys(key):
                group_remove(self.by_watch, watch, key)
            group_remove(self.by_names, (key[1], key[3]), key)
        if new is not None:
            self.by_id[new.id] = new
            for watch in intention_watch_keys(key):
                group_put(self.by_watch, watch, key, new)
            group_put(self.by_names, (key[1], key[3]), key, new)


class CAConfigs(Table[str, CAConfig]):
    """The authority's configuration: one row or none."""

    def __init__(self, journal: Journal) -> None:
        super().__init__(CA_CONFIG, CAConfig, journal)

    def key_of(self, row: CAConfig) -> str:
        return ""


class Autopilot(Table[str, AutopilotConfig]):
    """Autopilot's settings: one row or none."""

    def __init__(self, journal: Journal) -> None:
        super().__init__("autopilot", AutopilotConfig, journal)

    def key_of(self, row: AutopilotConfig) -> str:
        return ""


class CARoots(Table[str, CARoot]):
    """Root certificates by id."""

    def __init__(self, journal: Journal) -> None:
        super().__init__("ca-roots", CARoot, journal)

    def key_of(self, row: CARoot) -> str:
        return row.id


class SealedKeys(Table[str, bytes]):
    """Sealed private keys by root id; apart from the roots, so that no query shows one by accident."""

    def __init__(self, journal: Journal) -> None:
        super().__init__("ca-sealed-keys", tuple[str, bytes], journal)

    def pack(self, key: str, row: bytes) -> tuple[str, bytes]:
        return key, row

    def unpack(self, data: bytes) -> tuple[str, bytes]:
        key, row = self._decoder.decode(data)
        return key, row


RevocationKey = tuple[str, str, str]
"""(kind, service, value)"""


class Revocations(Table[RevocationKey, Revocation]):
    """Withdrawn identities."""

    def __init__(self, journal: Journal) -> None:
        super().__init__("revocations", Revocation, journal)

    def key_of(self, row: Revocation) -> RevocationKey:
        return row.kind, row.service, row.value


class ConfigEntry(Wire, frozen=True):
    """A configuration entry: free-form, but for kind and name."""

    kind: str
    name: str
    entry: dict[str, Any]
    create_index: int = 0
    modify_index: int = 0


class ConfigEntries(Table[tuple[str, str], ConfigEntry]):
    """Configuration entries by (kind, name)."""

    def __init__(self, journal: Journal) -> None:
        super().__init__("config-entries", ConfigEntry, journal)
        self.by_kind: dict[str, dict[tuple[str, str], ConfigEntry]] = {}

    def key_of(self, row: ConfigEntry) -> tuple[str, str]:
        return row.kind, row.name

    def reindex(self, key: tuple[str, str], old: ConfigEntry | None, new: ConfigEntry | None) -> None:
        if old is not None:
            group_remove(self.by_kind, key[0], key)
        if new is not None:
            group_put(self.by_kind, key[0], key, new)


class Request(msgspec.Struct, frozen=True, array_like=True):
    """A remembered outcome, for a retry of the same request."""

    request_id: str
    index: int
    at_us: int
    value: Any = None
    refusal: Refusal | None = None
    fingerprint: bytes = b""
    """Of its command; empty for one that an older version remembered, which is taken for any."""


class Requests(Table[str, Request]):
    """Outcomes by request id, oldest first."""

    def __init__(self, journal: Journal) -> None:
        super().__init__("requests", Request, journal)
        self.weight = 0
        """Bytes of the values that are more than a flag."""

    def key_of(self, row: Request) -> str:
        return row.request_id

    def reindex(self, key: str, old: Request | None, new: Request | None) -> None:
        if old is not None:
            self.weight -= _weight(old)
        if new is not None:
            self.weight += _weight(new)

    def surplus_weight(self, weight_max: int) -> int:
        """Return how many of the oldest must go for the rest to weigh no more than ``weight_max``."""
        weight, count = self.weight, 0
        for row in self.rows.values():
            if weight <= weight_max:
                break
            weight -= _weight(row)
            count += 1
        return count


def _weight(row: Request) -> int:
    value = row.value
    return 0 if value is None or isinstance(value, (bool, int, str)) else len(msgspec.msgpack.encode(value))
