"""``lictor identity``: withdraw an identity although its certificate has not run out, and give it back."""

from __future__ import annotations

from cli.client import API_FLAGS, READ_FLAGS, Api
from cli.errors import CliError, UsageError
from cli.flags import Args, Command, Family, Flag
from cli.output import print_json, table

REVOCATIONS = "/v1/connect/revocations"
_KINDS = {"service-id": "instance", "service": "service", "serial": "serial"}


def _subject(args: Args, command: str) -> dict[str, str]:
    """Return what the flags name: an instance (of one service, with both), a service, or a serial number."""
    if args.given("service-id") and args.given("service") and not args.given("serial"):
        return {"Kind": "instance", "Value": args.text("service-id"), "Service": args.text("service")}
    given = [flag for flag in _KINDS if args.given(flag)]
    if len(given) != 1:
        raise UsageError(f"lictor identity {command}: give one of -service-id ID, -service NAME, -serial NUMBER")
    return {"Kind": _KINDS[given[0]], "Value": args.text(given[0])}


def _name(subject: dict[str, str]) -> str:
    return f"{subject['Kind']} {subject['Value']}" + (f" of {subject['Service']}" if subject.get("Service") else "")


def revoke(args: Args) -> int:
    """Revoke."""
    subject = _subject(args, "revoke")
    Api.of(args).put(REVOCATIONS, {**subject, "Reason": args.text("reason")})
    print(f"Revoked: {_name(subject)}")
    return 0


def restore(args: Args) -> int:
    """Take a revocation back."""
    subject = _subject(args, "restore")
    params = {"kind": subject["Kind"], "value": subject["Value"]}
    if "Service" in subject:
        params["service"] = subject["Service"]
    if Api.of(args).write("DELETE", REVOCATIONS, params=params, allow_404=True).status == 404:
        raise CliError(f"{_name(subject)} is not revoked. See: lictor identity list")
    print(f"Restored: {_name(subject)}")
    return 0


def list_revocations(args: Args) -> int:
    """List what is revoked."""
    rows = Api.of(args).get(REVOCATIONS).json()
    if args.on("json"):
        print_json(rows)
    elif not rows:
        print("Nothing is revoked.")
    else:
        shown = [
            (r["Kind"], r["Value"], r.get("Service") or "-", r.get("CreatedAt", "-"), r.get("Reason") or "-")
            for r in rows
        ]
        print(table(("Kind", "Value", "Service", "Since", "Reason"), shown))
    return 0


_SUBJECT = (
    Flag("service-id", "one instance, by its id", "ID"),
    Flag("service", "every instance of a service (with -service-id: whose instance)", "NAME"),
    Flag("serial", "one certificate, by its serial number", "NUMBER"),
)
FAMILIES = {
    "identity": Family(
        "Revoke and restore identities",
        {
            "revoke": Command(
                "Withdraw an identity: its calls are refused and its live connections end",
                revoke,
                (*_SUBJECT, Flag("reason", "a text kept with it", "TEXT"), *API_FLAGS),
            ),
            "restore": Command("Take a revocation back", restore, (*_SUBJECT, *API_FLAGS)),
            "list": Command("List what is revoked", list_revocations, READ_FLAGS),
        },
    )
}
