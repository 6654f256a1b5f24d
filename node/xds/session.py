"""One Envoy's stream: its requests and its sidecar's updates in, responses out. No gRPC here."""

from __future__ import annotations

import logging
from typing import Any

from node.xds import messages, types
from node.xds.delta import Push, Subscriber
from node.xds.resources import Guard, Resources, guard, resources, version_of
from node.xds.snapshot import Merge
from raftstate.model.sidecar import SidecarUpdate

log = logging.getLogger("lictor.xds")

GENERATION_DIGITS_MAX = 15
"""Ours never get so long; Python refuses to read numbers of thousands of digits."""


class Session:
    """What one Envoy has and is to have."""

    def __init__(self, sidecar_id: str) -> None:
        self._sidecar_id = sidecar_id
        self._merge = Merge()
        self._subscriber = Subscriber()
        self._resources: Resources = {}
        self._versions: dict[str, dict[str, str]] = {}
        self._guard: Guard | None = None
        self._generation = 0
        self._known_before = ""
        """Guard's digest that Envoy had from an earlier stream."""
        self.refused = 0
        """Resources that Envoy did not take."""

    def request(self, request: Any) -> None:
        """Take a ``DeltaDiscoveryRequest``."""
        url = request.type_url
        if request.response_nonce:
            self._answered(request)
        initial = dict(request.initial_resource_versions)
        if url == types.LISTENER and (had := initial.get(types.PUBLIC_LISTENER)):
            self._resume(had)
        self._subscriber.request(url, request.resource_names_subscribe, request.resource_names_unsubscribe, initial)

    def _answered(self, request: Any) -> None:
        refused = request.HasField("error_detail")
        verdict = self._subscriber.answered(request.type_url, request.response_nonce, accepted=not refused)
        if not refused:
            return
        names = ", ".join(verdict.names) if verdict else "?"
        kind = request.type_url.rpartition(".")[2]
        self.refused += len(verdict.names) if verdict else 1
        log.error(
            "Envoy of %s refuses %s %s and keeps what it had: %s",
            self._sidecar_id, kind, names, request.error_detail.message,
        )  # fmt: skip

    def _resume(self, version: str) -> None:
        """Go on from the generation that Envoy has: connections that are still allowed survive the agent's restart.

        What was withdrawn while no agent was there shows by the guard's digest, and ends them.
        """
        generation, _, rest = version.partition(".")
        before = rest.partition(".")[0]
        known = generation.isascii() and generation.isdigit() and len(generation) <= GENERATION_DIGITS_MAX
        if known and before:
            self._generation, self._known_before = int(generation), before
            self._judge()

    def _judge(self) -> None:
        if self._guard is not None and self._known_before:
            if self._guard.digest() != self._known_before:
                self._generation += 1
            self._known_before = ""
            self._compile()

    def update(self, update: SidecarUpdate) -> bool:
        """Take an update of the sidecar's stream; return whether something is to be sent perhaps."""
        if not self._merge.apply(update):
            return False
        snapshot = self._merge.snapshot()
        if snapshot is None:
            return False
        now = guard(snapshot)
        if self._guard is not None and now.withdraws(self._guard):
            self._generation += 1
        self._guard = now
        self._judge()
        self._compile()
        return True

    def _compile(self) -> None:
        snapshot = self._merge.snapshot()
        if snapshot is None or self._guard is None:
            return
        self._resources = resources(snapshot, self._generation)
        self._versions = {
            url: {name: version_of(one) for name, one in rows.items()} for url, rows in self._resources.items()
        }
        listeners = self._versions[types.LISTENER]
        public = listeners[types.PUBLIC_LISTENER]
        listeners[types.PUBLIC_LISTENER] = f"{self._generation}.{self._guard.digest()}.{public}"

    def responses(self) -> list[Any]:
        """Return the ``DeltaDiscoveryResponse`` messages to send now, in order. None while nothing is known."""
        if not self._resources:
            return []
        pushes = (self._subscriber.push(url, self._versions[url]) for url in types.PUSH_ORDER)
        return [self._response(push) for push in pushes if push is not None]

    def _response(self, push: Push) -> Any:
        rows, versions = self._resources[push.type_url], self._versions[push.type_url]
        return messages.delta_response(
            push.type_url, push.nonce, [(name, versions[name], rows[name]) for name in push.send], list(push.removed)
        )
