"""Accepting on a listening socket, many connections at a time, within bounds."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable
from typing import Any

from proxy.logs import BurstLog
from proxy.poller import ACCEPT, Handler, Poller

log = logging.getLogger("lictor.proxy")

ACCEPTS_PER_TURN = 64
PAUSE_S = 0.1
"""How long connections are left in the kernel's backlog after one could not be accepted."""

Take = Callable[[int, tuple[Any, ...]], None]
"""Called with each connection: its descriptor, which is the callee's from now on, and the other side's address."""


class Acceptor(Handler):
    """Gives the connections that come in on ``sock`` to ``take``, from :meth:`start` on."""

    def __init__(
        self, poller: Poller, sock: socket.socket, take: Take, turn_over: Callable[[], None] | None = None
    ) -> None:
        """``turn_over`` is called after each bunch of connections."""
        self._poller = poller
        self._sock = sock
        self._fd = sock.fileno()
        self._take = take
        self._turn_over = turn_over
        self._log = BurstLog(log)
        self._accepting = False
        self._closed = False
        self._again: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Begin to accept, or again. Idempotent."""
        if not self._accepting and not self._closed:
            try:
                self._poller.add(self._fd, self, ACCEPT)
            except OSError as error:
                # As many are watched as this user may, most likely.
                self._try_again(error)
            else:
                self._accepting = True
                self._forget_again()

    def _try_again(self, error: OSError) -> None:
        self._log.warning(f"cannot accept connections: {error.strerror}; trying again shortly")
        self._forget_again()  # one at a time, however often others start it
        self._again = asyncio.get_running_loop().call_later(PAUSE_S, self.start)

    def _forget_again(self) -> None:
        if self._again is not None:
            self._again.cancel()
            self._again = None

    def stop(self) -> None:
        """Leave connections in the kernel's backlog. Idempotent."""
        self._forget_again()
        if self._accepting:
            self._accepting = False
            self._poller.remove(self._fd)

    def close(self) -> None:
        """Accept no more; the socket is closed too."""
        self.stop()
        self._closed = True
        self._sock.close()

    def on_ready(self, events: int) -> None:
        taken = False
        for _ in range(ACCEPTS_PER_TURN):
            if not self._accepting:
                break
            try:
                # What socket.accept() is made of, without an object for the connection, which costs as much again.
                fd, address = self._sock._accept()  # type: ignore[attr-defined]
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                break
            except OSError as error:
                # Out of descriptors, most likely.
                self.stop()
                self._try_again(error)
                break
            taken = True
            try:
                self._take(fd, address)
            except OSError as error:
                self._log.warning(f"a connection from {address[0]} was lost at once: {error.strerror}")
        if taken and self._turn_over is not None:
            self._turn_over()

    def on_failure(self, error: Exception) -> None:
        """A connection's beginning failed; others go on."""
