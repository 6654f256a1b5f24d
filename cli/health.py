"""``lictor health``: instances and checks with their verdicts."""

from __future__ import annotations

from typing import Any

from cli.client import READ_FLAGS, Api, quote
from cli.flags import Args, Command, Family, Flag
from cli.output import paint, print_json, table

_COLOURS = {"passing": "green", "warning": "yellow", "critical": "red"}


def _worst(checks: list[dict[str, Any]]) -> str:
    states = {check["Status"] for check in checks}
    return next((state for state in ("critical", "warning") if state in states), "passing")


def show(args: Args) -> int:
    """Show a service's instances, or every check."""
    api = Api.of(args)
    if not args.words:
        checks = api.get("/v1/health/state/any").json()
        if args.on("json"):
            print_json(checks)
            return 0
        rows = [(c["Node"], c["CheckID"], c["ServiceName"] or "-", c["Status"], c["Output"][:60]) for c in checks]
        print(_coloured(table(("Node", "Check", "Service", "Status", "Output"), rows)))
        return 0
    params = {"passing": "1"} if args.on("passing") else {}
    found = api.get(f"/v1/health/service/{quote(args.words[0])}", params).json()
    if args.on("json"):
        print_json(found)
        return 0
    instances = [
        (
            row["Service"]["ID"],
            row["Node"]["Node"],
            f"{row['Service']['Address'] or row['Node']['Address']}:{row['Service']['Port']}",
            _worst(row["Checks"]),
        )
        for row in found
    ]
    print(_coloured(table(("ID", "Node", "Address", "Status"), instances)))
    return 0


def _coloured(text: str) -> str:
    """Colour the verdicts after the columns are laid out, since colour codes have no width."""
    for state, colour in _COLOURS.items():
        text = text.replace(f"  {state}", f"  {paint(state, colour)}")
    return text


FAMILIES = {
    "health": Family(
        "Show health",
        alone=Command(
            "Show the instances of a service, or all checks, with their health",
            show,
            (Flag("passing", "only instances that pass every check", switch=True), *READ_FLAGS),
            "[SERVICE]",
            words_most=1,
        ),
    )
}
