"""The ``lictor`` command: finds the command that was typed, runs it, turns errors into exit codes.

Only the module of the family that was typed is imported, so that ``lictor version`` starts quickly.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence

from cli.compiled import warning
from cli.errors import CliError, UsageError
from cli.flags import HELP, Command, Family, HelpWanted, family_usage, parse, suggest, usage

FAMILIES = {
    "demo": ("cli.demo", "Run the whole story on this machine: a cluster, two apps, refusals, failures"),
    "services": ("cli.services", "Register, deregister and list services"),
    "intentions": ("cli.intentions", "Say who may call whom"),
    "identity": ("cli.identity", "Revoke and restore identities"),
    "config": ("cli.config", "Route, split and resolve traffic: write, read, list, delete entries"),
    "connect": ("cli.connect", "Run a sidecar; print its upstreams' environment"),
    "catalog": ("cli.catalog", "Look into the catalog: nodes, services, datacenters"),
    "health": ("cli.health", "Show the instances of a service, or all checks, with their health"),
    "members": ("cli.status", "List the cluster's members"),
    "status": ("cli.status", "Show leader and peers"),
    "info": ("cli.status", "Show the agent's own figures"),
    "leave": ("cli.status", "Let the agent leave the cluster and end"),
    "kv": ("cli.kv", "Get, put, delete and list keys"),
    "session": ("cli.session", "Create, list, renew and destroy sessions"),
    "lock": ("cli.lock", "Run a program while holding a lock"),
    "acl": ("cli.acl", "Say who may do what: tokens, policies, roles"),
    "ca": ("cli.ca", "Show and rotate the certificate authority's roots"),
    "tls": ("cli.tls", "Make the node certificates of a cluster by hand"),
    "operator": ("cli.operator", "Raft's members: list, remove, transfer leadership"),
    "snapshot": ("cli.snapshot", "Save, restore and inspect the replicated state"),
    "agent": ("cli.agent", "Run one node, server or client"),
    "cluster": ("cli.cluster.commands", "Run a cluster on this machine and do it harm"),
    "chaos": ("cli.chaos.commands", "Run clients and faults against a cluster and judge what they saw"),
    "version": ("cli.version", "Print the version"),
}
ALIASES = {
    "service": "services",
    "intention": "intentions",
    "snapshots": "snapshot",
    "identities": "identity",
    "sessions": "session",
    "-v": "version",
    "-version": "version",
    "--version": "version",
}


def overview() -> str:
    """Return the help text of ``lictor`` itself."""
    width = max(map(len, FAMILIES))
    lines = ["Usage: lictor COMMAND [flags]", "", "  A service mesh: identity, intentions and mutual TLS.", ""]
    lines += ["Commands:", *(f"  {word:<{width}}  {summary}" for word, (_, summary) in FAMILIES.items())]
    lines += [
        "",
        "Flags are typed -name VALUE, -name=VALUE or --name VALUE. Every command that asks an agent takes",
        "-http-addr (else LICTOR_HTTP_ADDR, CONSUL_HTTP_ADDR, 127.0.0.1:8500) and -wait (default 10s).",
        "",
        "Exit codes: 0 done; 1 refused or failed; 2 usage; 3 no agent reachable; 4 no leader in time;",
        "5 outcome unknown.",
    ]
    return "\n".join(lines)


def load(word: str) -> Family:
    """Import the family's module and return the family."""
    module = importlib.import_module(FAMILIES[word][0])
    families: dict[str, Family] = module.FAMILIES
    return families[word]


def find(family: Family, word: str, argv: Sequence[str]) -> tuple[Command, str, list[str]]:
    """Return the command that ``argv`` (what follows the family's word) means, its full name, and what is left."""
    for count in (2, 1):
        name = " ".join(argv[:count])
        if len(argv) >= count and name in family.commands:
            return family.commands[name], f"{word} {name}", list(argv[count:])
    if family.alone is not None and not (argv and argv[0] in HELP and family.commands):
        return family.alone, word, list(argv)
    if not argv or argv[0] in HELP:
        raise HelpWanted
    typed = " ".join(part for part in argv[:2] if not part.startswith("-"))
    below = [name for name in family.commands if name.startswith(f"{argv[0]} ")]
    if below and (len(argv) == 1 or argv[1] in HELP):
        raise HelpWanted
    hint = suggest(typed, list(family.commands)) or f" It is one of: {', '.join(family.commands)}."
    raise UsageError(f"lictor {word}: unknown command {typed or argv[0]!r}.{hint}")


def run(argv: Sequence[str]) -> int:
    """Run one command line. Returns the exit code; raises :class:`CliError`."""
    if not argv or argv[0] in (*HELP, "help"):
        if len(argv) > 1 and argv[0] == "help":
            return run([*argv[1:], "-help"])
        print(overview())
        return 0 if argv else 2
    word = ALIASES.get(argv[0], argv[0])
    if word not in FAMILIES:
        raise UsageError(f"lictor: unknown command {argv[0]!r}.{suggest(word, list(FAMILIES))} See: lictor -help")
    family = load(word)
    try:
        command, name, left = find(family, word, argv[1:])
    except HelpWanted:
        print(family_usage(family, word))
        return 0 if len(argv) > 1 else 2
    try:
        args = parse(command, name, left)
    except HelpWanted:
        print(usage(command, name))
        if command is family.alone and family.commands:
            print("\nOther commands:")
            print("\n".join(f"  lictor {word} {other}  {c.summary}" for other, c in family.commands.items()))
        return 0
    return command.run(args)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point: run the command line, report an error in one line, return the exit code."""
    if (stale := warning()) is not None:
        print(f"Warning: {stale}", file=sys.stderr)
    try:
        code = run(sys.argv[1:] if argv is None else argv)
        sys.stdout.flush()
        return code
    except CliError as error:
        print(f"Error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader of our output went away (``| head``). Python would complain once more while closing stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
