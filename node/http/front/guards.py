"""What keeps one client from taking the listener away from all others: counts of connections, and deadlines."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import resource
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from node.http.front.connection import Connection

log = logging.getLogger("lictor.http")

LOOPBACK_SHARE = 0.8
_WARN_EVERY_S = 30.0


@dataclass(frozen=True)
class FrontOptions:
    """Bounds of the HTTP listener. Times in seconds."""

    connections_max: int = 20000
    """Open connections in all; fewer where the process may not open so many files."""
    connections_per_client_max: int = 256
    """Open connections from one address (IPv6: from one /64). Loopback addresses, whose clients are programs of this
    host, may together with all others take what `connections_max` allows, one of them at most four fifths of it."""
    head_timeout_s: float = 10.0
    """From a request's first byte, or the connection's beginning, to the end of its head."""
    body_timeout_s: float = 30.0
    """From the end of the head to the end of the body."""
    idle_timeout_s: float = 600.0
    """Without a request; longer than common clients keep a connection for later use."""
    write_timeout_s: float = 60.0
    """How long a client may leave an answer unread while the socket's buffers are full."""


class Admission:
    """Counts connections."""

    def __init__(self, options: FrontOptions) -> None:
        files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        room = files - min(512, files // 4) if files != resource.RLIM_INFINITY else options.connections_max
        self.connections_max = max(1, min(options.connections_max, room))
        self._per_client = options.connections_per_client_max
        self._per_loopback = max(1, int(self.connections_max * LOOPBACK_SHARE))
        self._by_client: Counter[str] = Counter()
        self._warned_at = float("-inf")
        self.open = 0
        self.refused = 0

    def enter(self, address: str) -> tuple[int, str, str] | None:
        """Count a connection; return None, or status, reason and text with which it is turned away, uncounted."""
        client, loopback = client_of(address)
        if self.open >= self.connections_max:
            why = 503, "Service Unavailable", "This node has too many open HTTP connections; try again in a moment"
        elif self._by_client[client] >= (self._per_loopback if loopback else self._per_client):
            why = 429, "Too Many Requests", "Too many open HTTP connections from your address; use fewer at a time"
        else:
            self.open += 1
            self._by_client[client] += 1
            return None
        self.refused += 1
        now = asyncio.get_running_loop().time()
        if now - self._warned_at >= _WARN_EVERY_S:
            self._warned_at = now
            log.warning(
                "http: %s is turned away: %d connections are open, %d of them its own (limits.http_connections_max, "
                "limits.http_connections_per_client_max); %d turned away so far",
                address, self.open, self._by_client[client], self.refused,
            )  # fmt: skip
        if not self._by_client[client]:
            del self._by_client[client]
        return why

    def leave(self, address: str) -> None:
        """Uncount a connection that was let in."""
        client, _ = client_of(address)
        self.open -= 1
        self._by_client[client] -= 1
        if not self._by_client[client]:
            del self._by_client[client]


@lru_cache(maxsize=1024)
def client_of(address: str) -> tuple[str, bool]:
    """Return whom an address is counted for, and whether it is this host itself."""
    try:
        ip = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address, False
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.ipv4_mapped is not None:
            ip = ip.ipv4_mapped
        elif not ip.is_loopback:
            return str(ipaddress.ip_network((ip, 64), strict=False)), False
    return str(ip), ip.is_loopback


class Deadlines:
    """Who has to be done by when, all within the same time; the first to begin is the first to be late."""

    def __init__(self, timeout_s: float, late: Callable[[Connection], None]) -> None:
        self._timeout_s, self._late = timeout_s, late
        self._due: dict[Connection, float] = {}
        self._loop = asyncio.get_running_loop()  # kept: to ask for it takes a system call, and each request would
        self._timer: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        return len(self._due)

    def begin(self, who: Connection) -> None:
        """Give ``who`` the whole time, anew if it had been given some."""
        self._due.pop(who, None)
        self._due[who] = self._loop.time() + self._timeout_s
        if self._timer is None:
            self._timer = self._loop.call_later(self._timeout_s, self._look)

    def end(self, who: Connection) -> None:
        """``who`` is done."""
        self._due.pop(who, None)

    def close(self) -> None:
        """Nobody is late any more."""
        self._due.clear()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look(self) -> None:
        loop = self._loop
        now = loop.time()
        self._timer = None
        while self._due:
            who, due = next(iter(self._due.items()))
            if due > now:
                # At least this long between two looks, however many deadlines follow one another closely.
                pause_s = max(due - now, min(1.0, self._timeout_s / 10))
                self._timer = loop.call_later(pause_s, self._look)
                return
            del self._due[who]
            self._late(who)
