"""Check-and-set, in the same words wherever it is offered: ``-cas`` and ``-modify-index``."""

from __future__ import annotations

from cli.errors import CliError, UsageError
from cli.flags import Args, Flag, whole


def cas_flags(what: str) -> tuple[Flag, Flag]:
    """Return the two flags; ``what`` is what is written, such as ``key``."""
    return (
        Flag("cas", f"only if the {what}'s ModifyIndex is still -modify-index", switch=True),
        Flag("modify-index", f"for -cas; 0 (default): only if there is no such {what}", "INDEX", parse=whole),
    )


def cas_params(args: Args) -> dict[str, str]:
    """Return the request's parameters. Raises UsageError for an index that would not be looked at."""
    if args.on("cas"):
        return {"cas": str(args.number("modify-index"))}
    if args.given("modify-index"):
        raise UsageError("-modify-index means nothing without -cas: add -cas, or leave it out")
    return {}


def require_done(args: Args, done: object, name: str, verb: str) -> None:
    """Raise CliError when nothing was done, because the index was another. ``verb``: written, deleted."""
    if not done:
        raise CliError(f"{name} was not {verb}: its ModifyIndex is not {args.number('modify-index')}")
