"""Which servers are well, as Consul's autopilot says it, and which dead ones may be removed. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from raftstate.replica import RaftStatus

LAG_MAX = 250
"""Consul's MaxTrailingLogs: a server further behind is not healthy."""
MIN_QUORUM = 3
"""Dead servers are not removed when fewer voters than this would be left: a restart should find its place kept."""


def health(
    status: RaftStatus, alive: Callable[[str], bool], since: Mapping[str, str], *, version: str
) -> dict[str, Any]:
    """Return Consul's ``/v1/operator/autopilot/health`` from the leader's status.

    `alive` says whether a server's heartbeats arrive; `since` when each last changed between well and not.
    """
    servers = []
    well_voters = voters = 0
    for member in status.members:
        leads = member.id == status.leader
        lag = 0 if leads else status.lag.get(member.id, status.last_index)
        well = leads or (alive(member.id) and lag <= LAG_MAX)
        voters += member.voter
        well_voters += member.voter and well
        servers.append(
            {
                "ID": member.id,
                "Name": member.id,
                "Address": member.address,
                "SerfStatus": "alive" if leads or alive(member.id) else "failed",
                "Version": version,
                "Leader": leads,
                "LastContact": "0s" if leads else f"{status.last_contact_ms}ms",
                "LastTerm": status.term,
                "LastIndex": max(0, status.last_index - lag),
                "Healthy": well,
                "Voter": member.voter,
                "StableSince": since.get(member.id, ""),
            }
        )
    tolerance = max(0, well_voters - (voters // 2 + 1))
    return {
        "Healthy": all(server["Healthy"] for server in servers),
        "FailureTolerance": tolerance,
        "Servers": servers,
    }


def removable(status: RaftStatus, dead_for_s: Mapping[str, float], *, after_s: float) -> str | None:
    """Return one server to remove from the membership, or None.

    One at a time, only when dead for `after_s`, never the leader, never so that fewer than MIN_QUORUM voters stay,
    and only while a majority of what is left is well.
    """
    voters = [member for member in status.members if member.voter]
    for member in sorted(status.members, key=lambda one: -dead_for_s.get(one.id, 0.0)):
        if member.id == status.leader or dead_for_s.get(member.id, 0.0) < after_s:
            continue
        left = [one for one in voters if one.id != member.id]
        well = [one for one in left if one.id not in dead_for_s]
        if member.voter and (len(left) < MIN_QUORUM or len(well) <= len(left) // 2):
            continue
        return member.id
    return None
