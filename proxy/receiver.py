"""What a connection tells whoever stands on it: asyncio's protocol, as a class that can be compiled.

asyncio's own base class cannot be inherited from in compiled code, nor is it asked for: asyncio calls a protocol's
methods and does not look at its class.
"""

from __future__ import annotations

from typing import Any, Protocol

from proxy.native import mypyc_attr


class Connection(Protocol):
    """What a connection can do, be it one of ours or a transport of asyncio."""

    def write(self, data: bytes | bytearray | memoryview) -> None: ...
    def can_write_eof(self) -> bool: ...
    def write_eof(self) -> None: ...
    def pause_reading(self) -> None: ...
    def resume_reading(self) -> None: ...
    def is_closing(self) -> bool: ...
    def close(self) -> None: ...
    def abort(self) -> None: ...
    def get_extra_info(self, name: str, default: Any = None) -> Any: ...
    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None: ...


@mypyc_attr(allow_interpreted_subclasses=True)
class Receiver:
    """Stands on a connection. As it is here, it does nothing with what it is told."""

    __slots__ = ()

    def connection_made(self, transport: Any) -> None:
        """The connection, a :class:`Connection`, is there."""

    def connect_failed(self, error: OSError) -> None:
        """No address took the connection; called in place of ``connection_made`` and ``connection_lost``."""
        self.connection_lost(error)

    def data_received(self, data: bytes) -> None:
        """``data`` has come."""

    def eof_received(self) -> bool | None:
        """The other side has ended its data. True: we close the connection ourselves."""
        return None

    def pause_writing(self) -> None:
        """More is written than the other side takes."""

    def resume_writing(self) -> None:
        """It has taken most of it."""

    def flush(self) -> None:
        """The batch of events is over in which this was put down for it (:class:`~proxy.poller.Poller`): what they
        made is to be sent."""

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is gone; None: in good order."""


@mypyc_attr(allow_interpreted_subclasses=True)
class Face(Receiver):
    """A connection as a :class:`~proxy.stream.Channel`, by which compiled code knows it."""

    __slots__ = ()

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """See Channel."""

    def pause_reading(self) -> None:
        """See Channel."""

    def resume_reading(self) -> None:
        """See Channel."""


NOBODY = Receiver()
"""Stands on a connection that is gone."""
