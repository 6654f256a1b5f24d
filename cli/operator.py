"""``lictor operator raft``: the servers that replicate."""

from __future__ import annotations

import json

from cli.client import API_FLAGS, READ_FLAGS, Api
from cli.errors import CliError, UsageError
from cli.flags import Args, Command, Family, Flag, truth, whole
from cli.output import print_json, table

_AUTOPILOT = "/v1/operator/autopilot/configuration"
RECOVER_DETAILS = """
Run it on the server's machine, as the user that runs the server, while the server is stopped and the other
servers have a leader. The damaged data is kept under another name. At its next start the server takes no part
in raft until the others have removed it, and that is committed: it may have voted, and must not vote twice.
Then it joins as a new server does, and takes the whole state from its peers.
"""


def list_peers(args: Args) -> int:
    """List servers."""
    found = Api.of(args).get("/v1/operator/raft/configuration").json()
    if args.on("json"):
        print_json(found)
        return 0
    rows = [
        (s["Node"], s["ID"], s["Address"], "leader" if s["Leader"] else "follower", str(s["Voter"]).lower())
        for s in found["Servers"]
    ]
    print(table(("Node", "ID", "Address", "State", "Voter"), rows))
    return 0


def remove_peer(args: Args) -> int:
    """Remove a server that will not come back."""
    params = {key: args.text(key) for key in ("id", "address") if args.text(key)}
    if len(params) != 1:
        raise UsageError("lictor operator raft remove-peer: give one of -id ID, -address HOST:PORT")
    Api.of(args).write("DELETE", "/v1/operator/raft/peer", params=params)
    (key, value), *_ = params.items()
    print(f'Removed peer with {key} "{value}"')
    return 0


def add_peer(args: Args) -> int:
    """Add a server that runs."""
    params = {"id": args.text("id"), "address": args.text("address")}
    Api.of(args).write("PUT", "/v1/operator/raft/peer", params=params)
    print(f'Added peer with id "{params["id"]}": it votes')
    return 0


def recover(args: Args) -> int:
    """Prepare a stopped server to rejoin."""
    from node.config import load_config
    from node.errors import NodeError
    from node.recovery import recover as prepare

    try:
        config = load_config(args.text("config"))
        node = config.node(args.text("node"))
        aside = prepare(config, node)
    except NodeError as error:
        raise CliError(str(error)) from None
    if aside is not None:
        print(f"Kept the old raft data in {aside}: delete it once it is of no more use")
    print(
        f"{node.name} rejoins at its next start: the others take it out, then in again, without a vote until it has"
    )
    print("caught up. Start it, and see: lictor operator raft list-peers")
    return 0


def transfer(args: Args) -> int:
    """Hand the leadership to another server."""
    params = {"id": args.text("id")} if args.text("id") else {}
    Api.of(args).write("POST", "/v1/operator/raft/transfer-leader", params=params, once=not params)
    print("Success" + (f": {args.text('id')} leads now" if args.text("id") else ""))
    return 0


def autopilot(args: Args) -> int:
    """Show how many servers may fail."""
    answer = Api.of(args).get("/v1/operator/autopilot/health").json()
    if args.on("json"):
        print_json(answer)
        return 0
    print(f"Healthy:           {str(answer['Healthy']).lower()}")
    print(f"Failure tolerance: {answer['FailureTolerance']}")
    rows = [
        (s["Name"], s["Address"], "leader" if s["Leader"] else "follower", str(s["Healthy"]).lower(), s["LastIndex"])
        for s in answer["Servers"]
    ]
    print(table(("Node", "Address", "State", "Healthy", "LastIndex"), rows))
    return 0


def state(args: Args) -> int:
    """Show each server's part."""
    answer = Api.of(args).get("/v1/operator/autopilot/state").json()
    if args.on("json"):
        print_json(answer)
        return 0
    print(f"Healthy:           {str(answer['Healthy']).lower()}")
    print(f"Failure tolerance: {answer['FailureTolerance']}")
    print(f"Leader:            {answer['Leader']}")
    print(f"Voters:            {' '.join(answer['Voters'])}")
    rows = [
        (s["ID"], s["Address"], s["Status"], s["NodeStatus"], str(s["Healthy"]).lower(), s["StableSince"])
        for s in answer["Servers"].values()
    ]
    print(table(("Node", "Address", "Status", "Node Status", "Healthy", "Stable Since"), rows))
    return 0


def get_config(args: Args) -> int:
    """Show how dead servers are cleaned up."""
    found = Api.of(args).get(_AUTOPILOT).json()
    if args.on("json"):
        print_json(found)
        return 0
    for name, value in found.items():
        if not name.endswith("Index"):
            print(f"{name} = {json.dumps(value) if isinstance(value, str) else str(value).lower()}")
    return 0


def set_config(args: Args) -> int:
    """Change what was given, and only if nobody else changed it meanwhile."""
    given: dict[str, bool | int] = {}
    if args.given("cleanup-dead-servers"):
        given["CleanupDeadServers"] = args.on("cleanup-dead-servers")
    for key, flag in (("MaxTrailingLogs", "max-trailing-logs"), ("MinQuorum", "min-quorum")):
        if args.given(flag):
            given[key] = args.number(flag)
    if not given:
        raise UsageError("lictor operator autopilot set-config: give what to change; see -help")
    api = Api.of(args)
    found = api.get(_AUTOPILOT).json()
    if not api.put(_AUTOPILOT, {**found, **given}, {"cas": str(found["ModifyIndex"])}).json():
        raise CliError("the configuration was changed by somebody else meanwhile: look at it and try again")
    print("Configuration updated!")
    return 0


FAMILIES = {
    "operator": Family(
        "Raft's members",
        {
            "raft list-peers": Command("List the servers", list_peers, READ_FLAGS),
            "raft remove-peer": Command(
                "Remove a server that will not come back",
                remove_peer,
                (
                    Flag("id", "the server's raft id", "ID"),
                    Flag("address", "or its address", "HOST:PORT"),
                    *API_FLAGS,
                ),
            ),
            "raft add-peer": Command(
                "Add a server that runs: without a vote until it has caught up, which is waited for",
                add_peer,
                (
                    Flag("id", "its node name", "ID", required=True),
                    Flag("address", "where its RPC listens", "HOST:PORT", required=True),
                    *API_FLAGS,
                ),
                details="Ask a server for this (-http-addr). One with join = true in cluster.toml asks by itself.",
            ),
            "raft recover": Command(
                "Let a stopped server whose raft data is damaged or lost rejoin its peers",
                recover,
                (
                    Flag("config", "the cluster's file", "FILE", required=True, aliases=("config-file",)),
                    Flag("node", "which server of the file: this machine's", "NODE", required=True),
                ),
                details=RECOVER_DETAILS,
            ),
            "raft transfer-leader": Command(
                "Hand the leadership to another server",
                transfer,
                (Flag("id", "to which (default: the most advanced)", "ID"), *API_FLAGS),
            ),
            "autopilot health": Command("Show how many servers may fail", autopilot, READ_FLAGS),
            "autopilot state": Command("Show each server's part: who leads, votes, is well", state, READ_FLAGS),
            "autopilot get-config": Command("Show how dead servers are cleaned up", get_config, READ_FLAGS),
            "autopilot set-config": Command(
                "Change how dead servers are cleaned up",
                set_config,
                (
                    Flag("cleanup-dead-servers", "remove servers that stay dead", "true|false", truth),
                    Flag("max-trailing-logs", "a server further behind the leader is unwell", "N", whole),
                    Flag("min-quorum", "voters that a clean-up leaves at least", "N", whole),
                    *API_FLAGS,
                ),
                details="Since when a server counts as dead is liveness.remove_server_after in cluster.toml.",
            ),
        },
    )
}
