"""TCP connections on a :class:`~proxy.poller.Poller`, in asyncio's terms: a transport that calls a protocol
(:class:`~proxy.receiver.Receiver`).

Cheaper than the event loop's own: a connection is watched by one system call for all its life, a read or write is one
system call and no more, and nothing is set that a listening socket hands down (``TCP_NODELAY``) or that a connection
of one request does without.
"""

from __future__ import annotations

import asyncio
import errno
import os
import select
import socket
import struct
from collections import deque
from collections.abc import Sequence
from functools import lru_cache
from itertools import islice
from typing import Any, Final

from proxy.poller import READ, READ_WRITE, Handler, Poller
from proxy.receiver import NOBODY, Receiver

READ_FIRST_BYTES: Final = 16 * 1024
READ_MAX_BYTES: Final = 256 * 1024
"""A read asks for four times as much whenever the last one was filled, up to this."""
READ_SMALL_BYTES: Final = 479
"""What a read asks for where little comes at a time: CPython's own allocator has room for so many at once, where more
is cut from the heap, and the rest of it given back, for every read."""
SMALL_READS: Final = 16
"""So many small reads in a row, and the next one asks for no more."""
HIGH_BYTES: Final = 64 * 1024
_WRITEV_PIECES: Final = 16
LINGER_RESET: Final = struct.pack("ii", 1, 0)
"""Value of SO_LINGER with which closing a connection resets it."""
_MORE: Final = select.EPOLLRDHUP | select.EPOLLHUP | select.EPOLLERR | select.EPOLLPRI
"""There is more to read although a read was not filled: the end, or what follows an urgent byte."""

KEEPALIVE: Final = ((socket.TCP_KEEPIDLE, 60), (socket.TCP_KEEPINTVL, 15), (socket.TCP_KEEPCNT, 4))
"""After how many seconds of silence the kernel asks a peer, how often, and how many times; two minutes in all."""

_IN: Final = select.EPOLLIN
_OUT: Final = select.EPOLLOUT
_IN_OUT: Final = select.EPOLLIN | select.EPOLLOUT
_WRITABLE: Final = select.EPOLLOUT | select.EPOLLERR | select.EPOLLHUP
_read: Final = os.read
_write: Final = os.write

_CONNECTING: Final = 0
_OPEN: Final = 1
_CLOSING: Final = 2
_GONE: Final = 3

Address = tuple[int, tuple[Any, ...]]
"""Family, and address as the family has it."""


class PlainTransport(Handler):
    """A TCP connection. Its protocol is called as asyncio calls it; ``connection_lost`` never from within a call."""

    __slots__ = (
        "_addresses", "_eof_in", "_eof_out", "_error", "_fd", "_high", "_low", "_paused", "_poller", "_protocol",
        "_queue", "_queued", "_read_asks", "_read_bytes", "_read_max", "_sends", "_small_reads", "_sock", "_state",
        "_thorough", "_unread", "_watches_writes", "_write_paused", "peername",
    )  # fmt: skip

    def __init__(self, poller: Poller, protocol: Receiver, read_max: int = READ_MAX_BYTES) -> None:
        """``read_max``: most bytes that a read asks for."""
        self._poller = poller
        self._protocol = protocol
        self.peername: tuple[Any, ...] | None = None
        """Address of the other side, where it is the one that dialed."""
        self._fd = -1
        self._sock: socket.SocketType | None = None
        self._state = _CONNECTING
        self._addresses: list[Address] | None = None
        """Those that are left to be tried."""
        self._error: Exception | None = None
        self._read_max = read_max
        self._read_bytes = READ_FIRST_BYTES
        self._read_asks: Any = self._read_bytes
        """The same as an object: compiled code would make one for each read."""
        self._small_reads = 0
        """How many in a row, up to SMALL_READS."""
        self._paused = False
        self._unread = False
        """Readable while paused: no further event will say so."""
        self._thorough = False
        """Reads go on until there is nothing, filled or not: what an event said is said once."""
        self._eof_in = False
        self._eof_out = False
        self._queue: deque[bytes | bytearray | memoryview] | None = None
        self._queued = 0
        self._high, self._low = HIGH_BYTES, HIGH_BYTES // 4
        self._write_paused = False
        self._watches_writes = False
        self._sends = 0
        """Writes until now; on a dialed connection the second one sets TCP_NODELAY."""

    # How it begins

    def accepted(self, fd: int, peername: tuple[Any, ...]) -> None:
        """Begin with a connection that a listener took. Raises OSError, and closes it then."""
        self._fd = fd
        self.peername = peername
        self._state = _OPEN
        self._sends = 2  # the listener handed TCP_NODELAY down
        try:
            os.set_blocking(fd, False)
            self._poller.add(fd, self, READ)
        except OSError:
            self._state = _GONE
            os.close(fd)
            raise
        self._protocol.connection_made(self)

    def connect(self, addresses: Sequence[Address]) -> None:
        """Begin by dialing the first of these that takes the connection."""
        if self._state == _CONNECTING:
            self._addresses = list(addresses)
            self._try_next(OSError(errno.EADDRNOTAVAIL, "the name leads to no address"))

    def cannot_connect(self, error: OSError) -> None:
        """There is no address to dial."""
        if self._state == _CONNECTING:
            self.end(error)

    def _try_next(self, error: OSError) -> None:
        while self._addresses:
            family, address = self._addresses.pop(0)
            sock = None
            try:
                # The C type: Python's own socket class costs as much again as the system call.
                sock = socket.SocketType(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
                code = sock.connect_ex(address)
                if code in (0, errno.EINPROGRESS):
                    self._fd, self._sock = sock.fileno(), sock
                    self._watches_writes = True
                    # Connected to already, on loopback: a write at once will show, else the event does.
                    self._poller.add(self._fd, self, READ_WRITE)
                    return
                error = OSError(code, os.strerror(code))
            except OSError as failure:
                error = failure
            if sock is not None:
                sock.close()
            self._fd, self._sock = -1, None
        self.end(error)

    def _connected(self) -> None:
        self._state = _OPEN
        self._addresses = None
        self._protocol.connection_made(self)

    def _connect_failed(self, error: OSError) -> None:
        """One address did not take it."""
        if self._addresses and self._sock is not None:
            self._poller.remove(self._fd)
            # Not now: the next socket would have its number, and what this batch still has to tell of it.
            self._poller.end_later(self._sock.close)
            self._try_next(error)
        else:
            self.end(error)

    # Poller's handler

    def on_ready(self, events: int) -> None:
        state = self._state
        # A connection that was dialed is told each time that it can be written to as well.
        if events | _OUT == _IN_OUT and state == _OPEN and not (self._queued or self._paused or self._thorough):
            # By far the most frequent case, in few steps.
            try:
                data = _read(self._fd, self._read_asks)
            except BlockingIOError:
                return
            except OSError as error:
                self.end(error)
                return
            if data:
                size = len(data)
                if size == self._read_bytes:
                    self._read_more()
                elif size >= READ_SMALL_BYTES:
                    self._small_reads = 0
                elif self._small_reads < SMALL_READS:
                    self._small_reads += 1
                    if self._small_reads == SMALL_READS:
                        self._read_asks = self._read_bytes = READ_SMALL_BYTES
                self._protocol.data_received(data)
            else:
                self._ended_by_peer()
        elif state == _OPEN:
            if self._queued and events & _WRITABLE:
                self._drain()
                if self._state != _OPEN:
                    return
            if events & ~_OUT:
                self._readable(events)
        elif state == _CONNECTING:
            self._finish_connecting(events)
        elif state == _CLOSING:
            self._drain()

    def _finish_connecting(self, events: int) -> None:
        sock = self._sock
        if sock is None:
            return
        if code := sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            self._connect_failed(OSError(code, os.strerror(code)))
        elif events & _OUT:
            self._connected()
            if self._state == _OPEN and self._queue is not None:
                self._drain()
            if self._state == _OPEN and events & ~_OUT:
                self._readable(events)

    def on_failure(self, error: Exception) -> None:
        self.end(error)

    def _readable(self, events: int) -> None:
        if events & _MORE:
            self._thorough = True
            if self._eof_in:
                # A read tells of the end only, again and again.
                if events & select.EPOLLERR:
                    self.end(ConnectionResetError(errno.ECONNRESET, os.strerror(errno.ECONNRESET)))
                return
        if self._paused:
            self._unread = True
            return
        data = self._receive()
        if not data:
            return
        if len(data) == self._read_bytes:
            self._read_more()
            self._protocol.data_received(data)
            return
        self._protocol.data_received(data)
        if self._thorough:
            if not self.is_reading():
                self._unread = True
            elif data := self._receive():
                self._poller.again(self)
                self._protocol.data_received(data)

    def _read_more(self) -> None:
        """The last read was filled."""
        self._small_reads = 0
        if self._read_bytes == READ_SMALL_BYTES:
            self._read_bytes = READ_FIRST_BYTES
        elif self._read_bytes < self._read_max:
            self._read_bytes = min(self._read_bytes * 4, self._read_max)
        self._read_asks = self._read_bytes
        self._poller.again(self)

    def _receive(self) -> bytes:
        """Read once; the end and errors are dealt with here."""
        try:
            data = _read(self._fd, self._read_asks)
        except BlockingIOError:
            return b""
        except OSError as error:
            self.end(error)
            return b""
        if not data:
            self._ended_by_peer()
        return data

    def _ended_by_peer(self) -> None:
        if not self._eof_in:
            self._eof_in = True
            if not self._protocol.eof_received():
                self.close()

    # asyncio.Transport: reading

    def pause_reading(self) -> None:
        self._paused = True

    def resume_reading(self) -> None:
        self._paused = False
        if self._unread:
            self._unread = False
            self._poller.again(self)

    def is_reading(self) -> bool:
        return not self._paused and self._state == _OPEN

    # asyncio.Transport: writing

    def write(self, data: bytes | bytearray | memoryview) -> None:
        state = self._state
        if state >= _CLOSING or not data:
            return
        if self._queued or (state == _CONNECTING and self._fd < 0):
            self._enqueue(data)
            return
        if self._sends < 2:
            self._sends += 1
            if self._sends == 2:
                self._no_delay()
        try:
            sent = _write(self._fd, data)
        except BlockingIOError:
            self._enqueue(data)
            return
        except OSError as error:
            if state == _CONNECTING:
                self._enqueue(data)  # there may be another address
                self._connect_failed(error)
            else:
                self.end(error)
            return
        if state == _CONNECTING:
            self._connected()
        if sent < len(data):
            self._enqueue(memoryview(data)[sent:])

    def _no_delay(self) -> None:
        if self._sock is not None:
            try:
                self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            except OSError:
                pass  # gone; the write tells

    def _enqueue(self, data: bytes | bytearray | memoryview) -> None:
        if self._state >= _CLOSING:
            return
        if self._queue is None:
            self._queue = deque()
        self._queue.append(data)
        self._queued += len(data)
        if not self._watches_writes and self._fd >= 0:
            self._watches_writes = True
            try:
                self._poller.change(self._fd, READ_WRITE)
            except OSError as error:
                self.end(error)
                return
        if self._queued > self._high and not self._write_paused:
            self._write_paused = True
            self._protocol.pause_writing()

    def _drain(self) -> None:
        queue = self._queue
        while queue:
            try:
                sent = os.writev(self._fd, list(islice(queue, _WRITEV_PIECES)))
            except BlockingIOError:
                break
            except OSError as error:
                self.end(error)
                return
            self._queued -= sent
            while sent:
                size = len(queue[0])
                if size > sent:
                    queue[0] = memoryview(queue[0])[sent:]
                    break
                sent -= size
                queue.popleft()
        if self._write_paused and self._queued <= self._low:
            self._write_paused = False
            self._protocol.resume_writing()
        if not self._queued and self._state != _GONE:
            if self._state == _CLOSING:
                self.end(None)
            elif self._eof_out:
                self._shut_down()

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        self._high = HIGH_BYTES if high is None else high
        self._low = self._high // 4 if low is None else low

    def get_write_buffer_limits(self) -> tuple[int, int]:
        return self._low, self._high

    def get_write_buffer_size(self) -> int:
        return self._queued

    def can_write_eof(self) -> bool:
        return True

    def write_eof(self) -> None:
        if self._eof_out or self._state >= _CLOSING:
            return
        self._eof_out = True
        if not self._queued and self._state == _OPEN:
            self._shut_down()
        elif self._queue is None:
            self._queue = deque()  # so that a connection that is being made looks at what is to be done

    def keep_alive(self) -> None:
        """Have the kernel ask a silent peer now and then whether it is there, and end the connection if it is not."""
        if self._fd < 0:
            return
        try:
            with_socket(self._fd, _switch_keepalive_on)
        except OSError as error:
            self.end(error)

    def _shut_down(self) -> None:
        try:
            with_socket(self._fd, lambda sock: sock.shutdown(socket.SHUT_WR))
        except OSError as error:
            self.end(error)

    # asyncio.Transport: the end

    def is_closing(self) -> bool:
        return self._state >= _CLOSING

    def close(self) -> None:
        """End the connection once all that was written is sent."""
        if self._state >= _CLOSING:
            return
        if self._queued and self._state == _OPEN:
            self._state = _CLOSING
        else:
            self.end(None)

    def abort(self) -> None:
        """End the connection now."""
        self.end(None)

    def reset(self) -> None:
        """End the connection now, so that the other side does not take what it has for the whole of the data."""
        if self._state != _GONE and self._fd >= 0:
            try:
                with_socket(self._fd, lambda sock: sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_RESET))
            except OSError:
                pass  # already gone
        self.end(None)

    def end(self, error: Exception | None) -> None:
        """End the connection now; the protocol is told ``error``."""
        state = self._state
        if state == _GONE:
            return
        self._state = _GONE
        self._error = error
        self._queue, self._queued = None, 0
        self._poller.end_later(self._let_go_undone if state == _CONNECTING else self._let_go)

    def _let_go(self) -> None:
        self._close_socket()
        # The two refer to each other; parted, they are freed without the collector. So do this and an error that was
        # raised here, by its traceback.
        protocol, self._protocol = self._protocol, NOBODY
        error, self._error = self._error, None
        protocol.connection_lost(error)

    def _let_go_undone(self) -> None:
        self._close_socket()
        protocol, self._protocol = self._protocol, NOBODY
        error, self._error = self._error, None
        if isinstance(error, OSError):
            protocol.connect_failed(error)
        else:
            protocol.connection_lost(error)

    def _close_socket(self) -> None:
        fd, self._fd = self._fd, -1
        if fd < 0:
            return
        self._poller.forget(fd)
        if self._sock is not None:
            self._sock.close()
        else:
            os.close(fd)

    # asyncio.BaseTransport

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        """``peername`` of a connection that was accepted; nothing else is kept."""
        return self.peername if name == "peername" else default

    def set_protocol(self, protocol: Receiver) -> None:
        self._protocol = protocol

    def get_protocol(self) -> Receiver:
        return self._protocol


def _switch_keepalive_on(sock: socket.socket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in KEEPALIVE:
        sock.setsockopt(socket.IPPROTO_TCP, option, value)


def with_socket(fd: int, use: Any) -> None:
    """Call ``use`` with a socket object of a descriptor that stays open. Raises what ``use`` raises."""
    # Family and type are said, lest three system calls find them out; none of what is called looks at the family.
    sock = socket.SocketType(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK, 0, fd)
    try:
        use(sock)
    finally:
        sock.detach()


@lru_cache(256)
def numeric(host: str, port: int) -> Address | None:
    """Return the address that ``host`` is, or None when it is a name."""
    for family in (socket.AF_INET, socket.AF_INET6):
        try:
            socket.inet_pton(family, host)
        except OSError:
            continue
        return family, (host, port)
    return None


async def resolve(host: str, port: int) -> list[Address]:
    """Return the addresses of a name. Raises OSError, also of what can be no name."""
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except ValueError as error:  # empty or overlong labels, and the like, which nobody has checked
        raise OSError(errno.EINVAL, f"{host[:300]!r} is no host name: {error}") from error
    return [(family, address) for family, _, _, _, address in found]
