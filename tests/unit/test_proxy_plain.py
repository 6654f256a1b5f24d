"""Plain TCP connections on the data plane's own poller, against sockets of the kernel."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import random
import socket
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

import pytest

from proxy.acceptor import Acceptor
from proxy.plain import PlainTransport, numeric, resolve
from proxy.poller import Poller
from proxy.receiver import Receiver
from tests.support.both_loops import all_loops
from tests.support.sidecars import until


class Recorder(Receiver):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.transport: PlainTransport | None = None
        self.data = bytearray()
        self.told: list[str] = []
        self.lost: Exception | None = None
        self.keeps_half_open = True
        self.pauses: random.Random | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.told.append("made")

    def data_received(self, data: bytes) -> None:
        assert self.transport is not None
        assert self.transport.is_reading(), "data while paused"
        self.data += data
        if self.pauses is not None and self.pauses.random() < 0.5:
            self.transport.pause_reading()
            asyncio.get_running_loop().call_later(self.pauses.random() * 0.001, self.transport.resume_reading)

    def eof_received(self) -> bool:
        self.told.append("eof")
        return self.keeps_half_open

    def pause_writing(self) -> None:
        self.told.append("pause")

    def resume_writing(self) -> None:
        self.told.append("resume")

    def connection_lost(self, exc: Exception | None) -> None:
        self.told.append("lost")
        self.lost = exc

    def connect_failed(self, error: OSError) -> None:
        self.told.append("failed")
        self.lost = error


@contextlib.asynccontextmanager
async def accepted() -> AsyncIterator[tuple[Recorder, socket.socket]]:
    """A connection that a listener took, and the socket at its other end, which does not block."""
    poller, taken = Poller(), list[Recorder]()
    listener = socket.create_server(("127.0.0.1", 0))
    listener.setblocking(False)

    def take(fd: int, address: tuple[Any, ...]) -> None:
        recorder = Recorder()
        recorder.transport = PlainTransport(poller, recorder)
        recorder.transport.accepted(fd, address)
        taken.append(recorder)

    acceptor = Acceptor(poller, listener, take)
    acceptor.start()
    try:
        with socket.create_connection(listener.getsockname()) as far:
            far.setblocking(False)
            await until(lambda: bool(taken))
            yield taken[0], far
            assert taken[0].transport is not None
            taken[0].transport.abort()
    finally:
        acceptor.close()
        poller.close()


async def read_all(sock: socket.socket) -> bytes:
    received = bytearray()
    while data := await asyncio.get_running_loop().sock_recv(sock, 1 << 20):
        received += data
    return bytes(received)


def dialer(poller: Poller) -> tuple[Recorder, PlainTransport]:
    recorder = Recorder()
    transport = recorder.transport = PlainTransport(poller, recorder)
    return recorder, transport


@all_loops
async def test_what_is_sent_with_the_end_is_read_whole_whatever_the_pauses() -> None:
    """An event says only once that the other side has ended: not even a pause may lose it."""
    for seed in range(30):
        rng = random.Random(seed)
        async with accepted() as (recorder, far):
            recorder.pauses = rng
            sent = rng.randbytes(rng.choice([1, 1000, 16 * 1024, 64 * 1024, 300_000]))
            await asyncio.get_running_loop().sock_sendall(far, sent)
            far.shutdown(socket.SHUT_WR)
            await until(partial(recorder.told.__contains__, "eof"))
            assert recorder.data == sent, seed


@all_loops
async def test_urgent_bytes_hold_nothing_up() -> None:
    """The kernel ends a read before an urgent byte, though more is there that no event will tell of."""
    async with accepted() as (recorder, far):
        for _ in range(5):
            far.send(b"before ")
            far.send(b"!", socket.MSG_OOB)
            far.send(b"after ")
        far.shutdown(socket.SHUT_WR)
        await until(lambda: "eof" in recorder.told)
        # Of several urgent bytes the last is, the others have become bytes like any other.
        assert recorder.data == b"before !after " * 4 + b"before after "


@all_loops
async def test_a_slow_reader_pauses_the_writer_and_gets_all() -> None:
    async with accepted() as (recorder, far):
        assert recorder.transport is not None
        block = bytes(range(256)) * 1024
        count = 0
        while "pause" not in recorder.told:
            recorder.transport.write(block)
            count += 1
            assert count < 1000
        assert recorder.transport.get_write_buffer_size() > 64 * 1024
        recorder.transport.write_eof()
        assert await read_all(far) == block * count
        assert "resume" in recorder.told
        assert "lost" not in recorder.told  # half open


@all_loops
async def test_close_sends_what_was_written_and_abort_does_not() -> None:
    async with accepted() as (recorder, far):
        assert recorder.transport is not None
        block = bytes(4 << 20)
        recorder.transport.write(block)
        recorder.transport.close()
        recorder.transport.write(b"too late")
        assert len(await read_all(far)) == len(block)
        await until(lambda: recorder.told[-1] == "lost")
    async with accepted() as (recorder, far):
        assert recorder.transport is not None
        recorder.transport.write(block)
        recorder.transport.reset()
        assert "lost" not in recorder.told, "told from within the call"
        with pytest.raises(ConnectionResetError):
            await read_all(far)
        await until(lambda: recorder.told[-1] == "lost")


@all_loops
async def test_a_reset_is_told_even_after_the_end() -> None:
    async with accepted() as (recorder, far):
        far.shutdown(socket.SHUT_WR)
        await until(lambda: "eof" in recorder.told)
        far.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        far.close()
        await until(lambda: "lost" in recorder.told)
        assert isinstance(recorder.lost, ConnectionError)


@all_loops
async def test_what_is_written_before_the_connection_is_made_arrives_after_it() -> None:
    poller = Poller()
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        recorder, transport = dialer(poller)
        transport.write(b"before ")
        transport.write_eof()
        found = numeric("127.0.0.1", server.getsockname()[1])
        assert found is not None
        transport.connect((found,))
        near, _ = await asyncio.get_running_loop().sock_accept(server)
        with near:
            assert await asyncio.get_running_loop().sock_recv(near, 100) == b"before "
            assert await asyncio.get_running_loop().sock_recv(near, 100) == b""
        await until(lambda: "eof" in recorder.told)
        assert recorder.told[0] == "made"
        transport.abort()
        await until(lambda: recorder.told[-1] == "lost")
    poller.close()


@all_loops
async def test_addresses_are_tried_in_turn_and_the_last_failure_is_told() -> None:
    poller = Poller()
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket() as closed:
        server.setblocking(False)
        closed.bind(("127.0.0.1", 0))  # bound, not listening: refuses
        bad = (socket.AF_INET, closed.getsockname())
        good = (socket.AF_INET, server.getsockname())
        recorder, transport = dialer(poller)
        transport.connect((bad, bad, good))
        transport.write(b"once")
        near, _ = await asyncio.get_running_loop().sock_accept(server)
        with near:
            assert await asyncio.get_running_loop().sock_recv(near, 100) == b"once"
        transport.abort()
        await until(lambda: recorder.told[-1] == "lost")
        recorder, transport = dialer(poller)
        transport.connect((bad, bad))
        transport.write(b"never")
        await until(lambda: recorder.told == ["failed"])
        assert isinstance(recorder.lost, ConnectionRefusedError)
        recorder, transport = dialer(poller)
        transport.connect((bad,))
        transport.abort()
        await until(lambda: bool(recorder.told))
        assert recorder.told == ["lost"]
    poller.close()


@all_loops
async def test_the_next_attempt_is_not_told_what_became_of_the_last_one() -> None:
    """The batch of events in which an address is given up may still have one for its descriptor."""
    poller = Poller()
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        _, transport = dialer(poller)
        transport.connect(((socket.AF_INET, closed.getsockname()), (socket.AF_INET, server.getsockname())))
        before = transport._fd
        transport.write(b"x")  # refused, which this is told by
        assert transport._fd not in (-1, before)
        assert poller._handlers[before] is None
        transport.abort()
        await asyncio.sleep(0)
    poller.close()


@all_loops
async def test_a_name_is_looked_up_and_an_address_is_not() -> None:
    assert numeric("127.0.0.1", 80) == (socket.AF_INET, ("127.0.0.1", 80))
    assert numeric("::1", 80) == (socket.AF_INET6, ("::1", 80))
    assert numeric("localhost", 80) is None
    assert (socket.AF_INET, ("127.0.0.1", 80)) in await resolve("localhost", 80)


@all_loops
@pytest.mark.parametrize("name", ["a..b", "x" * 64 + ".example"])
async def test_what_can_be_no_name_is_an_error_of_the_connection(name: str) -> None:
    """A registration's address is anything; what nobody awaits would leave its calls waiting for ever."""
    with pytest.raises(OSError, match="no host name"):
        await resolve(name, 80)


@all_loops
async def test_a_bug_in_one_connection_ends_that_one_alone() -> None:
    reports: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: reports.append(context))
    async with accepted() as (recorder, far), accepted() as (other, other_far):

        def fail(data: bytes) -> None:
            raise RuntimeError("planted")

        recorder.data_received = fail  # type: ignore[method-assign]
        far.send(b"x")
        other_far.send(b"y")
        await until(lambda: "lost" in recorder.told)
        await until(lambda: other.data == b"y")
        assert str(reports[0]["exception"]) == "planted"
        assert "lost" not in other.told


@all_loops
async def test_a_listener_that_cannot_be_watched_for_now_is_watched_later() -> None:
    poller, taken = Poller(), list[int]()

    class Full:
        """Has no room for another descriptor, twice."""

        left = 2

        def add(self, fd: int, handler: Any, events: int) -> None:
            if self.left:
                self.left -= 1
                raise OSError(errno.ENOSPC, "no space left")
            poller.add(fd, handler, events)

        def remove(self, fd: int) -> None:
            poller.remove(fd)

    listener = socket.create_server(("127.0.0.1", 0))
    listener.setblocking(False)
    full = Full()
    acceptor = Acceptor(full, listener, lambda fd, address: taken.append(fd))  # type: ignore[arg-type]
    acceptor.start()
    with socket.create_connection(listener.getsockname()):
        await until(lambda: bool(taken))
    assert full.left == 0
    for fd in taken:
        os.close(fd)
    acceptor.close()
    poller.close()


@all_loops
async def test_a_listener_without_descriptors_tries_again_once_at_a_time_and_not_while_it_is_stopped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whoever ends a handshake starts it anew: each such start left a timer of its own, for as long as it lasted."""
    monkeypatch.setattr("proxy.acceptor.PAUSE_S", 0.01)
    tried = 0

    class Full:
        def add(self, fd: int, handler: Any, events: int) -> None:
            nonlocal tried
            tried += 1
            raise OSError(errno.ENOSPC, "no space left")

    loop = asyncio.get_running_loop()
    timers: list[asyncio.TimerHandle] = []
    call_later = loop.call_later

    def counted(*args: Any) -> asyncio.TimerHandle:
        timers.append(call_later(*args))
        return timers[-1]

    with socket.create_server(("127.0.0.1", 0)) as listener:
        acceptor = Acceptor(Full(), listener, lambda fd, address: None)  # type: ignore[arg-type]
        with monkeypatch.context() as patch:
            patch.setattr(loop, "call_later", counted)
            for _ in range(20):
                acceptor.start()
        assert len([one for one in timers if not one.cancelled()]) == 1
        await until(lambda: tried > 20)
        acceptor.stop()
        before = tried
        done = asyncio.Event()
        loop.call_later(0.05, done.set)
        await done.wait()
        assert tried == before
        acceptor.close()
