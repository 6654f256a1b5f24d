"""How a server whose raft data is damaged or lost comes back under its own name, without ever voting twice.

It has voted, and has acknowledged entries, that it no longer knows of. So, until the others have it out of the
committed membership, it must be to them as if it were down: it takes no part in raft, answers no request for a vote,
acknowledges nothing. From then on it is a new server that happens to bear the old name, and comes in as such: without
a vote until it has caught up (Raft thesis, chapter 4: one voter at a time, each step committed before the next).

A marker beside the raft directory says how far this has come. Each step leaves the disk so that the next start goes
on from there, whatever crashes when:

    SET_ASIDE  the damaged directory is to be renamed; it may have been, or not
    LEAVE      there is no raft data; the others must remove this server before its raft starts
    JOIN       they have; raft runs, and this directory must never take itself for a founder's

JOIN stays for good: it says of a directory what ``join = true`` says in the configuration.
"""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from node.errors import NodeError
from raftstate.disk import Disk

SET_ASIDE, LEAVE, JOIN = "set-aside", "leave", "join"
STAGES = (SET_ASIDE, LEAVE, JOIN)


class MarkerDamaged(NodeError):
    """The marker can't be read: without it nobody knows whether this server may vote."""

    code = "rejoin-marker"

    def __init__(self, path: str, why: str) -> None:
        super().__init__(
            f"{path} is damaged ({why}); this server does not start, since it may not know how it voted: "
            "run `lictor operator raft recover` for it again"
        )


class Marker(msgspec.Struct, frozen=True, rename="pascal"):
    """`aside`: the name that the damaged directory gets, beside the raft directory; empty if there was none."""

    stage: str
    aside: str = ""


class RejoinMarker:
    """The marker of one data directory. Call its methods while holding the directory's lock."""

    def __init__(self, disk: Disk, data_dir: Path) -> None:
        self._disk, self._data_dir = disk, str(data_dir)
        self.path = os.path.join(self._data_dir, "raft-rejoin")

    def read(self) -> Marker | None:
        """Return the marker, if there is one. Raises MarkerDamaged, OSError."""
        try:
            data = self._disk.read(self.path)
        except FileNotFoundError:
            return None
        try:
            marker = msgspec.json.decode(data, type=Marker)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise MarkerDamaged(self.path, str(error)) from None
        if marker.stage not in STAGES or os.path.basename(marker.aside) != marker.aside:
            raise MarkerDamaged(self.path, f"unknown stage {marker.stage!r}")
        return marker

    def write(self, marker: Marker) -> None:
        """Put the marker in place, durably. Raises OSError."""
        fresh = self.path + ".new"
        file = self._disk.create(fresh)
        try:
            file.append(msgspec.json.encode(marker) + b"\n")
            file.sync()
        finally:
            file.close()
        self._disk.rename(fresh, self.path)
        self._disk.sync_dir(self._data_dir)

    def begin(self) -> Path | None:
        """Set the raft directory aside and ask for a rejoin; return what it is called now, if there was one.

        May be called again after a crash, and for a server that has been through this before.
        """
        names = self._disk.listdir(self._data_dir)
        aside = ""
        if "raft" in names:
            number = 1
            while (aside := f"raft.damaged-{number}") in names:
                number += 1
        # The intent first: a directory that is gone without a marker would look like a founder's that begins.
        self.write(Marker(SET_ASIDE, aside))
        self.resume()
        return Path(self._data_dir, aside) if aside else None

    def resume(self) -> Marker | None:
        """Finish what a crash interrupted; return the marker for this start, if there is one: LEAVE or JOIN."""
        marker = self.read()
        if marker is not None:
            # A process that was killed may have left it in the cache only: it must be there before its word is taken.
            self._disk.sync_dir(self._data_dir)
        if marker is None or marker.stage != SET_ASIDE:
            return marker
        names = self._disk.listdir(self._data_dir)
        if marker.aside and "raft" in names and marker.aside not in names:
            self._disk.rename(os.path.join(self._data_dir, "raft"), os.path.join(self._data_dir, marker.aside))
            self._disk.sync_dir(self._data_dir)
        marker = Marker(LEAVE, marker.aside)
        self.write(marker)
        return marker

    def left(self) -> None:
        """The others have removed this server, and that is committed: raft may start here."""
        marker = self.read()
        self.write(Marker(JOIN, marker.aside if marker else ""))
