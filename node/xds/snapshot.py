"""A sidecar's configuration, whole: the merged sections of its stream of updates. Pure."""

from __future__ import annotations

from typing import Any

import msgspec

from raftstate.model.connect import Leaf, Revocation
from raftstate.model.intention import Intention
from raftstate.model.sidecar import SidecarSelf, SidecarUpdate, SidecarUpstream


class Snapshot(msgspec.Struct, frozen=True):
    """Everything Envoy's resources are made of."""

    self: SidecarSelf
    leaf: Leaf
    roots: tuple[str, ...]
    intentions: tuple[Intention, ...]
    default_allow: bool
    revocations: tuple[Revocation, ...]
    upstreams: tuple[SidecarUpstream, ...]


class Merge:
    """Takes the updates of one stream in order."""

    def __init__(self) -> None:
        self._sections: dict[str, Any] = {}

    def apply(self, update: SidecarUpdate) -> bool:
        """Take one update; return whether it changed anything."""
        changed = False
        for name in Snapshot.__struct_fields__:
            value = getattr(update, name)
            if value is not None and self._sections.get(name, msgspec.UNSET) != value:
                self._sections[name] = value
                changed = True
        return changed

    def snapshot(self) -> Snapshot | None:
        """Return the whole; None while a section is not known, because what is not known opens nothing."""
        if self.missing():
            return None
        return Snapshot(**self._sections)

    def missing(self) -> list[str]:
        """Return the names of the sections that are still awaited."""
        return [name for name in Snapshot.__struct_fields__ if name not in self._sections]
