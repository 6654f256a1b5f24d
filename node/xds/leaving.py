"""Which instances of an Envoy's TCP upstreams are being withdrawn, so that the calls to them end and no others. Pure.

Envoy ends no connection because its instance has gone from a cluster. What it does end, at once, are those that its
TCP proxy carries to an instance whose active health check fails (``close_connections_on_host_health_failure``). So
each instance of a TCP upstream has a check; it does not ask the instance but this agent, which holds its answer back
for as long as all is well (:mod:`node.xds.checks`): nobody polls. A withdrawn instance stays in its cluster until the
check has failed and Envoy has asked once more, which shows that it has acted. Where that does not come in time, the
calls through the upstream are ended all together, as :mod:`node.xds.ways` does.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator, Mapping, Sequence

import msgspec

from node.xds import plan, rbac
from node.xds.snapshot import Snapshot
from node.xds.types import is_http
from raftstate.model.sidecar import Endpoint, Key, SidecarUpstream, key_of

CHECKED_MAX = 256
"""Instances that one Envoy checks: each is a connection to the agent. Upstreams beyond are ended whole."""
PATIENCE_S = 1.0
"""How long a withdrawn instance is kept in its cluster for its check to fail."""
Groups = Sequence[Sequence[Endpoint]]
"""A cluster's instances: of its target, then of those that take over."""


class Checked(msgspec.Struct, frozen=True):
    """How Envoy asks about instances: where it reaches this agent, and under which name it is known here."""

    address: str
    port: int
    envoy: str


class Gone(msgspec.Struct, frozen=True):
    """One instance of a cluster that is withdrawn and not out of the cluster yet."""

    endpoint: Endpoint
    group: int
    since: float


def label(cluster: str, key: Key) -> str:
    """Return the name by which a check asks about an instance, as a host name."""
    text = "".join(f"{len(part)}:{part}" for part in (cluster, *(str(one) for one in key)))
    return base64.b32encode(hashlib.sha256(text.encode()).digest()[:20]).decode().lower()


def cluster_name(upstream: SidecarUpstream) -> str:
    """Return the name of an upstream's listener and routes, and of its cluster when it has one."""
    return f"upstream:{upstream.name}"


def upstream_of(cluster: str) -> str:
    """Return the name of the upstream's listener that leads to a cluster."""
    return cluster.partition("|")[0]


def groups(upstream: SidecarUpstream) -> dict[str, list[tuple[Endpoint, ...]]]:
    """Return the instances of each of an upstream's clusters."""
    name = cluster_name(upstream)
    if upstream.plan is None:
        return {name: [upstream.endpoints]}
    return {
        plan.node_cluster(name, one): [upstream.targets.get(target, ()) for target in (node.target, *node.failover)]
        for one, node in plan.resolvers(upstream.plan).items()
    }


def may_be_checked(upstream: SidecarUpstream) -> bool:
    """Whether the calls to one instance can be ended: not those of HTTP, which Envoy lets go on."""
    return not is_http(upstream.protocol) and not upstream.loopback_port


class Leaving:
    """One Envoy's instances over time."""

    def __init__(self) -> None:
        self.checked: set[str] = set()
        """Upstreams, by their listener's name, whose instances are checked."""
        self._led_to: dict[str, dict[Key, tuple[int, Endpoint]]] = {}
        self._gone: dict[str, dict[Key, Gone]] = {}
        self._too_many: set[str] = set()

    def follow(self, snapshot: Snapshot, now: float) -> set[str]:
        """Take where calls may lead now.

        Returns the upstreams of which an instance has gone that is not withdrawn: calls to it go on, and nothing
        tells them from others any more.
        """
        found = {name: rows for one in snapshot.upstreams for name, rows in groups(one).items()}
        self._choose(snapshot, found)
        left: set[str] = set()
        for upstream in snapshot.upstreams:
            if cluster_name(upstream) not in self.checked:
                continue
            deregistered = {key_of(one) for one in upstream.deregistered}
            for cluster in groups(upstream):
                if self._follow(cluster, found[cluster], deregistered, snapshot, now):
                    left.add(cluster_name(upstream))
        for table in (self._led_to, self._gone):
            for cluster in [one for one in table if one not in found or upstream_of(one) not in self.checked]:
                del table[cluster]
        return left

    def _choose(self, snapshot: Snapshot, found: Mapping[str, Groups]) -> None:
        sizes = {name: sum(map(len, rows)) for name, rows in found.items()}
        self.checked = set()
        total = 0
        for upstream in snapshot.upstreams:
            name = cluster_name(upstream)
            total += (size := sum(sizes[one] for one in groups(upstream)))
            if may_be_checked(upstream) and name not in self._too_many:
                if total > CHECKED_MAX:  # for good: a cluster that changes back and forth is worse than a coarse one
                    self._too_many.add(name)
                else:
                    self.checked.add(name)
                    continue
            total -= size

    def _follow(self, cluster: str, rows: Groups, deregistered: set[Key], snapshot: Snapshot, now: float) -> bool:
        live = {
            key_of(one): (group, one)
            for group, part in reversed(list(enumerate(rows)))
            for one in part
            if not rbac.is_revoked(one.service, one.service_id, snapshot.revocations)
        }
        before, self._led_to[cluster] = self._led_to.get(cluster, {}), live
        # One that has come back meanwhile stays withdrawn until its calls of before have ended: a sidecar that is
        # deregistered registers anew within a tenth of a second.
        gone = self._gone.setdefault(cluster, {})
        left = False
        for key, (group, one) in before.items():
            if key in live or key in gone:
                continue
            if key in deregistered or rbac.is_revoked(one.service, one.service_id, snapshot.revocations):
                gone[key] = Gone(one, group, now)
            else:
                left = True
        return left

    def labels_of(self, cluster: str) -> set[str]:
        """Return the names of the instances to which calls may lead."""
        return {label(cluster, key) for key in self._led_to.get(cluster, ())}

    def of(self, cluster: str) -> dict[Key, Gone]:
        """Return a cluster's instances that are being withdrawn."""
        return self._gone.get(cluster, {})

    def labels(self) -> set[str]:
        """Return the names of all instances that are being withdrawn."""
        return {name for name, _, _ in self._each()}

    def settle(self, acknowledged: set[str], now: float) -> tuple[bool, set[str]]:
        """Let go of the instances that are done with.

        Returns whether there were any, and the upstreams in which calls to one may be going on all the same.
        """
        done, late = False, set()
        for name, cluster, key in list(self._each()):
            overdue = now - self._gone[cluster][key].since >= PATIENCE_S
            if name in acknowledged or overdue:
                del self._gone[cluster][key]
                done = True
                if name not in acknowledged:
                    late.add(upstream_of(cluster))
        return done, late

    def next_at(self) -> float | None:
        """Return when :meth:`settle` has something to do at the latest, None: nothing is being withdrawn."""
        return min((one.since + PATIENCE_S for rows in self._gone.values() for one in rows.values()), default=None)

    def _each(self) -> Iterator[tuple[str, str, Key]]:
        for cluster, rows in self._gone.items():
            for key in rows:
                yield label(cluster, key), cluster, key
