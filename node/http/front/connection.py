"""One client's connection: plain requests are answered here, one at a time; with the first that is not plain, the
connection is aiohttp's for good."""

from __future__ import annotations

import asyncio
import logging
import sys
from typing import TYPE_CHECKING, Any, cast

from aiohttp import web

from node.http.front import repeats
from node.http.front.answers import brief, encode, failure
from node.http.front.heads import HEAD_BYTES_MAX, Head
from node.http.front.repeats import Body, Parked
from raftstate.loop_load import LOOP

if TYPE_CHECKING:
    from aiohttp.web_protocol import RequestHandler

    from node.http.front.listener import Front

log = logging.getLogger("lictor.http")

AHEAD_BYTES_MAX = 64 * 1024
"""What a client may send ahead while a request of its is answered; beyond, reading stops until then."""
LONG_HEAD_BYTES_MAX = 64 * 1024
"""A head that is longer is refused; one between the two bounds is aiohttp's, which bounds its lines."""
_EAGER: dict[str, Any] = {"eager_start": True} if sys.version_info >= (3, 12) else {}


class Connection(asyncio.Protocol):
    """The protocol of an accepted connection. It stands in for aiohttp's where a request asks for its peer."""

    __slots__ = (
        "_ahead", "_busy", "_counted", "_deaf", "_front", "_head", "_peer", "_read_paused", "_scanned", "_serving",
        "_slow", "_task", "_transport", "_write_paused",
    )  # fmt: skip

    def __init__(self, front: Front) -> None:
        self._front = front
        self._transport: asyncio.Transport | None = None
        self._peer = ""
        self._ahead: bytes | bytearray = b""
        """Received and not yet part of a request that is answered."""
        self._scanned = 0
        """So much of it holds no end of a head."""
        self._head: Head | None = None
        """Of the request whose body is not all there yet."""
        self._slow: RequestHandler | None = None
        self._task: asyncio.Task[None] | None = None
        self._busy = False
        """A request is being answered here."""
        self._serving = False
        """`_serve` is on the stack."""
        self._deaf = False
        """What comes is dropped: the connection is about to end."""
        self._counted = self._read_paused = self._write_paused = False

    # What aiohttp's requests ask of their protocol

    @property
    def transport(self) -> asyncio.Transport | None:
        return self._transport

    @property
    def ssl_context(self) -> Any:
        return None if self._transport is None else self._transport.get_extra_info("sslcontext")

    @property
    def peername(self) -> Any:
        return None if self._transport is None else self._transport.get_extra_info("peername")

    @property
    def sockname(self) -> Any:
        return None if self._transport is None else self._transport.get_extra_info("sockname")

    # asyncio's callbacks

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        peer = transport.get_extra_info("peername")
        self._peer = peer[0] if isinstance(peer, tuple) and peer else "local"
        refusal = self._front.enter(self, self._peer)
        if refusal is None:
            self._counted = True
            self._front.heads_due.begin(self)
        else:
            self._turn_away(*refusal)

    def data_received(self, data: bytes) -> None:
        LOOP.requests += 1
        if self._slow is not None:
            self._slow.data_received(data)
        elif not self._deaf:
            self._take(data)

    def eof_received(self) -> None:
        if self._slow is not None:
            self._slow.eof_received()

    def pause_writing(self) -> None:
        self._write_paused = True
        self._front.writes_due.begin(self)
        if self._slow is not None:
            self._slow.pause_writing()

    def resume_writing(self) -> None:
        self._write_paused = False
        if not self._deaf:
            self._front.writes_due.end(self)
        if self._slow is not None:
            self._slow.resume_writing()
        else:
            self._serve()

    def connection_lost(self, exc: Exception | None) -> None:
        self._front.left(self, self._peer if self._counted else None)
        self._front.parking.leave(self)
        self._transport = None
        self._ahead = b""
        self._deaf = True
        if self._slow is not None:
            self._slow.connection_lost(exc)
        if self._task is not None:
            self._task.cancel()  # so a blocking query parks no longer

    # Requests

    def _take(self, data: bytes) -> None:
        if not self._ahead:
            self._ahead = data
        else:
            if not isinstance(self._ahead, bytearray):
                self._ahead = bytearray(self._ahead)
            self._ahead += data
        if not self._busy and not self._write_paused:
            self._serve()
        elif len(self._ahead) > AHEAD_BYTES_MAX and not self._read_paused and self._transport is not None:
            self._read_paused = True
            self._transport.pause_reading()

    def _serve(self) -> None:
        """Begin what can be begun of what has been received."""
        if self._serving:
            return
        self._serving = True
        try:
            while self._ahead and not (self._busy or self._write_paused or self._deaf) and self._slow is None:
                if not self._step():
                    break
        finally:
            self._serving = False
        if self._read_paused and not (self._busy or self._write_paused) and self._transport is not None:
            self._read_paused = False
            self._transport.resume_reading()

    def _step(self) -> bool:
        """Begin one request; return whether there may be another to begin."""
        front, ahead, head = self._front, self._ahead, self._head
        if head is None:
            end = ahead.find(b"\r\n\r\n", max(0, self._scanned - 3)) + 4
            if end < 4:
                self._await_head()
                return False
            self._scanned = 0
            data = ahead if end == len(ahead) and isinstance(ahead, bytes) else bytes(ahead[:end])
            head = front.heads.head(data) if end <= HEAD_BYTES_MAX else None
            front.heads_due.end(self)
            front.idle_due.end(self)
            if head is None:
                self._hand_over()
                return False
        end = head.size + head.body_size
        if len(ahead) < end:
            if self._head is None:
                self._head = head
                front.bodies_due.begin(self)
            return False
        if self._head is not None:
            self._head = None
            front.bodies_due.end(self)
        body = bytes(ahead[head.size : end]) if head.body_size else b""
        self._ahead = ahead[end:] if end < len(ahead) else b""
        if head.memo is not None and (answer := repeats.again(head.memo, front.ask)) is not None:
            self._send(answer, ends=False)
            return True
        self._busy = True
        if head.parked is not None and front.parking.enter_at_once(self, head, front.ask):
            return False
        if front.writes is not None and front.writes.begin(head, body, self):
            return False
        self._begin(head, Body(body))
        return not self._busy

    def _begin(self, head: Head, body: Body) -> None:
        task = asyncio.Task(self._answer(head, body), loop=self._front.loop, **_EAGER)
        if self._busy:
            self._task = task

    def _await_head(self) -> None:
        if len(self._ahead) > LONG_HEAD_BYTES_MAX:
            self._turn_away(431, "Request Header Fields Too Large", "The request's head is too large")
            return
        if not self._scanned:
            self._front.heads_due.begin(self)
            self._front.idle_due.end(self)
        self._scanned = len(self._ahead)

    async def _answer(self, head: Head, body: Body) -> None:
        try:
            answer, ends = await self.make(head, body)
        except asyncio.CancelledError:
            self.close()  # nothing can be said of this request, and nothing may be answered in its place
            raise
        except Parked as parked:
            self._task = None
            if self._front.plain and parked.stale:
                head.parked = parked
            if not self._deaf:
                self._front.parking.enter(self, head, parked)
            return
        self._task = None
        self.take(answer, ends=ends)

    async def make(self, head: Head, body: Body) -> tuple[bytes, bool]:
        """Run the handler; return the answer's bytes, and whether the connection ends with it. Raises Parked."""
        front = self._front
        try:
            response = await front.handle(head, front.request(head, body, self))
            made = encode(response, closing=front.closing)
            if front.repeats:
                repeats.keep(head, body, cast(web.Response, response), guarded=not front.plain)
        except Parked:
            raise
        except web.HTTPException as error:
            return encode(error, closing=front.closing)
        except TimeoutError:
            return encode(failure(504), closing=True)
        except Exception:
            # As with aiohttp: the client is told, the log gets the traceback, the connection ends.
            log.exception("%s %s failed past its handler", head.message.method, head.message.path)
            return encode(failure(500), closing=True)
        return made

    def take(self, answer: bytes, *, ends: bool) -> None:
        """Send the answer of the request that was begun on, and begin on the next."""
        self._busy = False
        self._send(answer, ends=ends)
        self._serve()

    def again(self, head: Head) -> None:
        """Answer a request that has waited for as long as it may."""
        self._begin(head, Body(b"", waits=False))

    def _send(self, answer: bytes, *, ends: bool) -> None:
        transport = self._transport
        if transport is None or transport.is_closing():
            return
        transport.write(answer)
        if ends:
            self._ahead = b""
            self._deaf = True
            self._front.writes_due.begin(self)  # what is still to be sent has its time too
            transport.close()
        elif not self._ahead:
            self._front.idle_due.begin(self)

    def _hand_over(self) -> None:
        """Give the connection, from the request that was not begun on, to aiohttp."""
        transport = self._transport
        if transport is None:
            return
        self._slow = slow = self._front.make_slow()
        data, self._ahead = bytes(self._ahead), b""
        slow.connection_made(transport)
        slow.data_received(data)

    # Ends that the client did not choose

    @property
    def closing(self) -> bool:
        """Whether the listener is ending, so that an answer must say that its connection ends with it."""
        return self._front.closing

    @property
    def task(self) -> asyncio.Task[None] | None:
        """What answers the request that has been begun on here."""
        return self._task

    def is_slow(self) -> bool:
        """Whether the connection is aiohttp's."""
        return self._slow is not None

    def time_out(self, what: str) -> None:
        """End the connection, with an answer if there is part of a request."""
        if not self._ahead:
            self.close()
            return
        self._turn_away(408, "Request Timeout", f"The request's {what} did not come in time")

    def close(self) -> None:
        """End the connection once what was written has left."""
        if self._transport is not None:
            self._transport.close()

    def abort(self) -> None:
        """End the connection at once."""
        if self._transport is not None:
            self._transport.abort()

    def cancel(self) -> None:
        """End the request that is being answered, unanswered, and the connection."""
        if self._task is not None:
            self._task.cancel()
        self.close()

    def _turn_away(self, status: int, reason: str, text: str) -> None:
        """Answer and end. What the client still sends is read for a moment, or a reset might overtake the answer."""
        transport = self._transport
        self._ahead = b""
        self._deaf = True
        if transport is None or transport.is_closing():
            return
        transport.write(brief(status, reason, text))
        if not self._front.linger(self):
            transport.close()
        elif transport.can_write_eof():
            transport.write_eof()
