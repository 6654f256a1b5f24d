"""Instances that calls were once led to: whether they are still there, though a plan leads elsewhere by now. Pure.

A change of a plan leaves calls under way alone. When an instance that such a call may still be on is deregistered
later, the call has to end (withdrawal is prompt), and only who goes on following the instance can say so.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from raftstate.model.sidecar import LEFT_MAX, Endpoint, Key, key_of

LEFT_SERVICES_MAX = 50
"""Of how many services they may be: each is followed."""
DEREGISTERED_MAX = 256
"""How many of the last instances that went are told again with each change of the upstream; once would do."""


class Departures:
    """Of one upstream: the instances that were left, and those of them that are no more."""

    def __init__(self) -> None:
        self._led_to: dict[Key, Endpoint] = {}
        self._left: dict[Key, Endpoint] = {}
        """Not led to any more, still registered."""
        self._gone: dict[Key, Endpoint] = {}

    @property
    def services(self) -> set[str]:
        """The services whose instances have to be followed on account of those that were left."""
        return {endpoint.service for endpoint in self._left.values()}

    @property
    def deregistered(self) -> tuple[Endpoint, ...]:
        """Instances that were left and are no more, in the order they went."""
        return tuple(self._gone.values())

    def remember(self, endpoints: Iterable[Endpoint]) -> None:
        """Take instances that were left before this agent was there to see it; what is beyond the bounds is not."""
        services = self.services
        for endpoint in endpoints:
            key = key_of(endpoint)
            if key in self._led_to or key in self._left or key in self._gone:
                continue
            if endpoint.service not in services and len(services) >= LEFT_SERVICES_MAX:
                continue
            if len(self._left) >= LEFT_MAX:
                return
            services.add(endpoint.service)
            self._left[key] = endpoint

    def follow(self, led_to: Iterable[Endpoint], registered: Mapping[str, Collection[Endpoint]]) -> None:
        """Take where calls are led to now, and the instances of each service, as far as they are followed."""
        now = {key_of(endpoint): endpoint for endpoint in led_to}
        there = {key_of(endpoint) for rows in registered.values() for endpoint in rows}
        left = {key: each for key, each in (self._left | self._led_to).items() if key not in now}
        for key, endpoint in left.items():
            if endpoint.service in registered and key not in there:
                self._gone[key] = endpoint
        self._left = {key: each for key, each in left.items() if key not in self._gone}
        self._led_to = now
        for key in [key for key in self._gone if key in there]:
            del self._gone[key]
        while len(self._gone) > DEREGISTERED_MAX:
            del self._gone[next(iter(self._gone))]
