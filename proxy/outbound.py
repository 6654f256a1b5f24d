"""Upstreams: what their calls go to and how, and the connections that our app has made to them.

How one call finds its instance: :mod:`proxy.outgoing`.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Sequence

from proxy.access import OUTBOUND, Entry, Observer, path_of
from proxy.balancer import Balancer, Key, RetryBudget
from proxy.balancing.routing import Routing
from proxy.http import HttpCounters, OutboundHttp
from proxy.http2 import OutboundHttp2
from proxy.http_app import HttpAppConnection
from proxy.logs import LimitedLog
from proxy.metrics import Metrics, PairStats
from proxy.outbound_http import ServiceFleet, options_of
from proxy.outbound_http2 import Http2AppConnection, Http2Fleet
from proxy.outgoing import AppConnection, Outgoing, Waiting
from proxy.pool import SessionPool
from proxy.tasks import Tasks
from proxy.tracing import RequestTrace, Tracer, trace_id_of
from proxy.upstream_settings import UpstreamSettings, ignored_settings, resolver_of
from raftstate.model.plan import HTTP_PROTOCOLS, target_id
from raftstate.model.sidecar import Endpoint, SidecarSelf, SidecarUpstream, key_of

log = logging.getLogger("lictor.proxy.outbound")


class Upstream:
    """One upstream: its listener's connections, and the instances they go to."""

    def __init__(self, name: str, pool: SessionPool, metrics: Metrics, tasks: Tasks) -> None:
        self.name = name
        self.pool = pool
        self.tasks = tasks
        self.metrics = metrics
        self.spec: SidecarUpstream | None = None
        self.me: SidecarSelf | None = None
        self.balancer = Balancer(random.random)
        """Of the service's instances; with a plan, of its first target's."""
        self.balancers: dict[str, Balancer] = {}
        """By target id."""
        self.routing: Routing | None = None
        """None while there is no plan: all calls go by the balancer."""
        self.keys: frozenset[Key] = frozenset()
        """All instances that calls may go to."""
        self.random = random.random
        self.budget = RetryBudget()
        self.settings = UpstreamSettings({}, None)
        self.connections: set[Outgoing | HttpAppConnection] = set()
        self.opening: dict[Outgoing, float] = {}
        """Calls that an instance is to accept, and until when, the oldest first; one clock watches all of them."""
        self.waiting = Waiting()
        """Calls whose app has sent nothing yet."""
        self.http_options = options_of(name, {})
        self.http_counters = HttpCounters()
        self._fleet = ServiceFleet(self)
        self._http: OutboundHttp | None = None
        self._http2_fleet = Http2Fleet(self)
        self._http2: OutboundHttp2 | None = None
        self.observer: Observer | None = None
        """Who is told of calls that have ended; set before any is taken."""
        self.tracer: Tracer | None = None
        """Who decides on requests' trace context; set before any is taken."""
        self._unroutable = ""
        self.blocked = ""
        """Why no call may be made at all (our own identity is revoked, draining); empty normally."""
        self.limited = LimitedLog(log)
        self.stats: PairStats = metrics.pair("outbound", "", name)

    def update(self, spec: SidecarUpstream | None, me: SidecarSelf | None) -> list[Key]:
        """Take the upstream's new state; connections to instances that went are ended. Returns those instances."""
        before, self.spec, self.me = self.spec, spec, me
        if spec is not None:
            if before is None or before.config != spec.config:
                for text in ignored_settings(spec.config)[:20]:
                    log.warning("upstream %s: nothing acts on the setting %s", self.name, text[:300])
            self.settings = UpstreamSettings(spec.config, me, http=spec.protocol in HTTP_PROTOCOLS)
            self.http_options = options_of(spec.service or self.name, spec.config)
            for side in self._http_sides():
                side.use(self.http_options)
            self.stats = self.metrics.pair("outbound", me.service if me else "", spec.service or self.name)
        gone = self._retarget(before, spec, me.datacenter if me else "")
        if gone:
            self._http2_fleet.drop(gone, f"it is no longer an instance of {self.name}")
            for connection in list(self.connections):
                if connection.instance is not None and connection.instance.key in gone:
                    connection.cut(f"{connection.instance.key.instance} is no longer an instance of {self.name}")
        return list(gone)

    def _retarget(self, before: SidecarUpstream | None, spec: SidecarUpstream | None, datacenter: str) -> set[Key]:
        """Give each target its balancer; return the instances that are no more.

        An instance that calls merely are not to go to any more, because a plan changed or can't be followed for now,
        is none of those: what it has under way may end there. When it is deregistered later, the agent says so.
        """
        plan = spec.plan if spec is not None else None
        targets: dict[str, tuple[Endpoint, ...]] = {}
        if spec is not None and plan is not None:
            targets = {id: spec.targets.get(id, ()) for id in plan.targets}
        elif spec is not None:
            targets = {target_id(spec.service, datacenter): spec.endpoints}
        now = asyncio.get_running_loop().time()
        old, self.balancers = self.balancers, {}
        gone = {key_of(endpoint) for endpoint in (spec.deregistered if spec is not None else ())}
        known = not (spec is not None and spec.error)
        for id, endpoints in targets.items():
            balancer = old.pop(id, None) or Balancer(self.random)
            balancer.options = self.settings.balancer_of(resolver_of(plan, id))
            left = {instance.key for instance in balancer.update(endpoints, now)}
            if known and (
                before is None
                or before.plan is None
                or plan is None
                or before.plan.targets.get(id) == plan.targets[id]
            ):
                gone |= left
            self.balancers[id] = balancer
        if spec is None or before is None or before.service != spec.service:
            gone.update(key for balancer in old.values() for key in balancer.instances)
        self.balancer = next(iter(self.balancers.values()), None) or Balancer(self.random)
        self.keys = frozenset(key for balancer in self.balancers.values() for key in balancer.instances)
        self.routing = None
        self._unroutable = ""
        if plan is not None:
            try:
                self.routing = Routing(plan, self.balancers, self.random)
            except ValueError as error:
                self._unroutable = str(error)
        return gone - self.keys

    @property
    def http(self) -> OutboundHttp:
        """The HTTP side, made when it is first needed."""
        if self._http is None:
            self._http = OutboundHttp(self.http_options, self._fleet, self.http_counters)
            self._http.memory = self.pool.memory
            if self.observer is not None:
                self._http.told = self._told
            self._http.tracer = self.tracer
        return self._http

    @property
    def http2(self) -> OutboundHttp2:
        """The HTTP/2 side, made when it is first needed."""
        if self._http2 is None:
            self._http2 = OutboundHttp2(self.http_options, self._http2_fleet, self.http_counters)
            self._http2.memory = self.pool.memory
            if self.observer is not None:
                self._http2.told = self._told
            self._http2.tracer = self.tracer
        return self._http2

    def _http_sides(self) -> list[OutboundHttp | OutboundHttp2]:
        return [side for side in (self._http, self._http2) if side is not None]

    def tell_connection(self, instance: str, received: int, seconds: float) -> None:
        """A connection of the app has ended, on which ``instance`` (empty: none) sent so many bytes."""
        me, service = self.me, self.spec.service if self.spec else self.name
        source = (me.service, me.service_id) if me else ("", "")
        origin = "app" if instance else "cut"
        if self.observer is not None:
            self.observer(Entry(OUTBOUND, "tcp", *source, service, instance, "", "", 0, origin, received, seconds))

    def _told(
        self,
        party: tuple[str, str],
        protocol: str,
        request: tuple[bytes, bytes, Sequence[tuple[bytes, bytes]]],
        answer: tuple[int, str, int],
        seconds: float,
        trace: RequestTrace | None,
    ) -> None:
        me = self.me
        source = (me.service, me.service_id) if me else ("", "")
        method, target, fields = request
        what = (method.decode("latin-1"), path_of(target))
        code, origin, received = answer
        if self.observer is None:
            return
        trace_id = trace.trace_id if trace is not None else trace_id_of(fields)
        self.observer(
            Entry(OUTBOUND, protocol, *source, *party, *what, code, origin, received, seconds, trace_id, trace)
        )

    def protocol_factory(self) -> AppConnection | HttpAppConnection:
        """Return the protocol of a connection that our app makes."""
        if self.spec is not None and self.spec.protocol == "http":
            return HttpAppConnection(self)
        if self.spec is not None and self.spec.protocol in HTTP_PROTOCOLS:
            return Http2AppConnection(self)
        return AppConnection(self)

    def drain(self) -> None:
        """HTTP connections end with the request that is under way on them."""
        for side in self._http_sides():
            side.drain()
        for connection in list(self.connections):
            if isinstance(connection, Http2AppConnection) and connection.undecided:
                connection.cut("the sidecar is draining")

    def tick(self, now: float) -> None:
        """Give up on instances that did not accept in time. Called every second."""
        while self.opening:
            call, deadline = next(iter(self.opening.items()))
            if deadline > now:
                break
            call.accept_timed_out()
        self._fleet.tick(now)
        self._http2_fleet.tick(now)

    def sweep(self) -> None:
        """Let go of what was not needed for long. Called now and then."""
        self._fleet.sweep()
        self._http2_fleet.sweep()

    def unavailable(self) -> str:
        """Return why no connection can be made now, or ``""``."""
        if self.blocked:
            return self.blocked
        if self.spec is None:
            return "its instances are not known yet"
        if self.spec.error:
            return self.spec.error
        if self._unroutable:
            return self._unroutable
        if not self.keys and not self.spec.loopback_port:
            return f"{self._target_names() or f'service {self.spec.service}'} has no instance"
        return ""

    def _target_names(self) -> str:
        """Return what calls are led to, where a plan says it."""
        plan = self.spec.plan if self.spec is not None else None
        targets = plan.targets.values() if plan is not None else ()
        return ", ".join(f"subset {one.subset} of {one.service}" if one.subset else one.service for one in targets)

    def crowded(self) -> str:
        """Return why a TCP connection of the app, counted already, is one too many, or ``""``."""
        most = self.settings.max_connections
        return f"more than {most} connections" if len(self.connections) > most else ""

    def count(self, name: str, **labels: str) -> None:
        """Add to a counter of the pair of services that calls to this upstream are between."""
        source, destination = self.me.service if self.me else "", self.spec.service if self.spec else ""
        self.metrics.count(name, upstream=self.name, source=source, destination=destination, **labels)

    def failed(self, cause: str, text: str) -> None:
        """Count and log a connection of the app that came to nothing."""
        self.metrics.count("lictor_refused_total", direction="outbound", reason=cause)
        self.limited.warning(f"{cause} {text}", f"upstream {self.name}: app's connection closed: {text}")
