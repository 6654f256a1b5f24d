"""Which HTTP a connection speaks, its first bytes tell: the preface of HTTP/2 (prior knowledge), else HTTP/1.1."""

from __future__ import annotations

from collections.abc import Callable, Container

from proxy.http import Decide, Dial, HttpOptions, HttpStats, InboundConnection, InboundHttp
from proxy.http2 import InboundHttp2, InboundHttp2Connection
from proxy.http2.half import PREFACE
from proxy.stream import Channel, Data, Early
from raftstate.model.identity import Identity

_TELLING_BYTES = 3
"""``PRI`` begins no HTTP/1.1 method that is accepted; shorter beginnings could be ``PUT``, ``POST``, ``PATCH``."""


class HttpEntry:
    """HTTP in front of one app, of either version."""

    def __init__(self, options: HttpOptions) -> None:
        self.http1 = InboundHttp(options)
        self.http2 = InboundHttp2(options)
        self.undecided: set[Undecided] = set()

    @property
    def options(self) -> HttpOptions:
        """Options of the connections to come."""
        return self.http1.options

    def use(self, options: HttpOptions) -> None:
        """Take new options for the connections to come."""
        self.http1.options = self.http2.options = options

    def recheck(self, sources: Container[tuple[str, str]]) -> int:
        """The permissions of ``sources``, (service, instance), changed: decide again each request and stream that is
        under way from them, and end those that are not allowed any more; return how many."""
        return self.http1.recheck(sources) + self.http2.recheck(sources)

    def drain(self) -> None:
        """Let requests under way end; idle connections end at once."""
        self.http1.drain()
        self.http2.drain()
        for connection in list(self.undecided):
            connection.cut()

    async def close(self) -> None:
        """Cut everything."""
        for connection in list(self.undecided):
            connection.cut()
        await self.http1.close()
        await self.http2.close()


class Undecided:
    """A connection of which too little has come to tell: the channel's peer until then."""

    __slots__ = ("_app", "_app_early", "_early", "_entry", "_serve", "channel", "on_done", "peer")

    def __init__(
        self,
        entry: HttpEntry,
        channel: Channel,
        app: Channel | None,
        app_early: Early,
        *,
        peer: Identity,
        dial: Dial,
        decide: Decide,
        stats: HttpStats,
        identity: bytes = b"",
        on_done: Callable[[], None],
    ) -> None:
        """As :meth:`proxy.http.InboundHttp.serve`; ``app`` is a connection to the app that is there already, and
        ``app_early`` its peer until now."""
        self._entry = entry
        self._app = app
        self._app_early = app_early
        self._early = b""
        self.channel = channel
        self.on_done = on_done
        self.peer: Channel = channel

        def serve(side: InboundHttp | InboundHttp2) -> InboundConnection | InboundHttp2Connection:
            return side.serve(
                channel, peer=peer, dial=dial, decide=decide, stats=stats, identity=identity, on_done=on_done
            )

        self._serve = serve
        channel.peer = self
        entry.undecided.add(self)

    def write(self, data: Data) -> None:
        self._early += bytes(data)
        if len(self._early) >= _TELLING_BYTES or not PREFACE.startswith(self._early):
            self._decide()

    def _decide(self) -> None:
        entry = self._entry
        entry.undecided.discard(self)
        is_http2 = self._early[:_TELLING_BYTES] == PREFACE[:_TELLING_BYTES]
        connection = self._serve(entry.http2 if is_http2 else entry.http1)
        if self._app is not None:
            connection.adopt(self._app)
            self._app_early.release(self._app.peer)
        if self._early:
            self.channel.peer.write(self._early)

    def write_eof(self) -> None:
        self._decide()
        self.channel.peer.write_eof()

    def abort(self, error: Exception | None = None) -> None:
        self._end(error)

    def pause_reading(self) -> None:
        """Nothing was sent yet, so this cannot be."""

    def resume_reading(self) -> None:
        """As above."""

    def cut(self) -> None:
        """Drop the connection at once."""
        self.channel.abort()
        self._end(None)

    def _end(self, error: Exception | None) -> None:
        if self in self._entry.undecided:
            self._entry.undecided.discard(self)
            if self._app is not None:
                self._app.abort(error)
            self.on_done()
