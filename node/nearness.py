"""How near two places are, as far as it is known: same node, same zone, same region, elsewhere. Pure.

Consul orders by round-trip times that its gossip measures (network coordinates). There is no gossip here; the order
comes from what operators say: a node's ``zone`` in cluster.toml (or ``zone`` and ``region`` in its metadata), and the
``Locality`` of a service's registration, which goes before its node's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from raftstate.model.catalog import InstanceHealth, Node

SAME_NODE, SAME_ZONE, SAME_REGION, ELSEWHERE = range(4)


class Place(NamedTuple):
    """Where something is; empty: not known, and near nothing."""

    node: str
    zone: str = ""
    region: str = ""


def place_of(node: str, meta: Mapping[str, str], locality: Mapping[str, str] | None = None) -> Place:
    """Return the place of a node, or of a service on it that has a locality of its own."""
    said = locality or {}
    zone = said.get("Zone") or said.get("zone") or meta.get("zone", "")
    return Place(node, zone, said.get("Region") or said.get("region") or meta.get("region", ""))


def place_of_node(node: Node) -> Place:
    """Return a node's place."""
    return place_of(node.node, node.meta)


def place_of_instance(row: InstanceHealth) -> Place:
    """Return an instance's place."""
    return place_of(row.node.node, row.node.meta, row.service.locality)


def distance(here: Place, there: Place) -> int:
    """Return one of :data:`SAME_NODE`, :data:`SAME_ZONE`, :data:`SAME_REGION`, :data:`ELSEWHERE`."""
    if here.node == there.node:
        return SAME_NODE
    apart = here.region and there.region and here.region != there.region
    if here.zone and here.zone == there.zone and not apart:  # zones of two regions may have one name
        return SAME_ZONE
    return SAME_REGION if here.region and here.region == there.region else ELSEWHERE
