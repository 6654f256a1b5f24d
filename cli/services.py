"""``lictor services``: what the agent registers for this host."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cli.client import API_FLAGS, READ_FLAGS, Api, quote
from cli.errors import UsageError
from cli.flags import Args, Command, Family, Flag, port
from cli.output import print_json, table


def read_definitions(path: str) -> list[dict[str, Any]]:
    """Read service definitions from a JSON file: one, ``{"service": {…}}`` or ``{"services": […]}``."""
    try:
        value = json.loads(Path(path).read_text())
    except OSError as error:
        raise UsageError(f"can't read {path}: {error.strerror}") from None
    except ValueError as error:
        raise UsageError(f"{path} is not JSON: {error}") from None
    if isinstance(value, dict) and isinstance(value.get("services"), list):
        found: list[Any] = value["services"]
    elif isinstance(value, dict):
        found = [value.get("service", value)]
    else:
        found = [None]
    for place, definition in enumerate(found):
        if not isinstance(definition, dict) or not service_name(definition):
            raise UsageError(f"{path}: service {place + 1} has no name; expected an object with a Name")
    return found


def service_name(definition: dict[str, Any]) -> str:
    """Return the name in a definition, whose keys may be spelled in any case."""
    return next((str(value) for key, value in definition.items() if key.lower() == "name"), "")


def service_id(definition: dict[str, Any]) -> str:
    """Return the instance id in a definition; without one it is the name."""
    return next((str(v) for key, v in definition.items() if key.lower() == "id" and v), service_name(definition))


def pairs(texts: list[str], flag: str) -> dict[str, str]:
    """Parse ``KEY=VALUE`` flags."""
    result = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise UsageError(f"flag -{flag} must be KEY=VALUE, not {text!r}")
        result[key] = value
    return result


def definition_of(args: Args) -> dict[str, Any]:
    """Return the service definition that the flags describe."""
    definition: dict[str, Any] = {"Name": args.text("name")}
    if args.text("id"):
        definition["ID"] = args.text("id")
    if args.given("port"):
        definition["Port"] = args.number("port")
    if args.text("address"):
        definition["Address"] = args.text("address")
    if args.many("tag"):
        definition["Tags"] = [tag for text in args.many("tag") for tag in text.split(",") if tag]
    if args.many("meta"):
        definition["Meta"] = pairs(args.many("meta"), "meta")
    return definition


def register(args: Args) -> int:
    """Register one service by flags, or those of the files."""
    if bool(args.words) == args.given("name"):
        raise UsageError("lictor services register: give either -name NAME or definition files")
    definitions = [d for path in args.words for d in read_definitions(path)] or [definition_of(args)]
    api = Api.of(args)
    for definition in definitions:
        api.put("/v1/agent/service/register", definition)
        print(f"Registered service: {service_name(definition)}")
    return 0


def deregister(args: Args) -> int:
    """Deregister one service by id, or those of the files."""
    if bool(args.words) == args.given("id"):
        raise UsageError("lictor services deregister: give either -id ID or definition files")
    ids = [service_id(d) for path in args.words for d in read_definitions(path)] or [args.text("id")]
    api = Api.of(args)
    for one in ids:
        api.put(f"/v1/agent/service/deregister/{quote(one)}")
        print(f"Deregistered service: {one}")
    return 0


def list_services(args: Args) -> int:
    """List the agent's own services with their health."""
    api = Api.of(args)
    services = api.get("/v1/agent/services").json()
    if args.on("json"):
        print_json(services)
        return 0
    checks = api.get("/v1/agent/checks").json()
    rows = []
    for one in sorted(services.values(), key=lambda row: (row["Service"], row["ID"])):
        states = [check["Status"] for check in checks.values() if check["ServiceID"] == one["ID"]]
        state = next((bad for bad in ("critical", "warning") if bad in states), "passing")
        kind = one.get("Kind") or "service"
        rows.append((one["Service"], one["ID"], one["Port"], kind, state, ",".join(one.get("Tags") or ()) or "-"))
    print(table(("Service", "ID", "Port", "Kind", "Health", "Tags"), rows))
    return 0


FAMILIES = {
    "services": Family(
        "Register, deregister and list services",
        {
            "register": Command(
                "Register a service with the agent, by flags or by JSON files",
                register,
                (
                    Flag("name", "the service's name", "NAME"),
                    Flag("id", "the instance's id, unique on this agent (default: the name)", "ID"),
                    Flag("port", "the port the app listens on; 0: it takes no calls", "PORT", parse=port),
                    Flag("address", "the app's address (default: the agent's)", "ADDRESS"),
                    Flag("tag", "a tag; may be repeated", "TAG", many=True),
                    Flag("meta", "metadata; may be repeated", "KEY=VALUE", many=True),
                    *API_FLAGS,
                ),
                "[FILE…]",
                words_most=None,
            ),
            "deregister": Command(
                "Withdraw a service, and its sidecar with it",
                deregister,
                (Flag("id", "the instance's id", "ID"), *API_FLAGS),
                "[FILE…]",
                words_most=None,
            ),
            "list": Command("List the services of this agent", list_services, READ_FLAGS),
        },
    )
}
