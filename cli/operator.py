"""``lictor operator raft``: the servers that replicate."""

from __future__ import annotations

from cli.client import API_FLAGS, READ_FLAGS, Api
from cli.errors import UsageError
from cli.flags import Args, Command, Family, Flag
from cli.output import print_json, table


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
            "raft transfer-leader": Command(
                "Hand the leadership to another server",
                transfer,
                (Flag("id", "to which (default: the most advanced)", "ID"), *API_FLAGS),
            ),
            "autopilot health": Command("Show how many servers may fail", autopilot, READ_FLAGS),
        },
    )
}
