"""One Envoy's stream: its requests and its sidecar's updates in, responses out. No gRPC here."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from node.xds import messages, types
from node.xds.callers import Chains, Verdicts
from node.xds.checks import Checks
from node.xds.delta import Push, Subscriber
from node.xds.leaving import Checked, Leaving, upstream_of
from node.xds.resources import Resources, resources, version_of
from node.xds.snapshot import Merge
from node.xds.ways import Ways
from raftstate.model.sidecar import SidecarUpdate

log = logging.getLogger("lictor.xds")

_OF_UPSTREAMS = (types.CLUSTER, types.ENDPOINTS)
TROUBLE_MAX = 500
"""And of that in the sidecar's check."""
AGAIN_S = 5.0
"""After which what was refused is sent once more."""
READY_S = 0.5
"""How long what leads to a new cluster waits for it: withdrawals are behind it."""
WORDS_MAX = 2000
"""How much of what an Envoy says of a refusal is logged."""
STATE_ENDS = "|"
"""In a listener's version: between what a later stream goes on from, and what tells the content."""


class Session:
    """What one Envoy has and is to have."""

    def __init__(
        self,
        sidecar_id: str,
        checks: Checks | None = None,
        checked: Checked | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``checked``: how Envoy can ask ``checks`` about instances, None when it cannot."""
        self._sidecar_id = sidecar_id
        self._checks, self._checked, self._clock = checks or Checks(), checked, clock
        self._leaving = Leaving()
        self._ready: set[str] = set()
        """Clusters that can take calls."""
        self._awaited: dict[str, float] = {}
        """Those that cannot yet, and since when they are awaited."""
        self._brought: dict[str, dict[str, str]] = {}
        """Versions of clusters and their instances that Envoy has from an earlier stream, not compared yet."""
        self._merge = Merge()
        self._subscriber = Subscriber()
        self._resources: Resources = {}
        self._versions: dict[str, dict[str, str]] = {}
        self._chains, self._ways = Chains(), Ways()
        self._verdicts: Verdicts | None = None
        self._instances: Mapping[str, Sequence[str]] = {}
        self._services: Sequence[str] = ()
        self._refused: dict[tuple[str, str], str] = {}
        """Of what there is, what it does not take now, with its words."""
        self._again_at: float | None = None
        self.refused = 0
        """Resources that Envoy did not take."""

    def request(self, request: Any) -> None:
        """Take a ``DeltaDiscoveryRequest``."""
        url = request.type_url
        if request.response_nonce:
            self._answered(request)
        initial = dict(request.initial_resource_versions)
        if url == types.LISTENER and initial:
            self._resume(initial)
        if url in _OF_UPSTREAMS and initial:
            self._brought.setdefault(url, {}).update(initial)
            if url == types.CLUSTER:
                self._ready.update(initial)
            self._compare()
        self._subscriber.request(url, request.resource_names_subscribe, request.resource_names_unsubscribe, initial)

    def _answered(self, request: Any) -> None:
        refused = request.HasField("error_detail")
        verdict = self._subscriber.answered(request.type_url, request.response_nonce, accepted=not refused)
        if not refused:
            for name in verdict.names if verdict else ():
                self._refused.pop((request.type_url, name), None)
            return
        words = request.error_detail.message.strip()
        names = verdict.names if verdict else ("?",)
        # The rest of the push may well have been taken: Envoy names what it refuses, in most of its texts.
        named = [one for one in names if one in words] or names
        for name in set(names).difference(named):
            self._refused.pop((request.type_url, name), None)
        self._refuse(request.type_url, named, words)
        self._again_at = self._clock() + AGAIN_S

    def _refuse(self, type_url: str, names: Sequence[str], why: str) -> None:
        self.refused += len(names)
        why = why[:WORDS_MAX]
        if all(self._refused.get((type_url, name)) == why[:TROUBLE_MAX] for name in names):
            return  # as before
        self._refused.update({(type_url, name): why[:TROUBLE_MAX] for name in names})
        log.error(
            "Envoy of %s refuses %s %s and keeps what it had: %s",
            self._sidecar_id, type_url.rpartition(".")[2], ", ".join(names), why,
        )  # fmt: skip

    def _resume(self, versions: Mapping[str, str]) -> None:
        """Go on from the filter chains that Envoy has from an earlier stream."""
        for name, version in versions.items():
            state, _, _ = version.rpartition(STATE_ENDS)
            if name == types.PUBLIC_LISTENER:
                self._chains.resume(state)
            elif state:
                self._ways.resume(name, state)
        self._compile()

    @property
    def trouble(self) -> str:
        """What Envoy is to have and does not take, with its words; empty when it takes everything."""
        rows: dict[str, list[str]] = {}
        for (url, name), why in self._refused.items():
            if name in self._versions.get(url, {}):
                rows.setdefault(why, []).append(f"{url.rpartition('.')[2]} {name}")
        return "; ".join(f"{', '.join(names)}: {why}" for why, names in rows.items())[:TROUBLE_MAX]

    def update(self, update: SidecarUpdate) -> bool:
        """Take an update of the sidecar's stream; return whether something is to be sent perhaps."""
        if not self._merge.apply(update):
            return False
        self._compile()
        return bool(self._resources)

    def know(self, instances: Mapping[str, Sequence[str]], services: Sequence[str]) -> bool:
        """Take the instances, by service, that are known of the callers, and the services that there are.

        Returns whether something is to be sent perhaps.
        """
        if (instances, services) == (self._instances, self._services):
            return False
        self._instances, self._services = instances, services
        self._compile()
        return bool(self._resources)

    @property
    def callers(self) -> tuple[list[str], bool]:
        """The services that intentions let in by name, and whether others may come too: whom to know of."""
        return ([], False) if self._verdicts is None else (self._verdicts.services(), self._verdicts.anyone)

    def _compile(self) -> None:
        snapshot = self._merge.snapshot()
        if snapshot is None:
            return
        self._verdicts = Verdicts(snapshot)
        self._chains.follow(self._verdicts, self._instances, self._services)
        mixed: set[str] = set()
        if self._checked is not None:
            mixed = self._leaving.follow(snapshot, self._clock())
        self._ways.follow(snapshot, self._leaving.checked.__contains__)
        before = self._versions.get(types.CLUSTER, {})
        self._make()
        after = self._versions[types.CLUSTER]
        # Calls through a cluster that is replaced go on, and no check of the new one's ends them.
        mixed |= {upstream_of(name) for name in before.keys() & after.keys() if before[name] != after[name]}
        self._mix(mixed)
        self._compare()
        self._checks.withdraw(self._sidecar_id, self._leaving.labels())

    def _compare(self) -> None:
        """Look whether what Envoy has from an earlier stream is what it is to have."""
        for url in _OF_UPSTREAMS if self._versions else ():
            ours = self._versions[url]
            brought = self._brought.pop(url, {})
            self._mix({upstream_of(name) for name, version in brought.items() if ours.get(name, version) != version})

    def _mix(self, upstreams: set[str]) -> None:
        upstreams = upstreams & self._leaving.checked  # others' calls are ended all together anyway
        if not upstreams <= self._ways.mixed:
            self._ways.mixed |= upstreams
            self._make()

    @property
    def settle_at(self) -> float | None:
        """When :meth:`settle` or :meth:`responses` has something to do at the latest."""
        times = [since + READY_S for since in self._awaited.values()]
        times += [at for at in (self._leaving.next_at(), self._again_at) if at is not None]
        return min(times, default=None)

    def settle(self) -> None:
        """Take instances out of their clusters whose calls have ended, or could not be ended one by one.

        And send what was refused once more: a port may have been another process's.
        """
        if self._again_at is not None and self._clock() >= self._again_at:
            self._again_at = None
            for url, name in self._refused:
                self._subscriber.again(url, [name])
        done, late = self._leaving.settle(self._checks.acknowledged(self._sidecar_id), self._clock())
        if not done:
            return
        for name in sorted(late):
            log.warning(
                "Envoy of %s has not ended the calls to an instance of %s: all are ended", self._sidecar_id, name
            )
            self._ways.end(name)
        self._make()
        self._checks.withdraw(self._sidecar_id, self._leaving.labels())

    def _make(self) -> None:
        snapshot = self._merge.snapshot()
        if snapshot is None:
            return
        self._resources = resources(
            snapshot, self._chains.all(), self._ways.generations, self._checked, self._leaving
        )
        self._versions = {
            url: {name: version_of(one) for name, one in rows.items()} for url, rows in self._resources.items()
        }
        for url, name in [one for one in self._refused if one[1] not in self._versions.get(one[0], {})]:
            del self._refused[url, name]
        listeners = self._versions[types.LISTENER]
        for name, version in listeners.items():
            state = self._chains.state() if name == types.PUBLIC_LISTENER else self._ways.state(name)
            listeners[name] = f"{state}{STATE_ENDS}{version}"

    def responses(self) -> list[Any]:
        """Return the ``DeltaDiscoveryResponse`` messages to send now, in order. None while nothing is known."""
        if not self._resources:
            return []
        found: list[Any] = []
        for url in types.PUSH_ORDER:
            hold = self._not_ready() if url in types.USERS else set()
            if hold and not self._subscriber.was_sent(types.LISTENER):
                return found  # an Envoy that starts is to have all its listeners when it is ready
            push = self._subscriber.push(url, self._versions[url], hold=hold, removing=url in types.USERS)
            if push is None:
                continue
            found.append(self._response(push))
            if url == types.CLUSTER:
                # A cluster that changes takes the place of the one before once it is told its instances, and does not
                # ask for what the other had: Envoy gives up waiting after 15 s only.
                self._subscriber.again(types.ENDPOINTS, push.send)
        if not self._awaited and not self._subscriber.awaits(*types.USERS):
            pushes = [self._subscriber.push(url, self._versions[url]) for url in types.PUSH_ORDER]
            found += [self._response(push) for push in pushes if push is not None]
        return found

    def _not_ready(self) -> set[str]:
        """Return the listeners and routes that would lead to a cluster which Envoy is still making.

        One that is new can take calls once it was told its instances, and has checked them where they are checked.
        """
        clusters, now = self._versions[types.ENDPOINTS].keys(), self._clock()
        told = self._subscriber.was_sent(types.CLUSTER)
        self._ready &= clusters
        awaited = {}
        unasked = self._checks.unasked(self._sidecar_id)
        for name in (clusters & told) - self._ready:
            if name not in self._awaited and upstream_of(name) in self._leaving.checked:
                self._checks.expect(self._sidecar_id, self._leaving.labels_of(name))
                unasked = self._checks.unasked(self._sidecar_id)
            since = self._awaited.get(name, now)
            made = self._subscriber.has(types.ENDPOINTS, name) and unasked.isdisjoint(self._leaving.labels_of(name))
            if made or now - since >= READY_S:
                self._ready.add(name)
            else:
                awaited[name] = since
        self._awaited = awaited
        if not awaited:
            unasked.clear()  # an instance may have gone before anybody asked about it
        return {upstream_of(name) for name in awaited}

    def closed(self) -> list[Any]:
        """Return the messages that end all calls to the instance, because it is registered no more."""
        for rows in (self._resources, self._versions):
            rows.get(types.LISTENER, {}).pop(types.PUBLIC_LISTENER, None)
        return self.responses()

    def _response(self, push: Push) -> Any:
        """Return the message. What cannot be told is left out: withdrawals must not wait for it."""
        resources, versions = self._resources[push.type_url], self._versions[push.type_url]
        rows, bad = [], []
        for name in push.send:
            try:
                rows.append((name, versions[name], messages.encode(push.type_url, resources[name])))
            except messages.BadResource as error:
                self._refuse(push.type_url, [name], f"it cannot be told: {error}")
                bad.append(name)
        if bad:
            self._subscriber.leave_out(push, bad)
        return messages.delta_response(push.type_url, push.nonce, rows, list(push.removed))
