"""``lictor members``, ``status``, ``info`` and ``leave``."""

from __future__ import annotations

from typing import Any

from cli.client import API_FLAGS, READ_FLAGS, Api
from cli.flags import Args, Command, Family
from cli.output import print_json, table

_STATES = {0: "none", 1: "alive", 2: "leaving", 3: "left", 4: "failed"}


def members(args: Args) -> int:
    """List members."""
    found = Api.of(args).get("/v1/agent/members").json()
    if args.on("json"):
        print_json(found)
        return 0
    rows = []
    for one in sorted(found, key=lambda row: str(row["Name"])):
        tags = one.get("Tags") or {}
        kind = "server" if tags.get("role") in ("consul", "server") else "client"
        rows.append(
            (
                one["Name"],
                f"{one['Addr']}:{one['Port']}" if one.get("Port") else one["Addr"],
                _STATES.get(one["Status"], one["Status"]),
                kind,
                tags.get("build", "-"),
                tags.get("dc", "-"),
            )
        )
    print(table(("Node", "Address", "Status", "Type", "Build", "DC"), rows))
    return 0


def status(args: Args) -> int:
    """Show the leader and the peers; the exit code is 4 when there is no leader in time."""
    api = Api.of(args)
    leader, peers = api.get("/v1/status/leader").json(), api.get("/v1/status/peers").json()
    if args.on("json"):
        print_json({"Leader": leader, "Peers": peers})
    else:
        print(f"Leader: {leader or '(none)'}")
        print(f"Peers:  {', '.join(peers)}")
    return 0 if leader else 4


def info(args: Args) -> int:
    """Show what the agent tells of itself."""
    found: dict[str, Any] = Api.of(args).get("/v1/agent/self").json()
    if args.on("json"):
        print_json(found)
        return 0
    config = found.get("Config", {})
    for key in ("NodeName", "NodeID", "Datacenter", "Server", "Version"):
        print(f"{key} = {config.get(key, '-')}")
    for section, values in sorted((found.get("Stats") or {}).items()):
        print(f"{section}:")
        for key, value in sorted(values.items()):
            print(f"\t{key} = {value}")
    return 0


def leave(args: Args) -> int:
    """Let the agent leave."""
    Api.of(args).put("/v1/agent/leave")
    print("Graceful leave complete")
    return 0


FAMILIES = {
    "members": Family("List members", alone=Command("List the cluster's members", members, READ_FLAGS)),
    "status": Family("Show the leader", alone=Command("Show the raft leader and its peers", status, READ_FLAGS)),
    "info": Family("Show figures", alone=Command("Show the agent's own figures", info, READ_FLAGS)),
    "leave": Family("Leave", alone=Command("Let the agent leave the cluster and end", leave, API_FLAGS)),
}
