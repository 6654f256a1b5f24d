"""What the event loop serves beside raft. Whoever takes in requests on it counts them here.

A server's raft and its API, RPC and DNS share one loop: who makes that loop wait makes all of them wait.
"""

from __future__ import annotations


class LoopLoad:
    """Counted, not measured: it must cost next to nothing for each request."""

    __slots__ = ("requests",)

    def __init__(self) -> None:
        self.requests = 0
        """How often something came that someone waits for an answer to, but for writes: they wait for raft."""


LOOP = LoopLoad()
"""This process's: it has one event loop."""
