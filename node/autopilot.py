"""Which servers are well, as Consul's autopilot says it, and which dead ones may be removed. Pure.

What an operator may set is `AutopilotConfig`, replicated. The other fields of Consul's configuration are shown as
what is done, and cannot be set: see `shown`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from node.config import Liveness
from node.durations import format_duration
from raftstate.model.autopilot import AutopilotConfig

if TYPE_CHECKING:
    from raftstate.replica import RaftStatus  # an agent shows the report, and does not load a replica for it

DEFAULTS = AutopilotConfig()


def shown(config: AutopilotConfig, liveness: Liveness) -> dict[str, Any]:
    """Return Consul's ``/v1/operator/autopilot/configuration``, and since when a server counts as dead for good."""
    return {
        "CleanupDeadServers": config.cleanup_dead_servers,
        "LastContactThreshold": format_duration(liveness.node_ttl_s),
        "MaxTrailingLogs": config.max_trailing_logs,
        "MinQuorum": config.min_quorum,
        "ServerStabilizationTime": "0s",  # a vote comes with having caught up
        "RedundancyZoneTag": "",
        "DisableUpgradeMigration": True,
        "UpgradeVersionTag": "",
        "RemoveServerAfter": format_duration(liveness.remove_server_after_s),
        "CreateIndex": config.create_index,
        "ModifyIndex": config.modify_index,
    }


def health(
    status: RaftStatus,
    alive: Callable[[str], bool],
    since: Mapping[str, str],
    *,
    version: str,
    config: AutopilotConfig = DEFAULTS,
) -> dict[str, Any]:
    """Return Consul's ``/v1/operator/autopilot/health`` from the leader's status.

    `alive` says whether a server's heartbeats arrive; `since` when each last changed between well and not.
    """
    servers = []
    well_voters = voters = 0
    for member in status.members:
        leads = member.id == status.leader
        lag = 0 if leads else status.lag.get(member.id, status.last_index)
        well = leads or (alive(member.id) and lag <= config.max_trailing_logs)
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


def state(report: Mapping[str, Any]) -> dict[str, Any]:
    """Return Consul's ``/v1/operator/autopilot/state`` from its health report."""
    servers = {}
    for row in report["Servers"]:
        kept = {key: value for key, value in row.items() if key not in ("SerfStatus", "Leader", "Voter")}
        servers[row["ID"]] = {
            **kept,
            "NodeStatus": row["SerfStatus"],
            "ReadReplica": False,
            "Status": "leader" if row["Leader"] else "voter" if row["Voter"] else "non-voter",
            "Meta": {},
            "NodeType": "voter",
        }
    return {
        "Healthy": report["Healthy"],
        "FailureTolerance": report["FailureTolerance"],
        "OptimisticFailureTolerance": report["FailureTolerance"],
        "Servers": servers,
        "Leader": next((row["ID"] for row in report["Servers"] if row["Leader"]), ""),
        "Voters": [row["ID"] for row in report["Servers"] if row["Voter"]],
    }


def removable(
    status: RaftStatus, dead_for_s: Mapping[str, float], *, after_s: float, config: AutopilotConfig = DEFAULTS
) -> str | None:
    """Return one server to remove from the membership, or None.

    One at a time, only when dead for `after_s`, never the leader, never so that fewer voters than `min_quorum` stay,
    and only while a majority of what is left is alive and follows the log.
    """
    if not config.cleanup_dead_servers:
        return None

    def follows(server: str) -> bool:
        return server == status.leader or status.lag.get(server, status.last_index) <= config.max_trailing_logs

    voters = [member for member in status.members if member.voter]
    for member in sorted(status.members, key=lambda one: -dead_for_s.get(one.id, 0.0)):
        if member.id == status.leader or dead_for_s.get(member.id, 0.0) < after_s:
            continue
        left = [one for one in voters if one.id != member.id]
        well = [one for one in left if one.id not in dead_for_s and follows(one.id)]
        if member.voter and (len(left) < config.min_quorum or len(well) <= len(left) // 2):
            continue
        return member.id
    return None
