"""Who shakes hands when: by arrival, servers first, no more than can be seen to; and what a ClientHello tells."""

from __future__ import annotations

import ssl

import pytest
from hypothesis import given
from hypothesis import strategies as st

from node.rpc import admission
from node.rpc.admission import Admission, Lane
from node.rpc.hello import alpn_offered


def all_of(queue: Admission[str], now: float = 0.0) -> list[str]:
    found = []
    while (one := queue.next(now)) is not None:
        found.append(one[0])
    return found


def test_by_arrival_but_servers_first() -> None:
    queue = Admission[str](waiting_max=9)
    for name in ("a1", "a2", "s1", "a3", "s2"):
        assert queue.offer(name, Lane.PEER if name[0] == "s" else Lane.AGENT, 0.0) == ""
    assert all_of(queue) == ["s1", "s2", "a1", "a2", "a3"]
    assert len(queue) == 0


def test_agents_wait_while_enough_are_under_way_and_servers_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admission, "AT_ONCE_MAX", 2)
    queue = Admission[str](waiting_max=9)
    for name in ("a1", "a2", "a3"):
        queue.offer(name, Lane.AGENT, 0.0)
    (_, first), (_, second) = queue.next(0.0) or (), queue.next(0.0) or ()
    assert queue.next(0.1) is None
    queue.offer("s1", Lane.PEER, 0.0)
    assert all_of(queue, 0.1) == ["s1"]
    queue.ended(first)
    queue.ended(first)  # once is enough
    assert queue.next(0.2) is None, "the server's is under way as well"
    queue.ended(second)
    assert all_of(queue, 0.3) == ["a3"]


def test_a_handshake_that_takes_long_is_no_longer_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admission, "AT_ONCE_MAX", 1)
    queue = Admission[str](waiting_max=9)
    for name in ("slow", "next", "last"):
        queue.offer(name, Lane.AGENT, 0.0)
    _, slow = queue.next(0.0) or ()
    assert queue.next(admission.LEASE_S - 0.01) is None
    name, ticket = queue.next(admission.LEASE_S) or ()
    assert name == "next"
    queue.ended(slow)
    assert queue.next(admission.LEASE_S + 0.1) is None, "its place was given back already"
    queue.ended(ticket)
    assert all_of(queue, admission.LEASE_S + 0.1) == ["last"]


def test_who_would_wait_too_long_is_put_off() -> None:
    queue, late = Admission[str](waiting_max=9), admission.WAIT_S_MAX + 0.1
    assert queue.offer("first", Lane.AGENT, 0.0) == ""
    assert queue.offer("second", Lane.AGENT, late - 0.2) == ""
    assert queue.offer("third", Lane.AGENT, late) == "others have waited 1.1 s for a handshake"
    assert queue.offer("s", Lane.PEER, late) == "", "servers wait for no agent"
    taken = [queue.next(late), queue.next(late)]
    assert [one[0] for one in taken if one] == ["s", "first"]
    assert queue.offer("third", Lane.AGENT, late) == "", "the next has not waited for long"
    assert all_of(queue, late) == ["second", "third"]
    assert queue.offer("fourth", Lane.AGENT, late + 60.0) == "", "nobody waits"


def test_waiting_is_bounded_in_number() -> None:
    queue = Admission[str](waiting_max=2)
    assert [queue.offer("a", Lane.AGENT, 0.0) for _ in range(3)] == ["", "", "2 connections wait for a handshake"]
    for _ in range(admission.PEERS_WAITING_MAX):
        assert queue.offer("s", Lane.PEER, 0.0) == ""
    assert "servers wait" in queue.offer("s", Lane.PEER, 0.0)
    assert len(queue.clear()) == 2 + admission.PEERS_WAITING_MAX
    assert len(queue) == 0


def hello(*protocols: str) -> bytes:
    """What OpenSSL sends first."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    if protocols:
        context.set_alpn_protocols(list(protocols))
    out = ssl.MemoryBIO()
    try:
        context.wrap_bio(ssl.MemoryBIO(), out, server_hostname="x").do_handshake()
    except ssl.SSLWantReadError:
        pass
    return out.read()


@pytest.mark.parametrize("protocols", [(), ("lictor-raft/1",), ("lictor-rpc/1", "lictor-peer/1")])
def test_the_protocols_of_a_real_hello_are_read(protocols: tuple[str, ...]) -> None:
    data = hello(*protocols)
    assert alpn_offered(data) == protocols
    assert all(alpn_offered(data[:size]) in ((), protocols) for size in range(len(data)))


@given(st.binary(max_size=200), st.integers(0, 400), st.binary(max_size=4))
def test_whatever_is_sent_is_read_without_a_fault(noise: bytes, at: int, change: bytes) -> None:
    assert isinstance(alpn_offered(noise), tuple)
    data = bytearray(hello("lictor-rpc/1"))
    data[at : at + len(change)] = change
    assert isinstance(alpn_offered(bytes(data)), tuple)
