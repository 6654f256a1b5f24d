"""How the calls of one upstream are made: what its registration says, then its plan, then the defaults. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Set as AbstractSet

from proxy.balancer import LEAST_REQUEST, POLICIES, BalancerOptions
from raftstate.model.durations import parse_duration_s
from raftstate.model.plan import CONNECT_TIMEOUT_S, Plan, ResolverNode
from raftstate.model.sidecar import SidecarSelf

MAX_CONNECTIONS = 20_000
CONSECUTIVE_5XX = 5
BASE_EJECTION_S = 30.0
MAX_EJECTION_S = 300.0
EJECTION_PERCENT_MAX = 10


_NUMBERS = frozenset(
    (
        "connect_timeout_ms", "failures_to_eject", "max_attempts", "panic_threshold", "request_timeout_ms",
        "slow_start_ms", "try_timeout_ms",
    )
)  # fmt: skip
_LIMITS = frozenset(("max_concurrent_requests", "max_connections", "max_pending_requests"))
_PASSIVE_NUMBERS = frozenset(("enforcing_consecutive_5xx", "max_ejection_percent", "max_failures"))
_PASSIVE_TIMES = frozenset(("base_ejection_time", "interval"))
_PARTS = {"limits": _LIMITS, "passive_health_check": _PASSIVE_NUMBERS | _PASSIVE_TIMES}
_KNOWN = _NUMBERS | _PARTS.keys() | {"load_balancer", "locality", "protocol"}


class UpstreamSettings:
    """What an upstream's ``config`` says, with defaults. What it says in vain: :func:`ignored_settings`."""

    def __init__(self, config: Mapping[str, object], me: SidecarSelf | None, *, http: bool = False) -> None:
        """``http``: the upstream's calls are requests, whose answers can be judged."""
        policy = str(config.get("load_balancer") or LEAST_REQUEST)
        limits = config.get("limits")
        limits = limits if isinstance(limits, dict) else {}
        self.connect_timeout_s = _number(config.get("connect_timeout_ms"), CONNECT_TIMEOUT_S * 1000) / 1000
        self.max_connections = int(_number(limits.get("max_connections"), MAX_CONNECTIONS))
        locality = str(config.get("locality") or "")
        self.balancer = BalancerOptions(
            policy=policy if policy in POLICIES else LEAST_REQUEST,
            panic_threshold=_share(config.get("panic_threshold")),
            failures_to_eject=max(1, int(_number(config.get("failures_to_eject"), 1))),
            prefer_node=me.node if me and locality == "node" else "",
            prefer_zone=me.zone if me and locality in ("node", "zone") else "",
            slow_start_s=_number(config.get("slow_start_ms"), 0.0) / 1000,
            connect_timeout_s=self.connect_timeout_s,
        )
        passive = config.get("passive_health_check")
        if isinstance(passive, Mapping):
            self.balancer = _judging(self.balancer, passive, http=http)
        self._config = config
        self._me = me

    def balancer_of(self, node: ResolverNode | None) -> BalancerOptions:
        """Return how the instances of a resolver's target are balanced: the upstream's own words go first."""
        if node is None:
            return self.balancer
        said, options = node.balancing, self.balancer
        if said.policy and "load_balancer" not in self._config:
            options = options._replace(
                policy=said.policy,
                choice_count=said.choice_count,
                ring_size_min=said.ring_size_min,
                ring_size_max=said.ring_size_max,
            )
        if said.locality and "locality" not in self._config and self._me is not None:
            node_too = self._me.node if said.locality == "node" else ""
            options = options._replace(prefer_node=node_too, prefer_zone=self._me.zone)
        if "connect_timeout_ms" not in self._config:
            options = options._replace(connect_timeout_s=node.connect_timeout_s)
        return options


def ignored_settings(config: Mapping[str, object]) -> list[str]:
    """Return what of an upstream's ``config`` is not acted on, with the reasons; a registration checks nothing."""
    found = _unknown(config, _KNOWN, "") + _no_numbers(config, _NUMBERS, "")
    if "panic_threshold" in config and not found and _number(config["panic_threshold"], 0.0) > 1:
        found.append(f"panic_threshold: {config['panic_threshold']!r} is no share: 0 to 1")
    for key, known in _PARTS.items():
        part = config.get(key, {})
        if not isinstance(part, Mapping):
            found.append(f"{key}: it must be an object")
            continue
        found += _unknown(part, known, f"{key}.") + _no_numbers(part, known - _PASSIVE_TIMES, f"{key}.")
        for name in sorted(_PASSIVE_TIMES & known & part.keys()):
            value = part[name]
            try:
                parse_duration_s(value if isinstance(value, str | int | float) else str(value))
            except ValueError as error:
                found.append(f"{key}.{name}: {error}")
    if (policy := config.get("load_balancer")) and policy not in POLICIES:
        found.append(f"load_balancer: {policy!r} is none of {', '.join(POLICIES)}")
    if (locality := config.get("locality")) and locality not in ("node", "zone"):
        found.append(f"locality: {locality!r} is neither node nor zone")
    return found


def _unknown(part: Mapping[str, object], known: AbstractSet[str], at: str) -> list[str]:
    return [f"{at}{key} (known: {', '.join(sorted(known))})" for key in part if key not in known]


def _no_numbers(part: Mapping[str, object], names: AbstractSet[str], at: str) -> list[str]:
    said = [(name, part[name]) for name in sorted(names & part.keys())]
    return [
        f"{at}{name}: {value!r} is no number of 0 or more"
        for name, value in said
        if isinstance(value, bool) or not isinstance(value, int | float) or value < 0
    ]


def resolver_of(plan: Plan | None, target: str) -> ResolverNode | None:
    """Return the resolver that names a target, else one that fails over to it."""
    nodes = [node for node in plan.nodes.values() if isinstance(node, ResolverNode)] if plan is not None else []
    own = next((node for node in nodes if node.target == target), None)
    return own or next((node for node in nodes if target in node.failover), None)


def _judging(options: BalancerOptions, passive: Mapping[str, object], *, http: bool) -> BalancerOptions:
    """Return how instances are left out by what they answer. Source: ``PassiveHealthCheck`` of Consul's
    service-defaults, and Envoy's outlier detection, whose defaults hold for what is not said."""
    base_s = _seconds(passive.get("base_ejection_time")) or BASE_EJECTION_S
    return options._replace(
        failures_to_eject=max(1, int(_number(passive.get("max_failures"), 0)) or CONSECUTIVE_5XX),
        base_ejection_s=base_s,
        max_ejection_s=max(MAX_EJECTION_S, base_s),
        judges_answers=http,
        enforced_share=min(1.0, _number(passive.get("enforcing_consecutive_5xx"), 100) / 100),
        ejected_share_max=min(1.0, _number(passive.get("max_ejection_percent"), EJECTION_PERCENT_MAX) / 100),
        interval_s=_seconds(passive.get("interval")),
    )


def _seconds(value: object) -> float:
    try:
        return max(0.0, parse_duration_s(value)) if isinstance(value, str | int | float) else 0.0
    except ValueError:
        return 0.0  # a registration's own words, which nobody has checked


def _share(value: object) -> float:
    share = _number(value, 0.0)
    return share if share <= 1 else 0.0  # meant as percents perhaps: taken for 1 it would ignore all health


def _number(value: object, default: float) -> float:
    return float(value) if isinstance(value, int | float) and value >= 0 else default
