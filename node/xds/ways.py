"""When the calls through an upstream must end because an instance that they may lead to was revoked. Pure.

Envoy ends no connection because its instance has gone from a cluster: it is the filter chain that took the app's
connection which can be ended, and that is one for all of the upstream's instances. For a revocation all calls through
that upstream are ended, and made anew to the others. Where an instance merely goes, calls under way go on.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable

from node.xds.clusters import cluster_name
from node.xds.snapshot import Snapshot
from raftstate.model.connect import Revocation
from raftstate.model.sidecar import SidecarUpstream

GENERATION_DIGITS_MAX = 15
"""Ours never get so long; Python refuses to read numbers of thousands of digits."""
Withdrawn = frozenset[tuple[str, str, str]]
"""Kind, service and value of revocations."""


def withdrawn(upstream: SidecarUpstream, revocations: Iterable[Revocation]) -> Withdrawn:
    """Return the revocations that concern the services an upstream leads to, or one of its instances."""
    services = {upstream.service}
    if upstream.plan is not None:
        services |= {target.service for target in upstream.plan.targets.values()}
    groups = (upstream.endpoints, upstream.deregistered, *upstream.targets.values())
    instances = {one.service_id for group in groups for one in group}
    return frozenset(
        (row.kind, row.service, row.value)
        for row in revocations
        if (row.kind == "service" and row.value in services)
        or (row.kind == "instance" and (row.service in services or (not row.service and row.value in instances)))
    )


class Ways:
    """The generations of all upstreams' filter chains over time, by the name of the upstream's listener."""

    def __init__(self) -> None:
        self.generations: dict[str, int] = {}
        self._withdrawn: dict[str, Withdrawn] = {}
        self._digests: dict[str, str] = {}
        """What an Envoy brought from an earlier stream and was not compared yet."""

    def follow(self, snapshot: Snapshot) -> None:
        """Take what is revoked now."""
        for upstream in snapshot.upstreams:
            name, now = cluster_name(upstream), withdrawn(upstream, snapshot.revocations)
            if not now <= self._withdrawn.get(name, now):
                self._end(name)
            self._withdrawn[name] = now
        self._compare()

    def state(self, name: str) -> str:
        """Return what a later stream needs to go on from here."""
        return f"{self.generations.get(name, 0)}.{_digest(self._withdrawn.get(name, frozenset()))}"

    def resume(self, name: str, state: str) -> None:
        """Go on from what an Envoy has. What is not a state of ours is ignored."""
        generation, _, digest = state.partition(".")
        if digest and generation.isascii() and generation.isdigit() and len(generation) <= GENERATION_DIGITS_MAX:
            self.generations[name] = int(generation)
            self._digests[name] = digest
            self._compare()

    def _compare(self) -> None:
        for name in self._digests.keys() & self._withdrawn.keys():
            if self._digests.pop(name) != _digest(self._withdrawn[name]):
                self._end(name)

    def _end(self, name: str) -> None:
        self.generations[name] = self.generations.get(name, 0) + 1


def _digest(rows: Withdrawn) -> str:
    return hashlib.sha256(json.dumps(sorted(rows)).encode()).hexdigest()[:12]
