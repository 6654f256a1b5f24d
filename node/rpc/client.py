"""The calling end of RPC: calls, streams and uploads over one connection, and the way to open it."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator, Callable
from typing import Any

from node.config import SERVER
from node.errors import BadRequest, NodeError, Overloaded, PkiError, TimedOut, Unreachable, from_wire
from node.node_tls import ALPN_RPC, Peer, peer_of
from node.rpc.connection import FrameConnection
from node.rpc.frames import (
    REQUEST_BYTES_MAX,
    RESPONSE_BYTES_MAX,
    BadFrame,
    Cancel,
    End,
    Failure,
    Frame,
    Item,
    Request,
    Response,
)

STREAM_ITEMS_MAX = 1024
"""Items of one stream that may wait for their reader; a reader further behind loses the stream and starts over."""
BUSY_ALERT = "TLSV1_ALERT_INTERNAL_ERROR"
"""How OpenSSL names `node.rpc.hello.ALERT_BUSY`."""
UPLOAD_PIECE_BYTES = 256 * 1024


Told = Callable[[bytes | NodeError], None]
"""What is told of a call that was begun."""


class _Stream:
    """The items of one stream, in order; an exception among them ends it."""

    def __init__(self) -> None:
        self.items: asyncio.Queue[bytes | BaseException | None] = asyncio.Queue()


class ClientConnection(FrameConnection):
    """A connection to a server. After it ended every call raises Unreachable."""

    def __init__(
        self,
        peer: Peer,
        *,
        blocked: Callable[[str], bool] = lambda node: False,
        on_end: Callable[[ClientConnection], None] = lambda connection: None,
    ) -> None:
        super().__init__(peer, bytes_max=RESPONSE_BYTES_MAX, blocked=blocked)
        self._on_end = on_end
        self._next = 0
        self._waiting: dict[int, asyncio.Future[bytes]] = {}
        self._told: dict[int, tuple[Told, asyncio.TimerHandle]] = {}
        self._streams: dict[int, _Stream] = {}

    async def call(self, method: str, body: bytes, timeout_s: float) -> bytes:
        """Return the answer. Raises TimedOut, Unreachable, and whatever the server answered.

        Unreachable and TimedOut leave open whether the server acted on the request.
        """
        number = self._open(method, body)
        loop = asyncio.get_running_loop()
        waiting: asyncio.Future[bytes] = loop.create_future()
        self._waiting[number] = waiting
        # A timer on the future, not `asyncio.timeout`: a third of a short call's cost otherwise.
        timer = loop.call_later(timeout_s, _expire, waiting)
        try:
            self.send(Request(number, method, _millis(timeout_s), body))
            return await waiting
        except TimeoutError:
            self.send(Cancel(number))
            raise TimedOut(f"{self.peer.node} did not answer {method} within {timeout_s:g} s") from None
        except asyncio.CancelledError:
            self.send(Cancel(number))
            raise
        finally:
            timer.cancel()
            self._waiting.pop(number, None)

    def begin(self, method: str, body: bytes, timeout_s: float, told: Told) -> None:
        """As `call`, for who has no task to wait in: ``told`` gets what `call` would return or raise, once, later.

        It must not raise. Raises Unreachable or BadRequest itself when nothing was sent.
        """
        number = self._open(method, body)
        self._told[number] = told, self._loop.call_later(timeout_s, self._late, number, method, timeout_s)
        self.send(Request(number, method, _millis(timeout_s), body))

    def _late(self, number: int, method: str, timeout_s: float) -> None:
        self.send(Cancel(number))
        self._tell(number, TimedOut(f"{self.peer.node} did not answer {method} within {timeout_s:g} s"))

    def _tell(self, number: int, outcome: bytes | NodeError) -> None:
        told, timer = self._told.pop(number)
        timer.cancel()
        told(outcome)

    async def stream(self, method: str, body: bytes) -> AsyncIterator[bytes]:
        """Yield the items of a stream; closing the generator cancels it at the server."""
        number = self._open(method, body)
        stream = self._streams[number] = _Stream()
        ended = False
        try:
            self.send(Request(number, method, 0, body))
            while True:
                item = await stream.items.get()
                if not isinstance(item, bytes):
                    ended = True
                    if item is None:
                        return
                    raise item
                yield item
        finally:
            self._streams.pop(number, None)
            if not ended:
                self.send(Cancel(number))

    async def upload(self, method: str, body: bytes, pieces: AsyncIterator[bytes], timeout_s: float) -> bytes:
        """Send a call whose body comes in pieces; return the answer. Raises as `call`."""
        number = self._open(method, body)
        waiting: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._waiting[number] = waiting
        try:
            async with asyncio.timeout(timeout_s):
                self.send(Request(number, method, _millis(timeout_s), body, True))
                async for piece in pieces:
                    for start in range(0, len(piece), UPLOAD_PIECE_BYTES):
                        await self.writable()
                        if waiting.done():
                            return await waiting
                        self.send(Item(number, piece[start : start + UPLOAD_PIECE_BYTES]))
                self.send(End(number))
                return await waiting
        except TimeoutError:
            self.send(Cancel(number))
            raise TimedOut(f"{self.peer.node} did not finish {method} within {timeout_s:g} s") from None
        except BaseException:
            self.send(Cancel(number))
            raise
        finally:
            self._waiting.pop(number, None)

    def _open(self, method: str, body: bytes) -> int:
        if self.closed:
            raise Unreachable(f"the connection to {self.peer.node} is closed")
        if len(body) > REQUEST_BYTES_MAX - 1024:
            raise BadRequest(f"the request ({method}) has {len(body)} bytes: split it")
        self._next += 1
        return self._next

    def frame_received(self, frame: Frame) -> None:
        """Hand an answer to the one who waits for it; who does not wait any more is no fault."""
        if isinstance(frame, Response):
            self._settle(frame.call, frame.body, None)
        elif isinstance(frame, Failure):
            self._settle(frame.call, b"", from_wire(frame.code, frame.text, frame.reason, frame.http_status))
        elif isinstance(frame, Item):
            self._item(frame)
        elif isinstance(frame, End):
            if (stream := self._streams.get(frame.call)) is not None:
                stream.items.put_nowait(None)
        else:
            raise BadFrame(f"a server may not send {type(frame).__name__}")

    def _settle(self, number: int, body: bytes, error: NodeError | None) -> None:
        if number in self._told:
            self._tell(number, body if error is None else error)
            return
        if (stream := self._streams.get(number)) is not None:
            stream.items.put_nowait(error)
            return
        waiting = self._waiting.get(number)
        if waiting is None or waiting.done():
            return
        if error is None:
            waiting.set_result(body)
        else:
            waiting.set_exception(error)

    def _item(self, frame: Item) -> None:
        stream = self._streams.get(frame.call)
        if stream is None:
            return
        if stream.items.qsize() >= STREAM_ITEMS_MAX:
            del self._streams[frame.call]
            self.send(Cancel(frame.call))
            stream.items.put_nowait(Unreachable("the reader of a stream fell too far behind: subscribe again"))
            return
        stream.items.put_nowait(frame.body)

    def connection_ended(self, error: BaseException | None) -> None:
        """Fail whatever waits."""
        reason = f": {error}" if error else ""
        for waiting in self._waiting.values():
            if not waiting.done():
                waiting.set_exception(Unreachable(f"the connection to {self.peer.node} broke{reason}"))
        for number in tuple(self._told):
            self._tell(number, Unreachable(f"the connection to {self.peer.node} broke{reason}"))
        for stream in self._streams.values():
            stream.items.put_nowait(Unreachable(f"the connection to {self.peer.node} broke{reason}"))
        self._on_end(self)


def _expire(waiting: asyncio.Future[bytes]) -> None:
    if not waiting.done():
        waiting.set_exception(TimeoutError())


def _millis(timeout_s: float) -> int:
    return max(1, min(int(timeout_s * 1000), 24 * 3600 * 1000))


async def dial(
    address: tuple[str, int],
    context: ssl.SSLContext,
    datacenter: str,
    *,
    expect_node: str | None = None,
    timeout_s: float = 2.0,
    blocked: Callable[[str], bool] = lambda node: False,
    on_end: Callable[[ClientConnection], None] = lambda connection: None,
    on_reached: Callable[[], None] = lambda: None,
) -> ClientConnection:
    """Open a connection and check that a server (named `expect_node`, if given) is at the other end.

    `on_reached`: the host is there, and its kernel has taken the connection; the handshake begins.
    Raises Unreachable, also when the other end is not who it should be; the text says which.
    """
    loop = asyncio.get_running_loop()
    where = f"{expect_node or 'server'} at {address[0]}:{address[1]}"
    if expect_node is not None and blocked(expect_node):
        await asyncio.sleep(timeout_s)
        raise Unreachable(f"{where} did not answer within {timeout_s:g} s")
    gate = Gate()
    try:
        async with asyncio.timeout(timeout_s):
            sock = await _connect(address)
            on_reached()
            transport, _ = await loop.create_connection(
                lambda: gate,
                sock=sock,
                ssl=context,
                server_hostname="",  # none: who it is, `peer_of` sees
                ssl_handshake_timeout=timeout_s,
                ssl_shutdown_timeout=0.5,
            )
    except TimeoutError:
        raise Unreachable(f"{where} did not answer within {timeout_s:g} s") from None
    except ssl.SSLError as error:
        if error.reason == BUSY_ALERT:
            raise Overloaded(f"{where} has too many connections to see to") from None
        raise Unreachable(f"{where} cannot be reached: {error}") from None
    except OSError as error:
        raise Unreachable(f"{where} cannot be reached: {error}") from None
    ssl_object = transport.get_extra_info("ssl_object")
    try:
        peer = peer_of(ssl_object, datacenter)
        if peer.role != SERVER:
            raise PkiError(f"it is {peer.node}, a {peer.role}")
        if expect_node is not None and peer.node != expect_node:
            raise PkiError(f"it is {peer.node}")
        if ssl_object.selected_alpn_protocol() != ALPN_RPC:
            raise PkiError(f"it does not speak {ALPN_RPC}")
    except PkiError as error:
        transport.abort()
        raise Unreachable(f"{where} is not the server it should be: {error}") from None
    connection = ClientConnection(peer, blocked=blocked, on_end=on_end)
    gate.hand_over(transport, connection)
    return connection


async def _connect(address: tuple[str, int]) -> socket.socket:
    """Return a TCP connection to the first of the host's addresses that takes one. Raises OSError."""
    loop = asyncio.get_running_loop()
    failed: OSError = OSError(f"{address[0]} has no address")
    for family, kind, protocol, _, where in await loop.getaddrinfo(*address, type=socket.SOCK_STREAM):
        sock = socket.socket(family, kind, protocol)
        try:
            sock.setblocking(False)
            await loop.sock_connect(sock, where)
        except OSError as error:
            sock.close()
            failed = error
        except BaseException:
            sock.close()
            raise
        else:
            return sock
    raise failed


class Gate(asyncio.Protocol):
    """Keeps what arrives between the end of a handshake and the moment when the right protocol takes over."""

    def __init__(self) -> None:
        self._early: list[bytes] = []
        self._lost: tuple[Exception | None] | None = None

    def data_received(self, data: bytes) -> None:
        self._early.append(data)

    def connection_lost(self, error: Exception | None) -> None:
        self._lost = (error,)

    def hand_over(self, transport: Any, protocol: asyncio.Protocol) -> None:
        """Make `protocol` the transport's; it sees everything from the first byte."""
        transport.set_protocol(protocol)
        protocol.connection_made(transport)
        early, self._early = self._early, []
        for data in early:
            protocol.data_received(data)
        if self._lost is not None:
            protocol.connection_lost(self._lost[0])
