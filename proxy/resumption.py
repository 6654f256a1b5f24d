"""TLS 1.3 sessions that may be resumed: those that foreign peers gave us, and those that we let them resume.

A resumed handshake shows no certificate: it proves that the peer is who it was in the handshake before. So whoever
resumes is checked again by what that handshake proved (identity, revocation, trust, time), exactly as one who shows a
certificate; and no session outlives the TLS material it was made with, nor a change of revocations.

Sources: RFC 8446, sections 2.2, 4.6.1 (lifetime of what tickets derive from) and C.4 (a ticket is used once);
``docs/decisions/0025-*`` has what OpenSSL and Envoy do, and what was measured.
"""

from __future__ import annotations

import ssl
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Final, NamedTuple, Protocol

from proxy.balancer import Key

SESSIONS_PER_PEER: Final = 32
"""Sessions kept for one instance, and as many live connections to it that may still give theirs: with fewer, calls
that come and go side by side find none left."""
MAX_PEERS: Final = 32
"""Instances for which sessions are kept; the one not dialed for longest is forgotten first. A session takes about
8 KiB, so all of them take 8 MiB at most."""
MAX_AGE_S: Final = 1800.0
"""How long after a full handshake the last session that stems from it may be resumed."""
BARREN: Final = 3
"""After so many connections in a row without a ticket a peer is taken to give none: looking costs CPU too. So is one
with which as many handshakes failed that a session was offered in."""

MAX_SERVER_SESSIONS: Final = 1000
"""Sessions that a server's context holds for its peers, at about 10 KiB each."""


class ServerContext:
    """A server's TLS context whose sessions peers may resume.

    What is resumed lies in the context itself: the peer's ticket is no more than a name for it (a *stateful* ticket).
    So it is forgotten with the context, which is replaced before it holds too many sessions or too old. OpenSSL's
    other kind of ticket carries the session sealed; making one decodes the peer's certificate once more, which in
    OpenSSL 3.0 costs as much as verifying it.
    """

    __slots__ = ("_clock", "_context", "_made_s", "_make")

    def __init__(self, make: Callable[[], ssl.SSLContext], clock: Callable[[], float] = time.monotonic) -> None:
        """``make`` makes a new context. What it raises is raised here at once, and later by :meth:`current`."""
        self._make = make
        self._clock = clock
        self._context: ssl.SSLContext | None = make()
        self._made_s = clock()

    def current(self) -> ssl.SSLContext:
        """Return the context for the next handshake. Raises OSError when a new one is due and cannot be made."""
        context, now_s = self._context, self._clock()
        if (
            context is None
            or now_s >= self._made_s + MAX_AGE_S
            or context.session_stats()["number"] >= MAX_SERVER_SESSIONS
        ):
            context = self._context = self._make()
            self._made_s = now_s
        return context

    def forget(self) -> None:
        """Let nobody resume what was made so far."""
        self._context = None


class Giver(Protocol):
    """A live connection to a peer, whose session may be asked for."""

    received: int
    """Bytes of the peer's app: whoever has sent some has sent its ticket before."""
    transport: Any
    """Gives ``ssl_object``."""


class Origin(NamedTuple):
    """The full handshake that a session stems from."""

    chain_der: tuple[bytes, ...]
    """What the peer showed: the leaf first."""
    since_s: float
    """When it was, on the monotonic clock."""
    until_s: float
    """Unix time at which the first certificate on the peer's way to a root expires."""


class Kept(NamedTuple):
    """A session to resume."""

    session: ssl.SSLSession
    origin: Origin


class _Place:
    """What is kept for one instance."""

    __slots__ = ("barren", "failed", "live", "sessions")

    def __init__(self) -> None:
        self.sessions: list[Kept] = []
        self.live: dict[Giver, Origin] = {}
        self.barren = 0
        self.failed = 0


Place = tuple[Key, bool]
"""An instance, and whether HTTP/2 is offered to it: a session belongs to the context that it was made with."""


class SessionCache:
    """Sessions to foreign peers, each for one more connection to the very instance that gave it.

    Valid for one :class:`~proxy.tls.TlsMaterial` and one set of revocations: :meth:`clear` when either changes.
    """

    def __init__(
        self, monotonic: Callable[[], float] = time.monotonic, wall: Callable[[], float] = time.time
    ) -> None:
        self._monotonic = monotonic
        self._wall = wall
        self._places: OrderedDict[Place, _Place] = OrderedDict()

    def __len__(self) -> int:
        return sum(len(place.sessions) for place in self._places.values())

    def watch(
        self, at: Place, giver: Giver, chain_der: tuple[bytes, ...], until_s: float, before: Kept | None
    ) -> None:
        """A connection was made: its session may be had when the peer has given one. ``before``: what it resumed."""
        place = self._places.get(at)
        if place is None:
            place = self._places[at] = _Place()
            if len(self._places) > MAX_PEERS:
                self._places.popitem(last=False)
        self._places.move_to_end(at)
        if before is not None:
            place.failed = 0
        if max(place.barren, place.failed) < BARREN and len(place.live) < SESSIONS_PER_PEER:
            since_s = before.origin.since_s if before is not None else self._monotonic()
            place.live[giver] = Origin(chain_der, since_s, until_s)

    def ended(self, at: Place, giver: Giver) -> None:
        """That connection has ended: this is the last chance to have its session."""
        place = self._places.get(at)
        if place is None:
            return
        origin = place.live.pop(giver, None)
        if origin is not None and len(place.sessions) < SESSIONS_PER_PEER:
            kept = self._read(place, giver, origin)
            if kept is not None:
                place.sessions.append(kept)

    def take(self, at: Place) -> Kept | None:
        """Return a session that may be resumed, the newest; nobody else is given it."""
        place = self._places.get(at)
        if place is None:
            return None
        while place.sessions:
            kept = place.sessions.pop()
            if self._usable(kept):
                return kept
        for giver in reversed(place.live):
            if giver.received:
                kept_now = self._read(place, giver, place.live.pop(giver))
                return kept_now if kept_now is not None and self._usable(kept_now) else None
        return None

    def failed(self, at: Place) -> None:
        """A handshake failed in which a session was offered: the peer's others are worth no more."""
        place = self._places.get(at)
        if place is not None:
            place.failed += 1
            place.sessions.clear()
            place.live.clear()

    def drop(self, key: Key) -> None:
        """Forget all sessions with an instance."""
        for at in ((key, False), (key, True)):
            self._places.pop(at, None)

    def clear(self) -> None:
        """Forget all sessions."""
        self._places.clear()

    def _read(self, place: _Place, giver: Giver, origin: Origin) -> Kept | None:
        session = giver.transport.get_extra_info("ssl_object").session
        if session is None or not session.has_ticket:
            place.barren += 1
            return None
        place.barren = 0
        return Kept(session, origin)

    def _usable(self, kept: Kept) -> bool:
        session, origin = kept
        now_s = self._wall()
        age_s = now_s - session.time
        lifetime_s = min(session.timeout, session.ticket_lifetime_hint)
        # A clock that was set back makes a session older or younger than it is: then it is not resumed.
        return 0 <= age_s < lifetime_s and now_s < origin.until_s and self._monotonic() - origin.since_s < MAX_AGE_S
