"""Calls to our app: each stream (or foreign connection) is decided by intention, then joined with the app.

What was admitted is decided again whenever intentions or revocations change, and cut when the answer has changed.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Sequence

from proxy.access import INBOUND, Entry, Observer, path_of
from proxy.authz import Decision, Request
from proxy.call import APP_CONNECT_TIMEOUT_S, AppChannel, Call
from proxy.config import Configuration
from proxy.http import HttpCounters, HttpOptions
from proxy.http_entry import HttpEntry
from proxy.logs import LimitedLog
from proxy.metrics import Labels, Metrics, PairStats
from proxy.mux import frames
from proxy.mux.core import MuxStream
from proxy.mux.flow import MemoryBudget
from proxy.mux.session import MuxSession
from proxy.plain import PlainTransport, numeric, resolve
from proxy.poller import Poller
from proxy.relay import SocketChannel
from proxy.stream import NOBODY, Channel, Early
from proxy.tasks import Tasks
from proxy.tracing import RequestTrace, Tracer, trace_id_of
from raftstate.model.identity import Identity, SpiffeId

log = logging.getLogger("lictor.proxy.inbound")

MAX_INBOUND = 50_000
HTTP2_PROTOCOLS = frozenset({"http2", "grpc"})
"""Protocols of an app that takes HTTP/2; to others it is not offered, for nothing here translates."""
HTTP_PROTOCOLS = HTTP2_PROTOCOLS | {"http"}
MAX_DECISIONS = 10_000
"""Remembered decisions; instances come and go, and a policy may stand for weeks."""


class Desk:
    """Admits calls and keeps those that live."""

    def __init__(self, config: Configuration, metrics: Metrics, tasks: Tasks, poller: Poller | None = None) -> None:
        self.calls: set[Call] = set()
        self.apps: set[AppChannel] = set()
        """Connections to the app; some outlive their calls, until the app ends its side too."""
        self.dialing: dict[Call, float] = {}
        """Calls whose app is being connected, and until when, the oldest first. One clock watches all of them: a
        timer for each would cost more than the rest of the call's admission."""
        self.draining = False
        self.tasks = tasks
        self.poller = poller or Poller()
        self.memory = MemoryBudget()
        """In which HTTP counts what it holds; set before any call is taken."""
        self.observer: Observer | None = None
        """Who is told of calls that have ended; set before any is taken."""
        self.tracer: Tracer | None = None
        """Who decides on requests' trace context; set before any is taken."""
        self._http: HttpEntry | None = None
        self._http_counters: dict[str, HttpCounters] = {}
        """By source service."""
        self._config = config
        self._metrics = metrics
        self._log = LimitedLog(log)
        self._decisions: dict[tuple[str, str], Decision] = {}
        """By source service and instance, which is all that a decision looks at: not by certificate, which is another
        every few hours."""
        self._decisions_version = -1

    # HTTP

    @property
    def http(self) -> HttpEntry:
        """The HTTP filter, with options as the configuration now has them."""
        me = self._config.self
        if me is None:
            options = HttpOptions()
        else:
            spiffe = SpiffeId(trust_domain=me.trust_domain, datacenter=me.datacenter, service=me.service)
            options = HttpOptions(
                service=me.service,
                uri=spiffe.uri(),
                response_timeout_s=self._limit("local_request_timeout_ms", 0.0) / 1000,
                dial_timeout_s=self.connect_timeout_s,
            )
        if self._http is None:
            self._http = HttpEntry(options)
            self._http.http1.memory = self._http.http2.memory = self.memory
            if self.observer is not None:
                self._http.http1.told = self._http.http2.told = self._told
            self._http.http1.tracer = self._http.http2.tracer = self.tracer
        self._http.use(options)
        return self._http

    # Telling

    def now(self) -> float:
        """Return the loop's time."""
        return self.poller.now()

    def tell_connection(self, call: Call) -> None:
        """A call that was relayed has ended."""
        app = call.app
        self._tell(
            call.identity, "tcp", "app" if app is not None else "cut", app.received if app else 0, call.started
        )

    def _tell(self, identity: Identity, protocol: str, origin: str, received: int, started: float) -> None:
        me = self._config.self
        if self.observer is None or me is None:
            return
        seconds = self.now() - started if started else 0.0
        source = (identity.service, identity.instance)
        mine = (me.service, me.service_id)
        self.observer(Entry(INBOUND, protocol, *source, *mine, "", "", 0, origin, received, seconds))

    def _told(
        self,
        party: tuple[str, str],
        protocol: str,
        request: tuple[bytes, bytes, Sequence[tuple[bytes, bytes]]],
        answer: tuple[int, str, int],
        seconds: float,
        trace: RequestTrace | None,
    ) -> None:
        me = self._config.self
        if self.observer is None or me is None:
            return
        method, target, fields = request
        what = (method.decode("latin-1"), path_of(target))
        code, origin, received = answer
        self.observer(
            Entry(
                INBOUND,
                protocol,
                *party,
                me.service,
                me.service_id,
                *what,
                code,
                origin,
                received,
                seconds,
                trace.trace_id if trace is not None else trace_id_of(fields),
                trace,
            )
        )

    def drain(self) -> None:
        """Take no more calls; HTTP connections end with the request that is under way on them."""
        self.draining = True
        if self._http is not None:
            self._http.drain()

    def close(self) -> None:
        """Drop the connections to the app that are left."""
        for app in list(self.apps):
            app.abort()
            app.transport.abort()  # one that is closing may wait for an app that reads nothing

    def http_stats(self, identity: Identity) -> HttpCounters:
        """Return the counters of requests from a service."""
        return self._http_counters.setdefault(identity.service, HttpCounters())

    def http_counters(self) -> Iterable[tuple[Labels, HttpCounters]]:
        """Return the counters there are, each with its pair."""
        me = self._config.self
        for source, counters in self._http_counters.items():
            yield (("direction", "inbound"), ("source", source), ("destination", me.service if me else "")), counters

    # Admission

    def admit_stream(self, session: MuxSession, stream: MuxStream) -> None:
        """Take a stream that a peer opened: refuse it, or start its call."""
        identity = session.identity
        if (refusal := self._refusal(identity, stream.service)) is not None:
            code, text = refusal
            stream.refuse(code, text)
            return
        call = Call(self, stream, identity, self.decide(identity), session.certificate_sha256)
        stream.owner = call
        call.start()

    def admit_connection(self, channel: SocketChannel, identity: Identity, certificate_sha256: str) -> Call | None:
        """Take a foreign peer's connection: close it, or start its call."""
        if self._refusal(identity, "") is not None:
            channel.abort()
            return None
        call = Call(self, channel, identity, self.decide(identity), certificate_sha256)
        call.start()
        return call

    def _refusal(self, identity: Identity, service: str) -> tuple[int, str] | None:
        config = self._config
        me = config.self
        if not config.ready or me is None:
            return self._refuse(identity, frames.NOT_READY, f"sidecar still awaits: {', '.join(config.missing())}")
        if self.draining:
            return self._refuse(identity, frames.DRAINING, "sidecar is draining")
        if not config.registered:
            return self._refuse(identity, frames.NOT_READY, f"{me.service_id} was deregistered")
        if service and service != me.service:
            return self._refuse(identity, frames.WRONG_SERVICE, f"this is {me.service}, not {service}")
        if not me.local_port:
            return self._refuse(identity, frames.APP_DOWN, f"{me.service_id} takes no calls (registered with port 0)")
        if len(self.calls) >= (most := min(MAX_INBOUND, self._limit("max_inbound_connections", MAX_INBOUND))):
            return self._refuse(identity, frames.TOO_MANY, f"{most:g} calls are live already")
        decision = self.decide(identity)
        if not decision.allowed:
            return self._refuse(identity, frames.DENIED, decision.reason)
        return None

    def _limit(self, name: str, default: float) -> float:
        """Return what our configuration (service-defaults, or the registration) says, if it says more than 0."""
        value = self._config.self.config.get(name) if self._config.self is not None else None
        return value if isinstance(value, int | float) and value > 0 else default

    @property
    def connect_timeout_s(self) -> float:
        """How long our app may take to take a connection; Consul's ``LocalConnectTimeoutMs``."""
        return self._limit("local_connect_timeout_ms", APP_CONNECT_TIMEOUT_S * 1000) / 1000

    def _refuse(self, identity: Identity, code: int, text: str) -> tuple[int, str]:
        cause = frames.CODE_NAMES[code]
        self._tell(identity, "tcp", cause, 0, 0.0)
        self.refused(cause, f"call from {identity.service} ({identity.instance or 'no instance'}): {text}")
        return code, text

    def refused(self, cause: str, text: str) -> None:
        """Count and log a call that was not taken."""
        self._metrics.count("lictor_refused_total", direction="inbound", reason=cause)
        self._log.warning(text, f"refused: {text}")

    def decide(self, identity: Identity) -> Decision:
        """Decide connections from ``identity``; remembered until the policy changes."""
        config = self._config
        if self._decisions_version != config.policy_version:
            self._decisions.clear()
            self._decisions_version = config.policy_version
        source = (identity.service, identity.instance)
        decision = self._decisions.get(source)
        if decision is None:
            if config.policy is None or config.self is None:
                return NOT_KNOWN
            if not config.registered:
                return DEREGISTERED
            decision = config.policy.decide(identity, config.self.service, config.self.service_id)
            if len(self._decisions) >= MAX_DECISIONS:
                self._decisions.clear()
            self._decisions[source] = decision
        return decision

    def decide_request(self, identity: Identity, request: Request) -> Decision:
        """Decide one HTTP request by the policy in force now."""
        config = self._config
        if config.policy is None or config.self is None:
            return NOT_KNOWN
        return config.policy.decide_request(identity, config.self.service, config.self.service_id, request)

    def needs_http(self, decision: Decision) -> bool:
        """Whether a call is to be served as HTTP."""
        me = self._config.self
        return bool(decision.permissions) or (me is not None and me.protocol in HTTP_PROTOCOLS)

    async def dial_app(self, call: Call, peer: Channel) -> AppChannel:
        """Connect to our app; what it sends goes to ``peer``. Raises OSError or TimeoutError."""
        async with asyncio.timeout(self.connect_timeout_s):
            return await self.connect_app(call, peer)

    async def connect_app(self, call: Call, peer: Channel | None = None) -> AppChannel:
        """As :meth:`dial_app` without a time limit of its own; without ``peer``, what the app sends is kept in the
        channel's ``early``. Raises OSError."""
        waiter = asyncio.get_running_loop().create_future()
        app = AppChannel(call.stats, self.apps, waiter=waiter)
        if peer is None:
            app.early = Early(app)
        app.peer = peer or app.early or NOBODY
        self.connect(app)
        try:
            await waiter
        except asyncio.CancelledError:
            app.abort()
            raise
        return app

    def connect(self, app: AppChannel) -> None:
        """Begin to connect to our app; ``app`` is told how it went."""
        transport = app.transport = PlainTransport(self.poller, app)
        me = self._config.self
        if me is None or not me.local_port:
            transport.cannot_connect(ConnectionRefusedError("no app is registered"))
            return
        host = me.local_address or "127.0.0.1"
        address = numeric(host, me.local_port)
        if address is not None:
            transport.connect((address,))
        else:
            self.tasks.spawn(_look_up(transport, host, me.local_port))

    def tick(self, now: float) -> None:
        """Give up on apps that took too long to connect. Called every second."""
        for call in _overdue(self.dialing, now):
            call.dial_timed_out()

    # Withdrawal

    def recheck(self) -> None:
        """The policy changed: decide live calls again and cut those that it no longer admits.

        Of a call that is served as HTTP each request under way is decided again; those that are still allowed go on.
        """
        sources: set[tuple[str, str]] = set()
        for call in list(self.calls):
            decision = self.decide(call.identity)
            before, call.decision = call.decision, decision
            if not decision.allowed:
                self._cut(call, decision.reason)
            elif decision.permissions and decision.permissions != before.permissions:
                if call.http:
                    sources.add((call.identity.service, call.identity.instance))
                else:
                    self._cut(call, f"its requests cannot be decided: {decision.reason}")
        if sources and self._http is not None and (ended := self._http.recheck(sources)):
            self._metrics.count("lictor_cut_total", ended, direction="inbound", reason="denied")
            services = ", ".join(sorted({service for service, _ in sources}))
            text = f"{ended} requests of {services} ended: the permissions that changed do not allow them"
            self._log.warning("requests ended by permissions", text)

    def _cut(self, call: Call, reason: str) -> None:
        cause = "denied" if self._config.registered else "deregistered"
        self._metrics.count("lictor_cut_total", direction="inbound", reason=cause)
        self._log.warning(f"cut {reason}", f"live call from {call.identity.service} ended: {reason}")
        call.cut(frames.DENIED, reason)

    def pair(self, identity: Identity) -> PairStats:
        """Return the counters for calls from ``identity``."""
        me = self._config.self
        return self._metrics.pair("inbound", identity.service, me.service if me else "")


async def _look_up(transport: PlainTransport, host: str, port: int) -> None:
    try:
        addresses = await resolve(host, port)
    except OSError as error:
        transport.cannot_connect(error)
    else:
        transport.connect(addresses)


def _overdue(deadlines: dict[Call, float], now: float) -> list[Call]:
    overdue = []
    for call, deadline in deadlines.items():
        if deadline > now:
            break
        overdue.append(call)
    return overdue


NOT_KNOWN = Decision(False, None, "intentions are not known yet")
DEREGISTERED = Decision(False, None, "the instance was deregistered")
