"""When the calls through an upstream must end because an instance that they may lead to was revoked. Pure.

It is the filter chain that took the app's connection which can be ended, and that is one for all of the upstream's
instances: all calls are ended, and made anew to the others. So is done for HTTP, and for TCP where the calls to one
instance cannot be told from others (:mod:`node.xds.leaving`). Where an instance merely goes, calls under way go on.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable

from node.xds.leaving import cluster_name
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
        self.mixed: set[str] = set()
        """Upstreams through which a call may go on to an instance whose check would not end it: one from before its
        cluster was changed, or before it left its cluster."""
        self._withdrawn: dict[str, Withdrawn] = {}
        self._digests: dict[str, str] = {}
        """What an Envoy brought from an earlier stream and was not compared yet."""

    def follow(self, snapshot: Snapshot, singly: Callable[[str], bool] = lambda name: False) -> None:
        """Take what is revoked now. ``singly``: whether the check of an upstream's instance ends the calls to it."""
        for upstream in snapshot.upstreams:
            name, now = cluster_name(upstream), withdrawn(upstream, snapshot.revocations)
            if not now <= self._withdrawn.get(name, now) and (name in self.mixed or not singly(name)):
                self.end(name)
            self._withdrawn[name] = now
        self._compare()

    def state(self, name: str) -> str:
        """Return what a later stream needs to go on from here."""
        digest = _digest(self._withdrawn.get(name, frozenset()))
        return f"{self.generations.get(name, 0)}.{digest}.{'mixed' if name in self.mixed else 'clear'}"

    def resume(self, name: str, state: str) -> None:
        """Go on from what an Envoy has. What is not a state of ours is ignored."""
        generation, _, rest = state.partition(".")
        digest, _, told = rest.partition(".")
        if told != "clear":
            self.mixed.add(name)
        if digest and generation.isascii() and generation.isdigit() and len(generation) <= GENERATION_DIGITS_MAX:
            self.generations[name] = int(generation)
            self._digests[name] = digest
            self._compare()

    def _compare(self) -> None:
        for name in self._digests.keys() & self._withdrawn.keys():
            if self._digests.pop(name) != _digest(self._withdrawn[name]):
                self.end(name)

    def end(self, name: str) -> None:
        """End all calls through an upstream."""
        self.generations[name] = self.generations.get(name, 0) + 1
        self.mixed.discard(name)


def _digest(rows: Withdrawn) -> str:
    return hashlib.sha256(json.dumps(sorted(rows)).encode()).hexdigest()[:12]
