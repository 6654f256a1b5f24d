"""What a sidecar's calls were led to once and are led to no more. Pure.

A plan that leads elsewhere leaves calls under way alone. The agent tells when their instances are deregistered; one
that has restarted does not know of them, and is reminded.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain

from raftstate.model.sidecar import LEFT_MAX, Endpoint, Key, SidecarUpstream, key_of


class Left:
    """Of all upstreams, from one update to the next. Beyond the bound the oldest are forgotten first."""

    def __init__(self) -> None:
        self._service: dict[str, str] = {}
        self._led_to: dict[str, dict[Key, Endpoint]] = {}
        self._left: dict[str, dict[Key, Endpoint]] = {}

    def follow(self, upstreams: Iterable[SidecarUpstream]) -> None:
        """Take where calls are led to now."""
        before, self._led_to = self._led_to, {}
        for each in upstreams:
            now = {key_of(one): one for one in chain(each.endpoints, *each.targets.values())}
            self._led_to[each.name] = now
            if self._service.get(each.name) != each.service:  # the sidecar has ended all calls of another service
                self._service[each.name] = each.service
                self._left[each.name] = {}
                continue
            ended = {key_of(one) for one in each.deregistered}
            known = self._left[each.name] | before.get(each.name, {})
            left = {key: one for key, one in known.items() if key not in now and key not in ended}
            while len(left) > LEFT_MAX:
                del left[next(iter(left))]
            self._left[each.name] = left

    def told(self) -> dict[str, tuple[Endpoint, ...]]:
        """Return what an agent is to be reminded of, by upstream."""
        return {name: tuple(left.values()) for name, left in self._left.items() if left and name in self._led_to}
