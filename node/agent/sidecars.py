"""Configuration streams of the sidecars on this host: one live stream per sidecar, fed by views.

A change that arrives in a view is on its way to the sidecar in the next turn of the loop. A section is sent when it
differs from what this stream last sent. Sections that are not known (no server reached yet) are left out, and the
sidecar keeps what it has.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec

from node.agent.departures import Departures
from node.agent.leaf import LeafEntry, LeafManager
from node.agent.options import AgentOptions
from node.agent.traffic import (
    BadFilter,
    default_protocol,
    endpoints_of,
    own_config,
    protocol_of,
    upstream_config,
    upstream_protocol,
)  # fmt: skip
from node.agent.upstreams import Resolution, resolve
from node.agent.views import View, Views
from proxy.authz import compile_policy
from raftstate.model.catalog import CatalogService, InstanceHealth, ServiceInstance, Upstream
from raftstate.model.connect import CARoots, Revocation
from raftstate.model.identity import Identity
from raftstate.model.intention import Intention, precedence
from raftstate.model.plan import Plan
from raftstate.model.sidecar import Endpoint, SidecarSelf, SidecarUpdate, SidecarUpstream

FIRST_LINE_WAIT_S = 3.0
"""How long the first line waits to be complete; after that it carries what is known."""


@dataclass(frozen=True, slots=True)
class StreamHolder:
    """Who holds a sidecar's stream: for the text that refuses a second one."""

    pid: str
    since: float
    """Unix time."""

    def __str__(self) -> str:
        moment = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(self.since))
        return f"pid {self.pid or 'unknown'}, since {moment}"


@dataclass(slots=True)
class _UpstreamState:
    """One upstream's views. ``chain`` and ``instances`` belong to the service it resolves to now."""

    upstream: Upstream
    named: View | None = None
    on_port: View | None = None
    chain: View | None = None
    instances: dict[str, View] = field(default_factory=dict)
    """By service: those to which the plan leads, or led while an instance from then is still there."""
    departures: Departures = field(default_factory=Departures)
    resolution: Resolution = field(default_factory=Resolution)

    @property
    def name(self) -> str:
        """As the sidecar knows it."""
        return self.upstream.upstream_name or self.upstream.destination_name


class SidecarFeed:
    """One sidecar's stream of updates. ``close`` ends it from outside; leaving :meth:`updates` releases all views."""

    def __init__(self, options: AgentOptions, views: Views, leaves: LeafManager, row: ServiceInstance) -> None:
        if row.proxy is None:
            raise ValueError("a sidecar's registration has a Proxy")
        self._options, self._views, self._leaves, self._row, self._proxy = options, views, leaves, row, row.proxy
        self._wake = asyncio.Event()
        self._closed = False
        self._registered = True
        self._version = 0
        self._sent: dict[str, Any] = {}
        self._upstreams: list[_UpstreamState] = []
        self._held: list[tuple[View, Callable[[], None]]] = []
        self._defaults: View | None = None
        self._everyone: View | None = None
        self._identity = Identity(service=self._proxy.destination_service_name, instance=self._instance)

    @property
    def _instance(self) -> str:
        return self._proxy.destination_service_id

    def close(self, *, deregistered: bool = False) -> None:
        """End the stream; ``deregistered``: because the registration goes, which its last line says."""
        self._closed = True
        self._registered = self._registered and not deregistered
        self._wake.set()

    def remember(self, left: Mapping[str, Iterable[Endpoint]]) -> None:
        """Take from the sidecar, by upstream, the instances that its calls were led to before this stream began."""
        for state in self._upstreams:
            if endpoints := left.get(state.name):
                state.departures.remember(endpoints)
                self._wake.set()

    async def updates(self) -> AsyncIterator[SidecarUpdate]:
        """Yield what is to be sent: first everything, then what changed, and a heartbeat when nothing did."""
        service = self._proxy.destination_service_name
        leaf = self._leaves.entry(service, self._instance)
        leaf.holders += 1
        stop_leaf = leaf.listen(self._wake.set)
        try:
            roots = self._hold("connect.roots")
            self._defaults = self._hold("config.get", {"kind": "service-defaults", "name": service})
            self._everyone = self._hold("config.get", {"kind": "proxy-defaults", "name": "global"})
            match = {"name": service, "instance": self._instance}
            intentions = self._hold("intentions.match", {"by": "destination", **match})
            revocations = self._hold("connect.revocations")
            sources: View | None = None
            if any(one.destination_port for one in self._proxy.upstreams):
                sources = self._hold("intentions.match", {"by": "source", **match})
            self._upstreams = [self._open_upstream(one) for one in self._proxy.upstreams]
            deadline = asyncio.get_running_loop().time() + FIRST_LINE_WAIT_S
            while not self._closed:
                self._wake.clear()
                sections = self._sections(roots, intentions, revocations, leaf, sources)
                now = asyncio.get_running_loop().time()
                complete = all(value is not None for value in sections.values())
                if not self._sent and not complete and now < deadline:
                    await self._sleep(deadline - now)
                    continue
                changed = {
                    name: value
                    for name, value in sections.items()
                    if value is not None and self._sent.get(name, msgspec.UNSET) != value
                }
                if changed:
                    self._sent.update(changed)
                    yield self._update(changed)
                    continue
                if not await self._sleep(self._options.heartbeat_s) and not self._closed:
                    yield self._update({})
            if not self._registered:
                yield self._update({"registered": False})
        finally:
            stop_leaf()
            leaf.holders -= 1
            for view, stop in self._held:
                stop()
                self._views.release(view)

    def _update(self, sections: dict[str, Any]) -> SidecarUpdate:
        self._version += 1
        return SidecarUpdate(version=self._version, **sections)

    async def _sleep(self, timeout_s: float) -> bool:
        """Wait for a change; return whether there is one."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._wake.wait()
        except TimeoutError:
            return False
        return True

    def _hold(self, name: str, params: dict[str, Any] | None = None) -> View:
        view = self._views.acquire(name, params)
        self._held.append((view, view.listen(self._wake.set)))
        return view

    def _let_go(self, view: View) -> None:
        for held in self._held:
            if held[0] is view:
                self._held.remove(held)
                held[1]()
                self._views.release(view)
                return

    def _open_upstream(self, upstream: Upstream) -> _UpstreamState:
        state = _UpstreamState(upstream)
        name = upstream.destination_name or upstream.upstream_name
        if not upstream.destination_name or upstream.destination_port:
            state.named = self._hold("catalog.service", {"service": name})
        if upstream.destination_port:
            state.on_port = self._hold("catalog.services_by_port", {"port": upstream.destination_port})
        return state

    def _sections(
        self,
        roots: View,
        intentions: View,
        revocations: View,
        leaf: LeafEntry,
        sources: View | None,
    ) -> dict[str, Any]:
        bundle = next(iter(roots.typed(CARoots)), None) if roots.known else None
        found: list[SidecarUpstream | None] = [self._upstream(state, sources) for state in self._upstreams]
        return {
            "self": self._self(bundle) if bundle is not None and self._entries_known else None,
            "leaf": leaf.leaf,
            "roots": _bundle(bundle) if bundle is not None and bundle.roots else None,
            "intentions": intentions.memo("by precedence", lambda: _by_precedence(intentions))
            if intentions.known
            else None,
            "default_allow": self._options.default_allow,
            "revocations": revocations.typed(Revocation) if revocations.known else None,
            "upstreams": None if None in found else tuple(found),
            "registered": True,
        }

    @property
    def _entries_known(self) -> bool:
        views = (self._defaults, self._everyone)
        return all(view is not None and view.known for view in views)

    def _self(self, bundle: CARoots) -> SidecarSelf:
        row, proxy = self._row, self._proxy
        defaults, everyone = _entry(self._defaults), _entry(self._everyone)
        return SidecarSelf(
            proxy_id=row.id,
            service=proxy.destination_service_name,
            service_id=proxy.destination_service_id,
            node=row.node,
            datacenter=self._options.datacenter,
            trust_domain=bundle.trust_domain,
            public_address=row.address or self._options.address,
            public_port=row.port,
            local_address=proxy.local_service_address or "127.0.0.1",
            local_port=proxy.local_service_port,
            protocol=protocol_of(proxy.config) or default_protocol(defaults, everyone) or "tcp",
            zone=row.locality.get("Zone", "") or row.locality.get("zone", "") or self._options.zone,
            config=own_config(proxy.config, defaults, everyone),
        )

    def _upstream(self, state: _UpstreamState, sources: View | None) -> SidecarUpstream | None:
        """Return the upstream as it is known now; None while nothing is known of where it leads."""
        upstream = state.upstream
        awaited = (state.named, state.on_port, sources if upstream.destination_port else None)
        if any(view is not None and not view.known for view in awaited):
            return None
        resolution = self._resolve(state, sources)
        if resolution != state.resolution or (state.chain is None and resolution.service):
            self._leave(state)
            if resolution.service and not resolution.loopback_port:
                params = {"service": resolution.service, "datacenter": self._options.datacenter}
                state.chain = self._hold("discovery.chain", params)
                state.instances[resolution.service] = self._hold_instances(resolution.service)
        state.resolution = resolution
        if not self._entries_known:
            return None
        made = SidecarUpstream(
            name=state.name,
            service=resolution.service,
            bind_address=upstream.local_bind_address,
            bind_port=upstream.local_bind_port,
            protocol=protocol_of(upstream.config) or "tcp",
            loopback_port=resolution.loopback_port,
            error=resolution.error,
            config=upstream_config(upstream.config, resolution.service, _entry(self._defaults)),
        )
        return made if state.chain is None else self._planned(state, state.chain, made)

    def _planned(self, state: _UpstreamState, chain: View, made: SidecarUpstream) -> SidecarUpstream | None:
        """Return the upstream with what the plan for its service says; None while that is not known."""
        plan = next(iter(chain.typed(Plan)), None)
        if plan is None:
            return None
        if plan.error:
            return self._with_departures(state, msgspec.structs.replace(made, error=plan.error))
        wanted = {target.service for target in plan.targets.values()}
        for service in wanted - state.instances.keys():
            state.instances[service] = self._hold_instances(service)
        if not all(state.instances[service].known for service in wanted):
            return None
        views = [state.instances[service] for service in sorted(wanted)]
        said = {_said_protocol(view) for view in views}
        protocol = upstream_protocol(made.config, said.pop() if len(said) == 1 else "", plan)
        if plan.default:
            (view,) = views
            endpoints = _all_of(view)
            return self._with_departures(
                state, msgspec.structs.replace(made, protocol=protocol, endpoints=endpoints), wanted
            )
        try:
            targets = {id: self._target(state, plan, id) for id in plan.targets}
        except BadFilter as error:
            text = f"a subset of {made.service!r} has no instances: {error}"
            return self._with_departures(state, msgspec.structs.replace(made, error=text), wanted)
        return self._with_departures(
            state, msgspec.structs.replace(made, protocol=protocol, plan=plan, targets=targets), wanted
        )

    def _with_departures(
        self, state: _UpstreamState, made: SidecarUpstream, wanted: Collection[str] = ()
    ) -> SidecarUpstream:
        """Return the upstream with the instances that it led to once and that are no more. ``wanted``: the services
        whose instances it leads to; those of others are followed while there is one that it has left."""
        for service in state.departures.services - state.instances.keys():  # the sidecar brought them to mind
            state.instances[service] = self._hold_instances(service)
        led_to = itertools.chain(made.endpoints, *made.targets.values())
        known = {service: view for service, view in state.instances.items() if view.known}
        state.departures.follow(led_to, {service: _all_of(view) for service, view in known.items()})
        for service in state.instances.keys() - state.departures.services - set(wanted):
            if service != made.service:
                self._let_go(state.instances.pop(service))
        return msgspec.structs.replace(made, deregistered=state.departures.deregistered)

    def _target(self, state: _UpstreamState, plan: Plan, id: str) -> tuple[Endpoint, ...]:
        target = plan.targets[id]
        view = state.instances[target.service]
        return view.memo(
            ("target", target.filter, target.only_passing), lambda: endpoints_of(view.typed(InstanceHealth), target)
        )

    def _hold_instances(self, service: str) -> View:
        return self._hold("health.connect", {"service": service})

    def _leave(self, state: _UpstreamState) -> None:
        for view in (state.chain, *state.instances.values()):
            if view is not None:
                self._let_go(view)
        state.chain = None
        state.instances.clear()
        state.departures = Departures()

    def _resolve(self, state: _UpstreamState, sources: View | None) -> Resolution:
        upstream = state.upstream
        named = {row.service_name for row in state.named.typed(CatalogService)} if state.named is not None else set()
        on_port = state.on_port.typed(ServiceInstance) if state.on_port is not None else ()
        if sources is None:
            policy = compile_policy((), self._options.default_allow)
        else:
            policy = sources.memo(
                "policy", lambda: compile_policy(sources.typed(Intention), self._options.default_allow)
            )
        return resolve(upstream, self._identity, self._proxy.local_service_port, named, on_port, policy)


def _bundle(roots: CARoots) -> tuple[str, ...]:
    """Return the trusted certificates, the active root first. A cross-signed form is not a root of trust."""
    ordered = sorted(roots.roots, key=lambda root: (not root.active, root.id))
    return tuple(root.root_cert for root in ordered)


def _by_precedence(view: View) -> tuple[Intention, ...]:
    return tuple(
        sorted(
            view.typed(Intention),
            key=lambda one: (-precedence(one), one.destination_name, one.source_name, one.source_service),
        )
    )


def _entry(view: View | None) -> dict[str, Any] | None:
    """Return the configuration entry that a view follows, if there is one."""
    entry = next(iter(view.rows.values()), None) if view is not None else None
    return entry if isinstance(entry, dict) else None


def _all_of(view: View) -> tuple[Endpoint, ...]:
    """Return the instances of the service that a view follows."""
    return view.memo("endpoints", lambda: endpoints_of(view.typed(InstanceHealth)))


def _said_protocol(view: View) -> str:
    return view.memo("protocol", lambda: _protocol_of(view))


def _protocol_of(view: View) -> str:
    """Return what the instances behind an upstream speak, when they all say the same."""
    said = {
        protocol_of(row.service.proxy.config) for row in view.typed(InstanceHealth) if row.service.proxy is not None
    }
    return said.pop() if len(said) == 1 else ""
