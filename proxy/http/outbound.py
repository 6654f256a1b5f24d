"""The caller's side: requests of the app, each sent to an instance chosen for it, on connections that are kept.

A request is sent again, to another instance, only where that is safe: no byte of an answer has come, all that was
sent of it is still at hand (:data:`REPLAY_BYTES`), and either no app can have seen it (the stream was refused, the
instance not reached) or its method is idempotent (RFC 9110, section 9.2.2). A route may ask for more: attempts after
certain statuses, and whatever the method. Retries have a budget.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Final, Protocol

from proxy.errors import ConnectFailed, StreamClosed, StreamRefused
from proxy.http.connection import HttpConnection
from proxy.http.errors import TooMuchHeld, UnwantedStatus
from proxy.http.head import RequestHead, ResponseHead
from proxy.http.options import LIMITED
from proxy.http.parser import Message
from proxy.http.side import NEVER, OutboundSide
from proxy.http.upstream import Owner, Upstream
from proxy.mux.core import MuxStream
from proxy.stream import Channel, Data

REPLAY_BYTES: Final = 64 * 1024
"""What is kept of a request to send it again; one that is longer is sent once."""


class Lease(Protocol):
    """The right to send one request to one instance. ``done`` ends it."""

    key: Hashable

    def open(self, owner: Owner) -> Upstream | None:
        """Return a connection that is there now, or None: then :meth:`connect`."""
        ...

    async def connect(self, owner: Owner) -> Upstream:
        """Make a connection. Raises :class:`~proxy.errors.ConnectFailed` or OSError."""
        ...

    def failed(self, reason: str) -> None:
        """The instance could not be reached."""
        ...

    def silent(self, reason: str) -> None:
        """The instance took the request and did not answer it."""
        ...

    def answered(self, status: int) -> None:
        """The instance gave an answer with this status."""
        ...

    def refusal(self, refused: StreamRefused) -> tuple[int, str] | None:
        """The instance's sidecar did not take the stream: return the answer if no other one would, else None."""
        ...

    def done(self, upstream: Upstream | None) -> None:
        """The request has ended; ``upstream`` is the connection if it can take another one. Idempotent."""
        ...


class Aim(Protocol):
    """What a plan says of one request; see :class:`proxy.balancing.routing.Way`."""

    request_timeout_s: float
    idle_timeout_s: float
    attempts_max: int
    """0: as the upstream's options say."""
    retry_statuses: frozenset[int]
    retry_resets: bool
    edits: bool
    """Whether :meth:`edit` does anything."""

    def prepare(self, head: RequestHead) -> bytes:
        """Change the request's headers as the plan says; return the target to ask for."""
        ...

    def edit(self, head: ResponseHead) -> None:
        """Change the response's headers."""
        ...


class Fleet(Protocol):
    """The instances of one upstream."""

    def aim(self, head: RequestHead, client: Channel) -> Aim | None:
        """Return what the plan says of a request; None when there is no plan."""
        ...

    def unavailable(self) -> str:
        """Return why nothing can be sent now, or ``""``."""
        ...

    def pick(self, tried: set[Hashable], aim: Aim | None) -> Lease | None:
        """Choose the instance for a request, outside ``tried``."""
        ...

    def may_retry(self) -> bool:
        """Take leave for one retry."""
        ...


class OutboundConnection(HttpConnection):
    """A connection of the app. Each of its requests may go to another instance."""

    __slots__ = (
        "_active_at", "_aim", "_attempts", "_flying", "_idle_s", "_lease", "_outbound", "_placed", "_reason",
        "_respond_by", "_tried", "_waiting",
    )  # fmt: skip

    def __init__(self, side: OutboundSide[Fleet], channel: Channel, on_done: Callable[[], None] | None) -> None:
        super().__init__(side, channel, side.stats, on_done, replay_bytes_max=REPLAY_BYTES)
        self._outbound = side
        self._aim: Aim | None = None
        self._lease: Lease | None = None
        self._flying = False
        self._placed = False
        """Whether the active request has a place among the connections that may be in use."""
        self._waiting = False
        """Whether it awaits one."""
        self._attempts = 0
        self._tried: set[Hashable] = set()
        self._reason = ""
        """Why the last attempt failed."""
        self._idle_s = 0.0
        """How long neither side of the request may say anything; 0: for ever."""
        self._active_at = 0.0
        """When one of them last did, where that matters."""
        self._respond_by = NEVER

    def _party(self) -> tuple[str, str]:
        key = self._lease.key if self._lease is not None else None
        return self._options.service, str(getattr(key, "instance", ""))

    def _route(self, message: Message) -> None:
        side, head = self._outbound, message.head
        assert head is not None
        tracer = self._tracer
        trace = self._trace = tracer.begin(head.fields) if tracer is not None else None
        if problem := side.fleet.unavailable():
            self._reply(503, f"{self._options.service!r}: {problem}", "app-down")
            return
        if side.in_flight >= side.outbound.requests_max:
            self._turn_away(f"has {side.in_flight} requests in flight already")
            return
        self._flying = True
        side.in_flight += 1
        self._attempts = 0
        self._tried = set()
        self._reason = ""
        aim = self._aim = side.fleet.aim(head, self._channel)
        self._idle_s = aim.idle_timeout_s if aim is not None else 0.0
        self._respond_by = NEVER
        if trace is not None:
            head.fields, head.lines = trace.fields(head.fields), trace.lines(head.fields, head.lines)
        self._launch(message, head.wire(head.target if aim is None else aim.prepare(head)))
        if self._idle_s and self._active is message:
            self._stir()
            self.deadline = min(self._respond_by, self._active_at + self._idle_s)
            self._side.heed(self.deadline)

    # Silence

    def _stir(self) -> None:
        """One of the two sides has said something."""
        self._active_at = self._loop.time()

    def _forward(self, message: Message, out: list[bytes]) -> None:
        if self._idle_s and message.body:
            self._stir()
        super()._forward(message, out)

    def response_output(self, upstream: Upstream, pieces: list[bytes]) -> None:
        if self._idle_s:
            self._stir()
        super().response_output(upstream, pieces)

    def _stirred(self) -> Callable[[], None] | None:
        return self._stir if self._idle_s else None

    def response_switched(self, upstream: Upstream, rest: Data) -> None:
        super().response_switched(upstream, rest)
        if self._tunnelled and self._idle_s:
            self._stir()
            self.deadline = self._active_at + self._idle_s
            self._side.heed(self.deadline)

    def expire(self) -> None:
        if not self._idle_s or self._closing or (self._active is None and not self._tunnelled):
            super().expire()
            return
        now, quiet_by = self._loop.time(), self._active_at + self._idle_s
        if self._tunnelled:
            if quiet_by <= now:
                self.cut(StreamClosed(f"neither side said anything for {self._idle_s:g} s"))
            else:
                self.deadline = quiet_by
            return
        responding = self._upstream is not None and self._upstream.head is not None
        if responding and min(quiet_by, self._finish_by()) <= now:
            self.cut()
        elif quiet_by <= now:
            self._drop_upstream()
            self._reply(504, f"{self._options.service!r}: nothing was said for {self._idle_s:g} s", "timeout")
            self._advance()
        elif self._respond_by <= now and not responding:
            super().expire()
        else:
            self.deadline = min(quiet_by, self._finish_by() if responding else self._respond_by)

    def _connect(self, message: Message, *, anew: bool = False) -> None:
        """Make an attempt; ``anew``: with an instance that was tried already if there is no other."""
        if not self._placed and not self._find_place():
            return
        lease = self._lease = self._outbound.fleet.pick(self._tried, self._aim)
        if lease is None and anew:
            self._tried.clear()
            lease = self._lease = self._outbound.fleet.pick(self._tried, self._aim)
        if lease is None:
            self._reply(503, f"{self._options.service!r}: {self._reason or 'no instance can be used'}", "app-down")
            return
        self._attempts += 1
        self._tried.add(lease.key)
        if self._trace is not None:
            self._trace.sent_to(lease.key)
        upstream = lease.open(self)
        if upstream is not None:
            self._send(message, upstream)
            if message.complete:
                self._await_response()
        elif self._outbound.pending >= self._outbound.outbound.pending_max:
            self._turn_away(f"has {self._outbound.pending} requests waiting for a connection already")
        else:
            self._connecting = True
            self._outbound.pending += 1
            self._side.tasks.spawn(self._make(message, lease))

    # The limits of the upstream

    def _turn_away(self, problem: str) -> None:
        self._reply(503, f"{self._options.service!r}: {problem}", LIMITED)

    def _find_place(self) -> bool:
        """Return whether the active request may have a connection now; else it waits, or is answered."""
        side = self._outbound
        most = side.outbound.connections_max
        if side.in_use < most:
            side.in_use += 1
            self._placed = True
            return True
        if not most or side.pending >= side.outbound.pending_max:
            self._turn_away(f"uses {side.in_use} connections, and {side.pending} requests wait for one already")
            return False
        self._waiting = self._connecting = True
        side.wait(self)
        return False

    def let_in(self) -> None:
        """One of the connections that may be in use is free for our request."""
        self._waiting = self._connecting = False
        self._placed = True
        message = self._active
        if message is None:
            self._land()
            return
        self._connect(message)
        self._advance()

    def _send(self, message: Message, upstream: Upstream) -> None:
        aim = self._aim
        if aim is None:
            upstream.edit = upstream.screen = None
        else:
            upstream.edit = aim.edit if aim.edits else None
            upstream.screen = self._unwanted if aim.retry_statuses else None
        super()._send(message, upstream)

    def _unwanted(self, status: int) -> bool:
        """Whether another attempt is made instead of passing this status on; leave for it is then taken."""
        aim = self._aim
        if aim is None or status not in aim.retry_statuses or self._lease is None:
            return False
        if not (self._may_attempt() and not self._is_over() and self._outbound.fleet.may_retry()):
            return False
        self._lease.answered(status)
        return True

    def response_complete(self, upstream: Upstream) -> None:
        if upstream is self._upstream and upstream.head is not None and self._lease is not None:
            self._lease.answered(upstream.head.status)
        super().response_complete(upstream)

    def _attempts_max(self) -> int:
        aim = self._aim
        return aim.attempts_max if aim is not None and aim.attempts_max else self._outbound.outbound.attempts_max

    def _may_attempt(self) -> bool:
        return self._replay is not None and self._attempts < self._attempts_max()

    def _limit_s(self) -> float:
        aim = self._aim
        return (
            aim.request_timeout_s if aim is not None and aim.request_timeout_s else self._options.response_timeout_s
        )

    def _is_over(self) -> bool:
        return self._finish_by() <= self._loop.time()

    async def _make(self, message: Message, lease: Lease) -> None:
        upstream: Upstream | None = None
        ours = False
        try:
            upstream = await lease.connect(self)
        except (ConnectFailed, OSError) as error:
            reason = str(error) or type(error).__name__
            ours = isinstance(error, ConnectFailed) and error.ours
        finally:
            self._outbound.pending -= 1
        if self._done or self._lease is not lease or not self._connecting:
            if upstream is not None:
                upstream.close()
            return
        self._connecting = False
        if upstream is not None and not upstream.lost:
            self._send(message, upstream)
            if message.complete:
                self._await_response()
        elif ours:
            self._reply(503, f"{self._options.service!r}: {reason}", "app-down")
        else:
            reason = reason if upstream is None else "the connection was lost at once"
            lease.failed(reason)
            self._again(message, reason)
        self._advance()

    def _again(self, message: Message, reason: str) -> None:
        """An attempt came to nothing before any app can have answered: make another one, or say so."""
        self._drop_lease()
        self._reason = reason
        if not self._may_attempt():
            self._reply(503, f"{self._options.service!r}: {reason}", "app-down")
        elif not self._outbound.fleet.may_retry():
            self._reply(503, f"{self._options.service!r}: {reason}; no more retries", "app-down")
        else:
            self._connect(message)

    def _retry(self, upstream: Upstream, error: Exception | None, message: Message) -> bool:
        lease, head = self._lease, message.head
        assert head is not None
        if lease is None:
            return False
        if isinstance(error, UnwantedStatus):
            self._drop_lease()
            self._reason = str(error)
            self._connect(message, anew=True)
            self._advance()
            return True
        if isinstance(error, StreamRefused):
            final = lease.refusal(error)
            if final is not None:
                self._drop_lease()
                self._reply(*final, "denied" if final[0] == 403 else "app-down")
            else:
                self._again(message, str(error))
            self._advance()
            return True
        if isinstance(error, TooMuchHeld):
            self._drop_lease()  # not the instance's fault
            return False
        if upstream.served == 1:
            lease.silent(str(error) if error else "closed the connection")
        channel = upstream.channel
        unsent = isinstance(channel, MuxStream) and not channel.data_sent
        repeatable = unsent or head.idempotent or (self._aim is not None and self._aim.retry_resets)
        if upstream.heard or not repeatable or self._replay is None:
            self._drop_lease()
            return False
        if upstream.served > 1:
            self._tried.discard(lease.key)  # a kept connection had ended; the instance need not be at fault
        self._again(message, str(error) if error else "the connection was closed")
        self._advance()
        return True

    def _timed_out(self, message: Message) -> None:
        lease, head = self._lease, message.head
        assert head is not None
        if self._waiting:
            super()._timed_out(message)
            return
        if lease is not None:
            lease.silent("did not answer in time")
        self._drop_lease()
        repeatable = head.idempotent or (self._aim is not None and self._aim.retry_resets)
        may = not self._is_over() and repeatable and self._may_attempt()
        if may and self._outbound.fleet.may_retry():
            self._reason = "did not answer in time"
            self._connect(message, anew=True)
        else:
            super()._timed_out(message)

    def _await_response(self) -> None:
        self.deadline = NEVER
        super()._await_response()
        try_s = self._outbound.outbound.try_timeout_s
        if try_s:
            self.deadline = min(self.deadline, self._loop.time() + try_s)
        self._respond_by = self.deadline
        if self._idle_s:
            self.deadline = min(self.deadline, self._active_at + self._idle_s)
        if self.deadline != NEVER:
            self._side.heed(self.deadline)

    def _let_go(self, upstream: Upstream) -> None:
        self._upstream = None
        self._drop_lease(None if upstream.lost else upstream)
        self._land()

    def _reply(self, status: int, error: str, origin: str, *, close: bool = False) -> None:
        self._drop_lease()
        self._land()
        super()._reply(status, error, origin, close=close)

    def _finish(self) -> None:
        super()._finish()
        self._drop_lease()
        self._land()

    def _drop_lease(self, upstream: Upstream | None = None) -> None:
        lease, self._lease = self._lease, None
        if lease is not None:
            lease.done(upstream)

    def _land(self) -> None:
        """The request has ended, one way or another."""
        if self._flying:
            self._flying = False
            self._outbound.in_flight -= 1
        if self._waiting:
            self._waiting = False
            self._outbound.give_up(self)
        elif self._placed:
            self._placed = False
            side = self._outbound
            side.in_use -= 1
            if side.queue:
                side.let_in()
