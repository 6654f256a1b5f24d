"""Simulated partitions, for local clusters only (``fault_injection = true``).

A node drops every raft and RPC message to and from the peers it is told to block. Blocking on one side only makes
a one-way partition of requests; the cluster supervisor tells both sides.
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

    @property
    def blocked(self) -> frozenset[str]:
        """The peers blocked now."""
        return self._blocked

    def blocks(self, node: str) -> bool:
        """Return whether messages of `node` are dropped."""
        return node in self._blocked

    def block(self, nodes: Iterable[str]) -> list[str]:
        """Block exactly these peers; none heals everything. Raises Refused where faults are off."""
        if not self._enabled:
            raise Refused(
                "fault injection is off: set cluster.fault_injection = true (local clusters only)", http_status=403
            )
        self._blocked = frozenset(nodes)
        log.warning("faults: messages are dropped to and from: %s", ", ".join(sorted(self._blocked)) or "nobody")
        return sorted(self._blocked)
