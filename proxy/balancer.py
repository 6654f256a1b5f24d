"""Choosing the instance of an upstream that gets the next connection. Pure: clock and randomness are handed in.

healthy    no check of the instance is critical, as the catalog says
ejected    the instance failed to take connections lately, as this sidecar saw; left out until its back-off ends
avoided    the instance refused us by policy lately; used only when no other is left
panic      too few instances are healthy, so health is ignored (a wrong check must not take a service down)
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

from raftstate.model.sidecar import Endpoint

LEAST_REQUEST, ROUND_ROBIN, RANDOM = "least_request", "round_robin", "random"
POLICIES = (LEAST_REQUEST, ROUND_ROBIN, RANDOM)
AVOID_S = 1.0


class Key(NamedTuple):
    """What makes an endpoint the same one across updates."""

    address: str
    port: int
    service: str
    instance: str


def key_of(endpoint: Endpoint) -> Key:
    """Return the endpoint's key."""
    return Key(endpoint.address, endpoint.port, endpoint.service, endpoint.service_id)


class Instance:
    """An endpoint with what this sidecar knows of it. ``active`` is kept by the caller."""

    __slots__ = ("active", "avoid_until", "ejected_until", "ejections", "endpoint", "failures", "key", "picks")

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self.key = key_of(endpoint)
        self.active = 0
        """Connections in progress and established."""
        self.failures = 0
        """Consecutive failures to connect."""
        self.ejections = 0
        """Consecutive ejections; sets the back-off."""
        self.ejected_until = 0.0
        self.avoid_until = 0.0
        self.picks = 0.0
        """Smooth weighted round robin's running weight."""


class BalancerOptions(NamedTuple):
    """How to choose. Shares are 0 to 1."""

    policy: str = LEAST_REQUEST
    panic_threshold: float = 0.0
    """Health is ignored when the share of healthy instances is at or below this; 0: only when none is healthy."""
    failures_to_eject: int = 1
    base_ejection_s: float = 1.0
    """First back-off; doubles with each further ejection."""
    max_ejection_s: float = 30.0
    prefer_zone: str = ""
    """Use instances of this zone while any is usable."""
    prefer_node: str = ""
    """Use instances on this node while any is usable; goes before the zone."""


DEFAULT_OPTIONS = BalancerOptions()


class Balancer:
    """The instances of one upstream and the choice among them."""

    def __init__(self, random: Callable[[], float], options: BalancerOptions = DEFAULT_OPTIONS) -> None:
        self.instances: dict[Key, Instance] = {}
        self.options = options
        self.ejections_total = 0
        self._random = random
        self._healthy: list[Instance] = []
        self._troubled_until = 0.0
        """Latest end of an ejection or avoidance; before it the slow path of pick looks at each instance."""

    def update(self, endpoints: Sequence[Endpoint]) -> list[Instance]:
        """Take the new list; what is known of instances that stay is kept. Returns the instances that went."""
        before, self.instances = self.instances, {}
        for endpoint in endpoints:
            key = key_of(endpoint)
            instance = before.pop(key, None)
            if instance is None:
                instance = Instance(endpoint)
            instance.endpoint = endpoint
            self.instances[key] = instance
        self._healthy = [i for i in self.instances.values() if i.endpoint.healthy and i.endpoint.weight > 0]
        return list(before.values())

    @property
    def panicking(self) -> bool:
        """Whether health is being ignored."""
        return len(self._healthy) <= self.options.panic_threshold * len(self.instances)

    def pick(self, now: float, exclude: Collection[Key] = ()) -> Instance | None:
        """Return the instance for the next connection, None when there is none outside ``exclude``."""
        usable = list(self.instances.values()) if self.panicking else self._healthy
        if exclude:
            usable = [i for i in usable if i.key not in exclude]
        if now < self._troubled_until:
            calm = [i for i in usable if i.ejected_until <= now and i.avoid_until <= now]
            if not calm and usable:
                # All are in trouble: one that only refused us goes first, then the one whose back-off ends first.
                return min(usable, key=lambda i: (i.ejected_until > now, i.ejected_until, i.active))
            usable = calm
        if self.options.prefer_node or self.options.prefer_zone:
            usable = self._near(usable)
        if len(usable) <= 1:
            return usable[0] if usable else None
        if self.options.policy == ROUND_ROBIN:
            return self._next_in_turn(usable)
        first = self._weighted(usable)
        if self.options.policy == RANDOM:
            return first
        second = self._weighted([i for i in usable if i is not first])
        # (active + 1) / weight, compared without dividing.
        load = (first.active + 1) * max(1, second.endpoint.weight)
        return first if load <= (second.active + 1) * max(1, first.endpoint.weight) else second

    def succeeded(self, instance: Instance) -> None:
        """The instance took a connection."""
        instance.failures = instance.ejections = 0
        instance.ejected_until = instance.avoid_until = 0.0

    def failed(self, instance: Instance, now: float) -> bool:
        """The instance could not be reached, or its app could not. Returns whether it is ejected by this."""
        instance.failures += 1
        if instance.failures < self.options.failures_to_eject or instance.ejected_until > now:
            return False
        back_off = min(self.options.max_ejection_s, self.options.base_ejection_s * 2.0**instance.ejections)
        instance.ejections = min(instance.ejections + 1, 16)
        instance.ejected_until = now + back_off
        self._troubled_until = max(self._troubled_until, instance.ejected_until)
        self.ejections_total += 1
        return True

    def refused(self, instance: Instance, now: float) -> None:
        """The instance lives but does not admit us (denied, draining); others go first for a moment."""
        instance.avoid_until = now + AVOID_S
        self._troubled_until = max(self._troubled_until, instance.avoid_until)

    def _near(self, usable: list[Instance]) -> list[Instance]:
        node, zone = self.options.prefer_node, self.options.prefer_zone
        return (
            (node and [i for i in usable if i.endpoint.node == node])
            or (zone and [i for i in usable if i.endpoint.zone == zone])
            or usable
        )

    def _weighted(self, usable: list[Instance]) -> Instance:
        total = sum(max(1, i.endpoint.weight) for i in usable)
        at = self._random() * total
        for instance in usable:
            at -= max(1, instance.endpoint.weight)
            if at < 0:
                return instance
        return usable[-1]

    @staticmethod
    def _next_in_turn(usable: list[Instance]) -> Instance:
        """Smooth weighted round robin: in each run of sum(weights) picks, each instance gets its weight, spread."""
        total = 0
        for instance in usable:
            weight = max(1, instance.endpoint.weight)
            instance.picks += weight
            total += weight
        best = max(usable, key=lambda i: i.picks)
        best.picks -= total
        return best


class RetryBudget:
    """Bounds retries to a share of the connections, with a floor, so that retries cannot become the load."""

    def __init__(self, share: float = 0.2, floor_per_s: float = 10.0, most: float = 100.0) -> None:
        self._share = share
        self._floor_per_s = floor_per_s
        self._most = most
        self._tokens = most
        self._at = 0.0

    def connection(self) -> None:
        """Count a first attempt."""
        self._tokens = min(self._most, self._tokens + self._share)

    def take(self, now: float) -> bool:
        """Take leave for one retry; False when the budget is spent."""
        if self._at:
            self._tokens = min(self._most, self._tokens + (now - self._at) * self._floor_per_s)
        self._at = now
        if self._tokens < 1:
            return False
        self._tokens -= 1
        return True
