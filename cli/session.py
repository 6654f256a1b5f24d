"""``lictor session``: claims that end with their node, their checks or their time, on which locks hang."""

from __future__ import annotations

from typing import Any

from cli.client import API_FLAGS, READ_FLAGS, Api, quote
from cli.errors import CliError
from cli.flags import Args, Command, Family, Flag
from cli.output import print_json, table


def _seconds(nanoseconds: int) -> str:
    return f"{nanoseconds / 1e9:g}s"


def list_all(args: Args) -> int:
    """Print the sessions, or those of one node."""
    node = args.text("node")
    rows = Api.of(args).get(f"/v1/session/node/{quote(node)}" if node else "/v1/session/list").json()
    if args.on("json"):
        print_json(rows)
        return 0
    head = ("ID", "Name", "Node", "TTL", "Behavior", "Lock delay")
    cells = (
        (row["ID"], row["Name"] or "-", row["Node"], row["TTL"] or "-", row["Behavior"], _seconds(row["LockDelay"]))
        for row in rows
    )
    print(table(head, cells))
    return 0


def _known(api: Api, session_id: str) -> dict[str, Any]:
    rows: list[dict[str, Any]] = api.get(f"/v1/session/info/{quote(session_id)}").json()
    if not rows:
        raise CliError(f"no session {session_id!r}: it has ended, or never was. See: lictor session list")
    return rows[0]


def info(args: Args) -> int:
    """Print one session."""
    session = _known(Api.of(args), args.words[0])
    if args.on("json"):
        print_json(session)
        return 0
    checks = [*(session.get("NodeChecks") or ()), *(one["ID"] for one in session.get("ServiceChecks") or ())]
    for name, value in (
        ("ID", session["ID"]), ("Name", session["Name"]), ("Node", session["Node"]), ("TTL", session["TTL"]),
        ("Behavior", session["Behavior"]), ("LockDelay", _seconds(session["LockDelay"])),
        ("Checks", ", ".join(checks)), ("CreateIndex", session["CreateIndex"]),
        ("ModifyIndex", session["ModifyIndex"]),
    ):  # fmt: skip
        print(f"{name:<12} {value or '-'}")
    return 0


def create(args: Args) -> int:
    """Create a session and print its id alone, for use in scripts."""
    body: dict[str, Any] = {}
    for flag, field in (("name", "Name"), ("node", "Node"), ("behavior", "Behavior"), ("ttl", "TTL")):
        if args.given(flag):
            body[field] = args.text(flag)
    if args.given("lock-delay"):
        body["LockDelay"] = args.text("lock-delay")
    if args.given("check"):
        body["NodeChecks"] = [check for check in args.many("check") if check]
    print(Api.of(args).put("/v1/session/create", body).json()["ID"])
    return 0


def renew(args: Args) -> int:
    """Start a session's time again."""
    answer = Api.of(args).write("PUT", f"/v1/session/renew/{quote(args.words[0])}", allow_404=True)
    if answer.status == 404:
        raise CliError(f"no session {args.words[0]!r}: it has ended; its locks are free. See: lictor session create")
    print(f"Session renewed: {args.words[0]}")
    return 0


def destroy(args: Args) -> int:
    """End a session; its locks are free at once."""
    api = Api.of(args)
    _known(api, args.words[0])
    api.put(f"/v1/session/destroy/{quote(args.words[0])}")
    print(f"Session destroyed: {args.words[0]}")
    return 0


FAMILIES = {
    "session": Family(
        "Create, list, renew and destroy sessions",
        {
            "list": Command("List sessions", list_all, (Flag("node", "only this node's", "NODE"), *READ_FLAGS)),
            "info": Command("Show one session", info, READ_FLAGS, "ID", 1, 1),
            "create": Command(
                "Create a session and print its id",
                create,
                (
                    Flag("name", "a name for people to know it by"),
                    Flag("ttl", "end it unless it is renewed in this time, 10s to 24h", "TIME"),
                    Flag("behavior", "release or delete: what becomes of its keys when it ends (default release)"),
                    Flag("lock-delay", "how long its locks rest after it has ended by failure (default 15s)", "TIME"),
                    Flag("node", "the node it lives on (default the agent's)", "NODE"),
                    Flag("check", "end it with this node check (default serfHealth); empty: none", "ID", many=True),
                    *API_FLAGS,
                ),
            ),
            "renew": Command("Start a session's TTL again", renew, API_FLAGS, "ID", 1, 1),
            "destroy": Command("End a session", destroy, API_FLAGS, "ID", 1, 1),
        },
    )
}
