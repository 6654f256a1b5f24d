"""A mux session on an asyncio transport: the shell around :class:`~proxy.mux.core.MuxCore`.

Frames made during one turn of the loop leave in one write, so many small streams share TLS records and system
calls; that is where multiplexing wins over one TLS connection for each app connection.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Any, Final

from proxy.errors import MuxError, StreamClosed
from proxy.mux import frames
from proxy.mux.core import MAX_STREAMS, MuxCore, MuxStream
from proxy.mux.flow import NEAR_WINDOW_BYTES, MemoryBudget, window_for
from proxy.poller import Poller
from proxy.receiver import Connection, Receiver
from proxy.secure import SecureTransport
from raftstate.model.identity import Identity

log = logging.getLogger("lictor.proxy.mux")

KEEPALIVE_S: Final = 15.0
"""A session that was silent this long is pinged; silent twice as long, it is lost."""
JOIN_BYTES: Final = 64 * 1024
"""Output up to this size is joined into one write; longer output is not copied."""
FEW_STREAMS: Final = 2
"""With so few live streams frames are sent at once: there is nothing to gather, and the turn is latency."""
FIRST_PINGS: Final = 4
"""Pings in a row when the session begins, to know how far the peer is; then one with each keepalive."""
PARTING_S: Final = 1.0
"""How long the accepting side of a session that is over waits for the dialing side to close it."""
WRITE_HIGH_BYTES: Final = 512 * 1024


def _nothing_lost(session: MuxSession, error: Exception | None) -> None:
    """What a session that was lost already calls."""


class SessionCore(MuxCore):
    """The core of a session that is told when there is something to send."""

    def __init__(
        self,
        session: MuxSession,
        acceptor: Callable[[MuxStream], None] | None,
        max_streams: int,
        memory: MemoryBudget | None,
    ) -> None:
        super().__init__(acceptor=acceptor, max_streams=max_streams, memory=memory)
        self._session: MuxSession | None = session

    def wake(self) -> None:
        if self._session is not None:
            self._session.schedule()

    def peername(self) -> object:
        return self._session.peername() if self._session is not None else None

    def release(self) -> None:
        super().release()
        self._session = None


class MuxSession(Receiver):
    """One session. Ends by :meth:`close`, :meth:`kill`, or with its connection; ``on_lost`` is called once."""

    def __init__(
        self,
        *,
        identity: Identity,
        name: str,
        acceptor: Callable[[MuxSession, MuxStream], None] | None,
        on_lost: Callable[[MuxSession, Exception | None], None],
        max_streams: int = MAX_STREAMS,
        keepalive_s: float = KEEPALIVE_S,
        memory: MemoryBudget | None = None,
        certificate_sha256: str = "",
        poller: Poller | None = None,
    ) -> None:
        self.identity = identity
        """Who the peer is, from its certificate."""
        self.certificate_sha256 = certificate_sha256
        """Hex digest of that certificate (accepting side)."""
        self.name = name
        """The peer for logs: address and service."""
        self.closed = False
        accept = None if acceptor is None else lambda stream: acceptor(self, stream)
        self.core: MuxCore = SessionCore(self, accept, max_streams, memory)
        self.core.on_pong = self._pong
        self.core.growth.window_max = NEAR_WINDOW_BYTES
        self.round_trip_s = float("inf")
        """The shortest that was seen."""
        self._asked: float | None = None
        """When the ping was sent that is not answered yet."""
        self._on_lost = on_lost
        self._keepalive_s = keepalive_s
        self._loop = asyncio.get_running_loop()
        self._transport: Connection | None = None
        self._poller = poller
        """Whose batches the transport's events come in, and so whose end is the moment to flush."""
        self._flush_due = False
        self._heard = True
        self._pinged = False
        self._ending = False
        self._timer: asyncio.TimerHandle | None = None
        self._error: Exception | None = None
        self._idle_since: float | None = None
        self._opened = -1
        """The id of the newest stream when this was last looked at."""

    def peername(self) -> object:
        """Return the address that the session came from, as sockets give it; None when it is not known."""
        return self._transport.get_extra_info("peername") if self._transport is not None else None

    # Receiver

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        transport.set_write_buffer_limits(high=WRITE_HIGH_BYTES)
        self._timer = self._loop.call_later(self._keepalive_s, self._keepalive)
        self._ping()

    def data_received(self, data: bytes) -> None:
        self._heard = True
        if self.closed:
            return
        try:
            self.core.receive(data)
        except MuxError as error:
            log.warning("session with %s ended: protocol error: %s", self.name, error)
            self.kill(error, frames.PROTOCOL_ERROR)

    def eof_received(self) -> bool:
        return False

    def pause_writing(self) -> None:
        self.core.blocked = True

    def resume_writing(self) -> None:
        self.core.blocked = False
        self.flush()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if not self.closed:
            self.closed = True
            self.core.lose(StreamClosed(f"session with {self.name} was lost" + (f": {exc}" if exc else "")))
        on_lost, self._on_lost = self._on_lost, _nothing_lost
        on_lost(self, self._error or exc)
        # What refers to each other is parted, so that a session's buffers are freed now and not when the collector
        # comes by, which is seldom.
        self._transport = None
        self.core.release()

    # For the sidecar

    @property
    def idle_s(self) -> float:
        """How long, at the resolution of the keepalive, no stream was open."""
        return self._loop.time() - self._idle_since if self._idle_since is not None else 0.0

    def close(self, code: int, text: str) -> None:
        """Take no more streams; end the connection once the live ones have ended."""
        self.core.go_away(code, text)

    def kill(self, error: Exception, code: int = frames.CANCELLED) -> None:
        """End the connection and all its streams at once."""
        if self.closed:
            return
        self._error = error
        self.core.go_away(code, str(error))
        if self._transport is not None:
            if not self.core.blocked and not self._transport.is_closing():
                self._transport.write(b"".join(self.core.take_output()))
            self.closed = True
            self.core.lose(error)
            self._transport.abort()

    # Output

    def schedule(self) -> None:
        """See to it that what the core has made is sent soon."""
        if self._flush_due:
            return
        self._flush_due = True
        poller = self._poller
        if poller is not None and poller.inside:
            poller.flushes.append(self)
        elif len(self.core.streams) <= FEW_STREAMS:
            self.flush()
        elif poller is not None:
            poller.flush_later(self)
        else:
            self._loop.call_soon(self.flush)

    def flush(self) -> None:
        # Stays due while it runs: what is written meanwhile is sent by the loop below.
        self._flush_due = True
        transport, core = self._transport, self.core
        try:
            if transport is None or self.closed:
                return
            while not core.blocked:
                if core.out:
                    out, size = core.out, core.out_bytes
                    core.out, core.out_bytes = [], 0
                    if size <= JOIN_BYTES:
                        first = out[0]
                        # A frame of data and nothing else, most often: its header and itself.
                        joined = first + out[1] if len(out) == 2 and isinstance(first, bytes) else b"".join(out)
                        # Told by name, it is a call to compiled code, and not a search for a method.
                        if isinstance(transport, SecureTransport):
                            transport.write(joined)
                        else:
                            transport.write(joined)
                    elif isinstance(transport, SecureTransport):
                        transport.write_pieces(out)
                    else:
                        transport.write(b"".join(out))
                if not core.waiting:
                    break
                core.pump()
            if (core.draining or core.going_away) and core.finished:
                self._end(transport)
        finally:
            self._flush_due = False

    def _end(self, transport: Connection) -> None:
        """Close a session that is over. The accepting side gives the peer a moment to do it: an OPEN that crossed our
        GOAWAY must be refused, not lost, for only then may its call be made elsewhere."""
        if self.core.going_away or not self.core.accepts:
            transport.close()
        elif not self._ending:
            self._ending = True
            self._loop.call_later(PARTING_S, transport.close)

    def _ping(self) -> None:
        self._asked = time.monotonic()  # the loop's own clock may stand still for a turn
        self.core.ping()

    def _pong(self) -> None:
        if self._asked is None:
            return
        self.round_trip_s = min(self.round_trip_s, time.monotonic() - self._asked)
        self._asked = None
        self.core.growth.window_max = window_for(self.round_trip_s)
        if self.core.pongs < FIRST_PINGS:
            self._ping()

    def _keepalive(self) -> None:
        if not self._heard and self._pinged:
            self.kill(StreamClosed(f"session with {self.name} answers no ping"), frames.TIMED_OUT)
            return
        self._pinged = not self._heard
        if not self.closed:
            self._ping()
        self._heard = False
        newest = self.core.newest_stream
        if self.core.streams or newest != self._opened:
            self._idle_since, self._opened = None, newest  # those that came and went in between count as well
        elif self._idle_since is None:
            self._idle_since = self._loop.time()
        self._timer = self._loop.call_later(self._keepalive_s, self._keepalive)
