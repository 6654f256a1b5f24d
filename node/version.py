"""The version of Lictor that is installed."""

from __future__ import annotations

import functools
from importlib import metadata


@functools.cache
def lictor_version() -> str:
    """Return the version; ``0.0.0`` in a tree that was never installed."""
    try:
        return metadata.version("lictor")
    except metadata.PackageNotFoundError:
        return "0.0.0"
