"""After a 101: two channels back to back, and a word when both directions have ended."""

from __future__ import annotations

from collections.abc import Callable

from proxy.stream import Channel, Data


class Tunnel:
    """Joins two channels. ``on_done`` is called once, ``stir`` whenever one of the two says or takes something."""

    def __init__(
        self, a: Channel, b: Channel, on_done: Callable[[], None], stir: Callable[[], None] | None = None
    ) -> None:
        self.stir = stir
        self._on_done = on_done
        self._ends = 0
        a.peer = _Side(self, b)
        b.peer = _Side(self, a)

    def ended(self, *, both: bool = False) -> None:
        """A direction has ended, or both."""
        before = self._ends
        self._ends = 2 if both else before + 1
        if before < 2 <= self._ends:
            self._on_done()


class _Side:
    """The peer of one channel; passes all on to the other."""

    __slots__ = ("_tunnel", "peer")

    def __init__(self, tunnel: Tunnel, other: Channel) -> None:
        self._tunnel = tunnel
        self.peer = other

    def write(self, data: Data) -> None:
        if self._tunnel.stir is not None:
            self._tunnel.stir()
        self.peer.write(data)

    def write_eof(self) -> None:
        if self._tunnel.stir is not None:
            self._tunnel.stir()
        self.peer.write_eof()
        self._tunnel.ended()

    def abort(self, error: Exception | None = None) -> None:
        self.peer.abort(error)
        self._tunnel.ended(both=True)

    def pause_reading(self) -> None:
        self.peer.pause_reading()

    def resume_reading(self) -> None:
        if self._tunnel.stir is not None:
            self._tunnel.stir()
        self.peer.resume_reading()
