"""HTTP requests of our app: each gets an instance of its own choosing, on streams that are kept between requests.

Binds the HTTP filter's outbound side (:mod:`proxy.http.outbound`) to balancer, sessions and metrics.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Hashable, Mapping
from typing import TYPE_CHECKING, cast

from proxy.balancer import Instance
from proxy.choosing import aim_at, choose, is_retiring, report_answer, report_failure, report_refusal, report_silence
from proxy.errors import ConnectFailed, StreamClosed, StreamRefused
from proxy.http import HttpOptions, OutboundOptions
from proxy.http.head import RequestHead
from proxy.http.outbound import Aim, Lease
from proxy.http.upstream import Owner, Upstream
from proxy.mux.core import MuxStream
from proxy.mux.session import MuxSession
from proxy.relay import SocketChannel, dial
from proxy.stream import Channel, Data

if TYPE_CHECKING:
    from proxy.outbound import Upstream as Service

IDLE_MAX = 32
"""Streams kept open to one instance between requests."""
IDLE_S = 60.0
ACCEPT_TIMEOUT_S = 10.0
"""How long an instance's sidecar may take to accept a stream."""


def _number(source: Mapping[str, object], key: str, default: float) -> float:
    # Not within its only caller: compiled, a function of that kind and what it is called from refer to each other.
    value = source.get(key)
    return float(value) if isinstance(value, int | float) and value >= 0 else default


def options_of(name: str, config: Mapping[str, object]) -> OutboundOptions:
    """Read an upstream's ``config``: ``request_timeout_ms``, ``try_timeout_ms``, ``max_attempts`` and, under
    ``limits``, ``max_connections``, ``max_concurrent_requests`` and ``max_pending_requests`` (Consul's names where it
    has one)."""
    limits = config.get("limits")
    limits = cast("Mapping[str, object]", limits) if isinstance(limits, dict) else {}
    request_timeout_s = _number(config, "request_timeout_ms", 0) / 1000
    return OutboundOptions(
        http=HttpOptions(service=name, response_timeout_s=request_timeout_s),
        try_timeout_s=_number(config, "try_timeout_ms", 0) / 1000,
        attempts_max=max(1, int(_number(config, "max_attempts", 3))),
        requests_max=int(_number(limits, "max_concurrent_requests", 10_000)),
        pending_max=int(_number(limits, "max_pending_requests", 1_000)),
        connections_max=int(_number(limits, "max_connections", 20_000)),
    )


class ServiceFleet:
    """The instances of one upstream, with the idle streams to each."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.idle: dict[Hashable, deque[tuple[float, Upstream]]] = {}
        self.accept_timeout_s = ACCEPT_TIMEOUT_S
        self.opening: dict[_StreamFate, float] = {}
        """Streams that are to be accepted, and until when, the oldest first."""

    def unavailable(self) -> str:
        """Return why nothing can be sent now, or ``""``."""
        return self.service.unavailable()

    def aim(self, head: RequestHead, client: Channel) -> Aim | None:
        """What the plan says of a request; None when there is none."""
        return aim_at(self.service, head, client)

    def may_retry(self) -> bool:
        """Take leave for one retry."""
        return self.service.budget.take(self.service.pool.poller.now())

    def pick(self, tried: set[Hashable], aim: Aim | None) -> Lease | None:
        """Choose the instance for a request, outside ``tried``; None: there is none."""
        service = self.service
        if service.spec is not None and service.spec.loopback_port:
            return LoopbackLease(self, service.spec.loopback_port)
        instance = choose(service, tried, aim)
        return None if instance is None else InstanceLease(self, instance)

    def take_idle(self, key: Hashable) -> Upstream | None:
        """Return the idle stream that was used last."""
        idle = self.idle.get(key)
        while idle:
            _, upstream = idle.pop()
            if is_retiring(upstream.channel):
                upstream.close()
            elif not upstream.lost:
                return upstream
        return None

    def keep_idle(self, key: Hashable, upstream: Upstream) -> None:
        """Keep a stream for a later request; those that were not needed for long are closed."""
        now = self.service.pool.poller.now()
        idle = self.idle.get(key)
        if idle is None:
            idle = self.idle[key] = deque()
        idle.append((now, upstream))
        upstream.attach(self)
        while len(idle) > IDLE_MAX or (idle and idle[0][0] < now - IDLE_S):
            idle.popleft()[1].close()

    def tick(self, now: float) -> None:
        """Give up on streams that were not accepted in time. Called every second."""
        while self.opening:
            fate, deadline = next(iter(self.opening.items()))
            if deadline > now:
                break
            del self.opening[fate]
            fate.give_up()

    def sweep(self) -> None:
        """Close what was idle for long. Called now and then."""
        stale = self.service.pool.poller.now() - IDLE_S
        for key, idle in list(self.idle.items()):
            while idle and (idle[0][0] < stale or idle[0][1].lost):
                idle.popleft()[1].close()
            for at, upstream in [each for each in idle if is_retiring(each[1].channel)]:
                idle.remove((at, upstream))
                upstream.close()
            if not idle:
                del self.idle[key]

    def close_idle(self) -> None:
        """Close all idle streams."""
        for idle in self.idle.values():
            for _, upstream in idle:
                upstream.close()
        self.idle.clear()

    # Owner of the idle streams: what ends is skipped by take_idle

    def response_output(self, upstream: Upstream, pieces: list[bytes]) -> None:
        """An idle stream has no request; its Upstream ends it when bytes come."""

    def response_complete(self, upstream: Upstream) -> None:
        """As above."""

    def response_switched(self, upstream: Upstream, rest: Data) -> None:
        """As above."""

    def upstream_lost(self, upstream: Upstream, error: Exception | None) -> None:
        """It is skipped when its turn comes."""

    def upstream_full(self, upstream: Upstream, full: bool) -> None:
        """Nothing is being sent."""


class InstanceLease:
    """One request to one instance: the instance counts it, and learns how it went."""

    __slots__ = ("_done", "_fleet", "instance", "key", "service")

    def __init__(self, fleet: ServiceFleet, instance: Instance) -> None:
        self.service = fleet.service
        self.instance = instance
        self.key: Hashable = instance.key
        self._done = False
        self._fleet = fleet
        instance.active += 1

    def failed(self, reason: str) -> None:
        report_failure(self.service, self.instance, reason)

    def silent(self, reason: str) -> None:
        report_silence(self.service, self.instance, reason)

    def answered(self, status: int) -> None:
        if self.instance.owner.options.judges_answers or self.instance.silences:
            report_answer(self.service, self.instance, status)

    def refusal(self, refused: StreamRefused) -> tuple[int, str] | None:
        return report_refusal(self.service, self.instance, refused)

    def open(self, owner: Owner) -> Upstream | None:
        upstream = self._fleet.take_idle(self.key)
        if upstream is not None:
            upstream.attach(owner)
            return upstream
        session = self.service.pool.ready(self.instance.key)
        return None if session is None else self._open_stream(session, owner)

    async def connect(self, owner: Owner) -> Upstream:
        service = self.service
        result = await service.pool.connect(self.instance.key, self.instance.owner.options.connect_timeout_s)
        if isinstance(result, MuxSession):
            return self._open_stream(result, owner)
        upstream = Upstream(owner, service.http_options.http, service.pool.memory)
        upstream.channel = result
        result.attach(upstream)
        self.instance.owner.succeeded(self.instance)
        return upstream

    def _open_stream(self, session: MuxSession, owner: Owner) -> Upstream:
        upstream = Upstream(owner, self.service.http_options.http, self.service.pool.memory)
        fleet = self._fleet
        fate = _StreamFate(fleet, self.instance, upstream)
        upstream.channel = session.core.open(self.instance.key.service, upstream, fate)
        fleet.opening[fate] = self.service.pool.poller.now() + fleet.accept_timeout_s
        return upstream

    def done(self, upstream: Upstream | None) -> None:
        if self._done:
            return
        self._done = True
        self.instance.active -= 1
        if upstream is None:
            return
        if is_retiring(upstream.channel) or self.instance.key not in self.service.keys:
            upstream.close()
        else:
            self._fleet.keep_idle(self.key, upstream)


class _StreamFate:
    """Turns a mux stream's fate into its Upstream's."""

    __slots__ = ("_fleet", "_instance", "_upstream")

    def __init__(self, fleet: ServiceFleet, instance: Instance, upstream: Upstream) -> None:
        self._fleet = fleet
        self._instance = instance
        self._upstream = upstream

    def give_up(self) -> None:
        """The instance neither accepted nor refused in time."""
        text = "the instance did not accept in time"
        report_failure(self._fleet.service, self._instance, text)
        self._upstream.abort(StreamClosed(text))

    def stream_accepted(self, stream: MuxStream) -> None:
        self._fleet.opening.pop(self, None)
        self._instance.owner.succeeded(self._instance)

    def stream_refused(self, stream: MuxStream, code: int, text: str) -> None:
        self._fleet.opening.pop(self, None)
        self._upstream.abort(StreamRefused(code, f"{self._instance.key.instance}: {text}"))

    def stream_closed(self, stream: MuxStream) -> None:
        self._fleet.opening.pop(self, None)  # the channel's peer, the Upstream, is told


class LoopbackLease:
    """One request to our own app, without the mesh between: there is no other one, and nobody judges it."""

    __slots__ = ("_fleet", "key", "port")

    def __init__(self, fleet: ServiceFleet, port: int) -> None:
        self.port = port
        self.key: Hashable = ("loopback", port)
        self._fleet = fleet

    def failed(self, reason: str) -> None:
        """As :meth:`InstanceLease.failed`."""

    def silent(self, reason: str) -> None:
        """As :meth:`InstanceLease.silent`."""

    def answered(self, status: int) -> None:
        """As :meth:`InstanceLease.answered`."""

    def refusal(self, refused: StreamRefused) -> tuple[int, str] | None:
        return None

    def open(self, owner: Owner) -> Upstream | None:
        upstream = self._fleet.take_idle(self.key)
        if upstream is not None:
            upstream.attach(owner)
        return upstream

    async def connect(self, owner: Owner) -> Upstream:
        service = self._fleet.service
        upstream = Upstream(owner, service.http_options.http, service.pool.memory)

        channel = SocketChannel()
        channel.peer = upstream
        host = (service.me.local_address if service.me else "") or "127.0.0.1"
        try:
            async with asyncio.timeout(service.settings.connect_timeout_s):
                await dial(channel, host, self.port)
                upstream.channel = channel
        except (OSError, TimeoutError) as error:
            text = f"our own app at {host}:{self.port} cannot be reached: {error or 'timeout'}"
            raise ConnectFailed("app-down", text) from error
        return upstream

    def done(self, upstream: Upstream | None) -> None:
        if upstream is not None:
            self._fleet.keep_idle(self.key, upstream)
