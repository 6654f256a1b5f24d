"""``lictor ca``: the certificate authority behind every identity."""

from __future__ import annotations

from cli.client import API_FLAGS, READ_FLAGS, Api
from cli.flags import Args, Command, Family, Flag
from cli.output import print_json, table


def roots(args: Args) -> int:
    """List trusted roots."""
    found = Api.of(args).get("/v1/connect/ca/roots").json()
    if args.on("json"):
        print_json(found)
        return 0
    if args.on("pem"):
        print("".join(root["RootCert"].rstrip() + "\n" for root in found["Roots"]), end="")
        return 0
    print(f"Trust domain: {found['TrustDomain']}")
    rows = [
        (r["ID"], r["Name"], "yes" if r["Active"] else "no", (r.get("NotAfter") or "-")[:10]) for r in found["Roots"]
    ]
    print(table(("ID", "Name", "Active", "Ends"), rows))
    return 0


def rotate(args: Args) -> int:
    """Make a new root."""
    new = Api.of(args).put("/v1/connect/ca/rotate").json()
    print(
        f"Rotated: the active root is {new.get('ID', '?')}. Leaves move to it; the old root stays trusted till then."
    )
    return 0


FAMILIES = {
    "ca": Family(
        "Show and rotate the certificate authority's roots",
        {
            "roots": Command(
                "List the trusted roots", roots, (Flag("pem", "print the certificates", switch=True), *READ_FLAGS)
            ),
            "rotate": Command("Make a new root; no call fails meanwhile", rotate, API_FLAGS),
        },
    )
}
