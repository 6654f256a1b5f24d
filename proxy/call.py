"""One call to our app: on a mux stream or a foreign connection, joined with a connection to the app.

Whether it is admitted, and for how long, :mod:`proxy.inbound` decides.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from proxy.authz import Decision, Request
from proxy.errors import StreamClosed
from proxy.http import client_cert_header
from proxy.http_entry import Undecided
from proxy.metrics import PairStats
from proxy.mux import frames
from proxy.mux.core import MuxStream
from proxy.relay import SocketChannel
from proxy.stream import NOBODY, READ_LIMIT_BYTES, Channel, Data, Early, join
from raftstate.model.identity import Identity

if TYPE_CHECKING:
    from proxy.inbound import Desk

APP_CONNECT_TIMEOUT_S = 5.0


class Call:
    """One call to our app, on a mux stream or on a foreign connection. Where requests are to be decided it is that
    one's peer until the app is connected, and keeps what arrives."""

    __slots__ = (
        "_desk",
        "_dialed",
        "_early",
        "_early_bytes",
        "_early_eof",
        "_task",
        "app",
        "certificate_sha256",
        "decision",
        "gone",
        "http",
        "identity",
        "outside",
        "peer",
        "started",
        "stats",
    )

    def __init__(
        self, desk: Desk, outside: Channel, identity: Identity, decision: Decision, certificate_sha256: str
    ) -> None:
        self._desk = desk
        self.outside = outside
        """The mux stream or foreign connection."""
        self.identity = identity
        self.certificate_sha256 = certificate_sha256
        self.decision = decision
        self.peer: Channel = outside
        self.app: SocketChannel | None = None
        self.gone = False
        self.http = False
        self.stats: PairStats = desk.pair(identity)
        self._dialed: AppChannel | None = None
        """The connection that is relayed, from before the app has taken it."""
        self._early: list[Data] = []
        self._early_bytes = 0
        """Of what is kept; the outside is stopped from sending when it is enough."""
        self._early_eof = False
        self._task: asyncio.Task[None] | None = None
        self.started = desk.now() if desk.observer is not None else 0.0
        desk.calls.add(self)
        self.stats.total += 1
        self.stats.active += 1

    def start(self) -> None:
        """Connect the app and join, or serve as HTTP where requests are to be decided."""
        desk = self._desk
        self.http = desk.needs_http(self.decision)
        if self.http:
            self.outside.peer = self
            self._task = desk.tasks.spawn(self._serve_http())
            return
        # What comes before the app has taken the connection waits in its transport, and nothing comes from it.
        app = self._dialed = AppChannel(self.stats, desk.apps, self)
        join(app, self.outside)
        desk.dialing[self] = desk.now() + desk.connect_timeout_s
        desk.connect(app)

    def app_connected(self, app: AppChannel) -> None:
        """The app took the connection."""
        self._desk.dialing.pop(self, None)
        if self.gone:
            app.abort()
            return
        self.app = app
        self._accept()

    def app_refused(self, error: OSError) -> None:
        """The app did not take the connection."""
        if not self.gone:
            self._app_down(error.strerror or str(error) or type(error).__name__)

    async def _serve_http(self) -> None:
        app = await self._dial()
        if app is None:
            return
        self._accept()
        desk = self._desk
        Undecided(
            desk.http,
            self.outside,
            None if app.transport.is_closing() else app,
            app.early or Early(app),
            peer=self.identity,
            dial=self._dial_again,
            decide=self._decide_request,
            stats=desk.http_stats(self.identity),
            identity=client_cert_header(self.identity, desk.http.options.uri, self.certificate_sha256),
            on_done=self.end,
        )
        early, self._early = self._early, []
        if self._early_bytes > READ_LIMIT_BYTES:
            self.outside.resume_reading()  # first: its peer may call for a pause of its own
        for data in early:
            self.outside.peer.write(data)
        if self._early_eof:
            self.outside.peer.write_eof()

    async def _dial_again(self, peer: Channel) -> Channel:
        app = self.app = await self._desk.dial_app(self, peer)
        return app

    def _decide_request(self, request: Request) -> Decision:
        return self._desk.decide_request(self.identity, request)

    async def _dial(self) -> AppChannel | None:
        desk = self._desk
        desk.dialing[self] = desk.now() + desk.connect_timeout_s
        try:
            app = await desk.connect_app(self)
        except OSError as error:
            if not self.gone:
                self._app_down(error.strerror or str(error) or type(error).__name__)
            return None
        finally:
            desk.dialing.pop(self, None)
        if self.gone:
            app.abort()
            return None
        self.app = app
        return app

    def dial_timed_out(self) -> None:
        """The app neither takes nor refuses the connection."""
        self._app_down("no answer")

    def _app_down(self, reason: str) -> None:
        self._desk.refused("app-down", f"app does not take the connection: {reason}")
        self.turn_away(frames.APP_DOWN, f"app does not take the connection: {reason}")

    def _accept(self) -> None:
        if isinstance(self.outside, MuxStream):
            self.outside.accept()

    def turn_away(self, code: int, text: str) -> None:
        """Refuse the call before anything reached the app."""
        if isinstance(self.outside, MuxStream):
            self.outside.refuse(code, text)
        else:
            self.outside.abort()
        self.end()

    def cut(self, code: int, reason: str) -> None:
        """End the call now: what allowed it holds no longer."""
        if self.gone:
            return
        outside = self.outside
        peer = outside.peer
        if isinstance(outside, MuxStream):
            outside.reset(code, reason)
        else:
            outside.abort()
        if peer is not self:
            peer.abort(StreamClosed(reason))
        self.end()

    def end(self) -> None:
        """Account for the end; once."""
        if self.gone:
            return
        self.gone = True
        if self._desk.observer is not None and not self.http:
            self._desk.tell_connection(self)
        self.stats.active -= 1
        self._desk.calls.discard(self)
        dialed, self._dialed = self._dialed, None
        if dialed is not None and self.app is None:
            self._desk.dialing.pop(self, None)
            dialed.abort()
        if self._task is not None and not self._task.done() and self._task is not asyncio.current_task():
            self._task.cancel()

    # StreamOwner

    def stream_accepted(self, stream: MuxStream) -> None:
        pass

    def stream_refused(self, stream: MuxStream, code: int, text: str) -> None:
        pass

    def stream_closed(self, stream: MuxStream) -> None:
        if self.app is None or not self.http:
            self.end()

    # Channel, while the app is being connected whose requests are to be decided

    def write(self, data: Data) -> None:
        self._early.append(data)
        self._early_bytes += len(data)
        if self._early_bytes > READ_LIMIT_BYTES:
            self.outside.pause_reading()

    def write_eof(self) -> None:
        self._early_eof = True

    def abort(self, error: Exception | None = None) -> None:
        self.end()

    def pause_reading(self) -> None:
        pass

    def resume_reading(self) -> None:
        pass


class AppChannel(SocketChannel):
    """The connection to our app for one call. It is among ``opened`` for as long as it is open."""

    __slots__ = ("_call", "_opened", "_stats", "_waiter", "early")

    def __init__(
        self,
        stats: PairStats,
        opened: set[AppChannel],
        call: Call | None = None,
        waiter: asyncio.Future[None] | None = None,
    ) -> None:
        """``call``, or ``waiter``, is told whether the app has taken the connection."""
        super().__init__()
        self.early: Early | None = None
        """Its peer until its real one is known, where the app may speak before that."""
        self._stats = stats
        self._opened = opened
        self._call = call
        self._waiter = waiter

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._opened.add(self)
        if self._call is not None:
            self._call.app_connected(self)
        elif self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def connect_failed(self, error: OSError) -> None:
        """The app did not take the connection."""
        self._closing = True
        if self._call is not None:
            self._call.app_refused(error)
        elif self._waiter is not None and not self._waiter.done():
            self._waiter.set_exception(error)
        self._let_go()

    def on_closed(self) -> None:
        self._opened.discard(self)
        self._stats.bytes_in += self.received
        self._stats.bytes_out += self.sent
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_exception(ConnectionAbortedError("the sidecar gave the connection up"))
        self._let_go()

    def _let_go(self) -> None:
        """What refers to each other is parted, so that it is freed without the collector."""
        self._call = self._waiter = None
        self.peer = NOBODY
