"""From a snapshot to all of Envoy's resources. Pure."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence

from node.xds import clusters, listeners, rbac, types
from node.xds.callers import EVERYONE_ELSE, Chain
from node.xds.leaving import Checked, Leaving, cluster_name, groups
from node.xds.snapshot import Snapshot
from node.xds.types import Rule, is_http

Resources = dict[str, dict[str, Rule]]
"""By type URL, by name."""


def resources(
    snapshot: Snapshot,
    chains: Sequence[Chain] = (Chain(EVERYONE_ELSE, 0),),
    generations: Mapping[str, int] = {},
    checked: Checked | None = None,
    leaving: Leaving | None = None,
) -> Resources:
    """Compile everything.

    ``chains`` are those of the public listener, ``generations`` those of the upstreams' listeners by name, 0 where
    none is said; as :mod:`node.xds.listeners` has them.
    """
    access = rbac.access(snapshot)
    http = is_http(snapshot.self.protocol) or access.http
    found: Resources = {url: {} for url in types.PUSH_ORDER}
    found[types.CLUSTER][types.LOCAL_APP] = clusters.local_app(snapshot)
    found[types.SECRET] = clusters.secrets(snapshot, access, http=http)
    found[types.EXTENSION] = listeners.rbac_filters(
        snapshot, access, dict.fromkeys(one.caller.service for one in chains)
    )
    found[types.LISTENER][types.PUBLIC_LISTENER] = listeners.public_listener(snapshot, access, chains, http=http)
    for upstream in snapshot.upstreams:
        name = cluster_name(upstream)
        asks = checked if leaving is not None and name in leaving.checked else None
        gone = {one: leaving.of(one) for one in groups(upstream)} if leaving is not None else {}
        found[types.CLUSTER] |= clusters.upstream_clusters(upstream, snapshot, asks)
        found[types.ENDPOINTS] |= clusters.upstream_endpoints(upstream, snapshot, asks, gone)
        found[types.LISTENER][name] = listeners.upstream_listener(upstream, generations.get(name, 0))
        if is_http(upstream.protocol):
            found[types.ROUTES][name] = listeners.upstream_routes(upstream)
    return found


def _text(value: object) -> str:
    return json.dumps(value, sort_keys=True)


def version_of(resource: Rule) -> str:
    """Return a version that is the same for the same content, also after a restart of the agent."""
    return hashlib.sha256(_text(resource).encode()).hexdigest()[:16]
