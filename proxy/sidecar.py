"""The sidecar, put together; read from top to bottom.

Outbound: app -> upstream's listener (:mod:`proxy.listeners`) -> instance chosen (:mod:`proxy.balancer`)
          -> session to its sidecar (:mod:`proxy.pool`) -> stream (:mod:`proxy.outbound`)
Inbound:  public listener (:mod:`proxy.listeners`) -> handshake, identity (:mod:`proxy.tls`, :mod:`proxy.identity`)
          -> session -> stream -> intention (:mod:`proxy.authz`) -> app (:mod:`proxy.inbound`)

All of it follows the stream of :class:`SidecarUpdate`; each update touches only what it changes.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import AsyncIterator, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from proxy import config as sections
from proxy import http_metrics
from proxy.acceptor import Acceptor
from proxy.access import AccessLog, Observer, all_of
from proxy.admin import AdminServer
from proxy.config import Configuration
from proxy.errors import PortUnavailable, ProxyError
from proxy.following import follow_until
from proxy.http import HttpCounters
from proxy.inbound import Desk
from proxy.listeners import PublicListener, bind
from proxy.memory import calm_collector, keep_freed_memory
from proxy.metrics import Labels, Metrics
from proxy.mux.flow import BUFFER_BYTES, MemoryBudget
from proxy.otlp_headers import Headers
from proxy.outbound import Upstream
from proxy.plain import PlainTransport
from proxy.poller import Poller
from proxy.pool import SessionPool
from proxy.span_export import REASONS, SpanExporter
from proxy.tasks import Tasks
from proxy.tracing import Tracer
from raftstate.model.sidecar import SidecarUpdate, SidecarUpstream

log = logging.getLogger("lictor.proxy")

FIRST_PUBLIC_PORT = 20000
FIRST_UPSTREAM_PORT = 21000
FIRST_ADMIN_PORT = 19000
OFF = -1
_TICK_S = 1.0
_TICKS_PER_SWEEP = 30


@dataclass(frozen=True)
class SidecarOptions:
    """What is known before the agent is asked."""

    public_host: str = "127.0.0.1"
    public_port: int = 0
    """0: the first free one from 20000."""
    upstreams: tuple[tuple[str, str, int], ...] = ()
    """(name, host, port) to bind for each upstream; port 0: the first free one from 21000."""
    admin_port: int = OFF
    """On loopback; -1: none, 0: the first free one from 19000."""
    shared: bool = False
    """This is one of several worker processes that listen on the same ports."""
    access_log: str = ""
    """File to which a line of JSON is appended for each call; ``-``: standard output; empty: none."""
    otlp_endpoint: str = ""
    """Base address of an OTLP/HTTP collector to which spans of traced requests go; empty: none."""
    otlp_headers: Headers = field(default=(), repr=False)
    """What the collector is shown with the spans: its token, as a rule."""
    otlp_sample: float = 0.0
    """Of the requests that belong to no trace, the part that is to be traced, 0 to 1; 0: no trace begins here."""
    buffer_bytes: int = BUFFER_BYTES
    """What is held at most, in sum, for peers and apps that read slowly; each worker process has its own."""


@dataclass(frozen=True)
class BoundPorts:
    """What :meth:`Sidecar.bind` got."""

    public_port: int
    upstreams: dict[str, int] = field(default_factory=dict)
    admin_port: int = 0
    """0 when there is none."""


class Sidecar:
    """One sidecar: ``await bind()``, then ``await run(updates)``; ``drain`` and ``close`` end it."""

    def __init__(self, options: SidecarOptions) -> None:
        self.options = options
        self.config = Configuration()
        self.metrics = Metrics()
        self.draining = False
        self._tasks = Tasks("sidecar")
        self._memory = MemoryBudget(options.buffer_bytes)
        self._poller = Poller()
        self._pool = SessionPool(self.metrics, self._tasks, memory=self._memory, poller=self._poller)
        self._desk = Desk(self.config, self.metrics, self._tasks, self._poller)
        self._log: AccessLog | None = None
        self._spans: SpanExporter | None = None
        self._observer = self._make_observer()
        self._tracer = Tracer(self.options.otlp_sample) if self._spans is not None else None
        self._desk.observer = self._observer
        self._desk.tracer = self._tracer
        self._desk.memory = self._memory
        self._public: PublicListener | None = None
        self._upstreams: dict[str, Upstream] = {}
        self._sockets: dict[str, socket.socket] = {}
        self._servers: dict[str, Acceptor] = {}
        self._admin: AdminServer | None = None
        self._drained = asyncio.Event()
        self._running = False
        self._draining_task: asyncio.Task[None] | None = None

    def _make_observer(self) -> Observer | None:
        options = self.options
        if options.access_log:
            try:
                self._log = AccessLog(options.access_log, self._tasks)
            except OSError as error:
                raise ProxyError(f"the access log {options.access_log} can't be written: {error.strerror}") from error
        if options.otlp_endpoint:
            self._spans = SpanExporter(
                options.otlp_endpoint, self._resource, self._tasks, headers=options.otlp_headers
            )
        # Bound methods: an object that is called itself takes CPython a search for how.
        return all_of([each.take for each in (self._log, self._spans) if each is not None])

    def _resource(self) -> dict[str, str]:
        """Return whose spans ours are, as OpenTelemetry's conventions call it."""
        me = self.config.self
        if me is None:
            return {}
        return {
            "service.name": me.service,
            "service.instance.id": me.service_id,
            "lictor.node": me.node,
            "lictor.datacenter": me.datacenter,
        }

    def reopen_log(self) -> None:
        """Open the access log anew, after it was moved away."""
        if self._log is not None:
            try:
                self._log.reopen()
            except OSError as error:
                log.warning("the access log can't be opened anew, the old file stays in use: %s", error)

    # Life

    async def bind(self) -> BoundPorts:
        """Bind every listening socket; nothing is accepted yet. Raises :class:`PortUnavailable`."""
        options = self.options
        public = bind(options.public_host, options.public_port, FIRST_PUBLIC_PORT)
        self.adopt(public, {})
        try:
            for name, host, port in options.upstreams:
                if name in self._sockets:
                    raise PortUnavailable(f"upstream {name} is named twice")
                self._sockets[name] = bind(host or "127.0.0.1", port, FIRST_UPSTREAM_PORT)
                self._upstreams[name] = self._make_upstream(name)
            if options.admin_port != OFF:
                admin = bind("127.0.0.1", options.admin_port, FIRST_ADMIN_PORT)
                self._admin = AdminServer(admin, self)
        except PortUnavailable:
            await self.close()
            raise
        return BoundPorts(
            public_port=public.getsockname()[1],
            upstreams={name: sock.getsockname()[1] for name, sock in self._sockets.items()},
            admin_port=self._admin.port if self._admin else 0,
        )

    def adopt(self, public: socket.socket, upstreams: Mapping[str, socket.socket]) -> None:
        """Take listening sockets that are there already, in place of :meth:`bind`."""
        self._public = PublicListener(public, self.config, self._desk, self.metrics, self._tasks, self._memory)
        for name, sock in upstreams.items():
            self._sockets[name] = sock
            self._upstreams[name] = self._make_upstream(name)

    async def run(self, updates: AsyncIterator[SidecarUpdate]) -> None:
        """Serve, following ``updates``, until cancelled or drained. Raises :class:`ProxyError` if not bound."""
        if self._public is None:
            raise ProxyError("bind the sidecar's ports before it runs")
        keep_freed_memory()
        calm_collector()
        self.watch_gauges()
        if self._admin is not None:
            await self._admin.start()
        self._running = True
        for name in list(self._sockets):
            self._serve_upstream(name)
        self._tasks.spawn(self._sweep())
        try:
            await follow_until(self._drained, updates, self.apply, self._tasks, log)
        finally:
            self._running = False

    async def apply(self, update: SidecarUpdate) -> None:
        """Take one update: what it withdraws ends first, then what it brings is opened."""
        changed = self.config.apply(update)
        if not changed or self._public is None:
            return
        config = self.config
        if changed & {sections.TLS, sections.REVOCATIONS, sections.SELF}:
            # Whom it may call is not known before the revocations are.
            material = config.material if config.revocations is not None else None
            self._pool.use(material, config.self.trust_domain if config.self else "", config.revoked)
            self._public.recheck()
        if changed & {sections.POLICY, sections.SELF, sections.REGISTERED}:
            if sections.SELF in changed:
                config.policy_version += 1  # decisions are about the service and instance that we are
            self._desk.recheck()
        if changed & {sections.UPSTREAMS, sections.SELF}:
            self._update_upstreams()
        self._block_if_revoked()
        if not self.draining:
            self._public.start()

    def start_drain(self, timeout_s: float) -> None:
        """Run :meth:`drain` in the background; :meth:`run` returns when it is done."""
        # Not one of self._tasks: it ends by closing those.
        self._draining_task = asyncio.get_running_loop().create_task(self.drain(timeout_s))

    async def drain(self, timeout_s: float) -> None:
        """Take no new calls, let live ones end, for at most ``timeout_s``; then :meth:`close`."""
        if not self.draining:
            self.draining = True
            self._desk.drain()
            log.info("draining: live calls have %g s to end", timeout_s)
            if self._public is not None:
                self._public.drain("sidecar is draining")
            for server in self._servers.values():
                server.close()
            self._servers.clear()
            for upstream in self._upstreams.values():
                upstream.drain()
        try:
            async with asyncio.timeout(timeout_s):
                while self.live_calls() or self._being_left():  # noqa: ASYNC110 - calls must not pay for signalling their end
                    await asyncio.sleep(0.02)
        except TimeoutError:
            left = f"{self.live_calls()} calls, and {self._being_left()} sessions of other sidecars,"
            log.warning("%s were still live when the time to drain was over", left)
        await self.close()

    async def close(self) -> None:
        """End everything at once. Idempotent."""
        self.draining = self._desk.draining = True
        for server in self._servers.values():
            server.close()
        self._servers.clear()
        for sock in self._sockets.values():
            sock.close()
        for upstream in self._upstreams.values():
            for connection in list(upstream.connections):
                connection.cut("the sidecar is stopping")
        if self._public is not None:
            self._public.close()
        self._pool.close()
        if self._admin is not None:
            await self._admin.close()
        if self._spans is not None:
            await asyncio.sleep(0)  # calls that were cut above tell of their end on the loop's next turn
            await self._spans.close()
        self._drained.set()
        await self._tasks.close()
        self._desk.close()  # last: a dial that was under way may have come through
        if self._log is not None:
            self._log.close()
        await asyncio.sleep(0)  # sockets are closed on the loop's next turn
        self._poller.close()

    def _being_left(self) -> int:
        """Sessions that peers dialed and have not left yet: calls that they begin now are refused, not lost."""
        return len(self._public.sessions) if self._public is not None else 0

    def live_calls(self) -> int:
        """Calls in both directions that have not ended."""
        return len(self._desk.calls) + sum(len(upstream.connections) for upstream in self._upstreams.values())

    # Upstreams

    def _make_upstream(self, name: str) -> Upstream:
        upstream = Upstream(name, self._pool, self.metrics, self._tasks)
        upstream.observer = self._observer
        upstream.tracer = self._tracer
        return upstream

    def _serve_upstream(self, name: str) -> None:
        if name not in self._servers:
            upstream = self._upstreams[name]

            def take(fd: int, address: tuple[Any, ...]) -> None:
                PlainTransport(self._poller, upstream.protocol_factory()).accepted(fd, address)

            self._servers[name] = Acceptor(self._poller, self._sockets[name], take)
            self._servers[name].start()

    def _update_upstreams(self) -> None:
        specs = {spec.name: spec for spec in self.config.upstreams}
        for name, spec in specs.items():
            if name not in self._upstreams and not self._add_upstream(name, spec):
                continue
            if self._running and not self.draining:
                self._serve_upstream(name)
        gone = [
            key for name, each in self._upstreams.items() for key in each.update(specs.get(name), self.config.self)
        ]
        kept = {key for upstream in self._upstreams.values() for key in upstream.keys}
        for key in gone:
            if key not in kept:
                self._pool.drop(key, f"{key.instance} is no longer an instance of {key.service}")

    def _add_upstream(self, name: str, spec: SidecarUpstream) -> bool:
        """Bind an upstream that was added after the start; one whose port is taken is left out, and said so."""
        try:
            if self.options.shared and not spec.bind_port:
                raise PortUnavailable("it was added without a port; workers cannot agree on one")
            host = spec.bind_address or "127.0.0.1"
            self._sockets[name] = bind(host, spec.bind_port, FIRST_UPSTREAM_PORT, shared=self.options.shared)
        except PortUnavailable as error:
            log.warning("upstream %s is not served: %s", name, error)
            return False
        self._upstreams[name] = self._make_upstream(name)
        return True

    def _block_if_revoked(self) -> None:
        material = self.config.material
        reason = self.config.revoked.reason(material.identity) if material else ""
        for upstream in self._upstreams.values():
            upstream.blocked = f"our own identity is revoked: {reason}" if reason else ""
            if reason:
                for connection in list(upstream.connections):
                    connection.cut(upstream.blocked)

    async def _sweep(self) -> None:
        loop = asyncio.get_running_loop()
        ticks = 0
        while True:
            await asyncio.sleep(_TICK_S)
            ticks += 1
            try:
                await self._tick(loop.time(), sweep=ticks % _TICKS_PER_SWEEP == 0)
            except Exception:  # whatever it is: all timeouts hang on this clock
                log.exception("a turn of the clock failed; the next one comes all the same")

    async def _tick(self, now: float, *, sweep: bool) -> None:
        if self.config.tls_due:
            await self.apply(SidecarUpdate(version=self.config.version))
        self._desk.tick(now)
        for upstream in self._upstreams.values():
            upstream.tick(now)
            if sweep:
                upstream.sweep()
        if sweep:
            self._pool.sweep()

    # Seen from outside

    def watch_gauges(self) -> None:
        """Let the metrics include what is read when they are asked for. Idempotent."""
        public = self._public
        gauges = self.metrics.gauges
        http_metrics.export(self.metrics, self._http_counters)
        gauges["lictor_sessions"] = lambda: [
            ((("direction", "inbound"),), len(public.sessions) if public else 0),
            ((("direction", "outbound"),), len(self._pool.describe())),
        ]
        gauges["lictor_certificate_expiry_seconds"] = lambda: (
            [((), self.config.material.not_after_s)] if self.config.material else []
        )
        gauges["lictor_certificate_issued_seconds"] = lambda: (
            [((), self.config.material.not_before_s)] if self.config.material else []
        )
        gauges["lictor_buffered_bytes"] = lambda: [((), self._memory.held)]
        gauges["lictor_buffer_overruns_total"] = lambda: [((), self._memory.overruns)]
        if (access := self._log) is not None:
            gauges["lictor_access_log_dropped_total"] = lambda: [((), access.dropped)]
        if (spans := self._spans) is not None:
            gauges["lictor_spans_exported_total"] = lambda: [((), spans.exported)]
            gauges["lictor_spans_dropped_total"] = lambda: [
                ((("reason", reason),), spans.dropped_by[reason]) for reason in REASONS
            ]
        gauges["lictor_ready"] = lambda: [((), 1 if self.ready else 0)]

    def _http_counters(self) -> Iterable[tuple[Labels, HttpCounters]]:
        yield from self._desk.http_counters()
        source = self.config.self.service if self.config.self else ""
        for upstream in self._upstreams.values():
            destination = upstream.spec.service if upstream.spec else ""
            pair = (("direction", "outbound"), ("source", source), ("destination", destination or upstream.name))
            if upstream.http_counters.latency_count:
                yield pair, upstream.http_counters

    @property
    def ready(self) -> bool:
        """Whether calls can be taken and made."""
        return self.config.ready and self.config.registered and self._running and not self.draining

    def clusters(self) -> list[dict[str, object]]:
        """Return the upstreams with their instances as this sidecar sees them."""
        now = asyncio.get_running_loop().time()
        return [
            {
                "upstream": upstream.name,
                "service": upstream.spec.service if upstream.spec else "",
                "error": upstream.unavailable(),
                "connections": len(upstream.connections),
                "panicking": any(balancer.panicking for balancer in upstream.balancers.values()),
                "instances": [
                    {
                        "target": target,
                        "instance": instance.key.instance,
                        "address": f"{instance.key.address}:{instance.key.port}",
                        "healthy": instance.endpoint.healthy,
                        "weight": instance.endpoint.weight,
                        "active": instance.active,
                        "failures": instance.failures,
                        "ejected_for_s": round(max(0.0, instance.ejected_until - now), 3),
                    }
                    for target, balancer in upstream.balancers.items()
                    for instance in balancer.instances.values()
                ],
            }
            for upstream in self._upstreams.values()
        ]

    async def stats(self) -> dict[str, object]:
        """Return all figures in plain values."""
        return {**self.metrics.as_dict(), "live_calls": self.live_calls(), "sessions": self.sessions()}

    async def metrics_text(self) -> str:
        """Return all figures as Prometheus text."""
        return self.metrics.render()

    async def cluster_list(self) -> list[dict[str, object]]:
        """Return :meth:`clusters`."""
        return self.clusters()

    def sessions(self) -> dict[str, object]:
        """Return the mux sessions in both directions."""
        inbound = [
            {"peer": session.name, "streams": len(session.core.streams)}
            for session in (self._public.sessions if self._public else ())
        ]
        return {"outbound": self._pool.describe(), "inbound": inbound}
