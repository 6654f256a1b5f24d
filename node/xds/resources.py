"""From a snapshot to all of Envoy's resources, and from one guard to the next generation. Pure."""

from __future__ import annotations

import hashlib
import json

import msgspec

from node.xds import clusters, listeners, rbac, types
from node.xds.snapshot import Snapshot
from node.xds.types import Rule, is_http

Resources = dict[str, dict[str, Rule]]
"""By type URL, by name."""


class Guard(msgspec.Struct, frozen=True):
    """What admits callers now, for telling whether a change withdrew something."""

    allowing: frozenset[str]
    denying: frozenset[str]
    roots: frozenset[str]

    def withdraws(self, before: Guard) -> bool:
        """Whether somebody who was admitted before may not be any more. Errs towards yes."""
        return not (
            before.allowing <= self.allowing and self.denying <= before.denying and before.roots <= self.roots
        )

    def digest(self) -> str:
        """Return a short text that differs when the guard does."""
        parts = [sorted(self.allowing), sorted(self.denying), sorted(self.roots)]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def guard(snapshot: Snapshot) -> Guard:
    """Return what admits callers in this snapshot."""
    allowing = frozenset(_text([name, rule]) for name, rule in rbac.access(snapshot).policies.items())
    denying = frozenset(_text([name, rule]) for name, rule in rbac.revoked(snapshot).items())
    return Guard(allowing, denying, frozenset(snapshot.roots))


def resources(snapshot: Snapshot, generation: int = 0) -> Resources:
    """Compile everything; ``generation`` as :func:`node.xds.listeners.public_listener` has it."""
    access = rbac.access(snapshot)
    http = is_http(snapshot.self.protocol) or access.http
    found: Resources = {url: {} for url in types.PUSH_ORDER}
    found[types.CLUSTER][types.LOCAL_APP] = clusters.local_app(snapshot)
    found[types.SECRET] = clusters.secrets(snapshot, access, http=http)
    found[types.EXTENSION] = listeners.rbac_filters(snapshot, access)
    found[types.LISTENER][types.PUBLIC_LISTENER] = listeners.public_listener(
        snapshot, access, http=http, generation=generation
    )
    for upstream in snapshot.upstreams:
        name = clusters.cluster_name(upstream)
        found[types.CLUSTER] |= clusters.upstream_clusters(upstream, snapshot)
        found[types.ENDPOINTS] |= clusters.upstream_endpoints(upstream, snapshot)
        found[types.LISTENER][name] = listeners.upstream_listener(upstream)
        if is_http(upstream.protocol):
            found[types.ROUTES][name] = listeners.upstream_routes(upstream)
    return found


def _text(value: object) -> str:
    return json.dumps(value, sort_keys=True)


def version_of(resource: Rule) -> str:
    """Return a version that is the same for the same content, also after a restart of the agent."""
    return hashlib.sha256(_text(resource).encode()).hexdigest()[:16]
