"""Whether the data plane runs compiled, and whether what was compiled is what the sources say."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.machinery import EXTENSION_SUFFIXES
from importlib.util import find_spec
from pathlib import Path

PACKAGES = ("raftstate", "proxy", "node", "cli")
ROOT = Path(__file__).resolve().parents[1]
REBUILD = "python setup.py build_ext --inplace"


def is_compiled() -> bool:
    """Whether the modules that carry the data plane's bytes are compiled ones."""
    spec = find_spec("proxy.mux.core")
    return spec is not None and (spec.origin or "").endswith(tuple(EXTENSION_SUFFIXES))


def stale(root: Path = ROOT) -> list[str]:
    """Return the compiled modules of a source checkout whose source is newer or gone, as paths of sources.

    Python would run them all the same. Empty where ``root`` is no checkout: an installed package is not edited.
    """
    if not (root / "setup.py").is_file():
        return []
    return sorted(source.relative_to(root).as_posix() for source in _outdated(root))


def _outdated(root: Path) -> Iterator[Path]:
    for package in PACKAGES:
        for library in (root / package).rglob(f"*{EXTENSION_SUFFIXES[0]}"):
            name = library.name.partition(".")[0]
            if name.endswith("__mypyc"):
                continue  # what the modules share; it is as old as they are
            source = library.with_name(f"{name}.py")
            if not source.exists() or source.stat().st_mtime_ns > library.stat().st_mtime_ns:
                yield source


def warning(root: Path = ROOT) -> str | None:
    """Return the line that says which compiled modules are stale and what to do, or None."""
    found = stale(root)
    if not found:
        return None
    others = f" and {len(found) - 1} more" if len(found) > 1 else ""
    return f"compiled modules are older than their sources ({found[0]}{others}), and it is they that run: {REBUILD}"
