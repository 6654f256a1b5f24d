"""The serving end of RPC: methods by name, each call a task with the caller's deadline, bounded per connection."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from node.errors import BadRequest, Busy, NodeError, TimedOut, to_wire
from node.node_tls import Peer
from node.rpc.connection import FrameConnection
from node.rpc.frames import (
    REQUEST_BYTES_MAX,
    BadFrame,
    Cancel,
    End,
    Failure,
    Frame,
    Item,
    Request,
    Response,
)
from node.tasks import Tasks
from raftstate.loop_load import LOOP

log = logging.getLogger("lictor.rpc")

UPLOAD_BYTES_HIGH, UPLOAD_BYTES_LOW = 8 * 1024 * 1024, 2 * 1024 * 1024
"""Bytes of one upload that may wait: above the first its connection is read no more, until below the second."""
PIECE_BYTES_MIN = 128
FAILURE_TEXT_MAX = 4096


class Upload:
    """The pieces of a body that comes in pieces; `hold` and `go_on` stop and start the reading of the connection."""

    def __init__(self, hold: Callable[[], None], go_on: Callable[[], None]) -> None:
        self._pieces: asyncio.Queue[bytes | None] = asyncio.Queue()
        self._bytes = 0
        self._hold, self._go_on = hold, go_on
        self._held = False

    def put(self, piece: bytes | None) -> None:
        """Take in the next piece; None ends the upload."""
        self._pieces.put_nowait(piece)
        # A piece counts for a little more than it holds: many empty ones take room as well.
        self._bytes += _weight(piece)
        if not self._held and self._bytes > UPLOAD_BYTES_HIGH:
            self._held = True
            self._hold()

    async def read(self) -> AsyncIterator[bytes]:
        """Yield the pieces."""
        while (piece := await self._pieces.get()) is not None:
            self._bytes -= _weight(piece)
            if self._held and self._bytes < UPLOAD_BYTES_LOW:
                self.release()
            yield piece

    def release(self) -> None:
        """Let the connection be read again."""
        if self._held:
            self._held = False
            self._go_on()


def _weight(piece: bytes | None) -> int:
    return PIECE_BYTES_MIN + len(piece or b"")


@dataclass
class Call:
    """One request, as its method sees it."""

    peer: Peer
    body: bytes
    deadline: float
    """Loop time; infinity for a stream."""
    pieces: Upload | None = None

    def left_s(self) -> float:
        """Seconds until the caller gives up."""
        return max(0.0, self.deadline - asyncio.get_running_loop().time())

    def upload(self) -> AsyncIterator[bytes]:
        """The pieces of an upload. Raises BadRequest if the call is none."""
        if self.pieces is None:
            raise BadRequest("this call must be an upload")
        return self.pieces.read()


class Feed:
    """A stream that its source pushes: it has no task of its own, since there may be tens of thousands.

    Whoever feeds it sets `on_close`, and `on_writable`, called when a peer that had fallen behind reads again.
    """

    __slots__ = ("_connection", "_number", "on_close", "on_writable")

    def __init__(self, connection: ServerConnection, number: int) -> None:
        self._connection, self._number = connection, number
        self.on_close: Callable[[], None] = _nothing
        self.on_writable: Callable[[], None] = _nothing

    @property
    def writable(self) -> bool:
        """False: the peer is behind; send nothing now."""
        return self._connection.can_write

    def send(self, body: bytes) -> None:
        """Send one item."""
        self._connection.send(Item(self._number, body))

    def closed(self) -> None:
        """It is over: tell its source, and let go of it, or the two would keep each other and the connection."""
        on_close, self.on_close, self.on_writable = self.on_close, _nothing, _nothing
        on_close()

    def fail(self, error: NodeError) -> None:
        """End the stream by an error."""
        self._connection.end_feed(self._number, error)


class Reply:
    """The answer to a call that has no task of its own. Given after the caller went away, it is dropped."""

    __slots__ = ("_connection", "_number")

    def __init__(self, connection: ServerConnection, number: int) -> None:
        self._connection, self._number = connection, number

    def send(self, outcome: bytes | NodeError) -> None:
        """Answer; once."""
        self._connection.end_direct(self._number, outcome)


def _nothing() -> None:
    pass


Direct = Callable[["Call", Reply], bool]
"""Begin a call that its reply ends; False: nothing has begun, run the unary method instead."""
Feeding = Callable[["Call", Feed], bool]
"""Begin to feed; False: not at once, stream it instead."""
Immediate = Callable[["Call"], bytes]
"""Answer without waiting for anything."""
Unary = Callable[[Call], Awaitable[bytes]]
Streaming = Callable[[Call], AsyncIterator[bytes]]


class Methods:
    """What a server answers to."""

    def __init__(self) -> None:
        self.immediate: dict[str, Immediate] = {}
        self.unary: dict[str, Unary] = {}
        self.streaming: dict[str, Streaming] = {}
        self.feeding: dict[str, Feeding] = {}
        self.direct: dict[str, Direct] = {}

    def add(self, name: str, method: Unary) -> None:
        """Serve calls with one answer."""
        self.unary[name] = method

    def add_immediate(self, name: str, method: Immediate) -> None:
        """Serve calls that are answered in the turn of the loop in which they come: no task, no timer."""
        self.immediate[name] = method

    def add_direct(self, name: str, method: Direct) -> None:
        """Serve calls with one answer without a task, where `method` can."""
        self.direct[name] = method

    def add_feed(self, name: str, method: Feeding) -> None:
        """Serve calls of a streaming method without a task, where `method` can."""
        self.feeding[name] = method

    def add_stream(self, name: str, method: Streaming) -> None:
        """Serve calls answered by a stream."""
        self.streaming[name] = method


class ServerConnection(FrameConnection):
    """One client's connection."""

    def __init__(
        self,
        peer: Peer,
        methods: Methods,
        tasks: Tasks,
        *,
        inflight_max: int,
        blocked: Callable[[str], bool],
        on_end: Callable[[ServerConnection], None],
    ) -> None:
        super().__init__(peer, bytes_max=REQUEST_BYTES_MAX, blocked=blocked)
        self._methods, self._tasks, self._inflight_max, self._on_end = methods, tasks, inflight_max, on_end
        self._calls: dict[int, asyncio.Task[Any]] = {}
        self._uploads: dict[int, Upload] = {}
        self._feeds: dict[int, Feed] = {}
        self._direct: set[int] = set()
        """Calls that have no task and wait for their reply."""

    def __len__(self) -> int:
        """Calls in progress."""
        return len(self._calls) + len(self._feeds) + len(self._direct)

    def frame_received(self, frame: Frame) -> None:
        """Start, feed or cancel a call."""
        LOOP.requests += 1
        if isinstance(frame, Request):
            self._begin(frame)
        elif isinstance(frame, Cancel):
            if (task := self._calls.get(frame.call)) is not None:
                task.cancel()
            elif (feed := self._feeds.pop(frame.call, None)) is not None:
                feed.closed()
            else:
                self._direct.discard(frame.call)  # what it began goes on, and nobody is told
        elif isinstance(frame, (Item, End)):
            self._piece(frame)
        else:
            raise BadFrame(f"a client may not send {type(frame).__name__}")

    def _begin(self, request: Request) -> None:
        if request.call in self._calls or request.call in self._feeds or request.call in self._direct:
            raise BadFrame(f"call {request.call} is already in progress")
        if (immediate := self._methods.immediate.get(request.method)) is not None:
            # Before the bound on calls: an agent that does much must still be able to say that it lives.
            self._at_once(request, immediate)
            return
        if len(self) >= self._inflight_max:
            self._fail(request.call, Busy(f"{self._inflight_max} calls are in progress: try again in a moment"))
            return
        now = asyncio.get_running_loop().time()
        deadline = now + request.timeout_ms / 1000 if request.timeout_ms else float("inf")
        call = Call(self.peer, request.body, deadline)
        if request.upload:
            call.pieces = self._uploads[request.call] = Upload(self.pause_reading, self.resume_reading)
        if (feeding := self._methods.feeding.get(request.method)) is not None and self._feed(feeding, call, request):
            return
        direct = None if request.upload else self._methods.direct.get(request.method)
        if direct is not None and self._reply(direct, call, request):
            return
        work: Callable[[], Awaitable[None]]
        if (unary := self._methods.unary.get(request.method)) is not None:
            work = partial(self._answer, request.call, unary, call)
        elif (streaming := self._methods.streaming.get(request.method)) is not None:
            work = partial(self._stream, request.call, streaming, call)
        else:
            self._uploads.pop(request.call, None)
            self._fail(request.call, BadRequest(f"unknown method {request.method!r}: upgrade this server"))
            return
        self._calls[request.call] = self._tasks.spawn(self._guard(request.call, work))

    def _at_once(self, request: Request, method: Immediate) -> None:
        try:
            body = method(Call(self.peer, request.body, float("inf")))
        except Exception as error:  # noqa: BLE001 - told to the caller, as in `_guard`
            self._fail(request.call, self._as_node_error(error))
            return
        self.send(Response(request.call, body))

    def _as_node_error(self, error: Exception) -> NodeError:
        """The edge of the protocol: a fault in one call must answer that call and leave the others alone."""
        if isinstance(error, NodeError):
            return error
        log.error("rpc: a call of %s failed", self.peer.node, exc_info=error)
        return NodeError(f"the server failed: {type(error).__name__}; see its log")

    def _feed(self, feeding: Feeding, call: Call, request: Request) -> bool:
        feed = self._feeds[request.call] = Feed(self, request.call)
        try:
            if feeding(call, feed):
                return True
        except Exception as error:  # noqa: BLE001 - told to the caller, as in `_guard`
            self.end_feed(request.call, self._as_node_error(error))
            return True
        del self._feeds[request.call]
        return False

    def _reply(self, direct: Direct, call: Call, request: Request) -> bool:
        self._direct.add(request.call)
        try:
            begun = direct(call, Reply(self, request.call))
        except Exception as error:  # noqa: BLE001 - told to the caller, as in `_guard`
            self.end_direct(request.call, self._as_node_error(error))
            return True
        if not begun:
            self._direct.discard(request.call)
        return begun

    def end_direct(self, number: int, outcome: bytes | NodeError) -> None:
        """Answer a call that has no task, if it still waits."""
        if number in self._direct:
            self._direct.remove(number)
            if isinstance(outcome, NodeError):
                self._fail(number, outcome)
            else:
                self.send(Response(number, outcome))

    def end_feed(self, number: int, error: NodeError) -> None:
        """End a fed stream by an error."""
        if (feed := self._feeds.pop(number, None)) is not None:
            feed.closed()
            self._fail(number, error)

    def resume_writing(self) -> None:
        """The peer reads again."""
        super().resume_writing()
        for feed in tuple(self._feeds.values()):
            if not self.can_write:
                break  # one that was let catch up has filled the buffer again; the rest have their turn later
            feed.on_writable()

    def _piece(self, frame: Item | End) -> None:
        upload = self._uploads.get(frame.call)
        if upload is not None:  # else the call ended before its upload did
            upload.put(frame.body if isinstance(frame, Item) else None)

    async def _guard(self, number: int, work: Callable[[], Awaitable[None]]) -> None:
        # Made here, not by the caller: a task that is cancelled before its first step would leave it unawaited.
        try:
            await work()
        except TimeoutError:
            self._fail(number, TimedOut())
        except asyncio.CancelledError:
            raise
        except Exception as error:  # noqa: BLE001 - told to the caller
            self._fail(number, self._as_node_error(error))
        finally:
            self._calls.pop(number, None)
            if (upload := self._uploads.pop(number, None)) is not None:
                upload.release()

    async def _answer(self, number: int, method: Unary, call: Call) -> None:
        if call.deadline == float("inf"):
            body = await method(call)
        else:
            async with asyncio.timeout_at(call.deadline):
                body = await method(call)
        self.send(Response(number, body))

    async def _stream(self, number: int, method: Streaming, call: Call) -> None:
        items = method(call)
        try:
            async for body in items:
                await self.writable()
                self.send(Item(number, body))
        finally:
            await items.aclose()  # type: ignore[attr-defined]
        self.send(End(number))

    def _fail(self, number: int, error: NodeError) -> None:
        code, text, reason, status = to_wire(error)
        self.send(Failure(number, code, text[:FAILURE_TEXT_MAX], reason[:64], status))

    def connection_ended(self, error: BaseException | None) -> None:
        """Nobody waits for the answers any more."""
        for task in self._calls.values():
            task.cancel()
        feeds, self._feeds = self._feeds, {}
        for feed in feeds.values():
            feed.closed()
        self._on_end(self)
