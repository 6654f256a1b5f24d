"""``lictor config``: configuration entries, which say how traffic to a service is routed, split and resolved."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any
from urllib.parse import quote

from cli.cas import cas_flags, cas_params, require_done
from cli.chain_text import lines_of
from cli.client import API_FLAGS, READ_FLAGS, Api
from cli.errors import CliError, UsageError
from cli.flags import Args, Command, Family, Flag
from cli.hclfile import entry_of
from cli.output import print_json
from raftstate.acl.hcl import BadSyntax

ENTRY_CHARS_MAX = 1 << 20


def _path(kind: str, name: str = "") -> str:
    return f"/v1/config/{quote(kind, safe='')}" + (f"/{quote(name, safe='')}" if name else "")


def _required(args: Args, flag: str) -> str:
    value = args.text(flag)
    if not value:
        raise UsageError(f"lictor config: -{flag} must be given, like: -kind service-resolver -name web")
    return value


def _entry(source: str) -> dict[str, Any]:
    """Read an entry, JSON or HCL, with keys as Consul's API or as its HCL spells them."""
    try:
        text = sys.stdin.read() if source == "-" else Path(source).read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"can't read {source}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UsageError(f"{source} is not UTF-8 text") from None
    name = "stdin" if source == "-" else source
    if len(text) > ENTRY_CHARS_MAX:
        raise UsageError(f"{name} is longer than {ENTRY_CHARS_MAX} characters")
    try:
        entry = json.loads(text) if text.lstrip().startswith(("{", "[")) else entry_of(text)
    except BadSyntax as error:
        raise UsageError(f"{name} is no HCL that can be read: {error}") from None
    except ValueError as error:
        raise UsageError(f"{name} is no JSON: {error}") from None
    if not isinstance(entry, dict):
        raise UsageError(f"{source} must hold one entry: an object with Kind and Name")
    return entry


def _of(entry: dict[str, Any], field: str) -> str:
    found = next((str(value) for key, value in entry.items() if key.lower() == field), "")
    if not found and field == "kind":
        raise UsageError("the entry has no Kind (service-defaults, service-resolver, …)")
    return found


def write(args: Args) -> int:
    """Write an entry."""
    entry = _entry(args.words[0])
    kind, name = _of(entry, "kind"), _of(entry, "name")
    done = Api.of(args).put("/v1/config", json.dumps(entry).encode(), cas_params(args)).json()
    require_done(args, done, f"{kind}/{name}", "written")
    print(f"Config entry written: {kind}/{name}")
    return 0


def read(args: Args) -> int:
    """Print an entry."""
    kind, name = _required(args, "kind"), _required(args, "name")
    answer = Api.of(args).get(_path(kind, name), allow_404=True)
    if answer.status == 404:
        raise CliError(f"there is no config entry {kind}/{name}. Those there are: lictor config list -kind {kind}")
    print_json(answer.json())
    return 0


def list_names(args: Args) -> int:
    """Print the names of a kind's entries."""
    entries = Api.of(args).get(_path(_required(args, "kind"))).json()
    if args.on("json"):
        print_json(entries)
    else:
        for entry in entries:
            print(entry["Name"])
    return 0


def delete(args: Args) -> int:
    """Delete an entry."""
    kind, name = _required(args, "kind"), _required(args, "name")
    done = Api.of(args).write("DELETE", _path(kind, name), params=cas_params(args)).json()
    require_done(args, done or not args.on("cas"), f"{kind}/{name}", "deleted")
    print(f"Config entry deleted: {kind}/{name}")
    return 0


def chain(args: Args) -> int:
    """Print what all entries together make of calls to a service."""
    answer = Api.of(args).get(f"/v1/discovery-chain/{quote(args.words[0], safe='')}").json()
    if args.on("json"):
        print_json(answer)
    else:
        print("\n".join(lines_of(answer["Chain"])))
    return 0


_KIND = Flag("kind", "service-defaults, service-resolver, service-splitter, service-router, …", "KIND")
_NAME = Flag("name", "the entry's name: the service (of proxy-defaults: global)", "NAME")
_CAS = cas_flags("entry")
FAMILIES = {
    "config": Family(
        "Write, read, list and delete configuration entries",
        {
            "write": Command(
                "Write the entry in FILE (HCL or JSON; - is stdin), after it was checked with all others",
                write,
                (*_CAS, *API_FLAGS),
                "FILE",
                1,
                1,
            ),
            "read": Command("Print an entry", read, (_KIND, _NAME, *READ_FLAGS)),
            "list": Command("Print the names of a kind's entries", list_names, (_KIND, *READ_FLAGS)),
            "delete": Command("Delete an entry", delete, (_KIND, _NAME, *_CAS, *API_FLAGS)),
            "chain": Command(
                "Show what all entries together make of calls to a service", chain, (*READ_FLAGS,), "SERVICE", 1, 1
            ),
        },
    )
}
