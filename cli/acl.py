"""``lictor acl``: the first token, tokens, policies, roles, and the tokens that an agent uses itself."""

from __future__ import annotations

import sys
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cli.client import API_FLAGS, READ_FLAGS, Api, quote
from cli.errors import CliError, UsageError
from cli.flags import Args, Command, Family, Flag
from cli.output import print_json, table

JSON = Flag("json", "print the API's JSON", switch=True)


def _print(row: dict[str, Any], args: Args) -> int:
    """Print one row: its fields in columns, its rules as they are."""
    if args.on("json"):
        print_json(row)
        return 0
    for name, value in row.items():
        if name in ("Rules", "Hash") or name.startswith("Expanded"):
            continue
        if isinstance(value, list):
            value = ", ".join(_link(one) for one in value) or "-"
        print(f"{name + ':':<19} {value if value not in ('', None) else '-'}")
    if "Rules" in row:
        print("Rules:")
        print("\n".join(f"  {line}" for line in row["Rules"].splitlines()))
    return 0


def _link(link: Any) -> str:
    if not isinstance(link, dict):
        return str(link)
    if "ServiceName" in link:
        return ":".join([link["ServiceName"], ",".join(link.get("Datacenters", []))]).rstrip(":")
    if "NodeName" in link:
        return f"{link['NodeName']}:{link['Datacenter']}"
    return f"{link['Name']} ({link['ID']})"


def _list(rows: list[dict[str, Any]], columns: dict[str, Callable[[dict[str, Any]], str]], args: Args) -> int:
    if args.on("json"):
        print_json(rows)
    else:
        print(table(tuple(columns), ([cell(row) or "-" for cell in columns.values()] for row in rows)))
    return 0


def _field(name: str) -> Callable[[dict[str, Any]], str]:
    return lambda row: str(row[name])


def _names(field: str) -> Callable[[dict[str, Any]], str]:
    return lambda row: ", ".join(link["Name"] for link in row.get(field, []))


def _identities(row: dict[str, Any]) -> str:
    return ", ".join(_link(one) for one in (*row.get("ServiceIdentities", []), *row.get("NodeIdentities", [])))


# The first token


def bootstrap(args: Args) -> int:
    """Make the first token, once."""
    body = {"BootstrapSecret": _text_of(args.words[0]).strip()} if args.words else {}
    return _print(Api.of(args).put("/v1/acl/bootstrap", body).json(), args)


# Tokens


def _links(args: Args, before: str = "") -> dict[str, list[Any]]:
    """Return what the flags of tokens and roles link to; ``before`` stands before the flags' names."""

    def named(what: str) -> list[Any]:
        names, ids = args.many(f"{before}{what}-name"), args.many(f"{before}{what}-id")
        return [{"Name": name} for name in names] + [{"ID": id} for id in ids]

    return {
        "Policies": named("policy"),
        "Roles": named("role"),
        "ServiceIdentities": [_service_identity(text) for text in args.many(f"{before}service-identity")],
        "NodeIdentities": [_node_identity(text) for text in args.many(f"{before}node-identity")],
    }


def _changed_links(args: Args, old: dict[str, Any]) -> dict[str, list[Any]]:
    """Return the links that there were; a kind that is given replaces its own, what is appended is added."""
    given, added = _links(args), _links(args, "append-")
    return {name: (given[name] or old.get(name, [])) + added[name] for name in given}


def _service_identity(text: str) -> dict[str, Any]:
    name, _, datacenters = text.partition(":")
    return {"ServiceName": name} | ({"Datacenters": datacenters.split(",")} if datacenters else {})


def _node_identity(text: str) -> dict[str, Any]:
    name, colon, datacenter = text.rpartition(":")
    if not colon or not name or not datacenter:
        raise UsageError(f"-node-identity must be NODE:DATACENTER, not {text!r}")
    return {"NodeName": name, "Datacenter": datacenter}


def token_create(args: Args) -> int:
    """Create a token and print it with its secret, which is shown this once."""
    body: dict[str, Any] = _links(args) | {"Description": args.text("description")}
    # Made here, so that the same token results however often the request is sent.
    body["AccessorID"] = args.text("accessor") or str(uuid.uuid4())
    body["SecretID"] = args.text("secret") or str(uuid.uuid4())
    if args.on("local"):
        body["Local"] = True
    if args.given("expires-ttl"):
        body["ExpirationTTL"] = args.text("expires-ttl")
    return _print(Api.of(args).put("/v1/acl/token", body).json(), args)


def _accessor(args: Args, api: Api) -> str:
    """Return the accessor id that is meant, whole or by a beginning that only one has."""
    given = args.text("accessor-id")
    if len(given) == 36:
        return given
    ids = [row["AccessorID"] for row in api.get("/v1/acl/tokens").json()]
    return _only([id for id in ids if id.startswith(given)], "token", given)


def _only(found: list[str], what: str, given: str) -> str:
    if not found:
        raise CliError(f"no {what} has an id that begins with {given!r}; see: lictor acl {what} list")
    if len(found) > 1:
        raise CliError(f"{len(found)} ids begin with {given!r}: give more of it; see: lictor acl {what} list")
    return found[0]


def token_list(args: Args) -> int:
    """List the tokens."""
    columns = {
        "AccessorID": _field("AccessorID"),
        "Description": _field("Description"),
        "Policies": _names("Policies"),
        "Roles": _names("Roles"),
        "Identities": _identities,
        "Expires": lambda row: str(row.get("ExpirationTime", "")),
    }
    return _list(Api.of(args).get("/v1/acl/tokens").json(), columns, args)


def token_read(args: Args) -> int:
    """Show one token."""
    api = Api.of(args)
    if args.on("self") == args.given("accessor-id"):
        raise UsageError("give either -accessor-id or -self")
    path = "self" if args.on("self") else quote(_accessor(args, api))
    return _print(api.get(f"/v1/acl/token/{path}", {"expanded": ""} if args.on("expanded") else None).json(), args)


def token_update(args: Args) -> int:
    """Change what a token may do; what is not given stays."""
    api = Api.of(args)
    path = f"/v1/acl/token/{quote(_accessor(args, api))}"
    old = api.get(path).json()
    body = {**_changed_links(args, old), "Description": args.text("description", old["Description"])}
    return _print(api.put(path, body).json(), args)


def token_clone(args: Args) -> int:
    """Make a new token that may do what another may."""
    api = Api.of(args)
    body = {"Description": args.text("description")} if args.given("description") else {}
    return _print(api.put(f"/v1/acl/token/{quote(_accessor(args, api))}/clone", body).json(), args)


def token_delete(args: Args) -> int:
    """Delete a token: from then on it is good for nothing."""
    api = Api.of(args)
    accessor = _accessor(args, api)
    api.write("DELETE", f"/v1/acl/token/{quote(accessor)}")
    print(f"Token deleted: {accessor}")
    return 0


# Policies and roles


def _text_of(given: str) -> str:
    """Return a text as it was typed, of a file as ``@FILE``, or of stdin as ``-``."""
    if given == "-":
        return sys.stdin.read()
    if not given.startswith("@"):
        return given
    try:
        return Path(given[1:]).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise CliError(f"{given[1:]} cannot be read: {error}") from None


def _found(api: Api, kind: str, args: Args) -> dict[str, Any]:
    """Return the policy or role that the flags name."""
    if args.given("id") == args.given("name"):
        raise UsageError("give either -id or -name")
    if args.given("name"):
        answer = api.get(f"/v1/acl/{kind}/name/{quote(args.text('name'))}", allow_404=True)
    else:
        given = args.text("id")
        plural = {"policy": "policies", "role": "roles"}[kind]
        if len(given) != 36:
            ids = [row["ID"] for row in api.get(f"/v1/acl/{plural}").json()]
            given = _only([id for id in ids if id.startswith(given)], kind, given)
        answer = api.get(f"/v1/acl/{kind}/{quote(given)}", allow_404=True)
    if answer.status == 404:
        raise CliError(f"no {kind} {args.text('name') or args.text('id')!r}; see: lictor acl {kind} list")
    row: dict[str, Any] = answer.json()
    return row


def _reader(kind: str) -> Callable[[Args], int]:
    return lambda args: _print(_found(Api.of(args), kind, args), args)


def _deleter(kind: str) -> Callable[[Args], int]:
    def delete(args: Args) -> int:
        api = Api.of(args)
        row = _found(api, kind, args)
        api.write("DELETE", f"/v1/acl/{kind}/{quote(row['ID'])}")
        print(f"{kind.capitalize()} deleted: {row['Name']} ({row['ID']})")
        return 0

    return delete


def policy_create(args: Args) -> int:
    """Create a policy."""
    rules = _text_of(args.text("rules"))
    body: dict[str, Any] = {"Name": args.text("name"), "Description": args.text("description"), "Rules": rules}
    if args.given("valid-datacenter"):
        body["Datacenters"] = args.many("valid-datacenter")
    return _print(Api.of(args).put("/v1/acl/policy", body).json(), args)


def policy_list(args: Args) -> int:
    """List the policies."""
    columns = {name: _field(name) for name in ("ID", "Name", "Description")}
    return _list(Api.of(args).get("/v1/acl/policies").json(), columns, args)


def policy_update(args: Args) -> int:
    """Change a policy; what is not given stays."""
    api = Api.of(args)
    old = _found(api, "policy", args) if not args.given("id") else _found_by_id(api, "policy", args)
    body = {
        "Name": args.text("name", old["Name"]),
        "Description": args.text("description", old["Description"]),
        "Rules": _text_of(args.text("rules")) if args.given("rules") else old["Rules"],
        "Datacenters": args.many("valid-datacenter") or old.get("Datacenters", []),
    }
    return _print(api.put(f"/v1/acl/policy/{quote(old['ID'])}", body).json(), args)


def _found_by_id(api: Api, kind: str, args: Args) -> dict[str, Any]:
    """As `_found`, where -name is the new name beside -id."""
    return _found(api, kind, Args({"id": args.text("id")}, [], []))


def role_create(args: Args) -> int:
    """Create a role."""
    body = {**_links(args), "Name": args.text("name"), "Description": args.text("description")}
    return _print(Api.of(args).put("/v1/acl/role", body).json(), args)


def role_list(args: Args) -> int:
    """List the roles."""
    columns = {
        "ID": _field("ID"),
        "Name": _field("Name"),
        "Policies": _names("Policies"),
        "Identities": _identities,
    }
    return _list(Api.of(args).get("/v1/acl/roles").json(), columns, args)


def role_update(args: Args) -> int:
    """Change a role; what is not given stays."""
    api = Api.of(args)
    old = _found_by_id(api, "role", args) if args.given("id") else _found(api, "role", args)
    body = {
        **_changed_links(args, old),
        "Name": args.text("name", old["Name"]),
        "Description": args.text("description", old["Description"]),
    }
    return _print(api.put(f"/v1/acl/role/{quote(old['ID'])}", body).json(), args)


# The agent's own


def set_agent_token(args: Args) -> int:
    """Set a token that the agent uses where none is shown."""
    kind, token = args.words
    Api.of(args).put(f"/v1/agent/token/{quote(kind)}", {"Token": token})
    print(f"ACL token {kind!r} set" if token else f"ACL token {kind!r} cleared")
    return 0


_ANSWER = (JSON, *API_FLAGS)
_DESCRIPTION = Flag("description", "a text for people")
_LINKS = (
    Flag("policy-name", "a policy, by name", "NAME", many=True),
    Flag("policy-id", "a policy, by id", "ID", many=True),
    Flag("service-identity", "what an instance of this service needs", "NAME[:DC,DC]", many=True),
    Flag("node-identity", "what this node's agent needs", "NODE:DC", many=True),
)
_TOKEN_LINKS = (
    *_LINKS,
    Flag("role-name", "a role, by name", "NAME", many=True),
    Flag("role-id", "a role, by id", "ID", many=True),
)
_ACCESSOR = Flag(
    "accessor-id", "the token's accessor id, or how it alone begins", "ID", required=True, aliases=("id",)
)
_APPEND = tuple(
    Flag(f"append-{flag.name}", f"add to those there are: {flag.help}", flag.value, many=True)
    for flag in _TOKEN_LINKS
)
_WHICH = (Flag("id", "its id, or how it alone begins", "ID"), Flag("name", "or its name", "NAME"))
_RULES = Flag("rules", 'its rules, in HCL or JSON: the text, @FILE, or "-" for stdin', "RULES")
_DATACENTER = Flag("valid-datacenter", "where it counts (default: everywhere)", "DC", many=True)

FAMILIES = {
    "acl": Family(
        "Say who may do what: tokens, policies, roles",
        {
            "bootstrap": Command(
                "Make the first token, which may do everything",
                bootstrap,
                _ANSWER,
                "[SECRET | @FILE | -]",
                0,
                1,
                details="It works once, on the host of an agent. Keep the SecretID: it is shown this once.",
            ),
            "token create": Command(
                "Create a token; its secret is shown this once",
                token_create,
                (
                    _DESCRIPTION,
                    *_TOKEN_LINKS,
                    Flag("expires-ttl", "let it end after this time, 1m to 24h", "TIME"),
                    Flag("accessor", "its accessor id (default: a new one)", "UUID"),
                    Flag("secret", "its secret (default: a new one, which is better)", "UUID"),
                    Flag("local", "mark it as of this datacenter", switch=True),
                    *_ANSWER,
                ),
            ),
            "token list": Command("List the tokens", token_list, READ_FLAGS),
            "token read": Command(
                "Show one token",
                token_read,
                (
                    Flag("accessor-id", "its accessor id, or how it alone begins", "ID", aliases=("id",)),
                    Flag("self", "the token that is used to ask", switch=True),
                    Flag("expanded", "with all that it comes to (in -json)", switch=True),
                    *READ_FLAGS,
                ),
            ),
            "token update": Command(
                "Change what a token may do; what is not given stays",
                token_update,
                (_ACCESSOR, _DESCRIPTION, *_TOKEN_LINKS, *_APPEND, *_ANSWER),
            ),
            "token clone": Command(
                "Make a new token that may do what another may", token_clone, (_ACCESSOR, _DESCRIPTION, *_ANSWER)
            ),
            "token delete": Command("Delete a token", token_delete, (_ACCESSOR, *API_FLAGS)),
            "policy create": Command(
                "Create a policy",
                policy_create,
                (
                    Flag("name", "its name", "NAME", required=True),
                    _DESCRIPTION,
                    _RULES,
                    _DATACENTER,
                    *_ANSWER,
                ),
                details="""lictor acl policy create -name web -rules 'service "web" { policy = "write" }'""",
            ),
            "policy list": Command("List the policies", policy_list, READ_FLAGS),
            "policy read": Command("Show one policy", _reader("policy"), (*_WHICH, *READ_FLAGS)),
            "policy update": Command(
                "Change a policy; what is not given stays",
                policy_update,
                (*_WHICH, _DESCRIPTION, _RULES, _DATACENTER, *_ANSWER),
                details="With -id, -name is the new name.",
            ),
            "policy delete": Command("Delete a policy", _deleter("policy"), (*_WHICH, *API_FLAGS)),
            "role create": Command(
                "Create a role",
                role_create,
                (Flag("name", "its name", "NAME", required=True), _DESCRIPTION, *_LINKS, *_ANSWER),
            ),
            "role list": Command("List the roles", role_list, READ_FLAGS),
            "role read": Command("Show one role", _reader("role"), (*_WHICH, *READ_FLAGS)),
            "role update": Command(
                "Change a role; what is not given stays",
                role_update,
                (*_WHICH, _DESCRIPTION, *_LINKS, *(flag for flag in _APPEND if "role" not in flag.name), *_ANSWER),
                details="With -id, -name is the new name.",
            ),
            "role delete": Command("Delete a role", _deleter("role"), (*_WHICH, *API_FLAGS)),
            "set-agent-token": Command(
                "Set a token that the agent uses where none is shown",
                set_agent_token,
                API_FLAGS,
                "default|dns TOKEN",
                2,
                2,
                details='"default" stands in for requests without a token, "dns" for DNS. An empty TOKEN clears it.',
            ),
        },
    )
}
