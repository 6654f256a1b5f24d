"""``lictor catalog``: what the whole cluster knows."""

from __future__ import annotations

from cli.client import READ_FLAGS, Api, quote
from cli.flags import Args, Command, Family, Flag
from cli.output import print_json, table


def nodes(args: Args) -> int:
    """List nodes, or those that run a service."""
    api = Api.of(args)
    if args.text("service"):
        rows = api.get(f"/v1/catalog/service/{quote(args.text('service'))}").json()
        found = {row["Node"]: row for row in rows}.values()
    else:
        found = api.get("/v1/catalog/nodes").json()
    if args.on("json"):
        print_json(list(found))
        return 0
    print(
        table(
            ("Node", "ID", "Address", "DC"),
            [(n["Node"], (n.get("ID") or "-")[:8], n["Address"], n.get("Datacenter", "")) for n in found],
        )
    )
    return 0


def services(args: Args) -> int:
    """List service names with their tags."""
    found = Api.of(args).get("/v1/catalog/services").json()
    if args.on("json"):
        print_json(found)
        return 0
    for name, tags in sorted(found.items()):
        print(f"{name}  {','.join(tags)}" if tags and args.on("tags") else name)
    return 0


def instances(args: Args) -> int:
    """List the instances of a service."""
    found = Api.of(args).get(f"/v1/catalog/service/{quote(args.words[0])}").json()
    if args.on("json"):
        print_json(found)
        return 0
    rows = [(r["ServiceID"], r["Node"], r["ServiceAddress"] or r["Address"], r["ServicePort"]) for r in found]
    print(table(("ID", "Node", "Address", "Port"), rows))
    return 0


def datacenters(args: Args) -> int:
    """List datacenters."""
    found = Api.of(args).get("/v1/catalog/datacenters").json()
    if args.on("json"):
        print_json(found)
        return 0
    print("\n".join(found))
    return 0


FAMILIES = {
    "catalog": Family(
        "Look into the catalog",
        {
            "nodes": Command("List nodes", nodes, (Flag("service", "only nodes that run it", "NAME"), *READ_FLAGS)),
            "services": Command("List services", services, (Flag("tags", "show tags", switch=True), *READ_FLAGS)),
            "instances": Command("List a service's instances", instances, READ_FLAGS, "SERVICE", 1, 1),
            "datacenters": Command("List datacenters", datacenters, READ_FLAGS),
        },
    )
}
