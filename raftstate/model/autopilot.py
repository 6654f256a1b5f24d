"""Autopilot: how dead servers are cleaned up, and when a server counts as well."""

from __future__ import annotations

from raftstate.model.wire import Wire


class AutopilotConfig(Wire, frozen=True):
    """The part of Consul's autopilot configuration that Lictor acts on, replicated.

    Source: Consul's ``/v1/operator/autopilot/configuration``.
    """

    cleanup_dead_servers: bool = True
    """Whether a server that has been dead for ``liveness.remove_server_after`` leaves the membership by itself."""
    max_trailing_logs: int = 250
    """A server further behind the leader, in log entries, is not healthy."""
    min_quorum: int = 3
    """A voter is not cleaned up when fewer voters than this would be left: a restart should find its place kept."""
    create_index: int = 0
    modify_index: int = 0
