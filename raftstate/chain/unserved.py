"""Fields of configuration entries that Consul knows and that nothing here acts on. Pure.

What asks for nothing is taken, since clients send whole entries: an empty value, or a word for what is done anyway.
All else is refused by its name: who writes ``MutualTLSMode = "permissive"`` must not believe that it is in force. For
whoever takes an entry from a user; replicas don't judge by this, so that they apply what an older version has taken.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from raftstate.chain.entries import DEFAULTS, GLOBAL, RESOLVER, ROUTER, SPLITTER, BadEntry

_NO_GATEWAY = "there is no mesh gateway here: sidecars reach each other directly"
_NO_EXTENSIONS = "there are no Envoy extensions here"
_NO_EXPOSE = "nothing is served past mutual TLS here: have checks ask the app itself"
_NO_TRANSPARENCY = "there is no transparent proxy here: name the upstreams"
_ALWAYS_MUTUAL = "connections between sidecars are always mutual TLS here"
_NO_LOCALITY = "the only mode here is 'failover', in a service-resolver"
_BY_THE_KERNEL = "connections are spread by the kernel here, over the sidecar's -workers"
Unserved = Mapping[str, tuple[str, tuple[str, ...]]]
"""By field: why it can't be had, and the words that ask for nothing."""
_EVERYWHERE: Unserved = {
    "Mode": (_NO_TRANSPARENCY, ("direct",)),
    "TransparentProxy": (_NO_TRANSPARENCY, ()),
    "MutualTLSMode": (_ALWAYS_MUTUAL, ("strict",)),
    "MeshGateway": (_NO_GATEWAY, ("none",)),
    "Expose": (_NO_EXPOSE, ()),
    "EnvoyExtensions": (_NO_EXTENSIONS, ()),
}
_DEFAULTS: Unserved = {
    **_EVERYWHERE,
    "BalanceInboundConnections": (_BY_THE_KERNEL, ()),
    "ExternalSNI": ("there are no services outside of the mesh here", ()),
    "Destination": ("there are no services outside of the mesh here", ()),
    "RateLimits": ("rates are not limited here; MaxInboundConnections limits connections", ()),
}
_UPSTREAM: Unserved = {
    "MeshGateway": (_NO_GATEWAY, ("none",)),
    "BalanceOutboundConnections": (_BY_THE_KERNEL, ()),
}
_GLOBAL: Unserved = {
    **_EVERYWHERE,
    "AccessLogs": ("sidecars write access logs where they are started with -access-log", ()),
    "FailoverPolicy": ("failover is by the order of a service-resolver's targets here", ("sequential",)),
    "PrioritizeByLocality": (_NO_LOCALITY, ("none",)),
}
_RESOLVER: Unserved = {"PrioritizeByLocality": (_NO_LOCALITY, ("failover", "none"))}
_FAILOVER: Unserved = {"Policy": ("failover is by the order of the targets here", ("sequential",))}
_NUMBERS = ("max_inbound_connections", "local_connect_timeout_ms", "local_request_timeout_ms")
_CONFIG = ("protocol", "bind_address", *_NUMBERS)
"""What a sidecar reads of its own configuration."""
_VARIABLE = re.compile(r"%[A-Z_]+(?:\([^)]*\))?(?::[0-9]+)?%")
_NO_VARIABLES = "there are no variables here, it would be sent as it is written"
_CHANGES = ("RequestHeaders", "ResponseHeaders")
_UNSERVED_RETRIES = ("envoy-ratelimited",)


def check_served(kind: str, name: str, entry: Mapping[str, Any]) -> None:
    """Refuse what nothing acts on. ``entry`` is spelt as Consul's API has it. Raises :class:`BadEntry`."""
    for field, text in _asked_for(kind, entry):
        raise BadEntry(kind, name, field, text)


def _asked_for(kind: str, entry: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    if kind == DEFAULTS:
        yield from _of(entry, _DEFAULTS, "")
        parts = entry.get("UpstreamConfig") or {}
        yield from _of(parts.get("Defaults") or {}, _UPSTREAM, "UpstreamConfig.Defaults.")
        if (parts.get("Defaults") or {}).get("Name"):
            yield "UpstreamConfig.Defaults.Name", "goes with Overrides only: Defaults are of all upstreams"
        for number, part in enumerate(parts.get("Overrides") or ()):
            yield from _of(part, _UPSTREAM, f"UpstreamConfig.Overrides[{number}].")
    elif kind == GLOBAL:
        yield from _of(entry, _GLOBAL, "")
        for key, value in (entry.get("Config") or {}).items():
            at = f"Config[{str(key)[:80]!r}]"
            if key not in _CONFIG and _asks(value, ()):
                yield at, f"nothing here acts on it; known: {', '.join(_CONFIG)}"
            if key in _NUMBERS and (isinstance(value, bool) or not isinstance(value, int | float) or value < 0):
                yield at, f"{value!r} is no number of 0 or more"
    elif kind == RESOLVER:
        yield from _of(entry, _RESOLVER, "")
        for subset, part in (entry.get("Failover") or {}).items():
            yield from _of(part, _FAILOVER, f"Failover[{subset!r}].")
    elif kind == SPLITTER:
        for number, split in enumerate(entry.get("Splits") or ()):
            yield from _variables(split, f"Splits[{number}].")
    elif kind == ROUTER:
        for number, route in enumerate(entry.get("Routes") or ()):
            yield from _variables(route.get("Destination") or {}, f"Routes[{number}].Destination.")
            for place, word in enumerate((route.get("Destination") or {}).get("RetryOn") or ()):
                if word in _UNSERVED_RETRIES:
                    yield f"Routes[{number}].Destination.RetryOn[{place}]", f"{word!r}: there is no rate limiter here"


def _variables(part: Mapping[str, Any], at: str) -> Iterator[tuple[str, str]]:
    """Header values in which Envoy would put something in place of a variable."""
    for field in _CHANGES:
        for how in ("Add", "Set"):
            for name, value in ((part.get(field) or {}).get(how) or {}).items():
                if found := _VARIABLE.search(value):
                    yield f"{at}{field}.{how}[{name!r}]", f"{found[0]}: {_NO_VARIABLES}"


def _of(part: Mapping[str, Any], unserved: Unserved, at: str) -> Iterator[tuple[str, str]]:
    for field, (text, harmless) in unserved.items():
        if _asks(part.get(field), harmless):
            yield f"{at}{field}", text


def _asks(value: Any, harmless: tuple[str, ...]) -> bool:
    """Whether a value asks for anything but what is done anyway."""
    if isinstance(value, Mapping):
        return any(_asks(each, harmless) for each in value.values())
    if isinstance(value, list | tuple):
        return any(_asks(each, harmless) for each in value)
    return value not in harmless if isinstance(value, str) and value else bool(value)
