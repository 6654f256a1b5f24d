"""What a TLS ClientHello says before anyone is proved: the protocols it offers. Pure.

It decides only who waits in which queue for a handshake; what a peer may do is decided by its certificate.
Source: RFC 8446, sections 4.1.2 and 5.1; RFC 7301, section 3.1.
"""

from __future__ import annotations

HELLO_BYTES_MAX = 4096
"""How much of what a client sent first is looked at."""
ALERT_BUSY = bytes((21, 3, 3, 0, 2, 2, 80))
"""A fatal alert `internal_error` in the clear (RFC 8446, section 6): to our own clients, "busy, come back later"."""

_HANDSHAKE, _CLIENT_HELLO, _ALPN = 22, 1, 16


class _Cut(Exception):
    """The data ends here."""


class _Bytes:
    """Reads length-prefixed fields, as TLS writes them."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size))

    def take(self, size: int) -> bytes:
        taken = self._data[self._at : self._at + size]
        if len(taken) < size:
            raise _Cut
        self._at += size
        return taken

    def field(self, length_size: int) -> bytes:
        return self.take(self.number(length_size))

    @property
    def left(self) -> bool:
        return self._at < len(self._data)


def alpn_offered(data: bytes) -> tuple[str, ...]:
    """Return the protocols that a ClientHello offers; none when it is none, is cut short, or offers none."""
    try:
        record = _Bytes(data)
        if record.number(1) != _HANDSHAKE:
            return ()
        record.take(2)
        handshake = _Bytes(record.field(2))
        if handshake.number(1) != _CLIENT_HELLO:
            return ()
        hello = _Bytes(handshake.field(3))
        hello.take(2 + 32)
        for length_size in (1, 2, 1):  # session id, cipher suites, compression methods
            hello.field(length_size)
        extensions = _Bytes(hello.field(2))
        while extensions.left:
            kind, body = extensions.number(2), extensions.field(2)
            if kind == _ALPN:
                return _names(body)
    except _Cut:
        pass
    return ()


def _names(body: bytes) -> tuple[str, ...]:
    listed, names = _Bytes(_Bytes(body).field(2)), []
    while listed.left:
        names.append(listed.field(1).decode("ascii", "replace"))
    return tuple(names)
