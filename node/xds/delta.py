"""The delta form of xDS, one subscriber's side of it: what was asked, what was sent, what is to be sent. Pure.

Source: "xDS REST and gRPC protocol", incremental xDS. A resource is sent when its version differs from the one that
was last sent (or that the subscriber said to have); an acknowledgement does not change what is to be sent. A refused
version is not sent again; the subscriber keeps the one before until the resource changes.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Push:
    """One response of one type."""

    type_url: str
    nonce: str
    send: tuple[str, ...]
    """Names whose resources are sent, in order."""
    removed: tuple[str, ...]


NAMES_MAX = 10_000
"""Names that one subscriber may ask for or say to have, of one type."""
TYPES_MAX = 32
ANEW = ""
"""A version that no resource has."""
PENDING_MAX = 256
"""Pushes whose answers are awaited; the oldest are forgotten, of a subscriber that answers none."""


class TooMuch(Exception):
    """A subscriber asks for more than is kept for one."""


@dataclass(slots=True)
class _Type:
    """One type's subscription."""

    wildcard: bool = False
    names: set[str] = field(default_factory=set)
    sent: dict[str, str] = field(default_factory=dict)
    """Name to version, as far as the subscriber has it."""
    absent: set[str] = field(default_factory=set)
    """Names that were asked for and told not to exist."""
    asked: bool = False
    """There is a first request that has not been answered."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a subscriber said of a push; ``names`` is what the push held."""

    accepted: bool
    names: tuple[str, ...]


class Subscriber:
    """One stream's subscriptions."""

    def __init__(self) -> None:
        self._types: dict[str, _Type] = {}
        self._nonces = 0
        self._pending: dict[tuple[str, str], tuple[str, ...]] = {}

    def request(
        self,
        type_url: str,
        subscribe: Iterable[str],
        unsubscribe: Iterable[str],
        initial: Mapping[str, str],
    ) -> None:
        """Take a request's subscriptions. ``initial`` is what the subscriber has from an earlier stream.

        Raises TooMuch.
        """
        subscribe = list(subscribe)
        one = self._types.get(type_url)
        if len(self._types) >= TYPES_MAX and one is None:
            raise TooMuch(f"more than {TYPES_MAX} types of resources are asked for")
        known = 0 if one is None else len(one.names)
        if max(known + len(subscribe), len(initial)) > NAMES_MAX:
            raise TooMuch(f"more than {NAMES_MAX} resources of a type are asked for")
        if one is None:
            # The first request of a type without names means all of them.
            one = self._types[type_url] = _Type(wildcard=not subscribe, asked=True)
            one.sent.update(initial)
        for name in subscribe:
            if name == "*":
                one.wildcard = True
                continue
            one.names.add(name)
            one.absent.discard(name)
            if name not in initial:
                one.sent.pop(name, None)  # asked anew: it wants the resource, whatever it once had
        for name in unsubscribe:
            if name == "*":
                one.wildcard = False
            one.names.discard(name)
            one.sent.pop(name, None)
            one.absent.discard(name)

    def answered(self, type_url: str, nonce: str, *, accepted: bool) -> Verdict | None:
        """Take an acknowledgement or a refusal; None when the nonce is not one that awaits any."""
        names = self._pending.pop((type_url, nonce), None)
        return None if names is None else Verdict(accepted, names)

    def leave_out(self, push: Push, names: Collection[str]) -> None:
        """A push goes without these: its answer says nothing of them."""
        key = push.type_url, push.nonce
        self._pending[key] = tuple(name for name in self._pending[key] if name not in names)

    def again(self, type_url: str, names: Iterable[str]) -> None:
        """Send these once more though the subscriber has them: what uses them is made anew, and awaits them."""
        if (one := self._types.get(type_url)) is not None:
            for name in names:
                if name in one.sent:
                    one.sent[name] = ANEW  # the subscriber has it, or may: it is taken away should it go now

    def has(self, type_url: str, name: str) -> bool:
        """Whether the subscriber was sent a resource, and has said something to it."""
        one = self._types.get(type_url)
        return one is not None and name in one.sent and not self._awaits(type_url, name)

    def awaits(self, *type_urls: str) -> bool:
        """Whether something of these types was sent that the subscriber has not said anything to."""
        return any(url in type_urls for url, _ in self._pending)

    def was_sent(self, type_url: str) -> set[str]:
        """Return the names of the resources that the subscriber has, as far as it was sent them or said so."""
        one = self._types.get(type_url)
        return set() if one is None else set(one.sent)

    def _awaits(self, type_url: str, name: str) -> bool:
        return any(url == type_url and name in names for (url, _), names in self._pending.items())

    def push(
        self, type_url: str, versions: Mapping[str, str], *, hold: Collection[str] = (), removing: bool = True
    ) -> Push | None:
        """Return what must be sent for the type to be current, None when nothing; it then counts as sent.

        ``hold``: names that are not sent yet. ``removing``: whether what the subscriber has and is to have no more is
        taken from it now, or by a later push.
        """
        one = self._types.get(type_url)
        if one is None:
            return None
        wanted = versions if one.wildcard else {name: versions[name] for name in one.names if name in versions}
        send = tuple(name for name in wanted if one.sent.get(name) != wanted[name] and name not in hold)
        missing = {name for name in one.names if name not in versions and name not in one.absent}
        gone = {name for name in one.sent if name not in versions}
        if not removing:
            missing -= gone
        removed = tuple(sorted(gone | missing if removing else missing))
        if not send and not removed and not (one.asked and one.wildcard):
            return None
        one.asked = False
        one.absent = (one.absent | missing) - set(send)
        for name in removed:
            one.sent.pop(name, None)
        one.sent.update((name, wanted[name]) for name in send)
        self._nonces += 1
        nonce = str(self._nonces)
        self._pending[type_url, nonce] = send
        if len(self._pending) > PENDING_MAX:
            del self._pending[next(iter(self._pending))]
        return Push(type_url, nonce, send, removed)
