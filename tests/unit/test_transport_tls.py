"""The peer transport over real TLS sockets on loopback."""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from raftstate.errors import RaftError
from raftstate.messages import BadMessage
from tests.support.raft_tls import TestCA, TlsNode

Make = Callable[..., Any]


@pytest.fixture
def ca(tmp_path: Path) -> TestCA:
    return TestCA(tmp_path)


@pytest.fixture
async def make(ca: TestCA) -> AsyncIterator[Make]:
    async with AsyncExitStack() as stack:

        async def made(name: str, authority: TestCA = ca, **options: Any) -> TlsNode:
            node = TlsNode(authority, name, **options)
            await node.listen()
            await node.start()
            stack.push_async_callback(node.stop)
            return node

        yield made


async def linked(make: Make, **options: Any) -> tuple[TlsNode, TlsNode]:
    a, b = await make("a", **options), await make("b", **options)
    a.transport.set_peers({"a": a.address, "b": b.address})
    b.transport.set_peers({"a": a.address, "b": b.address})
    await a.until(lambda: a.transport.connected == {"b"})
    await b.until(lambda: b.transport.connected == {"a"})
    return a, b


async def test_messages_go_both_ways_whole_and_in_order(make: Make) -> None:
    a, b = await linked(make)
    sent = [bytes([0x91, 7]) + bytes([i % 256]) * (i * 37 % 5000) for i in range(300)]
    for frame in sent:
        a.transport.send("b", frame)
    b.transport.send("a", b"")
    await b.until(lambda: len(b.heard) == len(sent))
    await a.until(lambda: a.heard == [("b", b"")])
    assert b.heard == [("a", frame) for frame in sent]


async def test_links_may_be_handed_in_as_streams(make: Make) -> None:
    a, b = await make("a"), await make("b")
    await b.listen_with_streams()
    a.transport.set_peers({"b": b.address})
    await a.until(lambda: a.transport.connected == {"b"})
    for _ in range(100):
        a.transport.send("b", bytes(20_000))
    await b.until(lambda: b.heard == [("a", bytes(20_000))] * 100)
    assert list(b.transport._receivers) == ["a"]
    await b.stop()
    await a.until(lambda: a.events == ["+b", "-b"])
    assert not b.transport._pumps
    assert not b.transport._receivers


async def test_one_large_message_arrives(make: Make) -> None:
    a, b = await linked(make)
    large = bytes([0x91, 9]) + bytes(range(256)) * 20_000
    a.transport.send("b", large)
    await b.until(lambda: b.heard == [("a", large)])


async def test_heartbeats_overtake_snapshot_chunks(make: Make) -> None:
    a, b = await linked(make)
    chunk, heartbeat = bytes([0x97, 9]) + bytes(100_000), bytes([0x93, 5, 1, 1])
    for _ in range(200):
        a.transport.send("b", chunk)
    await b.until(lambda: len(b.heard) > 3)
    a.transport.send("b", heartbeat)
    await b.until(lambda: len(b.heard) == 201, timeout_s=30)
    assert b.heard.index(("a", heartbeat)) < 150


async def test_full_queue_drops_and_counts(make: Make) -> None:
    a, b = await linked(make, queue_bytes_max=10_000)
    for _ in range(20):
        a.transport.send("b", bytes(1000))
    assert a.transport.frames_dropped == 9  # the first one leaves at once, ten wait
    await b.until(lambda: len(b.heard) == 11)


async def test_sending_without_a_link_drops_and_counts(make: Make) -> None:
    a = await make("a")
    a.transport.send("nobody", b"x")
    assert a.transport.frames_dropped == 1


async def test_frames_above_the_bound_are_refused_at_both_ends(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    a, b = await linked(make, frame_bytes_max=1000)
    with pytest.raises(RaftError, match="make it smaller"):
        a.transport.send("b", bytes(1001))
    a.transport._frame_bytes_max = 5000
    a.transport.send("b", bytes(1001))
    await a.until(lambda: "-b" in a.events)
    assert "announced a message of 1001 bytes" in caplog.text
    assert not b.heard


async def test_malformed_message_closes_the_link_and_it_is_dialled_again(
    make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(peer: str, frame: bytes) -> None:
        raise BadMessage("that is no message")

    a, b = await make("a"), await make("b", on_frame=refuse)
    a.transport.set_peers({"b": b.address})
    await a.until(lambda: a.events == ["+b"])
    a.transport.send("b", b"rubbish")
    await a.until(lambda: a.events == ["+b", "-b", "+b"])
    assert "closed the link from server a: that is no message" in caplog.text


async def test_peer_that_restarts_is_linked_again_at_once(make: Make, ca: TestCA) -> None:
    a, b = await linked(make)
    await b.stop()
    await a.until(lambda: "-b" in a.events)
    again = TlsNode(ca, "b")
    again.port = b.port
    await again.listen()
    await again.start()
    try:
        again.transport.set_peers({"a": a.address})
        await a.until(lambda: a.events == ["+b", "-b", "+b"])
        a.transport.send("b", b"hello again")
        await again.until(lambda: again.heard == [("a", b"hello again")])
    finally:
        await again.stop()


async def test_peer_that_dials_cuts_the_back_off_short(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("raftstate.transport.BACKOFF_S_MIN", 0.01)
    a, b = await make("a"), await make("b")
    monkeypatch.setattr(a.transport, "_backoff_s", lambda failures: 3600.0)
    closed = await asyncio.start_server(lambda r, w: w.close(), "127.0.0.1", 0)
    port = closed.sockets[0].getsockname()[1]
    closed.close()
    await closed.wait_closed()
    b_address = b.address
    a.transport.set_peers({"b": f"127.0.0.1:{port}"})
    dialer = a.transport._dialers["b"]
    await eventually(lambda: bool(dialer._hurry._waiters))
    dialer.address = b_address
    b.transport.set_peers({"a": a.address})
    await a.until(lambda: a.transport.connected == {"b"})


async def test_removed_peer_is_left_and_a_new_address_is_dialled(make: Make) -> None:
    a, b = await linked(make)
    other = await make("b")
    a.transport.set_peers({"b": other.address})
    await a.until(lambda: a.events == ["+b", "-b", "+b"])
    a.transport.send("b", b"here")
    await other.until(lambda: other.heard == [("a", b"here")])
    a.transport.set_peers({})
    await a.until(lambda: a.events[-1] == "-b")
    assert not b.heard


async def test_server_with_another_name_is_refused_with_one_log_line(
    make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    a, c = await make("a"), await make("c")
    a.transport.set_peers({"b": c.address})
    await refused_thrice(a)
    assert complaints(caplog) == [
        f"raft: no link to server b at {c.address}: its certificate is that of server 'c'; will keep trying"
    ]


async def test_certificate_of_another_ca_is_refused_with_one_log_line(
    make: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    a, b = await make("a"), await make("b", TestCA(tmp_path, "other"))
    a.transport.set_peers({"b": b.address})
    await refused_thrice(a)
    [line] = complaints(caplog)
    assert "certificate verify failed" in line
    assert not b.transport._receivers


async def test_dialler_of_another_ca_never_counts_as_linked(
    make: Make, ca: TestCA, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    a, b = await make("a"), await make("b")
    other = TestCA(tmp_path, "other")
    a.transport.context = other.context(ssl.PROTOCOL_TLS_CLIENT, "a")
    a.transport.context.load_verify_locations(tmp_path / "ca.pem")  # it trusts the cluster; the cluster not it
    a.transport.set_peers({"b": b.address})
    await refused_thrice(a)
    assert a.events == []
    assert len(complaints(caplog)) == 1
    assert not b.transport._receivers


async def test_client_certificate_is_not_a_peer(make: Make, ca: TestCA, caplog: pytest.LogCaptureFixture) -> None:
    a, b = await make("a"), await make("b")
    a.transport.context = ca.context(ssl.PROTOCOL_TLS_CLIENT, "a", role="client")
    a.transport.set_peers({"b": b.address})
    await refused_thrice(a)
    assert a.events == []
    assert len(complaints(caplog)) == 1


async def test_plain_text_server_is_refused_with_one_log_line(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        writer.close()

    a = await make("a")
    plain = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with plain:
        a.transport.set_peers({"b": f"127.0.0.1:{plain.sockets[0].getsockname()[1]}"})
        await refused_thrice(a)
        await a.stop()
    assert len(complaints(caplog)) == 1


async def test_fault_filter_drops_both_ways_and_keeps_the_link(make: Make) -> None:
    a, b = await linked(make)
    asked: list[tuple[str, str]] = []

    def drop(peer: str, direction: str) -> bool:
        asked.append((peer, direction))
        return True

    a.transport.fault_filter = drop
    a.transport.send("b", b"lost")
    b.transport.send("a", b"lost too")
    await eventually(lambda: ("b", "in") in asked)
    a.transport.fault_filter = None
    a.transport.send("b", b"through")
    await b.until(lambda: bool(b.heard))
    assert b.heard == [("a", b"through")]
    assert a.heard == []
    assert ("b", "out") in asked
    assert a.transport.connected == {"b"}


@pytest.mark.parametrize("address", ["", "host", ":1", "host:", "host:x", "host:0", "host:65536"])
async def test_a_peer_whose_address_is_none_costs_the_others_nothing(
    make: Make, caplog: pytest.LogCaptureFixture, address: str
) -> None:
    """The log names it, from before addresses were looked at: a server that stopped here could never start again."""
    a, b = await make("a"), await make("b")
    a.transport.set_peers({"a": a.address, "b": b.address, "c": address})
    await a.until(lambda: a.transport.connected == {"b"})
    assert f"no link to server c: server address {address!r} is not host:port" in caplog.text


async def eventually(condition: Callable[[], bool]) -> None:
    """Wait for something that announces itself nowhere."""
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.001)


async def refused_thrice(node: TlsNode) -> None:
    """Wait until the dialer of `b` has failed three times over."""
    failures: list[int] = []
    real = node.transport._backoff_s

    def counted(count: int) -> float:
        failures.append(count)
        return real(count)

    node.transport._backoff_s = counted  # type: ignore[assignment,method-assign]
    await eventually(lambda: bool(failures) and failures[-1] >= 3)


def complaints(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
