"""Query parameters that all read endpoints share: consistency, blocking, datacenter, filter, near, pretty.

Source of the rules: Consul's "Consistency Modes", "Blocking Queries" and "Filtering" pages, and the behaviour of
its public clients.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field

from multidict import MultiMapping

from node.durations import parse_duration_s
from node.http.errors import BadRequest, HttpError

DEFAULT_WAIT_S = 300.0
MAX_WAIT_S = 600.0
_TRUE = frozenset({"1", "t", "T", "TRUE", "true", "True"})
_FALSE = frozenset({"0", "f", "F", "FALSE", "false", "False"})


def parse_bool(text: str) -> bool:
    """Parse as Go's ``strconv.ParseBool``. Raises :class:`ValueError`."""
    if text in _TRUE:
        return True
    if text in _FALSE:
        return False
    raise ValueError(f"invalid boolean {text[:20]!r}")


@dataclass(frozen=True, slots=True)
class ReadOptions:
    """What a read asks for. ``wait_s`` already includes the jitter and is 0 for a read that does not block."""

    mode: str = "default"
    """``default``, ``consistent`` or ``stale``."""
    cached: bool = False
    min_index: int = 0
    wait_s: float = 0.0
    filter: str = ""
    near: str = ""
    node_meta: Mapping[str, str] = field(default_factory=dict)
    max_age_s: float | None = None
    """A cached answer may be this old; 0: it may not be cached at all."""
    stale_if_error_s: float | None = None
    """An older one, up to this, will do when no newer can be had."""
    max_stale_s: float | None = None


def check_datacenter(query: MultiMapping[str], datacenter: str) -> None:
    """Refuse a request for another datacenter, in Consul's words."""
    wanted = query.get("dc", "")
    if wanted and wanted != datacenter:
        raise HttpError(500, "No path to datacenter")


def read_options(query: MultiMapping[str], headers: Mapping[str, str], rng: random.Random) -> ReadOptions:
    """Parse a read's parameters. Raises :class:`BadRequest`."""
    stale, consistent, leader = "stale" in query, "consistent" in query, "leader" in query
    if stale and (consistent or leader):
        raise BadRequest("Cannot specify ?stale with ?consistent, conflicting semantics.")
    cached = "cached" in query
    if cached and consistent:
        raise BadRequest("Cannot specify ?cached with ?consistent, conflicting semantics.")
    min_index = _index(query.get("index", ""))
    wait_s = _wait(query.get("wait", ""))
    if min_index:
        wait_s = min(wait_s or DEFAULT_WAIT_S, MAX_WAIT_S)
        wait_s += rng.uniform(0.0, wait_s / 16)
    else:
        wait_s = 0.0
    max_age_s = stale_if_error_s = None
    for directive in headers.get("Cache-Control", "").split(","):
        name, _, value = directive.strip().partition("=")
        if name in ("max-age", "stale-if-error"):
            if not (value.isascii() and value.isdigit() and len(value) <= 10):
                raise BadRequest(f"Invalid Cache-Control {name}")
            if name == "max-age":
                max_age_s = float(value)
            else:
                stale_if_error_s = float(value)
        elif name == "must-revalidate":
            max_age_s = 0.0
    max_stale_s = None
    if "max_stale" in query:
        try:
            max_stale_s = parse_duration_s(query["max_stale"])
        except ValueError:
            raise BadRequest("Invalid max_stale value " + repr(query["max_stale"][:40])) from None
        if max_stale_s < 0:
            raise BadRequest("Invalid max_stale value " + repr(query["max_stale"][:40]) + ": it is negative")
        stale = True
    mode = "consistent" if consistent else "stale" if stale else "default"
    return ReadOptions(
        mode=mode,
        cached=cached,
        min_index=min_index,
        wait_s=wait_s,
        filter=query.get("filter", ""),
        near=query.get("near", ""),
        node_meta=node_meta(query),
        max_age_s=max_age_s,
        stale_if_error_s=stale_if_error_s,
        max_stale_s=max_stale_s,
    )


def wait_of(query: MultiMapping[str], rng: random.Random) -> float:
    """Return how long a hash- or event-driven read may block, seconds, jitter included."""
    wait_s = min(_wait(query.get("wait", "")) or DEFAULT_WAIT_S, MAX_WAIT_S)
    return wait_s + rng.uniform(0.0, wait_s / 16)


def node_meta(query: MultiMapping[str]) -> dict[str, str]:
    """Return the ``node-meta=key:value`` pairs."""
    pairs = (text.partition(":") for text in query.getall("node-meta", []))
    return {key: value for key, _, value in pairs}


def _index(text: str) -> int:
    if not text:
        return 0
    # Go's ParseUint: no sign, ASCII digits only, 64 bits.
    if not (text.isascii() and text.isdigit()) or len(text) > 20 or int(text) >= 1 << 64:
        raise BadRequest("Invalid index")
    return int(text)


def _wait(text: str) -> float:
    if not text:
        return 0.0
    try:
        # Some clients send a bare number of seconds.
        wait_s = float(text) if text.isascii() and text.isdigit() else parse_duration_s(text)
    except ValueError:
        raise BadRequest("Invalid wait time") from None
    if wait_s < 0:
        raise BadRequest("Invalid wait time")
    return wait_s
