"""Simulated partitions, for local clusters only (``fault_injection = true``).

A node drops every raft and RPC message to and from the peers it is told to block; the cluster supervisor tells both
sides. With `one_way` it is deaf to them but heard by them.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable

from node.errors import Refused

log = logging.getLogger("lictor.faults")


class FaultFilter:
    """Which peers this node hears nothing of, by node name."""

    def __init__(self, *, enabled: bool) -> None:
        self._enabled = enabled
        self._blocked: frozenset[str] = frozenset()
        self._one_way = False

    @property
    def blocked(self) -> frozenset[str]:
        """The peers blocked now."""
        return self._blocked

    def blocks(self, node: str, direction: str = "in") -> bool:
        """Return whether messages of `node` ("in") or to it ("out") are dropped."""
        return node in self._blocked and (direction == "in" or not self._one_way)

    def block(self, nodes: Iterable[str], *, one_way: bool = False) -> list[str]:
        """Block exactly these peers; none heals everything. Raises Refused where faults are off."""
        if not self._enabled:
            raise Refused(
                "fault injection is off: set cluster.fault_injection = true (local clusters only)", http_status=403
            )
        self._blocked, self._one_way = frozenset(nodes), one_way
        way = "from" if one_way else "to and from"
        log.warning("faults: messages are dropped %s: %s", way, ", ".join(sorted(self._blocked)) or "nobody")
        return sorted(self._blocked)
