"""TLS on a :class:`~proxy.plain.PlainTransport`, in asyncio's terms: a transport that calls a protocol
(:class:`~proxy.receiver.Receiver`), and one itself of the connection below.

Beside asyncio's own TLS transport: a small record costs one read and one decryption and nothing else (no second
attempt, which would end in an exception), what is written is encrypted and sent at once, the end does not reset
what is on its way to the peer, and each direction ends by itself: in TLS 1.3 a close_notify says nothing of the other
direction (RFC 8446, section 6.1).
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Sequence
from typing import Any, Final

from proxy.plain import READ_MAX_BYTES, Address, PlainTransport
from proxy.poller import Poller
from proxy.receiver import NOBODY, Receiver

RECORD_BYTES: Final = 16 * 1024
"""Most that a record carries (RFC 8446, section 5.1), and so most that one decryption gives."""
_HEADER_BYTES: Final = 5
_RECORD_MAX_BYTES: Final = _HEADER_BYTES + RECORD_BYTES + 256
"""Most that a record may be, encrypted (RFC 8446, section 5.2)."""
_UNKNOWN: Final = -1
READ_BYTES: Final = READ_MAX_BYTES + READ_MAX_BYTES // 64
"""Most that a read asks for: what the longest read of an app has become in TLS, headers of records and frames
included, comes in one read; and so the next does."""
PARTING_S: Final = 2.0
"""How long the peer has to end its side after we have ended ours."""


class SecureTransport(Receiver):
    """A TLS connection. The protocol is told of it once the handshake is done, as :meth:`handshake` is; a handshake
    that fails is told to :meth:`handshake` alone."""

    __slots__ = (
        "_closing",
        "_decrypt",
        "_done",
        "_encrypt",
        "_encrypted",
        "_incoming",
        "_missing",
        "_object",
        "_outgoing",
        "_parting",
        "_peer_ended",
        "_plain",
        "_protocol",
        "_put",
        "_shaking",
        "_wrote_eof",
    )  # fmt: skip

    def __init__(
        self,
        poller: Poller,
        protocol: Receiver,
        context: ssl.SSLContext,
        *,
        server: bool,
        server_name: str = "",
        session: ssl.SSLSession | None = None,
    ) -> None:
        """``session``: one of this context's to resume, where the peer still knows it."""
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._object = context.wrap_bio(
            self._incoming,
            self._outgoing,
            server_side=server,
            server_hostname=server_name or None,
            session=session,
        )
        # What SSLObject's own methods are made of: a frame of Python's each would cost as much as a small record.
        inner: Any = getattr(self._object, "_sslobj", self._object)
        self._decrypt, self._encrypt = inner.read, inner.write
        self._encrypted = self._outgoing.read
        self._put = self._incoming.write
        self._protocol = protocol
        self._plain = PlainTransport(poller, self, READ_BYTES)
        self._shaking = True
        """The handshake is not over."""
        self._done: asyncio.Future[None] | None = asyncio.get_running_loop().create_future()
        """How it ended, for :meth:`handshake`, which may be called after that; None once it has told of a failure."""
        self._closing = False
        self._missing = _UNKNOWN
        """How many bytes are still to come of the record of which OpenSSL has a part; 0: it has none."""
        self._peer_ended = self._wrote_eof = False
        self._parting: asyncio.TimerHandle | None = None

    async def handshake(self) -> None:
        """Wait for the handshake's end, after :meth:`accepted` or :meth:`connect`; the caller bounds the time.

        Raises ssl.SSLError when it fails, OSError when the connection cannot be made or is lost. It is ended then,
        and when the caller is cancelled.
        """
        if self._done is None:
            raise ConnectionAbortedError("the handshake has failed")
        try:
            await self._done
        except BaseException:
            self.abort()
            self._done = None  # what is raised refers to this, by its traceback
            raise

    def accepted(self, fd: int, peername: tuple[Any, ...]) -> None:
        """Begin with a connection that a listener took. Raises OSError."""
        self._plain.accepted(fd, peername)

    def connect(self, addresses: Sequence[Address]) -> None:
        """Begin by dialing the first of these that takes the connection."""
        self._plain.connect(addresses)

    # Handshake

    def _shake(self) -> None:
        if not self._shaking:
            return
        try:
            self._object.do_handshake()
        except ssl.SSLWantReadError:
            self._send()
            return
        except ssl.SSLError as error:
            self._send()  # the alert that says why
            self._handshake_failed(error)
            self._plain.close()
            return
        self._send()
        self._shaking = False
        if self._done is not None and not self._done.done():
            self._done.set_result(None)
        self._protocol.connection_made(self)
        if self._incoming.pending:
            self.data_received(b"")

    def _handshake_failed(self, error: Exception) -> None:
        self._shaking = False
        self._closing = True
        self._protocol = NOBODY  # it was told of no connection, and shall not be of its loss
        if self._done is not None and not self._done.done():
            self._done.set_exception(error)

    # Receiver of the connection below

    def connection_made(self, transport: Any) -> None:
        self._shake()

    def data_received(self, data: bytes) -> None:
        if self._closing or self._peer_ended:
            # Nobody will take it; kept, it would be all that the peer sends until we part. What comes after its own
            # end is to be ignored (RFC 8446, section 6.1).
            return
        if self._shaking:
            self._put(data)
            self._shake()
            return
        ended = False
        size = len(data)
        try:
            if size > 5 and data[3] << 8 | data[4] == size - 5 and not self._missing:
                # One record, by the length it says (RFC 8446, section 5.1): what is in it is no longer than it.
                self._put(data)
                clear = self._decrypt(size)
                ended = not clear
            elif self._missing != _UNKNOWN:
                clear, ended = self._decrypt_records(data)
            else:
                clear, ended = self._decrypt_any(data)
        except ssl.SSLWantReadError:
            self._send()  # a key update, which is to be answered, or a ticket
            return
        except ssl.SSLZeroReturnError:  # an empty read, when both have ended their side
            clear, ended = b"", True
        except ssl.SSLError as error:
            self._broken(error)
            return
        if clear:
            self._protocol.data_received(clear)
        if ended:
            self._ended_by_peer(notified=True)

    def _decrypt_records(self, data: bytes) -> tuple[bytes, bool]:
        """Return what is in the records that ``data`` completes, in one piece, and whether the peer has ended its
        side. Raises ssl.SSLError.

        OpenSSL is given one record at a time, which so stays in the processor's cache from one copy to the next.
        """
        view, at, size = memoryview(data), 0, len(data)
        pieces: list[bytes] = []
        while at < size:
            missing = self._missing
            if not missing:
                if size - at >= _HEADER_BYTES:
                    missing = _HEADER_BYTES + (data[at + 3] << 8 | data[at + 4])
                if not missing or missing > _RECORD_MAX_BYTES:
                    # A part of a header, or none: OpenSSL is to judge.
                    clear, ended = self._decrypt_any(view[at:])
                    pieces.append(clear)
                    return b"".join(pieces), ended
            taken = min(missing, size - at)
            self._put(view[at : at + taken])
            at += taken
            self._missing = missing - taken
            if taken == missing:
                try:
                    clear = self._decrypt(RECORD_BYTES)
                except ssl.SSLWantReadError:
                    self._send()  # as above
                    continue
                except ssl.SSLZeroReturnError:
                    return b"".join(pieces), True
                if not clear:
                    return b"".join(pieces), True
                pieces.append(clear)
        return b"".join(pieces), False

    def _decrypt_any(self, data: bytes | memoryview) -> tuple[bytes, bool]:
        """As :meth:`_decrypt_records` where it is not known at which byte a record begins."""
        self._missing = _UNKNOWN
        self._put(data)
        pieces: list[bytes] = []
        try:
            while True:
                clear = self._decrypt(RECORD_BYTES)
                if not clear:
                    return b"".join(pieces), True
                pieces.append(clear)
                if not self._incoming.pending:
                    break
            self._missing = 0
        except ssl.SSLWantReadError:
            self._send()
        except ssl.SSLZeroReturnError:
            return b"".join(pieces), True
        return b"".join(pieces), False

    def _broken(self, error: ssl.SSLError) -> None:
        self._send()
        self._closing = True
        self._plain.end(error)

    def eof_received(self) -> bool:
        self._ended_by_peer(notified=False)
        return True  # we close it

    def _ended_by_peer(self, *, notified: bool) -> None:
        """By TLS (``notified``), after which we may go on, or by TCP alone: then the peer is gone, or may be."""
        if self._shaking:
            self._handshake_failed(ConnectionAbortedError("peer closed the connection during the handshake"))
            self._plain.close()
        elif not self._peer_ended:
            self._peer_ended = True
            goes_on = not self._closing and self._protocol.eof_received()
            if self._closing:
                self._plain.close()
            elif not (goes_on and notified) or self._wrote_eof:
                self.close()

    def connect_failed(self, error: OSError) -> None:
        """There is no connection."""
        self.connection_lost(error)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._parting is not None:
            self._parting.cancel()
        if self._shaking:
            self._handshake_failed(exc or ConnectionAbortedError("connection was lost"))
        else:
            self._closing = True
            protocol, self._protocol = self._protocol, NOBODY  # parted: see PlainTransport
            protocol.connection_lost(exc)

    def pause_writing(self) -> None:
        if not self._shaking:
            self._protocol.pause_writing()

    def resume_writing(self) -> None:
        if not self._shaking:
            self._protocol.resume_writing()

    # As asyncio.Transport

    def write(self, data: bytes | bytearray | memoryview) -> None:
        if self._closing or self._shaking or not data:
            return
        try:
            sent = self._encrypt(data)
            if sent < len(data):
                view = memoryview(data)
                while sent < len(data):
                    sent += self._encrypt(view[sent:])
        except ssl.SSLError as error:
            self._broken(error)
            return
        self._plain.write(self._encrypted())

    def write_pieces(self, pieces: Sequence[bytes | bytearray | memoryview]) -> None:
        """As :meth:`write` of all pieces joined, of which only short ones are copied: by one system call, and by full
        records, so that a header costs no record of its own."""
        if self._closing or self._shaking:
            return
        head: list[bytes | bytearray | memoryview] = []
        room = RECORD_BYTES  # in the record that begins with the head
        try:
            for piece in pieces:
                left = len(piece)
                if left < room:
                    head.append(piece)
                    room -= left
                    continue
                view = memoryview(piece)
                done = 0
                if head:
                    head.append(view[:room])
                    self._encrypt(b"".join(head))
                    head = []
                    done, room = room, RECORD_BYTES
                while left - done >= RECORD_BYTES:
                    done += self._encrypt(view[done : done + RECORD_BYTES])
                if done < left:
                    head.append(view[done:])
                    room -= left - done
            if head:
                self._encrypt(b"".join(head))
        except ssl.SSLError as error:
            self._broken(error)
            return
        self._plain.write(self._encrypted())

    def _send(self) -> None:
        if self._outgoing.pending:
            self._plain.write(self._outgoing.read())

    def write_eof(self) -> None:
        """End our direction: the peer is told by TLS. The connection ends once it has ended its own."""
        if not self._closing and not self._wrote_eof:
            self._notify()

    def _notify(self) -> None:
        self._wrote_eof = True
        try:
            self._object.unwrap()
        except ssl.SSLError:
            pass  # it waits for the peer's notice, as we do
        self._send()

    def close(self) -> None:
        if self._closing:
            return
        self._closing = True
        if self._shaking:
            self._plain.close()
            return
        if not self._wrote_eof:
            self._notify()
        if self._peer_ended:
            self._plain.close()
        else:
            # Closed at once, what the peer still sends would reset the connection, and with it what is to reach it.
            self._plain.resume_reading()
            self._plain.write_eof()
            self._parting = asyncio.get_running_loop().call_later(PARTING_S, self._plain.abort)

    def abort(self) -> None:
        self._closing = True
        self._plain.abort()

    def is_closing(self) -> bool:
        return self._closing or self._plain.is_closing()

    def can_write_eof(self) -> bool:
        return True

    def keep_alive(self) -> None:
        """Have the kernel find out that the peer has vanished, where nothing else does."""
        self._plain.keep_alive()

    def pause_reading(self) -> None:
        if not self._closing:
            self._plain.pause_reading()

    def resume_reading(self) -> None:
        self._plain.resume_reading()

    def is_reading(self) -> bool:
        return self._plain.is_reading()

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        self._plain.set_write_buffer_limits(high, low)

    def get_write_buffer_limits(self) -> tuple[int, int]:
        return self._plain.get_write_buffer_limits()

    def get_write_buffer_size(self) -> int:
        return self._plain.get_write_buffer_size()

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        """``ssl_object``, and what the connection below tells."""
        return self._object if name == "ssl_object" else self._plain.get_extra_info(name, default)

    def set_protocol(self, protocol: Receiver) -> None:
        self._protocol = protocol

    def get_protocol(self) -> Receiver:
        return self._protocol
