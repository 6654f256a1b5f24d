"""Small files that must survive a crash: written whole beside, synced, renamed, readable by their owner only."""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path


def write_private(path: Path, data: bytes) -> None:
    """Replace ``path`` atomically and durably, mode 0600. Blocks on the disk: call it off the loop."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".new-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    _sync_directory(path.parent)


def remove(path: Path) -> None:
    """Remove a file durably; it may be gone already."""
    path.unlink(missing_ok=True)
    if path.parent.is_dir():
        _sync_directory(path.parent)


def file_name(key: str) -> str:
    """Return a file name for any id, whatever characters it holds."""
    return hashlib.sha256(key.encode()).hexdigest()[:40] + ".json"


def _sync_directory(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
