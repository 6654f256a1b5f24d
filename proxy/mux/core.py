"""A mux session's logic: frames in, calls on streams out, frames to send kept in ``out``. No I/O, no clock.

The shell (:mod:`proxy.mux.session`) feeds :meth:`MuxCore.receive`, sends what :meth:`MuxCore.take_output` gives, and
says when the transport is full (``blocked``) and when it has room again (:meth:`MuxCore.pump`).

A stream is a :class:`~proxy.stream.Channel`. What it holds unsent is bounded: once it cannot send all of what it was
given it pauses its peer, so at most one read of the peer waits here. Waiting streams take turns.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any, Final, Protocol

from proxy.errors import MuxError, StreamClosed, StreamRefused
from proxy.mux import frames
from proxy.mux.flow import GrowthBudget, MemoryBudget, ReceiveWindow, SendCredit
from proxy.receiver import Face
from proxy.stream import NOBODY as NOBODY
from proxy.stream import Channel, Data

MAX_STREAMS: Final = 4096
OUT_HIGH_BYTES: Final = 256 * 1024
"""Streams wait for their turn while this much is queued in ``out``."""
OUT_MAX_BYTES: Final = 4 * 1024 * 1024
"""A peer that makes us answer this much while it reads nothing is cut off."""
TURN_BYTES: Final = 64 * 1024
"""What a waiting stream may send in its turn while others wait."""
GROWTH_BYTES: Final = 64 * 1024 * 1024
"""How much the receive windows of a session may grow in sum."""
MAX_STREAM_ID: Final = (1 << 31) - 1
_header: Final = frames.HEADER.pack
_DATA: Final = frames.DATA << 24


def _nothing() -> None:
    """Nobody is to be told any more."""


class StreamOwner(Protocol):
    """Who is told of a stream's fate. Called once for each stream: accepted, then closed; or refused; or closed."""

    def stream_accepted(self, stream: MuxStream) -> None:
        """The other side admitted the stream and its app is connected (dialing side only)."""

    def stream_refused(self, stream: MuxStream, code: int, text: str) -> None:
        """The other side did not admit the stream; no byte reached its app (dialing side only)."""

    def stream_closed(self, stream: MuxStream) -> None:
        """Both directions ended, or the stream was reset, or its session was lost."""


class MuxStream:
    """One stream. ``peer`` gets what arrives; ``owner`` is told of its fate."""

    __slots__ = (
        "_core", "_credit", "_header", "_header_size", "_window", "accepted", "closed", "data_sent", "fin_in",
        "fin_out", "fin_wanted", "id", "owner", "peer", "pending", "service",
    )  # fmt: skip

    def __init__(self, core: MuxCore, stream_id: int, service: str, peer: Channel, owner: StreamOwner | None) -> None:
        self._core = core
        self._credit = SendCredit()
        self._window = ReceiveWindow(core.growth, core.memory)
        self._header = b""
        """Of the last piece of data that was sent, and for how long a piece it is."""
        self._header_size = -1
        self.id = stream_id
        self.service = service
        self.peer = peer
        self.owner = owner
        self.accepted = False
        self.closed = False
        self.data_sent = False
        self.fin_in = False
        self.fin_wanted = False
        self.fin_out = False
        self.pending: deque[Data] | None = None
        """Given to us by the peer, not sent yet; non-empty means that the peer is paused. Made when first needed."""

    # Channel

    def write(self, data: Data) -> None:
        if self.fin_wanted or self.closed:
            return
        core, credit = self._core, self._credit
        size = len(data)
        if self.pending or core.blocked or size > credit.left or core.out_bytes > OUT_HIGH_BYTES:
            if not self.pending:
                self.peer.pause_reading()
            if self.pending is None:
                self.pending = deque()
            self.pending.append(data)
            core.memory.held += size
            if core.memory.over:
                self._drop_for_memory()
            elif credit.left and len(self.pending) == 1:
                core.enqueue(self)
            return
        credit.left -= size
        self.data_sent = True
        # As core.send_data, without a call: this is every piece of data in the common case. Pieces are often as long
        # as the one before.
        if size != self._header_size:
            self._header_size, self._header = size, _header(_DATA | size, self.id)
        out = core.out
        out.append(self._header)
        out.append(data)
        core.out_bytes += size + frames.HEADER_BYTES
        if len(out) == 2:
            core.wake()

    def write_eof(self) -> None:
        if self.fin_wanted or self.closed:
            return
        self.fin_wanted = True
        if not self.pending:
            self._send_fin()

    def abort(self, error: Exception | None = None) -> None:
        self.reset(frames.CANCELLED, str(error) if error else "connection closed")

    def pause_reading(self) -> None:
        self._window.pause()

    def resume_reading(self) -> None:
        if not self._window.taking:
            credit = self._window.resume()
            if credit and not self.closed and not self.fin_in:
                self._core.send_control(frames.window(self.id, credit))

    @property
    def retiring(self) -> bool:
        """Whether the session takes no more streams; one that could be kept for later should end then."""
        return self._core.draining or self._core.going_away

    # Admission, on the accepting side

    def accept(self) -> None:
        """Admit the stream; its app is connected."""
        if not self.closed and not self.accepted:
            self.accepted = True
            self._core.send_control(frames.frame(frames.ACCEPT, self.id))

    def refuse(self, code: int, text: str) -> None:
        """Turn the stream away before any of its bytes reached the app."""
        if not self.closed:
            self._core.send_control(frames.coded(frames.REFUSE, self.id, code, text))
            self._core.forget(self)

    def reset(self, code: int, text: str) -> None:
        """Drop both directions and tell the other side; the peer channel is not called."""
        if not self.closed:
            self._core.send_control(frames.coded(frames.RESET, self.id, code, text))
            self._core.forget(self)

    # Used by the core

    def take_turn(self, budget: int) -> bool:
        """Send up to ``budget`` bytes of what waits; return whether more could be sent in another turn."""
        core, credit, pending = self._core, self._credit, self.pending
        while pending and budget and credit.left:
            data = pending[0]
            size = len(data)
            allowed = min(size, credit.left, budget)
            if allowed < size:
                view = memoryview(data)
                pending[0] = view[allowed:]
                data = view[:allowed]
            else:
                pending.popleft()
            credit.left -= allowed
            budget -= allowed
            core.memory.held -= allowed
            self.data_sent = True
            core.send_data(self.id, data, allowed)
        if pending:
            return credit.left > 0
        # Even a peer that has sent its end: reading is how a socket learns that it is gone.
        self.peer.resume_reading()
        if self.fin_wanted and not self.fin_out and not self.pending and not self.closed:
            self._send_fin()
        return False

    def _send_fin(self) -> None:
        self.fin_out = True
        self._core.send_control(frames.frame(frames.FIN, self.id))
        if self.fin_in:
            self._core.forget(self)

    def on_data(self, payload: bytes | memoryview) -> None:
        if self.fin_in:
            raise MuxError(f"data after the end of stream {self.id}")
        window = self._window
        size = len(payload)
        if window.taking and size <= window.left and (window.held + size) * 2 < window.size:
            # As ReceiveWindow.received where nothing is to be granted yet: nearly all data is such.
            window.left -= size
            window.held += size
            # Told by name, it is a call to compiled code, and not a search for a method; told of a Channel, which
            # Face alone is not, it would be one.
            peer: Any = self.peer
            if isinstance(peer, Face):
                peer.write(payload)
            else:
                peer.write(payload)
            return
        credit = window.received(size)
        self.peer.write(payload)
        if credit and not self.closed:
            self._core.send_control(frames.window(self.id, credit))
        elif not self._window.taking and self._core.memory.over and not self.closed:
            self._drop_for_memory()

    def on_fin(self) -> None:
        if self.fin_in:
            raise MuxError(f"stream {self.id} ended twice")
        self.fin_in = True
        self.peer.write_eof()
        if self.fin_out and not self.closed:
            self._core.forget(self)

    def on_window(self, credit: int) -> None:
        waiting = self.pending and not self._credit.left
        self._credit.grant(credit)
        if waiting:
            self._core.enqueue(self)

    def _drop_for_memory(self) -> None:
        """This process holds too much, and this stream is what was just added to."""
        self._core.memory.overruns += 1
        peer, text = self.peer, "sidecar holds too much for peers that read slowly"
        self.reset(frames.TOO_MANY, text)
        peer.abort(StreamClosed(text))

    def peername(self) -> object:
        """Return the address that the session came from, as sockets give it; None when it is not known."""
        return self._core.peername()

    def release(self) -> None:
        """Mark closed and let go of buffers; called by the core once."""
        self.closed = True
        self.peer = NOBODY  # the two refer to each other; parted, they are freed without the collector
        if self.pending:
            self._core.memory.held -= sum(map(len, self.pending))
            self.pending.clear()
        self._window.close()


class MuxCore:
    """Both sides of a session. ``acceptor`` is given streams that the peer opens; None on the dialing side."""

    def __init__(
        self,
        *,
        acceptor: Callable[[MuxStream], None] | None,
        max_streams: int = MAX_STREAMS,
        memory: MemoryBudget | None = None,
    ) -> None:
        self.memory = memory or MemoryBudget()
        """What all sessions of this process share."""
        self.streams: dict[int, MuxStream] = {}
        self.out: list[Data] = []
        self.out_bytes = 0
        self.blocked = False
        """The transport is full; set by the shell."""
        self.going_away = False
        """The peer takes no more streams."""
        self.draining = False
        """We take no more streams."""
        self.growth = GrowthBudget(GROWTH_BYTES)
        self.pongs = 0
        """Answers seen to our pings."""
        self.on_pong: Callable[[], None] = _nothing
        self.max_streams = max_streams
        self._acceptor = acceptor
        self._parser = frames.FrameParser()
        self._last_id = -1
        self.waiting: dict[MuxStream, None] = {}
        """Streams with something to send and credit for it, in turn order."""

    def wake(self) -> None:
        """There is something to send, or the session is over; for the shell, which overrides it."""

    # From the shell

    def receive(self, data: bytes) -> None:
        """Take bytes from the peer. Raises :class:`MuxError`; the session must then end."""
        streams = self.streams
        parser = self._parser
        only = parser.only_data_for(data)
        if only:
            # By far the most frequent case, in few steps.
            stream = streams.get(only)
            if stream is not None:
                stream.on_data(frames.without_header(data))
            else:
                self._check_known(frames.DATA, only)
        else:
            for kind, stream_id, payload in parser.feed(data):
                if kind == frames.DATA:
                    stream = streams.get(stream_id)
                    if stream is not None:
                        stream.on_data(payload)
                    else:
                        self._check_known(kind, stream_id)
                else:
                    self._receive_control(kind, stream_id, payload)
        if self.out_bytes > OUT_MAX_BYTES:
            raise MuxError("peer makes us answer but reads nothing")
        if self.waiting and not self.blocked:
            self.wake()

    def take_output(self) -> list[Data]:
        """Return what is to be sent now, in order."""
        out, self.out = self.out, []
        self.out_bytes = 0
        return out

    def pump(self) -> None:
        """Let waiting streams send, in turn, until enough is queued. Call after a flush while not blocked."""
        waiting = self.waiting
        while waiting and not self.blocked and self.out_bytes < OUT_HIGH_BYTES:
            stream = next(iter(waiting))
            del waiting[stream]
            # Alone it sends what there is in one piece, which then costs one frame and one write at the other side.
            if not stream.closed and stream.take_turn(TURN_BYTES if waiting else OUT_HIGH_BYTES):
                waiting[stream] = None

    def open(self, service: str, peer: Channel, owner: StreamOwner) -> MuxStream:
        """Open a stream (dialing side). Data may be written at once; it is lost if the stream is refused."""
        self._last_id += 2
        stream = MuxStream(self, self._last_id, service, peer, owner)
        self.streams[stream.id] = stream
        self.send_control(frames.frame(frames.OPEN, stream.id, service.encode()))
        return stream

    @property
    def accepts(self) -> bool:
        """Whether this is the accepting side."""
        return self._acceptor is not None

    @property
    def newest_stream(self) -> int:
        """The id of the stream that was opened last; -1 before there was one."""
        return self._last_id

    @property
    def can_open(self) -> bool:
        """Whether the dialing side may open one more stream here."""
        full = len(self.streams) >= self.max_streams or self._last_id + 2 > MAX_STREAM_ID
        return not (full or self.going_away or self.draining)

    def ping(self) -> None:
        """Ask the peer for a sign of life."""
        self.send_control(frames.frame(frames.PING, 0))

    def go_away(self, code: int, text: str) -> None:
        """Take no more streams; live ones go on. Idempotent."""
        if not self.draining:
            self.draining = True
            self.send_control(frames.coded(frames.GOAWAY, 0, code, text))

    def lose(self, error: Exception) -> None:
        """The session is gone: every stream's peer is aborted."""
        self.draining = True
        for stream in list(self.streams.values()):
            if not stream.closed:
                peer = stream.peer
                self.forget(stream)
                peer.abort(error)

    def peername(self) -> object:
        """Return the peer's address, as sockets give it; None when it is not known."""
        return None

    def release(self) -> None:
        """The session is over: let go of the shell."""
        self.on_pong = _nothing
        self._acceptor = None

    # From streams

    def send_data(self, stream_id: int, data: Data, size: int) -> None:
        out = self.out
        out.append(frames.header(frames.DATA, stream_id, size))
        out.append(data)
        self.out_bytes += size + frames.HEADER_BYTES
        if len(out) == 2:
            self.wake()

    def send_control(self, encoded: bytes) -> None:
        self.out.append(encoded)
        self.out_bytes += len(encoded)
        if len(self.out) == 1:
            self.wake()

    def enqueue(self, stream: MuxStream) -> None:
        self.waiting[stream] = None
        if len(self.waiting) == 1 and not self.blocked:
            self.wake()

    def forget(self, stream: MuxStream) -> None:
        if self.streams.pop(stream.id, None) is None:
            return
        self.waiting.pop(stream, None)
        stream.release()
        owner, stream.owner = stream.owner, None
        if owner is not None:
            owner.stream_closed(stream)
        if not self.streams and (self.draining or self.going_away):
            self.wake()

    @property
    def finished(self) -> bool:
        """Whether the session has nothing left to do: no stream lives and none will come."""
        return (self.draining or self.going_away) and not self.streams and not self.out

    # Frames other than DATA

    def _receive_control(self, kind: int, stream_id: int, payload: bytes | memoryview) -> None:
        if kind == frames.OPEN:
            self._on_open(stream_id, payload)
            return
        if stream_id == 0:
            self._on_session_frame(kind, payload)
            return
        stream = self.streams.get(stream_id)
        if stream is None:
            self._check_known(kind, stream_id)
        elif kind == frames.WINDOW:
            stream.on_window(frames.decode_window(payload))
        elif kind == frames.FIN:
            stream.on_fin()
        elif kind == frames.RESET:
            code, text = frames.decode_coded(payload)
            peer = stream.peer
            self.forget(stream)
            reason = f"{frames.CODE_NAMES.get(code, code)}: {text}"
            # An accepted stream's app may go: nothing of what was under way has reached it.
            peer.abort(StreamRefused(code, reason) if code == frames.APP_DOWN else StreamClosed(reason))
        elif self._acceptor is not None or stream.accepted:
            raise MuxError(f"admission frame {kind} out of place on stream {stream_id}")
        elif kind == frames.ACCEPT:
            stream.accepted = True
            if stream.owner is not None:
                stream.owner.stream_accepted(stream)
        else:
            code, text = frames.decode_coded(payload)
            owner, stream.owner = stream.owner, None
            self.forget(stream)
            if owner is not None:
                owner.stream_refused(stream, code, text)

    def _on_open(self, stream_id: int, payload: bytes | memoryview) -> None:
        if self._acceptor is None:
            raise MuxError("the accepting side opened a stream")
        if stream_id <= self._last_id or stream_id % 2 == 0:
            raise MuxError(f"stream id {stream_id} does not follow {self._last_id}")
        self._last_id = stream_id
        try:
            service = bytes(payload).decode()
        except UnicodeDecodeError as error:
            raise MuxError("service name in OPEN is not UTF-8") from error
        if self.draining:
            self.send_control(frames.coded(frames.REFUSE, stream_id, frames.DRAINING, "sidecar is draining"))
        elif len(self.streams) >= self.max_streams or self.memory.scarce:
            full = len(self.streams) >= self.max_streams
            text = f"session has {self.max_streams} streams already" if full else "sidecar's buffers are nearly full"
            self.send_control(frames.coded(frames.REFUSE, stream_id, frames.TOO_MANY, text))
        else:
            stream = MuxStream(self, stream_id, service, NOBODY, None)
            self.streams[stream_id] = stream
            self._acceptor(stream)

    def _on_session_frame(self, kind: int, payload: bytes | memoryview) -> None:
        if kind == frames.PING:
            if len(payload) > 8:
                raise MuxError("PING payload is longer than 8 bytes")
            self.send_control(frames.frame(frames.PONG, 0, bytes(payload)))
        elif kind == frames.PONG:
            self.pongs += 1
            self.on_pong()
        else:
            frames.decode_coded(payload)
            self.going_away = True
            self.wake()

    def _check_known(self, kind: int, stream_id: int) -> None:
        """A frame for a stream that is gone is normal (it crossed our reset); for one that never was, it is not."""
        if stream_id == 0 or stream_id > self._last_id or stream_id % 2 == 0:
            raise MuxError(f"frame {kind} on stream {stream_id}, which was never opened")
