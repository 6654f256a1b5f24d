"""``lictor version``."""

from __future__ import annotations

from cli.compiled import is_compiled
from cli.flags import Args, Command, Family


def version() -> str:
    """Return the installed version."""
    from importlib.metadata import PackageNotFoundError
    from importlib.metadata import version as installed

    try:
        return installed("lictor")
    except PackageNotFoundError:
        return "(not installed)"


def run(args: Args) -> int:
    """Print it, and how the data plane runs."""
    print(f"Lictor v{version()}")
    print("Data plane: compiled" if is_compiled() else "Data plane: plain Python, not compiled")
    return 0


FAMILIES = {"version": Family("Print the version", alone=Command("Print the version", run))}
