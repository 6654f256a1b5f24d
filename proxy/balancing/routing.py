"""A service's plan, ready to be followed: which instances a connection or a request may go to. Pure.

Source of the rules: Consul's service-router, service-splitter and service-resolver; where they are silent, what Envoy
does with what Consul makes of them. A header that comes several times is matched as one value, joined by commas.
"""

from __future__ import annotations

import logging
import math
import re
from bisect import bisect_right
from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import accumulate
from typing import NamedTuple, Protocol
from urllib.parse import parse_qsl

import re2

from proxy.balancer import Balancer, Instance, Key
from proxy.balancing.hashing import hash_of
from raftstate.model.plan import (
    HashPolicy,
    HeaderChange,
    HeaderCondition,
    Match,
    Plan,
    QueryCondition,
    ResolverNode,
    Route,
    RouterNode,
    SplitterNode,
)  # fmt: skip

log = logging.getLogger("lictor.proxy.outbound")

REGEX_MEMORY_BYTES = 1 << 20
_RESETS = frozenset(("5xx", "reset", "reset-before-request"))
_STATUSES = {
    "5xx": frozenset(range(500, 600)),
    "gateway-error": frozenset((502, 503, 504)),
    "retriable-4xx": frozenset((409,)),
}
_GRPC_STATUSES = {
    "cancelled": b"1",
    "deadline-exceeded": b"4",
    "resource-exhausted": b"8",
    "internal": b"13",
    "unavailable": b"14",
}
Field = tuple[bytes, bytes]


class Asked(Protocol):
    """A request's head."""

    @property
    def method(self) -> bytes: ...
    @property
    def target(self) -> bytes: ...
    @property
    def fields(self) -> Sequence[Field]:
        """Names in lower case."""
        ...


class Chooses(Protocol):
    """Where instances come from: a balancer, or a destination with those that take over."""

    def pick(self, now: float, exclude: Collection[Key] = (), hashed: int | None = None) -> Instance | None:
        """Return the instance for the next call, None when there is none outside ``exclude``."""
        ...


class Destination:
    """A resolver's target, with the targets that take over when it has no healthy instance."""

    __slots__ = ("balancers", "hash_policies", "request_timeout_s")

    def __init__(self, balancers: tuple[Balancer, ...], node: ResolverNode) -> None:
        self.balancers = balancers
        self.request_timeout_s = node.request_timeout_s
        self.hash_policies = node.balancing.hash_policies

    def pick(self, now: float, exclude: Collection[Key] = (), hashed: int | None = None) -> Instance | None:
        """Return an instance of the first target that has a healthy one; of any when none has."""
        for balancer in self.balancers:
            if balancer.able(now, exclude):
                return balancer.pick(now, exclude, hashed)
        for balancer in self.balancers:
            if (instance := balancer.pick(now, exclude, hashed)) is not None:
                return instance
        return None


class Way(NamedTuple):
    """What the plan says of a request, all but the instance."""

    destination: Destination
    match: Match = Match()
    prefix_rewrite: str = ""
    request_timeout_s: float = 0.0
    attempts_max: int = 0
    """0: nothing is said."""
    idle_timeout_s: float = 0.0
    """How long neither side may say anything; 0: nothing is said."""
    retry_statuses: frozenset[int] = frozenset()
    retry_grpc: frozenset[bytes] = frozenset()
    """gRPC statuses that come without a response before them."""
    retry_resets: bool = False
    """A request whose connection was lost is sent again whatever its method."""
    request_changes: tuple[HeaderChange, ...] = ()
    response_changes: tuple[HeaderChange, ...] = ()

    def target(self, target: bytes) -> bytes:
        """Return the target to ask for."""
        if not self.prefix_rewrite:
            return target
        path, mark, query = target.partition(b"?")
        rewrite = self.prefix_rewrite.encode()
        rest = path[len(self.match.path_prefix.encode()) :] if self.match.path_prefix else b""
        if rewrite.endswith(b"/") and rest.startswith(b"/"):
            rest = rest[1:]
        elif rest and not rewrite.endswith(b"/") and not rest.startswith(b"/") and self.match.path_prefix[-1:] == "/":
            rest = b"/" + rest
        return rewrite + rest + mark + query


class _Shares:
    """Ways with their shares of the calls."""

    __slots__ = ("_bounds", "_ways")

    def __init__(self, ways: Sequence[tuple[float, Way]]) -> None:
        self._ways = tuple(way for _, way in ways)
        self._bounds = tuple(accumulate(weight for weight, _ in ways))

    def take(self, random: Callable[[], float]) -> Way:
        if len(self._ways) == 1:
            return self._ways[0]
        at = bisect_right(self._bounds, random() * self._bounds[-1])
        return self._ways[min(at, len(self._ways) - 1)]


class Routing:
    """A plan over the balancers of its targets."""

    def __init__(self, plan: Plan, balancers: Mapping[str, Balancer], random: Callable[[], float]) -> None:
        """Raises :class:`ValueError` when the plan leads to a node or target that it has not."""
        self._plan, self._balancers, self._random = plan, balancers, random
        self._destinations: dict[str, Destination] = {}
        start = plan.nodes.get(plan.start)
        if isinstance(start, RouterNode):
            if not start.routes:
                raise ValueError("a router has no route")
            self._routes = [
                (_conditions(route.match), self._shares(route.next_node, route)) for route in start.routes
            ]
            self._last = self._routes[-1][1]
        else:
            self._routes = []
            self._last = self._shares(plan.start, None)

    def connection(self) -> Way:
        """Return the way of a connection: that of requests which no route but the last takes."""
        return self._last.take(self._random)

    def request(self, asked: Asked) -> Way:
        """Return the way of a request."""
        if self._routes:
            view = _View(asked)
            for conditions, shares in self._routes:
                if all(condition(view) for condition in conditions):
                    return shares.take(self._random)
        return self._last.take(self._random)

    def _shares(self, name: str, route: Route | None) -> _Shares:
        node = self._plan.nodes.get(name)
        if isinstance(node, SplitterNode):
            return _Shares(
                [
                    (
                        split.weight,
                        _way(
                            self._destination(split.next_node), route, split.request_headers, split.response_headers
                        ),
                    )
                    for split in node.splits
                ]
            )
        return _Shares([(1.0, _way(self._destination(name), route, HeaderChange(), HeaderChange()))])

    def _destination(self, name: str) -> Destination:
        found = self._destinations.get(name)
        if found is None:
            node = self._plan.nodes.get(name)
            if not isinstance(node, ResolverNode):
                raise ValueError(f"the plan has no resolver {name!r}")
            targets = (node.target, *node.failover)
            if missing := [target for target in targets if target not in self._balancers]:
                raise ValueError(f"the plan has no target {missing[0]!r}")
            found = self._destinations[name] = Destination(tuple(self._balancers[t] for t in targets), node)
        return found


def _way(destination: Destination, route: Route | None, asked: HeaderChange, answered: HeaderChange) -> Way:
    if route is None:
        return Way(
            destination,
            request_timeout_s=destination.request_timeout_s,
            request_changes=(asked,) if asked else (),
            response_changes=(answered,) if answered else (),
        )
    statuses = frozenset(route.retry_on_status_codes).union(*(_STATUSES.get(word, ()) for word in route.retry_on))
    return Way(
        destination,
        match=route.match,
        prefix_rewrite=route.prefix_rewrite,
        request_timeout_s=route.request_timeout_s or destination.request_timeout_s,
        attempts_max=route.num_retries + 1 if route.num_retries else 0,
        idle_timeout_s=route.idle_timeout_s,
        retry_statuses=statuses,
        retry_grpc=frozenset(_GRPC_STATUSES[word] for word in route.retry_on if word in _GRPC_STATUSES),
        retry_resets=not _RESETS.isdisjoint(route.retry_on),
        request_changes=tuple(change for change in (route.request_headers, asked) if change),
        response_changes=tuple(change for change in (answered, route.response_headers) if change),
    )


# Matching


class _View:
    """A request as routes see it."""

    __slots__ = ("_query", "fields", "method", "path", "query")

    def __init__(self, asked: Asked) -> None:
        path, _, self.query = asked.target.partition(b"?")
        self.path = path.decode("latin-1")
        self.method = asked.method.decode("latin-1")
        self.fields = asked.fields
        self._query: dict[str, str] | None = None

    def parameter(self, name: str) -> str | None:
        """Return a query parameter's first value."""
        if self._query is None:
            self._query = parameters(self.query)
        return self._query.get(name)


def parameters(query: bytes) -> dict[str, str]:
    """Return the first value of each parameter of a query; of one that has too many, nothing."""
    found: dict[str, str] = {}
    try:
        pairs = parse_qsl(query.decode("latin-1"), keep_blank_values=True, max_num_fields=256)
    except ValueError:
        return found
    for name, value in pairs:
        found.setdefault(name, value)
    return found


_Condition = Callable[[_View], bool]


def _conditions(match: Match) -> tuple[_Condition, ...]:
    found: list[_Condition] = []
    if match.methods:
        methods = frozenset(match.methods)
        found.append(lambda view: view.method in methods)
    if match.path_exact or match.path_prefix or match.path_regex:
        found.append(_path(match))
    found += [_header(condition) for condition in match.header]
    found += [_parameter(condition) for condition in match.query_param]
    return tuple(found)


def _path(match: Match) -> _Condition:
    fold = match.case_insensitive
    if match.path_regex:
        full = _regex(match.path_regex, fold=fold)
        return lambda view: full(view.path)
    wanted = match.path_exact or match.path_prefix
    if fold:
        wanted = wanted.lower()
        if match.path_exact:
            return lambda view: view.path.lower() == wanted
        return lambda view: view.path.lower().startswith(wanted)
    if match.path_exact:
        return lambda view: view.path == wanted
    if wanted == "/":
        return lambda view: True
    return lambda view: view.path.startswith(wanted)


def _header(condition: HeaderCondition) -> _Condition:
    name, invert = condition.name.lower().encode(), condition.invert
    test: Callable[[str], bool]
    fold = condition.ignore_case
    wanted = condition.exact or condition.prefix or condition.suffix or condition.contains
    wanted = wanted.lower() if fold else wanted
    if condition.present:

        def test(value: str) -> bool:
            return True
    elif condition.exact:

        def test(value: str) -> bool:
            return value == wanted
    elif condition.prefix:

        def test(value: str) -> bool:
            return value.startswith(wanted)
    elif condition.suffix:

        def test(value: str) -> bool:
            return value.endswith(wanted)
    elif condition.contains:

        def test(value: str) -> bool:
            return wanted in value
    else:
        test = _regex(condition.regex)

    def holds(view: _View) -> bool:
        values = [value for key, value in view.fields if key == name]
        if not values:
            return invert
        text = b",".join(values).decode("latin-1")
        return test(text.lower() if fold else text) is not invert

    return holds


def _parameter(condition: QueryCondition) -> _Condition:
    name = condition.name
    if condition.present:
        return lambda view: view.parameter(name) is not None
    if condition.exact:
        return lambda view: view.parameter(name) == condition.exact
    full = _regex(condition.regex)
    return lambda view: (value := view.parameter(name)) is not None and full(value)


def _regex(pattern: str, *, fold: bool = False) -> Callable[[str], bool]:
    options = re2.Options()
    options.max_mem = REGEX_MEMORY_BYTES
    options.log_errors = False
    options.case_sensitive = not fold
    try:
        fullmatch = re2.compile(pattern, options).fullmatch
    except re2.error as error:
        log.warning("the expression %r of a route does not compile, so it matches nothing: %s", pattern, error)
        return lambda text: False
    return lambda text: fullmatch(text) is not None


# Changes


def change_lines(
    fields: list[Field], lines: list[bytes], changes: Sequence[HeaderChange]
) -> tuple[list[Field], list[bytes]]:
    """Return a head's fields and its lines (see :mod:`proxy.http.head`) after the changes."""
    for change in changes:
        dropped = {name.lower().encode() for name in (*change.remove, *change.set)}
        if dropped and any(name in dropped for name, _ in fields):
            kept = [at for at, (name, _) in enumerate(fields) if name not in dropped]
            lines = [lines[at] for at in kept if at < len(lines)]
            fields = [fields[at] for at in kept]
        fields, lines = list(fields), list(lines)
        for name, value in (*change.set.items(), *change.add.items()):
            fields.append((name.lower().encode(), value.encode()))
            lines.append(name.encode() + b": " + value.encode())
    return fields, lines


# Hashing


_COOKIE = re.compile(rb"\s*([^=;\s]+)\s*=\s*\"?([^;\"]*)")


def hash_request(
    policies: Sequence[HashPolicy], asked: Asked, source_ip: str, random: Callable[[], float]
) -> tuple[int | None, tuple[str, ...]]:
    """Return a request's hash (None: nothing to hash by) and the cookies to set with the answer."""
    parts: list[bytes] = []
    cookies: tuple[str, ...] = ()
    for policy in policies:
        value: bytes | None = None
        if policy.source_ip:
            value = source_ip.encode() or None
        elif policy.field == "header":
            wanted = policy.field_value.lower().encode()
            values = [given for name, given in asked.fields if name == wanted]
            value = b",".join(values) if values else None
        elif policy.field == "query_parameter":
            text = parameters(asked.target.partition(b"?")[2]).get(policy.field_value)
            value = None if text is None else text.encode("latin-1", "replace")
        elif policy.field == "cookie":
            value = _cookie(asked.fields, policy.field_value.encode())
            if value is None and (policy.cookie_ttl_s or policy.cookie_session):
                made = f"{int(random() * 2**53):014x}{int(random() * 2**53):014x}"
                value = made.encode()
                age = f"; Max-Age={math.ceil(policy.cookie_ttl_s)}" if policy.cookie_ttl_s else ""
                path = f"; Path={policy.cookie_path}" if policy.cookie_path else ""
                cookies = (*cookies, f"{policy.field_value}={made}{age}{path}; HttpOnly")
        if value is not None:
            parts.append(value)
            if policy.terminal:
                break
    return (hash_of(b"\0".join(parts)) if parts else None), cookies


def _cookie(fields: Sequence[Field], wanted: bytes) -> bytes | None:
    for name, value in fields:
        if name == b"cookie":
            for key, given in _COOKIE.findall(value):
                if key == wanted:
                    return bytes(given).rstrip()
    return None


def hash_connection(policies: Sequence[HashPolicy], source_ip: str) -> int | None:
    """Return a connection's hash, None when nothing of it is hashed by."""
    return hash_of(source_ip.encode()) if source_ip and any(policy.source_ip for policy in policies) else None
