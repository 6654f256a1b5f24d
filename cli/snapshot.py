"""``lictor snapshot``: the replicated state in one checksummed file."""

from __future__ import annotations

import gzip
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from cli.client import API_FLAGS, Api
from cli.errors import CliError, UsageError
from cli.flags import Args, Command, Family, Flag
from cli.output import print_json, table

if TYPE_CHECKING:
    from raftstate.snapshot_format import SnapshotSummary

_READ_BYTES = 1 << 20
_GZIP = b"\x1f\x8b"


def _verified(path: Path) -> SnapshotSummary:
    """Read a whole snapshot file, plain or gzipped, and check it. Raises :class:`CliError`."""
    return _read(path, lambda _chunk: None)


def _read(path: Path, see: Callable[[bytes], None]) -> SnapshotSummary:
    """The same; each chunk of the state is shown to ``see``."""
    from raftstate.errors import RaftError
    from raftstate.snapshot_format import SnapshotDecoder

    decoder = SnapshotDecoder(str(path), advice="take another with lictor snapshot save, or use an older one")
    try:
        for data in _content(path):
            for chunk in decoder.feed(data):
                see(chunk)
        return decoder.finish()
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise CliError(f"{path} is damaged ({error}): take another with lictor snapshot save") from None
    except OSError as error:
        raise UsageError(f"can't read {path}: {error.strerror or error}") from None
    except RaftError as error:
        raise CliError(str(error)) from None


def _content(path: Path) -> Iterator[bytes]:
    with path.open("rb") as raw:
        packed = raw.read(2) == _GZIP
        raw.seek(0)
        with gzip.GzipFile(fileobj=raw) if packed else raw as file:
            while data := file.read(_READ_BYTES):
                yield data


def _write_whole(path: Path, chunks: Iterable[bytes]) -> None:
    """Write a file under another name, check and sync it, and only then give it its name."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            for chunk in chunks:
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        _verified(temporary)
        temporary.replace(path)
        directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(directory)  # the name as well: a backup that is said to be saved outlives a power cut
        finally:
            os.close(directory)
    except OSError as error:
        raise CliError(f"can't write {path}: {error.strerror}") from None
    finally:
        temporary.unlink(missing_ok=True)


def save(args: Args) -> int:
    """Save."""
    path = Path(args.words[0])
    _write_whole(path, Api.of(args).read_stream("/v1/snapshot"))
    summary = _verified(path)
    print(f"Saved and verified snapshot to index {summary.header.index}: {path}")
    return 0


def restore(args: Args) -> int:
    """Restore; the file is checked before it is sent."""
    path = Path(args.words[0])
    summary = _verified(path)
    with path.open("rb") as file:
        Api.of(args).put_file("/v1/snapshot" + ("?foreign=true" if args.on("foreign") else ""), file)
    print(f"Restored snapshot of index {summary.header.index}")
    return 0


def inspect(args: Args) -> int:
    """Show what a file holds; needs no agent."""
    from raftstate.state.snapshot import trust_domain_in

    path = Path(args.words[0])
    told: list[str] = []
    summary = _read(path, lambda chunk: told.append(trust_domain_in(chunk)))
    header = summary.header
    facts: dict[str, object] = {
        "File": str(path),
        "Size": path.stat().st_size,
        "Index": header.index,
        "Term": header.term,
        "Taken": datetime.fromtimestamp(header.created, UTC).isoformat(timespec="seconds"),
        "TrustDomain": next(filter(None, told), ""),
        "Members": ", ".join(sorted(header.members)),
        "StateBytes": summary.bytes,
        "SHA256": summary.sha256,
    }
    if args.on("json"):
        print_json(facts)
    else:
        print("\n".join(table(("Snapshot", "verified, whole"), facts.items()).splitlines()))
    return 0


FAMILIES = {
    "snapshot": Family(
        "Save, restore and inspect the replicated state",
        {
            "save": Command(
                "Save a snapshot while the cluster runs",
                save,
                (*API_FLAGS, Flag("stale", "accepted as Consul's; the leader takes it always", switch=True)),
                "FILE",
                1,
                1,
            ),
            "restore": Command(
                "Replace the cluster's state by a saved one",
                restore,
                (
                    *API_FLAGS,
                    Flag("foreign", "take over another cluster's state, its identities and roots too", switch=True),
                ),
                "FILE",
                1,
                1,
            ),
            "inspect": Command(
                "Check a file and show what it holds",
                inspect,
                (Flag("json", "print JSON", switch=True),),
                "FILE",
                1,
                1,
            ),
        },
    )
}
