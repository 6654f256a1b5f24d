"""Which services' plans a change of one configuration entry may change. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from raftstate.chain.entries import DEFAULTS, GLOBAL, RESOLVER, ROUTER, SPLITTER

Entries = Mapping[tuple[str, str], Mapping[str, Any]]
_CHAIN = (ROUTER, SPLITTER, RESOLVER)


def affected_by(kind: str, name: str, entry: Mapping[str, Any] | None, entries: Entries) -> list[str]:
    """Return the services, sorted, whose plan may be another once ``entry`` stands at ``kind`` and ``name``."""
    changed = dict(entries)
    if entry is None:
        changed.pop((kind, name), None)
    else:
        changed[kind, name] = entry
    if kind == GLOBAL:
        return sorted({of for of_kind, of in changed if of_kind in _CHAIN})
    if kind not in (*_CHAIN, DEFAULTS):
        return []
    referrers: dict[str, set[str]] = {}
    for (of_kind, of), each in changed.items():
        if of_kind in _CHAIN:
            for service in _references(of_kind, each):
                referrers.setdefault(service, set()).add(of)
    found, waiting = {name}, [name]
    while waiting:
        for service in referrers.get(waiting.pop(), ()):
            if service not in found:
                found.add(service)
                waiting.append(service)
    return sorted(found)


def _references(kind: str, entry: Mapping[str, Any]) -> Iterator[str]:
    if kind == ROUTER:
        places = [route.get("Destination") for route in _maps(entry.get("Routes"))]
    elif kind == SPLITTER:
        places = list(_maps(entry.get("Splits")))
    else:
        failover = entry.get("Failover")
        failovers = list(_maps(list(failover.values()))) if isinstance(failover, Mapping) else []
        places = [entry.get("Redirect"), *failovers]
        places += [target for each in failovers for target in _maps(each.get("Targets"))]
    for place in places:
        if isinstance(place, Mapping) and isinstance(service := place.get("Service"), str) and service:
            yield service


def _maps(value: Any) -> Iterator[Mapping[str, Any]]:
    if isinstance(value, list | tuple):
        yield from (each for each in value if isinstance(each, Mapping))
