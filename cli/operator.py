"""``lictor operator raft``: the servers that replicate."""

from __future__ import annotations

from cli.client import API_FLAGS, READ_FLAGS, Api
from cli.errors import CliError, UsageError
from cli.flags import Args, Command, Family, Flag
from cli.output import print_json, table

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
    Api.of(args).write("POST", "/v1/operator/raft/transfer-leader", params=params)
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
        },
    )
}
