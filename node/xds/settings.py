"""How a sidecar's calls are made, as Envoy's settings: balancing, timeouts, limits, ejection, locality. Pure.

They are read as a Lictor sidecar reads them (`proxy.upstream_settings`): what the registration says, then the
entries, then the plan, then the defaults.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from node.xds.types import Rule, is_http
from proxy.balancer import BalancerOptions
from proxy.upstream_settings import UpstreamSettings
from raftstate.model.plan import CONNECT_TIMEOUT_S, ResolverNode
from raftstate.model.sidecar import Endpoint, SidecarSelf, SidecarUpstream

UNBOUND = 1_000_000
"""Envoy's own bounds (1,024 connections and requests) would fail calls that a Lictor sidecar carries."""
ONLY_WHEN_NONE_IS_LEFT = 1_000_000
"""Overprovisioning, percent: a priority counts as whole while one in ten thousand of its instances is healthy."""
YEAR_S = 366 * 86_400.0
"""No call takes longer, and Envoy takes no duration of thousands of years."""
NEAR_ENOUGH = 140
"""The same for near instances: when fewer than 1/1.4 of them can be used, a share of the calls goes farther."""
_LB = {"random": "RANDOM", "round_robin": "ROUND_ROBIN", "ring_hash": "RING_HASH", "maglev": "MAGLEV"}


class ClusterSettings:
    """The settings of one cluster of an upstream. ``node``: the resolver whose instances it has, if it has one."""

    def __init__(self, upstream: SidecarUpstream, me: SidecarSelf, node: ResolverNode | None = None) -> None:
        self._config: Mapping[str, Any] = upstream.config
        self._options: BalancerOptions = UpstreamSettings(
            upstream.config, me, http=is_http(upstream.protocol)
        ).balancer_of(node)

    def cluster(self) -> Rule:
        """Return the cluster's fields."""
        options = self._options
        return {
            "lb_policy": _LB.get(options.policy, "LEAST_REQUEST"),
            "connect_timeout": seconds(options.connect_timeout_s),
            # As Lictor's balancer: health is ignored when no instance is healthy (0 would mean never), and a check
            # that turns critical ends no call: it may be the agent over there that is gone, not the instance.
            "common_lb_config": {"healthy_panic_threshold": {"value": max(1.0, options.panic_threshold * 100)}},
            "ignore_health_on_host_removal": True,
            "circuit_breakers": self._bounds(),
            "outlier_detection": self._ejection(),
            **self._balancer(),
        }

    def _balancer(self) -> Rule:
        options = self._options
        start = {"slow_start_config": {"slow_start_window": seconds(options.slow_start_s)}}
        slow = start if options.slow_start_s else {}
        if options.policy == "ring_hash":
            sizes = {
                "minimum_ring_size": options.ring_size_min,
                "maximum_ring_size": max(options.ring_size_max, options.ring_size_min),
            }
            return {"ring_hash_lb_config": sizes}
        if options.policy == "round_robin":
            return {"round_robin_lb_config": slow} if slow else {}
        if options.policy in ("random", "maglev"):
            return {}
        return {"least_request_lb_config": {"choice_count": max(options.choice_count, 2), **slow}}

    def _bounds(self) -> Rule:
        limits = self._config.get("limits")
        limits = limits if isinstance(limits, Mapping) else {}
        return bounds(
            max_connections=whole(limits.get("max_connections")),
            max_pending_requests=whole(limits.get("max_pending_requests")),
            max_requests=whole(limits.get("max_concurrent_requests")),
        )

    def _ejection(self) -> Rule:
        """Leave out who cannot be reached, and who answers with 5xx where a passive health check says so."""
        options = self._options
        failures = min(options.failures_to_eject, 2**32 - 1)
        enforced = round(options.enforced_share * 100)
        return {
            "split_external_local_origin_errors": True,
            "consecutive_local_origin_failure": failures,
            "enforcing_consecutive_local_origin_failure": enforced,
            "enforcing_local_origin_success_rate": 0,
            "consecutive_5xx": failures,
            "enforcing_consecutive_5xx": enforced if options.judges_answers else 0,
            "enforcing_consecutive_gateway_failure": 0,
            "enforcing_success_rate": 0,
            "base_ejection_time": seconds(options.base_ejection_s),
            "max_ejection_time": seconds(max(options.max_ejection_s, options.base_ejection_s)),
            "interval": seconds(options.interval_s or 1.0),
            "max_ejection_percent": round(options.ejected_share_max * 100),
            # One may always be ejected, as by Lictor's balancer: of two instances it is half of them at once.
            "always_eject_one_host": True,
            # A check that passes (node.xds.checks) does not say that the instance can be reached.
            "successful_active_health_check_uneject_host": False,
        }

    def nearest_first(self, groups: Sequence[Sequence[Endpoint]]) -> tuple[list[list[Endpoint]], int]:
        """Return groups of falling priority, each divided by nearness, and Envoy's overprovisioning factor.

        The factor is 0 where there is one priority. One factor holds for a whole cluster: where other targets may
        take over, near instances too are left only when none of them can be used.
        """
        levels = self._levels()
        found = [part for group in groups for part in _divided(group, levels)]
        if len(groups) > 1:
            return found, ONLY_WHEN_NONE_IS_LEFT
        return found, NEAR_ENOUGH if levels else 0

    def _levels(self) -> list[Callable[[Endpoint], bool]]:
        node, zone = self._options.prefer_node, self._options.prefer_zone
        levels: list[Callable[[Endpoint], bool]] = []
        if node:
            levels.append(lambda endpoint: endpoint.node == node)
        if zone:
            levels.append(lambda endpoint: endpoint.zone == zone)
        return levels


def _divided(group: Sequence[Endpoint], levels: list[Callable[[Endpoint], bool]]) -> list[list[Endpoint]]:
    parts, left = [], list(group)
    for within in levels:
        parts.append([one for one in left if within(one)])
        left = [one for one in left if not within(one)]
    return [*parts, left]


def bounds(
    *, max_connections: int | None = None, max_pending_requests: int | None = None, max_requests: int | None = None
) -> Rule:
    """Return circuit breakers; what is None is not bound."""
    threshold = {
        "priority": "DEFAULT",
        "max_connections": UNBOUND if max_connections is None else max_connections,
        "max_pending_requests": UNBOUND if max_pending_requests is None else max_pending_requests,
        "max_requests": UNBOUND if max_requests is None else max_requests,
        "max_retries": 100,
    }
    return {"thresholds": [threshold]}


def own_connect_timeout(me: SidecarSelf) -> str:
    """Return how long the app may take to accept a connection (``local_connect_timeout_ms``)."""
    given = whole(me.config.get("local_connect_timeout_ms"))
    return seconds(given / 1000 if given else CONNECT_TIMEOUT_S)


def own_request_timeout(me: SidecarSelf) -> str:
    """Return how long the app may take to answer (``local_request_timeout_ms``); ``0s``: as long as it likes."""
    given = whole(me.config.get("local_request_timeout_ms"))
    return seconds(given / 1000 if given else 0.0)


def own_bounds(me: SidecarSelf) -> Rule:
    """Return the bound on connections to the app (``max_inbound_connections``)."""
    return bounds(max_connections=whole(me.config.get("max_inbound_connections")) or None)


def whole(value: object) -> int | None:
    """Return a number that is none below 0, as Envoy's unsigned 32 bits; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
        return None
    return min(int(value), 2**32 - 1)


def seconds(value: float) -> str:
    """Return a duration as protobuf's JSON has it; one that is too long for Envoy, or no number, as a year."""
    if not value <= YEAR_S:
        value = YEAR_S
    return f"{value:.9f}".rstrip("0").rstrip(".") + "s"
