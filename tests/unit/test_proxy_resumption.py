"""Which TLS sessions are kept, for how long and how many, with clocks and sessions made up."""

from __future__ import annotations

import ssl
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from proxy import resumption
from proxy.balancer import Key
from proxy.resumption import BARREN, MAX_AGE_S, MAX_PEERS, SESSIONS_PER_PEER, Kept, ServerContext, SessionCache

CHAIN = (b"leaf",)
FOREVER = 1e12


def key(port: int = 1) -> Key:
    return Key("127.0.0.1", port, "backend", "backend-1")


@dataclass(eq=False)
class Giver:
    """A connection whose peer has given a ticket, or not."""

    ticket: bool = True
    received: int = 1
    made_s: float = 0.0
    lifetime_s: int = 7200
    asked: int = 0
    transport: Any = field(default=None)

    def __post_init__(self) -> None:
        self.transport = self

    def get_extra_info(self, name: str) -> Any:
        assert name == "ssl_object"
        self.asked += 1
        session = SimpleNamespace(
            has_ticket=self.ticket, time=self.made_s, timeout=7200, ticket_lifetime_hint=self.lifetime_s
        )
        return SimpleNamespace(session=session)


class Clocks:
    def __init__(self) -> None:
        self.now_s = 0.0
        self.cache = SessionCache(lambda: self.now_s, lambda: self.now_s)

    def give(self, giver: Giver, port: int = 1, until_s: float = FOREVER, before: Kept | None = None) -> None:
        self.cache.watch((key(port), False), giver, CHAIN, until_s, before)
        self.cache.ended((key(port), False), giver)

    def take(self, port: int = 1, *, http2: bool = False) -> Kept | None:
        return self.cache.take((key(port), http2))


def test_a_session_is_taken_once_for_its_own_instance_and_context() -> None:
    c = Clocks()
    c.give(Giver())
    assert c.take(2) is None
    assert c.take(http2=True) is None
    kept = c.take()
    assert kept is not None
    assert kept.origin.chain_der == CHAIN
    assert c.take() is None


def test_no_more_are_kept_than_allowed() -> None:
    c = Clocks()
    for port in range(MAX_PEERS + 10):
        for _ in range(SESSIONS_PER_PEER + 3):
            c.give(Giver(), port)
    assert len(c.cache) == MAX_PEERS * SESSIONS_PER_PEER
    assert c.take(0) is None
    assert c.take(MAX_PEERS + 9) is not None


def test_nothing_outlives_certificate_ticket_or_the_age_of_what_it_stems_from() -> None:
    c = Clocks()
    c.give(Giver(), until_s=100.0)
    c.now_s = 100.0
    assert c.take() is None
    c.give(Giver(made_s=100.0, lifetime_s=50))
    c.now_s = 150.0
    assert c.take() is None
    c.give(Giver(made_s=160.0))  # the clock was set back
    assert c.take() is None
    c.give(Giver(made_s=150.0))
    kept = c.take()
    assert kept is not None
    c.now_s = 150.0 + MAX_AGE_S - 1
    c.give(Giver(made_s=c.now_s), before=kept)  # resumed: its age goes on
    kept = c.take()
    assert kept is not None
    c.give(Giver(made_s=c.now_s), before=kept)
    c.now_s += 1
    assert c.take() is None


def test_a_live_connection_is_asked_once_and_not_before_its_ticket_may_be_there() -> None:
    c = Clocks()
    silent, live = Giver(received=0), Giver()
    c.cache.watch((key(), False), live, CHAIN, FOREVER, None)
    c.cache.watch((key(), False), silent, CHAIN, FOREVER, None)
    assert c.take() is not None
    assert c.take() is None
    c.cache.ended((key(), False), live)
    assert (live.asked, silent.asked, len(c.cache)) == (1, 0, 0)
    c.cache.ended((key(), False), silent)
    assert len(c.cache) == 1


def test_a_peer_without_tickets_is_soon_not_asked_any_more() -> None:
    c = Clocks()
    givers = [Giver(ticket=False) for _ in range(BARREN + 5)]
    for giver in givers:
        c.give(giver)
    assert sum(giver.asked for giver in givers) == BARREN


def test_what_was_withdrawn_gives_nothing_later() -> None:
    c = Clocks()
    live = Giver()
    for withdraw in (c.cache.clear, lambda: c.cache.drop(key())):
        c.give(Giver())
        c.cache.watch((key(), False), live, CHAIN, FOREVER, None)
        withdraw()
        assert c.take() is None
        c.cache.ended((key(), False), live)
        assert (c.take(), live.asked) == (None, 0)


def test_a_servers_context_is_replaced_when_it_is_old_or_full_or_told_to_forget() -> None:
    now_s, made = [0.0], 0

    class Context:
        number = 0

        def session_stats(self) -> dict[str, int]:
            return {"number": self.number}

    def make() -> ssl.SSLContext:
        nonlocal made
        made += 1
        return Context()  # type: ignore[return-value]

    context = ServerContext(make, lambda: now_s[0])
    first = context.current()
    assert context.current() is first
    now_s[0] = MAX_AGE_S
    second = context.current()
    assert second is not first
    second.number = resumption.MAX_SERVER_SESSIONS  # type: ignore[attr-defined]
    third = context.current()
    assert third is not second
    context.forget()
    assert context.current() is not third
    assert made == 4
