"""Choosing the instance of an upstream that gets the next connection. Pure: clock and randomness are handed in.

healthy    no check of the instance is critical, as the catalog says
ejected    the instance failed to take connections lately, as this sidecar saw; left out until its back-off ends
avoided    the instance refused us by policy lately; used only when no other is left
panic      too few instances are healthy and not ejected, so neither is believed (a wrong check must not take a
           service down, nor must a fault of our own)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

from proxy.balancing.hashing import Maglev, Ring
from raftstate.model.plan import CONNECT_TIMEOUT_S
from raftstate.model.sidecar import Endpoint, key_of
from raftstate.model.sidecar import Key as Key

LEAST_REQUEST, ROUND_ROBIN, RANDOM = "least_request", "round_robin", "random"
RING_HASH, MAGLEV = "ring_hash", "maglev"
POLICIES = (LEAST_REQUEST, ROUND_ROBIN, RANDOM, RING_HASH, MAGLEV)
AVOID_S = 1.0
SILENCES_TO_EJECT = 5
"""Requests in a row that an instance took and did not answer, after which it is ejected."""
OVERFLOW = 1.4
"""While 1/1.4 (71 %) of the near instances are usable they get all calls; below that, farther ones get a share."""
WARM_SHARE_MIN = 0.1
"""Part of its weight that an instance has when it is new, with slow start."""


class Instance:
    """An endpoint with what this sidecar knows of it. ``active`` is kept by the caller."""

    __slots__ = (
        "active", "avoid_until", "ejected_until", "ejections", "endpoint", "failures", "key", "owner", "picks",
        "silences", "since",
    )  # fmt: skip

    def __init__(self, endpoint: Endpoint, owner: Balancer, since: float) -> None:
        self.endpoint = endpoint
        self.owner = owner
        self.since = since
        """When it was first seen healthy, for slow start."""
        self.key = key_of(endpoint)
        self.active = 0
        """Connections in progress and established."""
        self.failures = 0
        """Consecutive failures to connect."""
        self.silences = 0
        """Consecutive requests that it took and did not answer, where answers are not judged."""
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
    """Health is ignored when the share of healthy instances is at or below this; 0: only when none is healthy. So are
    ejections, when the share of those that are healthy and not ejected is."""
    failures_to_eject: int = 1
    base_ejection_s: float = 1.0
    """First back-off; doubles with each further ejection, or grows by as much again where answers are judged."""
    max_ejection_s: float = 30.0
    judges_answers: bool = False
    """An answer with a status of 500 and above counts as a failure, and only a better one as a success."""
    enforced_share: float = 1.0
    """Part of the ejections that are due which take place."""
    ejected_share_max: float = 1.0
    """Part of the instances that may be ejected at a time; one always may."""
    interval_s: float = 0.0
    """Ejections end at multiples of this; 0: each at its own time."""
    prefer_zone: str = ""
    """Use instances of this zone while any is usable."""
    prefer_node: str = ""
    """Use instances on this node while any is usable; goes before the zone."""
    choice_count: int = 2
    """least_request: how many are compared."""
    slow_start_s: float = 0.0
    """How long an instance that is new, or healthy again, takes to get its whole share; not for the hashing ones."""
    ring_size_min: int = 1024
    ring_size_max: int = 8_388_608
    connect_timeout_s: float = CONNECT_TIMEOUT_S


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
        self._warming_until = 0.0
        self._even = True
        """All instances have the same weight."""
        self._table: Ring[Instance] | Maglev[Instance] | None = None
        """For the hashing policies: all instances by hash. Made when it is first needed."""
        self._table_of: tuple[object, ...] = ()

    def update(self, endpoints: Sequence[Endpoint], now: float = 0.0) -> list[Instance]:
        """Take the new list; what is known of instances that stay is kept. Returns the instances that went."""
        before, self.instances = self.instances, {}
        first = not before
        shape = {key: instance.endpoint.weight for key, instance in before.items()}
        for endpoint in endpoints:
            key = key_of(endpoint)
            instance = before.pop(key, None)
            if instance is None:
                # Of the first list nobody is newer than the others.
                instance = Instance(endpoint, self, float("-inf") if first else now)
                self._warming_until = max(self._warming_until, instance.since + self.options.slow_start_s)
            elif endpoint.healthy and not instance.endpoint.healthy:
                instance.since = now
                self._warming_until = max(self._warming_until, now + self.options.slow_start_s)
            instance.endpoint = endpoint
            self.instances[key] = instance
        self._healthy = [i for i in self.instances.values() if i.endpoint.healthy and i.endpoint.weight > 0]
        self._even = len({instance.endpoint.weight for instance in self.instances.values()}) <= 1
        if shape != {key: instance.endpoint.weight for key, instance in self.instances.items()}:
            self._table = None
        return list(before.values())

    def able(self, now: float, exclude: Collection[Key] = ()) -> bool:
        """Whether there is an instance outside ``exclude`` that is healthy and not ejected."""
        if not exclude and now >= self._troubled_until:
            return bool(self._healthy)
        return any(i.ejected_until <= now and i.key not in exclude for i in self._healthy)

    @property
    def panicking(self) -> bool:
        """Whether health is being ignored."""
        return len(self._healthy) <= self.options.panic_threshold * len(self.instances)

    def pick(self, now: float, exclude: Collection[Key] = (), hashed: int | None = None) -> Instance | None:
        """Return the instance for the next connection, None when there is none outside ``exclude``.

        ``hashed`` is the call's hash, for the hashing policies; without one they choose at random.
        """
        usable = list(self.instances.values()) if self.panicking else self._healthy
        if exclude:
            usable = [i for i in usable if i.key not in exclude]
        if now < self._troubled_until:
            usable = self._calm(usable, now)
        options = self.options
        if hashed is not None and options.policy in (RING_HASH, MAGLEV):
            return self._hashed(usable, hashed)
        if options.prefer_node or options.prefer_zone:
            usable = self._near(usable)
        if len(usable) <= 1:
            return usable[0] if usable else None
        warming = now if now < self._warming_until and options.slow_start_s else None
        if options.policy == ROUND_ROBIN:
            return self._next_in_turn(usable, warming)
        if self._even and warming is None and options.choice_count == 2:
            # The usual case, in constant time.
            count = len(usable)
            at = int(self._random() * count)
            first = usable[at]
            if options.policy != LEAST_REQUEST:
                return first
            further = int(self._random() * (count - 1))
            second = usable[further + 1 if further >= at else further]
            return first if first.active <= second.active else second
        first = self._weighted(usable, warming)
        if options.policy != LEAST_REQUEST:
            return first
        return self._least(usable, first, warming)

    def _calm(self, usable: list[Instance], now: float) -> list[Instance]:
        """Return those of the usable instances that calls may go to while some are ejected or avoided."""
        options = self.options
        working = [i for i in usable if i.ejected_until <= now]
        if options.panic_threshold:
            left = sum(1 for instance in self._healthy if instance.ejected_until <= now)
            if left <= options.panic_threshold * len(self.instances):
                working = usable
        if not working and usable:
            if not options.judges_answers:
                # None can be reached, as far as we know: the one whose back-off ends first.
                return [min(usable, key=lambda i: (i.ejected_until, i.active))]
            working = usable  # they take connections, so that none should get the load of all
        return [i for i in working if i.avoid_until <= now] or working

    def succeeded(self, instance: Instance) -> None:
        """The instance took a connection."""
        instance.avoid_until = 0.0
        if not self.options.judges_answers:
            instance.failures = instance.ejections = 0
            instance.ejected_until = 0.0

    def answered(self, instance: Instance, status: int, now: float) -> bool:
        """The instance's app answered a request. Returns whether it is ejected by this."""
        instance.silences = 0
        if not self.options.judges_answers:
            return False
        if status >= 500:
            return self.failed(instance, now)
        instance.failures = 0
        return False

    def silent(self, instance: Instance, now: float) -> bool:
        """The instance took a request and did not answer it. Returns whether it is ejected by this.

        One request that no app survives, or that takes too long, must not take the instances from all others.
        """
        if self.options.judges_answers:
            return self.answered(instance, 504, now)
        instance.silences += 1
        if instance.silences < SILENCES_TO_EJECT:
            return False
        instance.silences = 0
        return instance.ejected_until <= now and self._eject(instance, now)

    def failed(self, instance: Instance, now: float) -> bool:
        """The instance could not be reached, or its app could not. Returns whether it is ejected by this."""
        options = self.options
        if instance.ejected_until > now:
            return False  # what was under way to it says nothing new
        instance.failures += 1
        if instance.failures < options.failures_to_eject:
            return False
        instance.failures = 0 if options.judges_answers else instance.failures
        return self._eject(instance, now)

    def _eject(self, instance: Instance, now: float) -> bool:
        """Leave the instance out for a while, if one more may be."""
        options = self.options
        if not self._may_eject(now):
            return False
        if options.judges_answers:
            if now - instance.ejected_until > options.max_ejection_s:
                instance.ejections = 0  # it was well for long
            back_off = options.base_ejection_s * (instance.ejections + 1)
        else:
            back_off = options.base_ejection_s * 2.0**instance.ejections
        instance.ejections = min(instance.ejections + 1, 16)
        instance.ejected_until = now + min(options.max_ejection_s, back_off)
        if options.interval_s:
            instance.ejected_until = math.ceil(instance.ejected_until / options.interval_s) * options.interval_s
        self._troubled_until = max(self._troubled_until, instance.ejected_until)
        self.ejections_total += 1
        return True

    def _may_eject(self, now: float) -> bool:
        """Whether one more instance may be left out."""
        options = self.options
        if options.ejected_share_max < 1.0:
            out = sum(1 for instance in self.instances.values() if instance.ejected_until > now)
            if out and out >= options.ejected_share_max * len(self.instances):
                return False
        return options.enforced_share >= 1.0 or self._random() < options.enforced_share

    def refused(self, instance: Instance, now: float) -> None:
        """The instance lives but does not admit us (denied, draining); others go first for a moment."""
        instance.avoid_until = now + AVOID_S
        self._troubled_until = max(self._troubled_until, instance.avoid_until)

    def _hashed(self, usable: list[Instance], hashed: int) -> Instance | None:
        """Return the usable instance for a hash. The table is of all instances: trouble moves the troubled only."""
        options = self.options
        wanted = (options.policy, options.ring_size_min, options.ring_size_max)
        if self._table is None or self._table_of != wanted:
            self._table_of = wanted
            members = [(i, "|".join(map(str, i.key)), max(1, i.endpoint.weight)) for i in self.instances.values()]
            members.sort(key=lambda member: member[1])
            if options.policy == RING_HASH:
                self._table = Ring(members, options.ring_size_min, options.ring_size_max)
            else:
                self._table = Maglev(members)
        if len(usable) == len(self.instances):
            return self._table.find(hashed, _any)
        chosen = set(map(id, usable))
        return self._table.find(hashed, lambda instance: id(instance) in chosen)

    def _near(self, usable: list[Instance]) -> list[Instance]:
        """Return the nearest of the usable instances. The fewer of the near ones are, the more calls go farther."""
        node, zone = self.options.prefer_node, self.options.prefer_zone
        levels: list[Callable[[Endpoint], bool]] = []
        if node:
            levels.append(lambda endpoint: endpoint.node == node)
        if zone:
            levels.append(lambda endpoint: endpoint.zone == zone)
        for within in levels:
            near = [i for i in usable if within(i.endpoint)]
            if not near:
                continue
            if len(near) == len(usable):
                return near
            known = sum(1 for endpoint in self.instances.values() if within(endpoint.endpoint))
            share = OVERFLOW * len(near) / known
            if share >= 1 or self._random() < share:
                return near
        return usable

    @staticmethod
    def _weight(instance: Instance, now: float) -> float:
        """Return an instance's weight while some are warming up."""
        weight = max(1, instance.endpoint.weight)
        window = instance.owner.options.slow_start_s
        if not window or now - instance.since >= window:
            return weight
        return weight * max(WARM_SHARE_MIN, (now - instance.since) / window)

    def _weighted(self, usable: list[Instance], warming: float | None = None) -> Instance:
        if warming is not None:
            weights = [self._weight(i, warming) for i in usable]
        else:
            weights = [max(1, i.endpoint.weight) for i in usable]
        at = self._random() * sum(weights)
        for instance, weight in zip(usable, weights, strict=True):
            at -= weight
            if at < 0:
                return instance
        return usable[-1]

    def _least(self, usable: list[Instance], first: Instance, warming: float | None) -> Instance:
        """Return the least loaded of ``choice_count`` instances, of which ``first`` is one.

        They are drawn by weight, and compared by the calls they have for each unit of it: what the next call would
        add is left out, for it would count the weight twice, and leave an idle lighter one without any.
        """
        chosen = [first]
        left = [i for i in usable if i is not first]
        while left and len(chosen) < self.options.choice_count:
            further = self._weighted(left, warming)
            left.remove(further)
            chosen.append(further)
        if warming is None:
            return min(chosen, key=lambda i: i.active / max(1, i.endpoint.weight))
        return min(chosen, key=lambda i: i.active / self._weight(i, warming))

    def _next_in_turn(self, usable: list[Instance], warming: float | None) -> Instance:
        """Smooth weighted round robin: in each run of sum(weights) picks, each instance gets its weight, spread."""
        total = 0.0
        for instance in usable:
            weight = max(1, instance.endpoint.weight) if warming is None else self._weight(instance, warming)
            instance.picks += weight
            total += weight
        best = max(usable, key=lambda i: i.picks)
        best.picks -= total
        return best


def _any(instance: Instance) -> bool:
    return True


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
