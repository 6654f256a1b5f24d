"""One call of our app: its connection, and its way to an instance that takes it.

Until the destination has accepted, what the app sent is kept, so that a refused or unreachable instance costs the
app nothing: the next one is tried with the same bytes.
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any

from proxy.balancer import Instance, Key
from proxy.balancing.routing import Chooses, hash_connection
from proxy.choosing import source_of
from proxy.errors import ConnectFailed, StreamClosed
from proxy.foreign import ForeignChannel
from proxy.mux import frames
from proxy.mux.core import MuxStream
from proxy.mux.session import MuxSession
from proxy.relay import SocketChannel, dial
from proxy.stream import Channel, Data, Early, join

if TYPE_CHECKING:
    from proxy.outbound import Upstream

REPLAY_BYTES = 64 * 1024
"""What is kept for another attempt; the app is read no further until one has succeeded."""
MAX_ATTEMPTS = 5
OPEN_DELAY_TURNS = 2
"""Turns of the loop that OPEN waits for the app's first bytes; when the server speaks first there are none."""
ACCEPT_TIMEOUT_S = 10.0
_INSTANCE_FAULTS = frozenset({frames.APP_DOWN, frames.TIMED_OUT})


class AppConnection(SocketChannel):
    """A connection that our app made to an upstream's listener."""

    __slots__ = ("_started", "_stats", "_upstream", "outgoing")
    __deletable__ = ("outgoing",)  # for mypyc: which attributes may be deleted

    def __init__(self, upstream: Upstream) -> None:
        super().__init__()
        self.outgoing = Outgoing(upstream, self)
        self.peer = self.outgoing
        self._stats = upstream.stats
        self._upstream = upstream if upstream.observer is not None else None
        self._started = time.monotonic() if self._upstream is not None else 0.0

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._stats.total += 1
        self._stats.active += 1
        self.outgoing.start()

    def on_closed(self) -> None:
        self._stats.active -= 1
        self._stats.bytes_in += self.received
        self._stats.bytes_out += self.sent
        if self._upstream is not None:
            instance = self.outgoing.instance
            self._upstream.tell_connection(
                instance.key.instance if instance is not None else "", self.sent, time.monotonic() - self._started
            )
        self.outgoing.ended()


class Outgoing:
    """The way of one app connection to an instance. Until accepted it is the app connection's peer."""

    __slots__ = (
        "_attempts", "_choice", "_eof", "_hash", "_held", "_live", "_replay", "_replay_bytes", "_stream",
        "_stream_full", "_tried", "_waits_for", "app", "instance", "peer", "reason", "upstream",
    )  # fmt: skip

    def __init__(self, upstream: Upstream, app: AppConnection) -> None:
        self.upstream = upstream
        self.app = app
        self.peer: Channel = app
        self.instance: Instance | None = None
        self.reason = ""
        """Why the last attempt failed."""
        self._live = True
        """The app is there and no instance has accepted yet."""
        self._replay: list[Data] = []
        self._replay_bytes = 0
        self._eof = False
        self._held = False
        self._stream: MuxStream | None = None
        self._waits_for: MuxSession | None = None
        """The session on which the stream is opened when the app has sent something, or has not for a moment."""
        self._stream_full = False
        self._attempts = 0
        self._tried: set[Key] = set()
        self._choice: Chooses = upstream.balancer
        self._hash: int | None = None

    def start(self) -> None:
        upstream = self.upstream
        upstream.connections.add(self)
        if reason := upstream.unavailable() or upstream.crowded():
            # A turn later: the app, whose connect() is hardly over, sees its connection made, and then reset.
            asyncio.get_running_loop().call_soon(self._fail, "unavailable", reason)
        elif upstream.spec is not None and upstream.spec.loopback_port:
            upstream.tasks.spawn(self._loopback(upstream.spec.loopback_port))
        else:
            upstream.budget.connection()
            if upstream.routing is not None:
                destination = upstream.routing.connection().destination
                self._choice = destination
                self._hash = hash_connection(destination.hash_policies, source_of(self.app))
            self._attempt()

    # Attempts

    def _attempt(self) -> None:
        upstream = self.upstream
        now = upstream.pool.poller.now()
        self._leave()
        if self._stream_full:
            self.stream_flow(full=False)  # it was the last attempt's stream that took no more
        instance = self._choice.pick(now, self._tried, self._hash)
        if instance is None:
            self._fail("exhausted", self.reason or "no instance can be used")
            return
        if self._attempts:
            if self._attempts >= MAX_ATTEMPTS or not upstream.budget.take(now):
                self._fail("retries", f"{self.reason}; no more retries")
                return
            upstream.count("lictor_retries_total")
        self._attempts += 1
        self._tried.add(instance.key)
        self.instance = instance
        instance.active += 1
        session = upstream.pool.ready(instance.key)
        if session is None:
            upstream.tasks.spawn(self._dial(instance))
        elif self._replay or self._eof:
            self._open(session, instance)
        else:
            self._waits_for = session
            upstream.waiting.add(self)

    def open_now(self) -> None:
        """Wait no longer for the app's first bytes, if that is what is waited for."""
        session, self._waits_for = self._waits_for, None
        if session is not None and self.instance is not None and self._live:
            self._open(session, self.instance)

    async def _dial(self, instance: Instance) -> None:
        upstream = self.upstream
        try:
            result = await upstream.pool.connect(instance.key, instance.owner.options.connect_timeout_s)
        except ConnectFailed as error:
            if self._live and self.instance is instance:
                if error.ours:
                    self._fail(error.cause, str(error))
                else:
                    self._failed(instance, str(error))
            return
        if not self._live or self.instance is not instance:
            if isinstance(result, ForeignChannel):
                result.abort()
        elif isinstance(result, MuxSession):
            self._open(result, instance)
        else:
            self._accepted(result)

    def _open(self, session: MuxSession, instance: Instance) -> None:
        if session.closed or not session.core.can_open:
            self.upstream.tasks.spawn(self._dial(instance))
            return
        answer = _Answer(self)
        stream = self._stream = answer.stream = session.core.open(instance.key.service, answer, self)
        for data in self._replay:
            stream.write(data)
        if self._eof:
            stream.write_eof()
        opening = self.upstream.opening
        if self not in opening:
            opening[self] = self.upstream.pool.poller.now() + ACCEPT_TIMEOUT_S

    def accept_timed_out(self) -> None:
        """The instance neither accepted nor refused in time."""
        self._settle()
        stream = self._stream
        if self._live and stream is not None:
            self._stream = None
            stream.owner = None
            stream.reset(frames.TIMED_OUT, "not accepted in time")
            self._lost(stream, "instance did not accept in time")

    def _failed(self, instance: Instance, reason: str) -> None:
        upstream = self.upstream
        self.reason = reason
        if instance.owner.failed(instance, self.upstream.pool.poller.now()):
            upstream.count("lictor_ejections_total")
            key = f"ejected {instance.key}"
            upstream.limited.warning(key, f"upstream {upstream.name}: {instance.key.instance} left out: {reason}")
        self._attempt()

    def _lost(self, stream: MuxStream, reason: str) -> None:
        """The stream ended before it was accepted; if nothing was sent on it, another instance may have the call."""
        self.reason = reason
        if stream.data_sent or self.instance is None:
            self._fail("lost", reason)
        else:
            self._failed(self.instance, reason)

    def _accepted(self, channel: Channel) -> None:
        """An instance took the call: join the app with it and step aside."""
        self._live = False
        self._settle()
        app = self.app
        if self.instance is not None:
            self.instance.owner.succeeded(self.instance)
        if isinstance(channel, SocketChannel):
            replay, self._replay = self._replay, []
            if isinstance(channel, ForeignChannel):
                channel.attach(app)
            else:
                join(app, channel)
            if self._held:
                app.resume_reading()  # first: what is sent now may be more than the connection takes
            for data in replay:
                channel.write(data)
            if self._eof:
                channel.write_eof()
        else:
            self._replay = []
            join(app, channel)
            if self._held and not self._stream_full:
                app.resume_reading()

    async def _loopback(self, port: int) -> None:
        me = self.upstream.me
        host = (me.local_address if me else "") or "127.0.0.1"
        try:
            async with asyncio.timeout(self.upstream.settings.connect_timeout_s):
                channel = SocketChannel()
                channel.peer = early = Early(channel)  # the app may speak first
                await dial(channel, host, port)
        except (OSError, TimeoutError) as error:
            self._fail("app-down", f"our own app at {host}:{port} cannot be reached: {error or 'timeout'}")
            return
        if self._live:
            self._accepted(channel)
            early.release(self.app)
        else:
            channel.abort()

    # Ends

    def _fail(self, cause: str, text: str) -> None:
        if self._live:
            self._live = False
            self._settle()
            self._replay = []
            self.upstream.failed(cause, text)
            self.app.abort(StreamClosed(text))

    def cut(self, reason: str) -> None:
        """End the call now, whatever its state."""
        if self._live:
            self._live = False
            self._settle()
            if self._stream is not None:
                self._stream.abort(StreamClosed(reason))
        else:
            self.app.peer.abort(StreamClosed(reason))
        self.app.abort(StreamClosed(reason))

    def ended(self) -> None:
        """The app's connection is gone; the last call on this object."""
        self._live = False
        self._settle()
        self._replay = []
        self._leave()
        self.upstream.connections.discard(self)
        del self.app.outgoing  # the two refer to each other; parted, they are freed without the cyclic collector

    def _leave(self) -> None:
        if self.instance is not None:
            self.instance.active -= 1
            self.instance = None
        self._stream = self._waits_for = None

    def _settle(self) -> None:
        """No instance is to accept any more."""
        self.upstream.opening.pop(self, None)

    # StreamOwner

    def stream_accepted(self, stream: MuxStream) -> None:
        if stream is self._stream and self._live:
            self._accepted(stream)

    def stream_refused(self, stream: MuxStream, code: int, text: str) -> None:
        if stream is not self._stream or not self._live or self.instance is None:
            return
        instance, self._stream = self.instance, None
        reason = f"{instance.key.instance} refused: {frames.CODE_NAMES.get(code, str(code))}: {text}"
        self.upstream.count("lictor_refusals_received_total", reason=frames.CODE_NAMES.get(code, "other"))
        if code in _INSTANCE_FAULTS:
            self._failed(instance, reason)
        else:
            self.reason = reason
            instance.owner.refused(instance, self.upstream.pool.poller.now())
            self._attempt()

    def stream_closed(self, stream: MuxStream) -> None:
        pass  # the app's connection ends with it and does the accounting

    # Channel: what the app sends before an instance has accepted

    def write(self, data: Data) -> None:
        if not self._live:
            return
        self._replay.append(data)
        self._replay_bytes += len(data)
        if self._replay_bytes >= REPLAY_BYTES and not self._held:
            self._held = True
            self.app.pause_reading()
        if self._stream is not None:
            self._stream.write(data)
        elif self._waits_for is not None:
            self.open_now()

    def write_eof(self) -> None:
        self._eof = True
        if self._stream is not None:
            self._stream.write_eof()
        else:
            self.open_now()

    def abort(self, error: Exception | None = None) -> None:
        self._live = False
        if self._stream is not None:
            self._stream.abort(error)

    def pause_reading(self) -> None:
        pass  # the app reads slowly; nothing goes to it before an instance has accepted

    def resume_reading(self) -> None:
        pass

    def stream_flow(self, *, full: bool) -> None:
        """The stream cannot take more for now, or can again."""
        self._stream_full = full
        if full:
            self.app.pause_reading()
        elif not self._held:
            self.app.resume_reading()


class Waiting:
    """Calls that wait a moment for their app's first bytes, which then go out with OPEN."""

    def __init__(self) -> None:
        self._calls: list[list[Outgoing]] = [[] for _ in range(OPEN_DELAY_TURNS)]
        """By the turns of the loop that are left to them."""
        self._due = False

    def add(self, call: Outgoing) -> None:
        """Have :meth:`Outgoing.open_now` called in a moment."""
        self._calls[-1].append(call)
        if not self._due:
            self._due = True
            asyncio.get_running_loop().call_soon(self._turn)

    def _turn(self) -> None:
        over = self._calls.pop(0)
        self._calls.append([])
        self._due = any(self._calls)
        if self._due:
            asyncio.get_running_loop().call_soon(self._turn)
        for call in over:
            call.open_now()


class _Answer:
    """The stream's peer before it is accepted: no data may come, its end may, and its flow is passed on."""

    __slots__ = ("_outgoing", "peer", "stream")

    def __init__(self, outgoing: Outgoing) -> None:
        self._outgoing = outgoing
        self.peer: Channel = outgoing
        self.stream: MuxStream | None = None

    def write(self, data: Data) -> None:
        self._misbehaved("data before the stream was accepted")

    def write_eof(self) -> None:
        self._misbehaved("end before the stream was accepted")

    def _misbehaved(self, reason: str) -> None:
        # Reset, or it would stay open, and what comes on it next would be taken for the next attempt's.
        if self.stream is not None:
            self.stream.reset(frames.PROTOCOL_ERROR, reason)
        self.abort(StreamClosed(reason))

    def abort(self, error: Exception | None = None) -> None:
        outgoing, stream = self._outgoing, self.stream
        self.stream = None
        if stream is not None and stream is outgoing._stream and outgoing._live:
            outgoing._stream = None
            outgoing._lost(stream, str(error) if error else "stream was lost")

    def pause_reading(self) -> None:
        self._outgoing.stream_flow(full=True)

    def resume_reading(self) -> None:
        self._outgoing.stream_flow(full=False)
