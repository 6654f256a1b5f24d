"""``lictor kv``: the key-value store."""

from __future__ import annotations

import base64
import sys
from pathlib import Path
from typing import Any

from cli.cas import cas_flags, cas_params, require_done
from cli.client import API_FLAGS, READ_FLAGS, Api
from cli.errors import CliError, UsageError
from cli.flags import Args, Command, Family, Flag, whole
from cli.output import print_json


def _path(key: str) -> str:
    from urllib.parse import quote

    return f"/v1/kv/{quote(key.lstrip('/'), safe='/')}"


def _value(row: dict[str, Any]) -> bytes:
    return base64.b64decode(row["Value"] or "")


def get(args: Args) -> int:
    """Print a key's value, or those under a prefix."""
    key = args.words[0] if args.words else ""
    api = Api.of(args)
    if not key and not (args.on("recurse") or args.on("keys")):
        raise UsageError("lictor kv get: expects KEY (or -recurse, -keys). See: lictor kv get -help")
    if args.on("keys"):
        params = {"keys": "", **({"separator": args.text("separator")} if args.given("separator") else {})}
        answer = api.get(_path(key), params, allow_404=True)
        print("\n".join(answer.json() if answer.status == 200 else ()))
        return 0
    answer = api.get(_path(key), {"recurse": ""} if args.on("recurse") else {}, allow_404=True)
    if answer.status == 404:
        raise CliError(f"no key {'begins with' if args.on('recurse') else 'is named'} {key!r}")
    rows = answer.json()
    if args.on("json"):
        print_json(rows)
    elif args.on("detailed"):
        for row in rows:
            for field in ("CreateIndex", "Flags", "Key", "LockIndex", "ModifyIndex", "Session"):
                print(f"{field:<16} {row.get(field, '-')}")
            print(f"{'Value':<16} {_value(row).decode('utf-8', 'replace')}\n")
    elif args.on("recurse"):
        for row in rows:
            print(f"{row['Key']}:{_value(row).decode('utf-8', 'replace')}")
    else:
        sys.stdout.flush()
        sys.stdout.buffer.write(_value(rows[0]) + b"\n")
    return 0


def put(args: Args) -> int:
    """Set a key."""
    key, text = args.words[0], args.words[1] if len(args.words) > 1 else ""
    if text == "-":
        value = sys.stdin.buffer.read()
    elif text.startswith("@"):
        try:
            value = Path(text[1:]).read_bytes()
        except OSError as error:
            raise UsageError(f"can't read {text[1:]}: {error.strerror}") from None
    else:
        value = text.encode()
    params = cas_params(args)
    if args.given("flags"):
        params["flags"] = str(args.number("flags"))
    require_done(args, Api.of(args).put(_path(key), value, params).json(), key, "written")
    print(f"Success! Data written to: {key}")
    return 0


def delete(args: Args) -> int:
    """Delete a key, or all under a prefix."""
    key = args.words[0]
    params = cas_params(args) | ({"recurse": ""} if args.on("recurse") else {})
    require_done(args, Api.of(args).write("DELETE", _path(key), params=params).json(), key, "deleted")
    print(f"Success! Deleted key{'s with prefix' if args.on('recurse') else ''}: {key}")
    return 0


_CAS = cas_flags("key")
FAMILIES = {
    "kv": Family(
        "Get, put, delete and list keys",
        {
            "get": Command(
                "Print a key's value",
                get,
                (
                    Flag("recurse", "all keys with this prefix", switch=True),
                    Flag("keys", "only the names of the keys with this prefix", switch=True),
                    Flag("separator", "with -keys, list up to this character only", "CHAR"),
                    Flag("detailed", "print indexes and flags too", switch=True),
                    *READ_FLAGS,
                ),
                "[KEY]",
                words_most=1,
            ),
            "put": Command(
                "Set a key to DATA, to a file's content (@FILE) or to stdin's (-)",
                put,
                (*_CAS, Flag("flags", "a number kept beside the value", "NUMBER", parse=whole), *API_FLAGS),
                "KEY [DATA]",
                1,
                2,
            ),
            "delete": Command(
                "Delete a key",
                delete,
                (Flag("recurse", "all keys with this prefix", switch=True), *_CAS, *API_FLAGS),
                "KEY",
                1,
                1,
            ),
        },
    )
}
