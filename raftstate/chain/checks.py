"""What is wrong with a configuration entry.

Keys may be written as Consul's API has them (``PathPrefix``) or as its HCL has them (``path_prefix``). A field that
Consul does not know is refused, as it is most likely misspelt.

Source of the rules: Consul's pages on service-defaults, service-router, service-splitter and service-resolver.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

import msgspec.inspect as shape

from raftstate.chain.entries import (
    KINDS,
    BadEntry,
    DefaultsEntry,
    Destination,
    Duration,
    Failover,
    Form,
    GlobalEntry,
    HashPart,
    HTTPPart,
    LoadBalancer,
    PassivePart,
    Redirect,
    ResolverEntry,
    RoutePart,
    RouterEntry,
    SplitterEntry,
    read_entry,
)  # fmt: skip
from raftstate.filter import BadFilter, compile_filter
from raftstate.model.durations import parse_duration_s
from raftstate.model.plan import POLICIES, PROTOCOLS, HeaderChange, HeaderCondition, QueryCondition

REGEX_MEMORY_BYTES = 1 << 20
ITEMS_MAX = 512
"""Routes, splits, subsets and failover targets of one entry."""
METHODS = frozenset(("GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH"))
_RETRY_ON = frozenset(
    (
        "5xx", "gateway-error", "reset", "reset-before-request", "connect-failure", "envoy-ratelimited",
        "retriable-4xx", "refused-stream", "cancelled", "deadline-exceeded", "internal", "resource-exhausted",
        "unavailable",
    )
)  # fmt: skip
_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+", re.ASCII)
_UNSAFE_VALUE = re.compile(r"[\x00-\x08\x0a-\x1f\x7f]")
_FRAMING = frozenset(
    (
        "host", "connection", "content-length", "transfer-encoding", "upgrade", "te", "trailer", "keep-alive",
        "proxy-connection", "expect", "x-forwarded-client-cert",
    )
)  # fmt: skip
"""Headers that no entry may change: they frame messages, or say who calls."""
_UNSAFE_PATH = re.compile(r"[\x00-\x20?#\x7f]")


@lru_cache(maxsize=1)
def _shapes() -> dict[str, shape.Type]:
    return {kind: shape.type_info(form) for kind, form in KINDS.items()}


def check_entry(kind: str, name: str, entry: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entry with its keys as Consul's API spells them. Raises :class:`BadEntry`.

    Everything is checked but regular expressions and filters: see :func:`check_expressions`.
    """
    spelt = spell(entry, _shapes()[kind], kind, name)
    for field, text in _problems(read_entry(kind, name, spelt)):
        raise BadEntry(kind, name, field, text)
    return spelt


def check_expressions(kind: str, name: str, entry: Mapping[str, Any]) -> None:
    """Compile the entry's regular expressions and filters. Raises :class:`BadEntry`.

    For whoever takes an entry from a user: what compiles may change with the library, so replicas don't judge it.
    """
    form = read_entry(kind, name, entry)
    if isinstance(form, RouterEntry):
        for number, route in enumerate(form.routes):
            http = route.match.http if route.match is not None and route.match.http is not None else HTTPPart()
            at = f"Routes[{number}].Match.HTTP"
            patterns = [(f"{at}.PathRegex", http.path_regex)]
            patterns += [(f"{at}.Header[{n}].Regex", one.regex) for n, one in enumerate(http.header)]
            patterns += [(f"{at}.QueryParam[{n}].Regex", one.regex) for n, one in enumerate(http.query_param)]
            for field, pattern in patterns:
                if pattern and (problem := regex_problem(pattern)):
                    raise BadEntry(kind, name, field, problem)
    if isinstance(form, ResolverEntry):
        for subset, part in (form.subsets or {}).items():
            try:
                compile_filter(part.filter or "Service is not empty")
            except BadFilter as error:
                raise BadEntry(kind, name, f"Subsets[{subset!r}].Filter", str(error)) from error


def regex_problem(pattern: str) -> str:
    """Return why RE2 does not take a pattern, or ``""``."""
    import re2  # 3 MiB with libstdc++: most entries have no pattern

    options = re2.Options()
    options.max_mem = REGEX_MEMORY_BYTES
    options.log_errors = False
    try:
        re2.compile(pattern, options)
    except re2.error as error:
        reason = error.args[0] if error.args else "does not compile"
        return f"{pattern[:80]!r}: {reason.decode() if isinstance(reason, bytes) else reason}"
    return ""


def spell(entry: Mapping[str, Any], form: shape.Type, kind: str, name: str) -> dict[str, Any]:
    """Return an entry of a form with its keys as Consul's API spells them. Raises :class:`BadEntry` for others."""
    spelt = _spell(entry, form, kind, name, "")
    assert isinstance(spelt, dict)
    return spelt


def _spell(value: Any, form: shape.Type, kind: str, name: str, at: str) -> Any:
    """Return ``value`` with the keys of structs as they are spelt outside."""
    if isinstance(form, shape.UnionType):
        forms = [
            each for each in form.types if isinstance(each, shape.StructType | shape.VarTupleType | shape.DictType)
        ]
        return _spell(value, forms[0], kind, name, at) if forms and value is not None else value
    if isinstance(form, shape.VarTupleType) and isinstance(form.item_type, shape.StructType):
        value = [value] if isinstance(value, Mapping) else value  # one block of HCL, where several would be a list
    if isinstance(form, shape.VarTupleType) and isinstance(value, list | tuple):
        return [_spell(each, form.item_type, kind, name, f"{at}[{n}]") for n, each in enumerate(value)]
    if isinstance(form, shape.DictType) and isinstance(value, Mapping):
        return {str(key): _spell(each, form.value_type, kind, name, f"{at}[{key!r}]") for key, each in value.items()}
    if not isinstance(form, shape.StructType):
        return value
    if isinstance(value, list | tuple) and len(value) == 1 and at and not at.endswith("]"):
        value = value[0]  # HCL as JSON writes a block as a list of one
    if not isinstance(value, Mapping):
        return value
    known = {field.encode_name.lower(): field for field in form.fields}
    spelt: dict[str, Any] = {}
    for key, each in value.items():
        field = known.get(str(key).replace("_", "").lower())
        where = f"{at}.{key}" if at else str(key)
        if field is None:
            names = ", ".join(sorted(each.encode_name for each in form.fields))
            raise BadEntry(kind, name, where[:200], f"there is no such field; known: {names}")
        if field.encode_name in spelt:
            raise BadEntry(kind, name, where, "is given twice")
        inner = f"{at}.{field.encode_name}" if at else field.encode_name
        spelt[field.encode_name] = _spell(each, field.type, kind, name, inner)
    return spelt


Problems = Iterator[tuple[str, str]]


def _problems(form: Any) -> Problems:
    match form:
        case RouterEntry():
            yield from _tenancy(form, "")
            yield from _count(form.routes, "Routes")
            for number, route in enumerate(form.routes):
                yield from _route(route, f"Routes[{number}]")
        case SplitterEntry():
            yield from _tenancy(form, "")
            yield from _count(form.splits, "Splits")
            yield from _splits(form)
        case ResolverEntry():
            yield from _tenancy(form, "")
            yield from _resolver(form)
        case DefaultsEntry():
            yield from _tenancy(form, "")
            yield from _defaults(form)
        case GlobalEntry():
            yield from _tenancy(form, "")
            protocol = (form.config or {}).get("protocol", "")
            if protocol not in ("", *PROTOCOLS):
                yield "Config.protocol", f"{protocol!r} is none of {', '.join(PROTOCOLS)}"


def _tenancy(form: Form, at: str) -> Problems:
    for field, value in (("Namespace", form.namespace), ("Partition", form.partition)):
        if value not in ("", "default"):
            yield f"{at}{field}", f"{value!r}: there is only 'default' here"


def _count(items: Any, field: str) -> Problems:
    if items is not None and len(items) > ITEMS_MAX:
        yield field, f"has {len(items)} items; the most is {ITEMS_MAX}"


def _route(route: RoutePart, at: str) -> Problems:
    http = route.match.http if route.match is not None and route.match.http is not None else HTTPPart()
    where = f"{at}.Match.HTTP"
    paths = [
        field
        for field, value in (
            ("PathExact", http.path_exact), ("PathPrefix", http.path_prefix), ("PathRegex", http.path_regex)
        )
        if value
    ]  # fmt: skip
    if len(paths) > 1:
        yield where, f"only one of {', '.join(paths)} can be set"
    for field, value in (("PathExact", http.path_exact), ("PathPrefix", http.path_prefix)):
        if value and not value.startswith("/"):
            yield f"{where}.{field}", f"{value!r} must begin with '/'"
    for number, header in enumerate(http.header):
        yield from _condition(header, f"{where}.Header[{number}]", "prefix", "suffix", "contains")
        if header.ignore_case and (header.present or header.regex):
            yield f"{where}.Header[{number}].IgnoreCase", "goes with exact, prefix, suffix or contains only"
    for number, query in enumerate(http.query_param):
        yield from _condition(query, f"{where}.QueryParam[{number}]")
    for number, method in enumerate(http.methods):
        if method.upper() not in METHODS:
            yield f"{where}.Methods[{number}]", f"{method!r} is no HTTP method"
    if route.destination is not None:
        yield from _destination(route.destination, f"{at}.Destination", bool(http.path_exact or http.path_prefix))


def _condition(one: HeaderCondition | QueryCondition, at: str, *further: str) -> Problems:
    kinds = [kind for kind in ("present", "exact", "regex", *further) if getattr(one, kind)]
    if not one.name:
        yield f"{at}.Name", "must not be empty"
    if len(kinds) != 1:
        yield at, f"exactly one of present, exact, regex{', '.join(('', *further))} must be set"


def _destination(one: Destination, at: str, rewritable: bool) -> Problems:
    yield from _tenancy(one, f"{at}.")
    if one.prefix_rewrite and not rewritable:
        yield f"{at}.PrefixRewrite", "needs PathExact or PathPrefix in the route's match"
    if one.prefix_rewrite and (not one.prefix_rewrite.startswith("/") or _UNSAFE_PATH.search(one.prefix_rewrite)):
        yield f"{at}.PrefixRewrite", f"{one.prefix_rewrite!r} is no path: it begins with '/', without blanks, ? and #"
    yield from _duration(one.request_timeout, f"{at}.RequestTimeout")
    yield from _duration(one.idle_timeout, f"{at}.IdleTimeout")
    if not 0 <= one.num_retries <= 100:
        yield f"{at}.NumRetries", f"{one.num_retries} is not between 0 and 100"
    for number, word in enumerate(one.retry_on):
        if word not in _RETRY_ON:
            yield f"{at}.RetryOn[{number}]", f"{word!r} is none of {', '.join(sorted(_RETRY_ON))}"
    for number, code in enumerate(one.retry_on_status_codes):
        if not 200 <= code <= 599:
            yield f"{at}.RetryOnStatusCodes[{number}]", f"{code} is no status code"
    yield from _changes(one.request_headers, f"{at}.RequestHeaders")
    yield from _changes(one.response_headers, f"{at}.ResponseHeaders")


def _changes(change: HeaderChange | None, at: str) -> Problems:
    if change is None:
        return
    for field, names in (("Add", change.add), ("Set", change.set), ("Remove", change.remove)):
        for name in names:
            if not _TOKEN.fullmatch(name):
                yield f"{at}.{field}", f"{name[:80]!r} is no header name"
            if name.lower().replace("_", "-") in _FRAMING:
                yield f"{at}.{field}", f"{name!r} can't be changed: it frames the message or says who calls"
    for field, pairs in (("Add", change.add), ("Set", change.set)):
        for name, value in pairs.items():
            if _UNSAFE_VALUE.search(value) or len(value) > 4096:
                yield f"{at}.{field}", f"the value of {name!r} holds a control character or is too long"


def _splits(form: SplitterEntry) -> Problems:
    if not form.splits:
        yield "Splits", "there must be at least one"
    for number, split in enumerate(form.splits):
        at = f"Splits[{number}]"
        yield from _tenancy(split, f"{at}.")
        if not 0 <= split.weight <= 100 or 0 < split.weight < 0.01:
            yield f"{at}.Weight", f"{split.weight:g} must be 0, or 0.01 to 100"
        yield from _changes(split.request_headers, f"{at}.RequestHeaders")
        yield from _changes(split.response_headers, f"{at}.ResponseHeaders")
    total = sum(round(split.weight * 100) for split in form.splits)
    if total != 10_000:
        yield "Splits", f"the weights add up to {total / 100:g}, not to 100"
    seen = [(split.service, split.service_subset) for split in form.splits]
    for number, pair in enumerate(seen):
        if pair in seen[:number]:
            yield f"Splits[{number}]", "an earlier split leads to the same place"


def _resolver(form: ResolverEntry) -> Problems:
    yield from _duration(form.connect_timeout, "ConnectTimeout")
    yield from _duration(form.request_timeout, "RequestTimeout")
    subsets = form.subsets or {}
    yield from _count(subsets, "Subsets")
    for subset in subsets:
        if not re.fullmatch(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?", subset):
            yield f"Subsets[{subset[:80]!r}]", "a subset's name is a DNS label: a-z, 0-9 and '-'"
    if form.default_subset and form.default_subset not in subsets:
        yield "DefaultSubset", f"{form.default_subset!r} is none of Subsets ({', '.join(subsets) or 'there is none'})"
    if form.redirect is not None:
        one = form.redirect
        yield from _reference(one, "Redirect")
        if not (one.service or one.service_subset or one.datacenter):
            yield "Redirect", "says nothing: set Service or ServiceSubset"
        for field, value in (
            ("Subsets", subsets),
            ("DefaultSubset", form.default_subset),
            ("Failover", form.failover),
        ):
            if value and not (field == "Subsets" and not one.service):
                yield field, "does not go with Redirect"
    for subset, failover in (form.failover or {}).items():
        at = f"Failover[{subset!r}]"
        if subset not in ("*", "") and subset not in subsets:
            yield at, "there is no such subset"
        yield from _failover(failover, at)
    yield from _load_balancer(form.load_balancer)


def _reference(one: Redirect, at: str) -> Problems:
    yield from _tenancy(one, f"{at}.")
    for field, value in (("Peer", one.peer), ("SamenessGroup", one.sameness_group)):
        if value:
            yield f"{at}.{field}", "there is no cluster peering here"


def _failover(one: Failover, at: str) -> Problems:
    yield from _tenancy(one, f"{at}.")
    if one.sameness_group:
        yield f"{at}.SamenessGroup", "there is no cluster peering here"
    if one.targets and (one.service or one.service_subset or one.datacenters):
        yield f"{at}.Targets", "does not go with Service, ServiceSubset and Datacenters"
    if not (one.targets or one.service or one.service_subset or one.datacenters):
        yield at, "says nothing: set Service, ServiceSubset or Targets"
    yield from _count(one.targets, f"{at}.Targets")
    for number, target in enumerate(one.targets or ()):
        yield from _reference(target, f"{at}.Targets[{number}]")


def _load_balancer(one: LoadBalancer | None) -> Problems:
    if one is None:
        return
    at, policies = "LoadBalancer", one.hash_policies or ()
    if one.policy not in ("", *POLICIES):
        yield f"{at}.Policy", f"{one.policy!r} is none of {', '.join(POLICIES)}"
    if one.ring_hash_config is not None:
        ring = one.ring_hash_config
        if one.policy != "ring_hash":
            yield f"{at}.RingHashConfig", "goes with the policy ring_hash only"
        if not 1 <= ring.minimum_ring_size <= ring.maximum_ring_size <= 8_388_608:
            yield f"{at}.RingHashConfig", "sizes must be 1 to 8388608, the minimum no greater than the maximum"
    if one.least_request_config is not None:
        if one.policy != "least_request":
            yield f"{at}.LeastRequestConfig", "goes with the policy least_request only"
        if not 2 <= one.least_request_config.choice_count <= 100:
            yield f"{at}.LeastRequestConfig.ChoiceCount", "must be 2 to 100"
    if policies and one.policy not in ("ring_hash", "maglev"):
        yield f"{at}.HashPolicies", f"go with ring_hash and maglev, not with {one.policy or 'no policy'!r}"
    for number, part in enumerate(policies):
        yield from _hash_part(part, f"{at}.HashPolicies[{number}]")


def _hash_part(one: HashPart, at: str) -> Problems:
    if one.source_ip:
        if one.field or one.field_value:
            yield at, "SourceIP does not go with Field and FieldValue"
        return
    if one.field not in ("header", "cookie", "query_parameter"):
        yield f"{at}.Field", f"{one.field!r} is none of header, cookie, query_parameter"
    if not one.field_value or (one.field != "query_parameter" and not _TOKEN.fullmatch(one.field_value)):
        yield f"{at}.FieldValue", f"must be the name of the {one.field or 'field'}"
    if one.cookie_config is not None:
        if one.field != "cookie":
            yield f"{at}.CookieConfig", "goes with the field cookie only"
        yield from _duration(one.cookie_config.ttl, f"{at}.CookieConfig.TTL")
        if one.cookie_config.session and one.cookie_config.ttl:
            yield f"{at}.CookieConfig", "a session cookie has no TTL"
        if re.search(r"[\x00-\x20;,\x7f]", one.cookie_config.path):
            yield f"{at}.CookieConfig.Path", "is no path"


def _defaults(form: DefaultsEntry) -> Problems:
    if form.protocol not in ("", *PROTOCOLS):
        yield "Protocol", f"{form.protocol!r} is none of {', '.join(PROTOCOLS)}"
    for field, value in (
        ("MaxInboundConnections", form.max_inbound_connections),
        ("LocalConnectTimeoutMs", form.local_connect_timeout_ms),
        ("LocalRequestTimeoutMs", form.local_request_timeout_ms),
    ):
        if value < 0:
            yield field, "must not be negative"
    parts = form.upstream_config
    if parts is None:
        return
    named = [("UpstreamConfig.Defaults", parts.defaults)] if parts.defaults is not None else []
    named += [(f"UpstreamConfig.Overrides[{n}]", part) for n, part in enumerate(parts.overrides or ())]
    for at, part in named:
        yield from _tenancy(part, f"{at}.")
        if part.protocol not in ("", *PROTOCOLS):
            yield f"{at}.Protocol", f"{part.protocol!r} is none of {', '.join(PROTOCOLS)}"
        if at != "UpstreamConfig.Defaults" and not part.name:
            yield f"{at}.Name", "must name the upstream's service"
        if part.connect_timeout_ms < 0:
            yield f"{at}.ConnectTimeoutMs", "must not be negative"
        for field in part.limits.__struct_fields__ if part.limits is not None else ():
            if (getattr(part.limits, field) or 0) < 0:
                yield f"{at}.Limits", f"{field} must not be negative"
        if part.passive_health_check is not None:
            yield from _passive(part.passive_health_check, f"{at}.PassiveHealthCheck")


def _passive(one: PassivePart, at: str) -> Problems:
    yield from _duration(one.interval, f"{at}.Interval")
    yield from _duration(one.base_ejection_time, f"{at}.BaseEjectionTime")
    if one.max_failures is not None and one.max_failures < 0:
        yield f"{at}.MaxFailures", "must not be negative"
    for field, percent in (
        ("EnforcingConsecutive5xx", one.enforcing_consecutive_5xx),
        ("MaxEjectionPercent", one.max_ejection_percent),
    ):
        if percent is not None and not 0 <= percent <= 100:
            yield f"{at}.{field}", f"{percent} is no percentage: 0 to 100"


def _duration(value: Duration, field: str) -> Problems:
    try:
        seconds = parse_duration_s(value)
    except ValueError as error:
        yield field, str(error)
        return
    if not 0 <= seconds <= 86_400 * 366:
        yield field, f"{value!r} must be between 0 and a year"
