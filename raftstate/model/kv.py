"""Key/value entries and sessions, as Consul's API shows them."""

from __future__ import annotations

import msgspec

from raftstate.model.wire import Wire

BEHAVIOR_RELEASE, BEHAVIOR_DELETE = "release", "delete"
DEFAULT_LOCK_DELAY_NS = 15_000_000_000


class KVEntry(Wire, frozen=True):
    """One key. JSON shows the value in base64, and ``null`` when it is empty."""

    lock_index: int
    """How often the lock on this key was acquired."""
    key: str
    flags: int
    value: bytes | None
    session: str | msgspec.UnsetType = msgspec.UNSET
    """The session that holds the lock; left out when there is none."""
    create_index: int = 0
    modify_index: int = 0


class ServiceCheck(Wire, frozen=True):
    """A check of a service that a session depends on."""

    id: str
    namespace: str = ""


class Session(Wire, frozen=True):
    """A claim on locks that ends when its node, one of its checks or its TTL fails."""

    id: str
    node: str
    name: str = ""
    lock_delay: int = DEFAULT_LOCK_DELAY_NS
    """Nanoseconds for which a key that an ended session held cannot be locked."""
    behavior: str = BEHAVIOR_RELEASE
    ttl: str = ""
    node_checks: tuple[str, ...] = ("serfHealth",)
    service_checks: tuple[ServiceCheck, ...] = ()
    create_index: int = 0
    modify_index: int = 0
