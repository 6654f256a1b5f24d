"""``lictor intentions``: who may call whom.

A name on either side is a service, one instance's id, or ``*``; ``service:instance`` is the explicit form.
"""

from __future__ import annotations

import re
from typing import Any

from cli.client import API_FLAGS, READ_FLAGS, Api, quote
from cli.errors import CliError, Refused, UsageError
from cli.flags import Args, Command, Family, Flag
from cli.output import note, paint, print_json, table
from cli.services import pairs

_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.IGNORECASE)
EXACT = "/v1/connect/intentions/exact"


def _sides(args: Args, command: str) -> tuple[str, str]:
    """Return (source, destination) from ``-from``/``-to`` or from two words."""
    flagged = args.text("from"), args.text("to")
    if args.words and any(flagged):
        raise UsageError(f"lictor intentions {command}: give either -from and -to, or SOURCE DESTINATION, not both")
    if any(flagged):
        if not all(flagged):
            raise UsageError(f"lictor intentions {command}: missing {'-to' if flagged[0] else '-from'}")
        return flagged
    if len(args.words) != 2:
        raise UsageError(f"lictor intentions {command}: expects -from SOURCE -to DESTINATION, or SOURCE DESTINATION")
    return args.words[0], args.words[1]


def _pair(source: str, destination: str) -> dict[str, str]:
    return {"source": source, "destination": destination}


def body_of(args: Args) -> dict[str, Any]:
    """Return what the flags say an intention does: an action, or permissions made from ``-verb``."""
    if args.on("allow") and args.on("deny"):
        raise UsageError("lictor intentions create: -allow and -deny contradict each other")
    body: dict[str, Any] = {"Action": "deny" if args.on("deny") else "allow"}
    if args.given("verb"):
        if args.on("deny"):
            raise UsageError("lictor intentions create: -verb lists what is permitted; it does not go with -deny")
        import msgspec

        from raftstate.model.verbs import verbs_to_permissions

        try:
            permissions = verbs_to_permissions(args.text("verb"))
        except ValueError as error:
            raise UsageError(f"lictor intentions create: -verb: {error}") from None
        if permissions:
            body = {"Permissions": msgspec.to_builtins(permissions)}
    if args.given("description"):
        body["Description"] = args.text("description")
    if args.many("meta"):
        body["Meta"] = pairs(args.many("meta"), "meta")
    return body


def create(args: Args) -> int:
    """Create an intention; one that exists is an error unless ``-replace``."""
    source, destination = _sides(args, "create")
    body = body_of(args)
    api = Api.of(args)
    if args.on("replace"):
        api.put(EXACT, body, _pair(source, destination))
    else:
        try:
            api.write(
                "POST", "/v1/connect/intentions", {**body, "SourceName": source, "DestinationName": destination}
            )
        except Refused as error:
            if "already" in str(error) or "duplicate" in str(error).lower():
                raise CliError(
                    f"an intention {source} => {destination} exists already; -replace overwrites it, and lictor"
                    " intentions delete removes it"
                ) from None
            raise
    shown = "deny" if args.on("deny") else "allow"
    print(f"Created: {source} => {destination} ({shown})")
    _say_what_was_meant(api, source, destination)
    return 0


def _say_what_was_meant(api: Api, source: str, destination: str) -> None:
    """Tell when a name was taken for a service that is not registered: it might be a misspelt instance id."""
    answer = api.get(EXACT, _pair(source, destination), allow_404=True)
    if answer.status != 200:
        return
    row = answer.json()
    services = api.get("/v1/catalog/services").json()
    for side, typed in (("Source", source), ("Destination", destination)):
        name = row.get(f"{side}Name", typed)
        if typed != "*" and not row.get(f"{side}Service") and name not in services:
            note(f"Note: nothing is registered as {typed!r} yet; the intention takes it as the name of a service.")


def _one_row(api: Api, args: Args, command: str) -> tuple[dict[str, Any], str]:
    """Return the intention that an ID or two names mean, and how it was called."""
    if len(args.words) == 1 and not args.given("from"):
        if not _UUID.fullmatch(args.words[0]):
            raise UsageError(
                f"lictor intentions {command}: {args.words[0]!r} is not an intention's id; give two names"
            )
        answer = api.get(f"/v1/connect/intentions/{quote(args.words[0])}", allow_404=True)
        called = args.words[0]
    else:
        source, destination = _sides(args, command)
        answer = api.get(EXACT, _pair(source, destination), allow_404=True)
        called = f"{source} => {destination}"
    if answer.status == 404:
        raise CliError(f"there is no intention {called}. See: lictor intentions list")
    return answer.json(), called


def delete(args: Args) -> int:
    """Delete an intention."""
    api = Api.of(args)
    if len(args.words) == 1 and not args.given("from"):
        row, called = _one_row(api, args, "delete")
        api.write("DELETE", f"/v1/connect/intentions/{quote(row['ID'])}")
    else:
        source, destination = _sides(args, "delete")
        called = f"{source} => {destination}"
        _one_row(api, args, "delete")
        api.write("DELETE", EXACT, params=_pair(source, destination))
    print(f"Intention deleted: {called}")
    return 0


def action_of(row: dict[str, Any]) -> str:
    """Return an intention's action in a word or two."""
    permissions = row.get("Permissions") or ()
    if not permissions:
        return str(row.get("Action") or "deny")
    first = permissions[0]
    methods = (first.get("HTTP") or {}).get("Methods") or ()
    more = f" +{len(permissions) - 1}" if len(permissions) > 1 else ""
    return f"{first['Action']} http{' ' + ','.join(methods) if methods else ''}{more}"


def side_of(row: dict[str, Any], side: str) -> str:
    """Return how an intention's source or destination is written: ``name`` or ``service:instance``."""
    service = row.get(f"{side}Service")
    return f"{service}:{row[f'{side}Name']}" if service else str(row[f"{side}Name"])


def list_intentions(args: Args) -> int:
    """List intentions by falling precedence."""
    rows = Api.of(args).get("/v1/connect/intentions").json()
    if args.on("json"):
        print_json(rows)
        return 0
    if not rows:
        print("There are no intentions.")
        return 0
    rows.sort(key=lambda row: -row.get("Precedence", 0))
    shown = [
        (side_of(r, "Source"), action_of(r), side_of(r, "Destination"), r.get("Precedence", "-"), r.get("ID", ""))
        for r in rows
    ]
    print(table(("Source", "Action", "Destination", "Precedence", "ID"), shown))
    return 0


def get(args: Args) -> int:
    """Show one intention."""
    row, _ = _one_row(Api.of(args), args, "get")
    if args.on("json"):
        print_json(row)
        return 0
    print(f"Source:       {side_of(row, 'Source')}")
    print(f"Destination:  {side_of(row, 'Destination')}")
    print(f"Action:       {action_of(row)}")
    for key in ("Description", "ID", "Precedence", "CreatedAt", "UpdatedAt"):
        if row.get(key):
            print(f"{key + ':':<13} {row[key]}")
    for key, value in (row.get("Meta") or {}).items():
        print(f"Meta[{key}]:   {value}")
    return 0


def check(args: Args) -> int:
    """Say whether a connection would be allowed. The exit code is 1 when it would not."""
    source, destination = _sides(args, "check")
    found = Api.of(args).get("/v1/connect/intentions/check", _pair(source, destination)).json()
    reason = f"  ({found['Reason']})" if found.get("Reason") else ""
    print((paint("Allowed", "green") if found["Allowed"] else paint("Denied", "red")) + reason)
    return 0 if found["Allowed"] else 1


def match(args: Args) -> int:
    """List the intentions that bear on a service, the one that decides first."""
    if args.on("source") and args.on("destination"):
        raise UsageError("lictor intentions match: give -source or -destination, not both")
    by, name = "source" if args.on("source") else "destination", args.words[0]
    found = Api.of(args).get("/v1/connect/intentions/match", {"by": by, "name": name}).json()
    if args.on("json"):
        print_json(found)
        return 0
    for row in found.get(name) or ():
        print(f"{side_of(row, 'Source')} => {side_of(row, 'Destination')} ({action_of(row)})")
    return 0


_SIDES = (
    Flag("from", "source: a service, an instance's id, service:instance or *", "SOURCE", aliases=("source",)),
    Flag("to", "destination, likewise", "DESTINATION", aliases=("destination",)),
)
_PAIR = "[SOURCE DESTINATION]"
FAMILIES = {
    "intentions": Family(
        "Say who may call whom",
        {
            "create": Command(
                "Allow or deny calls from a source to a destination",
                create,
                (
                    *_SIDES,
                    Flag("verb", "permit HTTP only: http, or methods such as GET,POST", "VERBS"),
                    Flag("allow", "allow (the default)", switch=True),
                    Flag("deny", "deny", switch=True),
                    Flag("replace", "overwrite an intention of the same pair", switch=True),
                    Flag("description", "a text kept with it", "TEXT"),
                    Flag("meta", "metadata; may be repeated", "KEY=VALUE", many=True),
                    *API_FLAGS,
                ),
                _PAIR,
                words_most=2,
            ),
            "delete": Command("Delete an intention", delete, (*_SIDES, *API_FLAGS), f"{_PAIR} | ID", words_most=2),
            "list": Command("List intentions", list_intentions, READ_FLAGS),
            "get": Command("Show an intention", get, (*_SIDES, *READ_FLAGS), f"{_PAIR} | ID", words_most=2),
            "check": Command("Would a connection be allowed?", check, (*_SIDES, *READ_FLAGS), _PAIR, words_most=2),
            "match": Command(
                "List the intentions that bear on a service",
                match,
                (
                    Flag("source", "NAME is the source", switch=True),
                    Flag("destination", "NAME is the destination (the default)", switch=True),
                    *READ_FLAGS,
                ),
                "NAME",
                1,
                1,
            ),
        },
    )
}
