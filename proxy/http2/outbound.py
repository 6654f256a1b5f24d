"""The caller's side of HTTP/2: each stream of the app goes to an instance chosen for it, on links that are shared.

A request is sent again, to another instance, only where that is safe: nothing of an answer has gone to the app, all
that was sent of it is still at hand (:data:`~proxy.http.outbound.REPLAY_BYTES`), and either nobody has looked at it
(the link was refused, REFUSED_STREAM, a GOAWAY that leaves it out: RFC 9113, sections 8.7 and 6.8) or its method is
idempotent. A route may ask for more: attempts after certain statuses, of HTTP or of gRPC, and whatever the method.
What nobody has looked at but can't be sent again is given back to the app as REFUSED_STREAM. Retries have a budget.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Final

from h2.errors import ErrorCodes

from proxy.errors import ConnectFailed, StreamRefused
from proxy.http.head import Field
from proxy.http.options import LIMITED
from proxy.http.outbound import REPLAY_BYTES
from proxy.http.side import NEVER, OutboundSide
from proxy.http2.connection import TURNED_AWAY_MAX, Http2Connection
from proxy.http2.errors import StreamError
from proxy.http2.events import ResponseCame
from proxy.http2.exchange import Exchange, Replay
from proxy.http2.fleet import Aim, Fleet, Lease
from proxy.http2.link import Link
from proxy.stream import Channel

STREAMS_MAX: Final = 512
"""Of one connection of the app: a gRPC channel keeps to one connection, whatever it has under way."""


class _Call:
    """Where a request goes, and what was tried."""

    __slots__ = ("aim", "attempts", "lease", "reason", "respond_by", "tried")

    def __init__(self, aim: Aim | None) -> None:
        self.aim = aim
        self.lease: Lease | None = None
        self.attempts = 0
        self.tried: set[Hashable] = set()
        self.reason = ""
        """Why the last attempt failed."""
        self.respond_by = NEVER
        """When the response must have begun."""


class OutboundHttp2Connection(Http2Connection):
    """A connection of the app. Each of its streams may go to another instance."""

    resets_max = 1024
    """Twice :data:`STREAMS_MAX`."""

    def __init__(self, side: OutboundSide[Fleet], channel: Channel, on_done: Callable[[], None] | None) -> None:
        self._outbound = side
        self._channel = channel
        self._calls: dict[int, _Call] = {}
        """By the client's stream id, as the exchanges."""
        super().__init__(side, channel, side.stats, on_done, streams_max=STREAMS_MAX)

    def _client_name(self) -> str:
        return f"our app, to {self._options.service!r}"

    def _party(self, exchange: Exchange) -> tuple[str, str]:
        call = self._calls.get(exchange.client_id)
        key = call.lease.key if call is not None and call.lease is not None else None
        return self._options.service, str(getattr(key, "instance", ""))

    def _route(self, exchange: Exchange) -> None:
        side, head = self._outbound, exchange.head
        if problem := side.fleet.unavailable():
            self._answer(exchange, 503, f"{self._options.service!r}: {problem}", "app-down")
            return
        if side.in_flight >= side.outbound.requests_max:
            problem = f"has {side.in_flight} requests in flight already"
            self._answer(exchange, 503, f"{self._options.service!r}: {problem}", LIMITED)
            return
        side.in_flight += 1
        aim = side.fleet.aim(head, self._channel)
        call = self._calls[exchange.client_id] = _Call(aim)
        target = head.target
        if exchange.trace is not None:
            head.fields = exchange.trace.fields(head.fields)
        if aim is not None:
            head.fields = aim.asked(head.fields)
            target = aim.target(target)
        exchange.headers = head.wire(target, b"")
        exchange.replay = Replay(REPLAY_BYTES)
        self._connect(exchange, call)

    # Attempts

    def _connect(self, exchange: Exchange, call: _Call, *, anew: bool = False, paid: bool = True) -> None:
        """Make an attempt; ``anew``: with an instance that was tried already if there is no other. Unless leave for a
        retry was ``paid`` for, that takes some."""
        fleet = self._outbound.fleet
        lease = fleet.pick(call.tried, call.aim)
        if lease is None and anew and (paid or fleet.may_retry()):
            call.tried.clear()
            lease = fleet.pick(call.tried, call.aim)
        if lease is None:
            reason = call.reason or "no instance can be used"
            self._answer(exchange, 503, f"{self._options.service!r}: {reason}", "app-down")
            return
        call.lease = lease
        call.attempts += 1
        call.tried.add(lease.key)
        if exchange.trace is not None:
            exchange.trace.sent_to(lease.key)
        link = lease.link()
        if link is not None:
            self._launch(exchange, call, link)
        elif self._outbound.pending >= self._outbound.outbound.pending_max:
            problem = f"has {self._outbound.pending} requests waiting for a connection already"
            self._answer(exchange, 503, f"{self._options.service!r}: {problem}", LIMITED)
        else:
            self._outbound.pending += 1
            self._arm(exchange, self._finish_by(exchange, call))
            self._side.tasks.spawn(self._make(exchange, call, lease))

    async def _make(self, exchange: Exchange, call: _Call, lease: Lease) -> None:
        link: Link | None = None
        reason, ours = "", False
        try:
            link = await lease.connect()
        except (ConnectFailed, OSError) as error:
            reason = str(error) or type(error).__name__
            ours = isinstance(error, ConnectFailed) and error.ours
        finally:
            self._outbound.pending -= 1
        if call.lease is not lease or self._calls.get(exchange.client_id) is not call:
            return
        if link is not None:
            self._launch(exchange, call, link)
        elif ours:
            self._answer(exchange, 503, f"{self._options.service!r}: {reason}", "app-down")
        else:
            lease.failed(reason)
            self._again(exchange, call, reason, free=True)
        self.flush()

    def _launch(self, exchange: Exchange, call: _Call, link: Link) -> None:
        if not self._send(exchange, link):
            self._again(exchange, call, "the connection takes no more requests", anew=True, free=True)
        elif exchange.link is not None:
            self._watch(exchange, call)

    def _again(
        self,
        exchange: Exchange,
        call: _Call,
        reason: str,
        *,
        anew: bool = False,
        free: bool = False,
        paid: bool = False,
    ) -> None:
        """An attempt came to nothing: make another one, or say so.

        ``free``: nobody has looked at the request, so that another instance may be asked without taking of the
        budget: hundreds may be under way to an instance that begins to drain, or wait for one dial to it. ``paid``:
        the same instance may be, too.
        """
        call.reason = reason
        replay = exchange.replay
        self._drop_lease(call)
        if replay is None or replay.spent or call.attempts >= self._attempts_max(call):
            self._answer(exchange, 503, f"{self._options.service!r}: {reason}", "app-down")
        elif not free and not self._outbound.fleet.may_retry():
            self._answer(exchange, 503, f"{self._options.service!r}: {reason}; no more retries", "app-down")
        else:
            self._resend(exchange, call, anew=anew, paid=paid or not free)

    def _resend(self, exchange: Exchange, call: _Call, *, anew: bool, paid: bool = True) -> None:
        self._rewind(exchange)
        exchange.deadline = call.respond_by = NEVER
        self._connect(exchange, call, anew=anew, paid=paid)

    def _attempts_max(self, call: _Call) -> int:
        return call.aim.attempts_max if call.aim and call.aim.attempts_max else self._outbound.outbound.attempts_max

    def _may_attempt(self, exchange: Exchange, call: _Call) -> bool:
        spent = exchange.replay is None or exchange.replay.spent
        return not spent and call.attempts < self._attempts_max(call) and not self._is_over(exchange, call)

    def _repeatable(self, exchange: Exchange, call: _Call) -> bool:
        """Whether the request may be sent again though an app may have seen it."""
        return exchange.head.idempotent or (call.aim is not None and call.aim.retry_resets)

    # Time

    def _limit_s(self, call: _Call) -> float:
        said = call.aim.request_timeout_s if call.aim is not None else 0.0
        return said or self._options.response_timeout_s

    def _finish_by(self, exchange: Exchange, call: _Call) -> float:
        limit_s = self._limit_s(call)
        return exchange.asked_at + limit_s if limit_s else NEVER

    def _is_over(self, exchange: Exchange, call: _Call) -> bool:
        return self._finish_by(exchange, call) <= self._side.loop.time()

    def _watch(self, exchange: Exchange, call: _Call) -> None:
        """Set the times by which something must have happened."""
        if exchange.request_came and not exchange.status and call.respond_by == NEVER:
            try_s = self._outbound.outbound.try_timeout_s
            call.respond_by = self._finish_by(exchange, call)
            if try_s:
                call.respond_by = min(call.respond_by, self._side.loop.time() + try_s)
        idle_s = call.aim.idle_timeout_s if call.aim is not None else 0.0
        quiet_by = exchange.active_at + idle_s if idle_s else NEVER
        self._arm(exchange, min(call.respond_by, quiet_by, self._finish_by(exchange, call)))

    def _timed_out(self, exchange: Exchange) -> None:
        call, now = self._calls[exchange.client_id], self._side.loop.time()
        idle_s = call.aim.idle_timeout_s if call.aim is not None else 0.0
        if call.respond_by > now:
            if exchange.status and self._is_over(exchange, call):
                super()._timed_out(exchange)
            elif not idle_s or exchange.active_at + idle_s > now:
                self._watch(exchange, call)
            elif exchange.status:
                self._forget_link(exchange, ErrorCodes.CANCEL)
                self._end_early(exchange, 504, f"{self._options.service!r}: nothing was said for {idle_s:g} s")
            else:
                text = f"{self._options.service!r}: nothing was said for {idle_s:g} s"
                self._answer(exchange, 504, text, "timeout")
            return
        if call.lease is not None and exchange.link is not None:
            call.lease.silent("did not answer in time")
        may = self._repeatable(exchange, call) and self._may_attempt(exchange, call)
        if may and self._outbound.fleet.may_retry():
            self._forget_link(exchange, ErrorCodes.CANCEL)
            self._drop_lease(call)
            call.reason = "did not answer in time"
            self._resend(exchange, call, anew=True)
        else:
            super()._timed_out(exchange)

    def _more_came(self, exchange: Exchange) -> None:
        exchange.active_at = self._side.loop.time()
        super()._more_came(exchange)
        call = self._calls.get(exchange.client_id)
        if call is not None and exchange.link is not None and exchange.request_came:
            self._watch(exchange, call)

    # Owner

    def answered(self, exchange: Exchange, event: ResponseCame) -> None:
        call = self._calls[exchange.client_id]
        exchange.active_at = self._side.loop.time()
        if event.status >= 200:
            status = event.status
            said = dict(event.fields).get(b"grpc-status", b"") if event.end else b""
            unwanted = self._unwanted(exchange, call, status, said)
            if call.lease is not None and (unwanted or not exchange.head.grpc):
                call.lease.answered(_as_http(status, said))  # of a gRPC call that is passed on, the end tells
            if unwanted:
                self._forget_link(exchange, ErrorCodes.CANCEL)
                self._drop_lease(call)
                call.reason = f"answered {f'gRPC status {said.decode()}' if said else status}"
                self._resend(exchange, call, anew=True)
                return
        super().answered(exchange, event)
        if exchange.status and exchange.client_id in self._exchanges:
            call.respond_by = NEVER
            self._watch(exchange, call)

    def _unwanted(self, exchange: Exchange, call: _Call, status: int, grpc_status: bytes) -> bool:
        """Whether another attempt is made instead of passing this answer on; leave for it is then taken."""
        aim = call.aim
        if aim is None or not (status in aim.retry_statuses or (grpc_status and grpc_status in aim.retry_grpc)):
            return False
        return self._may_attempt(exchange, call) and self._outbound.fleet.may_retry()

    def came(self, exchange: Exchange) -> None:
        exchange.active_at = self._side.loop.time()
        super().came(exchange)

    def _answered_whole(self, exchange: Exchange) -> None:
        lease = self._calls[exchange.client_id].lease
        if lease is not None and exchange.head.grpc and exchange.origin == "app":
            lease.answered(_as_http(exchange.status, exchange.grpc_status))
        super()._answered_whole(exchange)

    def _edit(self, exchange: Exchange, headers: list[Field]) -> list[Field]:
        aim = self._calls[exchange.client_id].aim
        return headers if aim is None else aim.answered(headers)

    def not_served(self, exchange: Exchange, *, leaving: bool) -> None:
        if exchange.response_came:
            exchange.request_ended = True
        elif exchange.status or exchange.replay is None or exchange.replay.spent:
            self._refuse(exchange)
        else:
            call = self._calls[exchange.client_id]
            if leaving and exchange.turned_away < TURNED_AWAY_MAX:
                exchange.turned_away += 1
                call.attempts -= 1
            reason = f"{self._party(exchange)[1]} takes no more requests"
            self._again(exchange, call, reason, anew=True, free=True, paid=leaving)

    def was_reset(self, exchange: Exchange, code: ErrorCodes | int) -> None:
        call = self._calls[exchange.client_id]
        resets = call.aim is not None and call.aim.retry_resets
        if resets and not exchange.status and self._may_attempt(exchange, call):
            self._again(exchange, call, "the instance ended the request", anew=True)
        else:
            super().was_reset(exchange, code)

    def _lost(self, exchange: Exchange, error: Exception | None) -> None:
        call = self._calls[exchange.client_id]
        reason = str(error) if error is not None else "the connection was closed"
        if isinstance(error, StreamRefused):
            final = call.lease.refusal(error) if call.lease is not None else None
            if final is not None:
                self._answer(exchange, *final, "denied" if final[0] == 403 else "app-down")
            else:
                self._again(exchange, call, reason, free=True)
            return
        if call.lease is not None:
            call.lease.silent(reason)
        if self._repeatable(exchange, call) and self._may_attempt(exchange, call):
            self._again(exchange, call, reason, anew=True)
        else:
            self._answer(exchange, 502, f"{self._options.service!r}: {reason}", "app-down")

    def _broken(self, exchange: Exchange, error: Exception | None) -> None:
        reason = str(error) if isinstance(error, StreamError) else "the connection to the instance was lost"
        self._end_early(exchange, 503, f"{self._options.service!r}: {reason}")

    # Ends

    def _over(self, exchange: Exchange) -> None:
        call = self._calls.pop(exchange.client_id, None)
        if call is not None:
            self._outbound.in_flight -= 1
            self._drop_lease(call)

    @staticmethod
    def _drop_lease(call: _Call) -> None:
        lease, call.lease = call.lease, None
        if lease is not None:
            lease.done()


_AS_HTTP = {b"2": 500, b"4": 504, b"13": 500, b"14": 503, b"15": 500, b"8": 503}


def _as_http(status: int, grpc_status: bytes) -> int:
    """Return the HTTP status that says the same as a gRPC call's two: what is the instance's fault is a 5xx."""
    return _AS_HTTP.get(grpc_status, status) if grpc_status else status
