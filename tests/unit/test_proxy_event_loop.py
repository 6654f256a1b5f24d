"""A sidecar's own event loop, with sockets of the kernel: what asyncio promises holds while a poller leads."""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import selectors
import signal
import socket
import sys
import threading
import time
import weakref
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import pytest

from proxy.event_loop import SidecarLoop
from proxy.poller import BATCHES, READ, Handler, Poller
from proxy.receiver import Receiver
from tests.support.sidecars import until

LONG_S = 60.0
"""So long the loop would wait."""
GIVEN_UP_S = 10.0
"""A test's own timer, which ends such a wait too."""
PROMPT_S = 5.0
"""A test that took longer was ended by that timer only."""


def on_own_loop(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[[], None]:
    """Run an async test on a :class:`SidecarLoop` on which a poller leads that watches one end of a socket pair."""

    def run() -> None:
        async def bounded() -> None:
            with watched_pair() as pair:
                started = time.monotonic()
                async with asyncio.timeout(GIVEN_UP_S):
                    await test(pair)
                assert time.monotonic() - started < PROMPT_S
                assert leads(pair.poller)

        with asyncio.Runner(loop_factory=SidecarLoop) as runner:
            runner.run(bounded())

    run.__name__, run.__doc__ = test.__name__, test.__doc__
    return run


class Pair(Handler):
    """A watched socket, which calls ``told`` for each event, and the other end, to which a test writes."""

    def __init__(self, poller: Poller) -> None:
        self.poller = poller
        self.near, self.far = socket.socketpair()
        self.near.setblocking(False)
        self.told: Callable[[], object] = lambda: None
        self.failures: list[Exception] = []
        self.poller.add(self.near.fileno(), self, READ)

    def on_ready(self, events: int) -> None:
        with contextlib.suppress(BlockingIOError):
            self.near.recv(100)
        self.told()

    def on_failure(self, error: Exception) -> None:
        self.failures.append(error)

    def poke(self) -> None:
        self.far.send(b"x")

    def close(self) -> None:
        self.poller.remove(self.near.fileno())
        self.near.close()
        self.far.close()


@contextlib.contextmanager
def watched_pair() -> Iterator[Pair]:
    poller = Poller()
    pair = Pair(poller)
    try:
        yield pair
    finally:
        pair.close()
        poller.close()


def leads(poller: Poller) -> bool:
    loop = asyncio.get_running_loop()
    assert isinstance(loop, SidecarLoop)
    return loop.host.leader is poller


async def idle() -> None:
    """Let everything that is scheduled run, so that what comes next meets the loop waiting."""
    for _ in range(3):
        await asyncio.sleep(0)


def from_within(pair: Pair, act: Callable[[], object]) -> None:
    """Have ``act`` called by a handler, while the loop would wait for long: a thread writes when it is asleep."""

    def told() -> None:
        pair.told = lambda: None
        act()

    pair.told = told
    thread = threading.Timer(0.05, pair.poke)
    thread.daemon = True
    thread.start()


@on_own_loop
async def test_what_a_handler_schedules_is_run(pair: Pair) -> None:
    loop, ran = asyncio.get_running_loop(), asyncio.Event()
    from_within(pair, lambda: loop.call_soon(ran.set))
    await ran.wait()


@on_own_loop
async def test_a_handler_may_end_what_a_task_waits_for(pair: Pair) -> None:
    future: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    from_within(pair, lambda: future.set_result("done"))
    assert await future == "done"


@on_own_loop
async def test_a_handler_may_start_a_task(pair: Pair) -> None:
    ran, tasks = asyncio.Event(), list[asyncio.Task[None]]()

    async def work() -> None:
        ran.set()

    from_within(pair, lambda: tasks.append(asyncio.get_running_loop().create_task(work())))
    await ran.wait()


@on_own_loop
async def test_a_timer_that_a_handler_sets_shortens_the_wait(pair: Pair) -> None:
    loop, due = asyncio.get_running_loop(), asyncio.Event()
    later = loop.call_later(LONG_S, lambda: None)
    from_within(pair, lambda: loop.call_later(0.1, due.set))
    await due.wait()
    later.cancel()


@on_own_loop
async def test_timers_are_neither_early_nor_late(pair: Pair) -> None:
    loop = asyncio.get_running_loop()
    for delay_s in (0.0, 0.0004, 0.003, 0.02):
        started = time.monotonic()
        await asyncio.sleep(delay_s)
        assert delay_s <= time.monotonic() - started < PROMPT_S / 2
        assert abs(loop.time() - time.monotonic()) < PROMPT_S / 2
    assert abs(pair.poller.now() - time.monotonic()) < PROMPT_S / 2


@on_own_loop
async def test_another_thread_wakes_the_wait(pair: Pair) -> None:
    loop, woken = asyncio.get_running_loop(), asyncio.Event()
    thread = threading.Timer(0.05, loop.call_soon_threadsafe, (woken.set,))
    thread.start()
    await woken.wait()
    thread.join()


@on_own_loop
async def test_signals_executors_names_and_children_work_while_a_poller_leads(pair: Pair) -> None:
    loop, struck = asyncio.get_running_loop(), asyncio.Event()
    loop.add_signal_handler(signal.SIGUSR1, struck.set)
    thread = threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGUSR1))
    thread.start()
    await struck.wait()
    thread.join()
    assert loop.remove_signal_handler(signal.SIGUSR1)
    assert await asyncio.to_thread(threading.get_ident) != threading.get_ident()
    assert await loop.getaddrinfo("localhost", 80, type=socket.SOCK_STREAM)
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-c", "print(input()); raise SystemExit(3)",
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    output, _ = await child.communicate(b"said\n")
    assert (output, child.returncode) == (b"said\n", 3)


@on_own_loop
async def test_asyncios_own_connections_work_beside_it(pair: Pair) -> None:
    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()
        writer.close()

    server = await asyncio.start_server(echo, "127.0.0.1", 0)
    reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
    sent = os.urandom(3_000_000)  # more than buffers hold, so that writers are waited for

    async def send() -> None:
        writer.write(sent)
        await writer.drain()
        writer.write_eof()

    received, _ = await asyncio.gather(reader.read(-1), send())
    assert received == sent
    writer.close()
    server.close()


# Fairness


@on_own_loop
async def test_a_data_plane_that_never_rests_starves_neither_timers_nor_descriptors_nor_threads(pair: Pair) -> None:
    """And they wait for few batches, far fewer than after which the loop gets a turn anyway."""
    loop = asyncio.get_running_loop()
    batches, busy = 0, True
    ours, theirs = socket.socketpair()
    ours.setblocking(False)

    def again() -> None:
        nonlocal batches
        batches += 1
        time.sleep(0.001)
        if batches == 5:
            theirs.send(b"there")
        if busy:
            pair.poller.again(pair)

    pair.told = again
    pair.poller.again(pair)
    assert await loop.sock_recv(ours, 100) == b"there"
    assert 5 <= batches < BATCHES / 4
    batches = 5
    while batches == 5:  # noqa: ASYNC110 - the sleep is what is tested
        await asyncio.sleep(0.01)  # of which each batch takes a part
    assert 5 < batches < BATCHES / 4
    batches = 5
    loop.call_later(LONG_S, lambda: None)
    assert await asyncio.to_thread(lambda: 7) == 7
    assert 5 < batches < BATCHES / 4
    busy = False
    ours.close()
    theirs.close()


@on_own_loop
async def test_a_loop_that_never_rests_starves_no_data_plane(pair: Pair) -> None:
    loop, stopped = asyncio.get_running_loop(), asyncio.Event()
    count = 0

    def spin() -> None:
        nonlocal count
        count += 1
        if not stopped.is_set():
            loop.call_soon(spin)

    spin()
    from_within(pair, stopped.set)
    await stopped.wait()
    assert count > 1


@on_own_loop
async def test_cancelled_timers_are_forgotten_while_the_data_plane_is_busy(pair: Pair) -> None:
    """Else each request that sets a timer and cancels it leaves it behind until the loop has something to do."""
    loop, done = asyncio.get_running_loop(), asyncio.Event()
    timers: list[weakref.ref[asyncio.TimerHandle]] = []

    def again() -> None:
        timer = loop.call_later(LONG_S, lambda: None)
        timer.cancel()
        timers.append(weakref.ref(timer))
        if len(timers) < 20 * BATCHES:
            pair.poller.again(pair)
        else:
            done.set()

    pair.told = again
    pair.poller.again(pair)
    await done.wait()
    assert sum(timer() is not None for timer in timers) < 4 * BATCHES


# Leading and following


@on_own_loop
async def test_a_second_poller_is_nested_and_the_next_leads_once_the_first_is_closed(pair: Pair) -> None:
    with watched_pair() as second:
        assert leads(pair.poller)
        for each in (second, pair, second):
            told = asyncio.Event()
            from_within(each, told.set)
            await told.wait()
    pair.poller.close()
    assert not leads(pair.poller)
    with watched_pair() as third:
        assert leads(third.poller)
        told = asyncio.Event()
        from_within(third, told.set)
        await told.wait()
    pair.poller = Poller()  # as it was, for the frame around each test
    pair.poller.add(pair.near.fileno(), pair, READ)


@on_own_loop
async def test_a_closed_poller_leaves_nothing_watched(pair: Pair) -> None:
    """Of a descriptor that stays open, level-triggered as a listening one, the loop would never sleep again."""
    loop = asyncio.get_running_loop()
    assert isinstance(loop, SidecarLoop)
    pair.poller.change(pair.near.fileno(), select.EPOLLIN)
    pair.poller.close()
    pair.poke()
    await asyncio.sleep(0)
    assert loop.host.epoll.poll(0) == []
    pair.poller.add(pair.near.fileno(), pair, READ)  # it comes to life again


@on_own_loop
async def test_what_was_put_off_outside_of_a_batch_is_done_before_the_next_wait(pair: Pair) -> None:
    order: list[str] = []
    ended = asyncio.Event()

    class Flushed(Receiver):
        def flush(self) -> None:
            order.append("flush")

    def end() -> None:
        order.append("end")
        ended.set()

    pair.poller.end_later(end)
    pair.poller.flush_later(Flushed())
    await ended.wait()
    assert order == ["flush", "end"]


@on_own_loop
async def test_a_handler_that_fails_ends_alone(pair: Pair) -> None:
    loop, reported, told = asyncio.get_running_loop(), list[dict[str, Any]](), asyncio.Event()
    loop.set_exception_handler(lambda _, context: reported.append(context))

    def fail() -> None:
        raise ValueError("a bug")

    from_within(pair, fail)
    await until(lambda: bool(pair.failures))
    from_within(pair, told.set)
    await told.wait()
    assert [str(error) for error in pair.failures] == ["a bug"]
    assert [str(context["exception"]) for context in reported] == ["a bug"]


def test_a_handler_may_stop_the_loop() -> None:
    loop = SidecarLoop()

    async def watch() -> contextlib.ExitStack:
        stack = contextlib.ExitStack()
        from_within(stack.enter_context(watched_pair()), loop.stop)
        return stack

    stack = loop.run_until_complete(watch())
    started = time.monotonic()
    guard = loop.call_later(GIVEN_UP_S, loop.stop)
    loop.run_forever()
    assert time.monotonic() - started < PROMPT_S
    guard.cancel()
    stack.close()
    loop.close()
    loop.close()


def test_an_interrupt_in_a_handler_ends_the_run_and_leaves_the_loop_whole() -> None:
    loop = SidecarLoop()
    stack = contextlib.ExitStack()

    async def watch(act: Callable[[], object]) -> Pair:
        pair = stack.enter_context(watched_pair())
        from_within(pair, act)
        return pair

    def interrupt() -> None:
        raise KeyboardInterrupt

    pair = loop.run_until_complete(watch(interrupt))
    with pytest.raises(KeyboardInterrupt):
        loop.run_forever()
    told = loop.create_future()
    from_within(pair, lambda: told.set_result(None))
    loop.run_until_complete(asyncio.wait_for(told, PROMPT_S))
    stack.close()
    loop.close()


def test_a_poller_may_be_closed_after_its_loop() -> None:
    loop = SidecarLoop()
    stack = contextlib.ExitStack()

    async def watch() -> Pair:
        return stack.enter_context(watched_pair())

    pair = loop.run_until_complete(watch())
    loop.close()
    pair.poller.close()
    pair.near.close()
    pair.far.close()


# Descriptors of asyncio's own


@on_own_loop
async def test_readers_and_writers_come_and_go_as_asyncio_has_it(pair: Pair) -> None:
    loop, readable, writable = asyncio.get_running_loop(), asyncio.Event(), asyncio.Event()
    ours, theirs = socket.socketpair()
    fd = ours.fileno()
    loop.add_reader(fd, readable.set)
    await idle()
    assert not readable.is_set()
    loop.add_writer(ours, writable.set)  # the object names the same descriptor
    await writable.wait()
    assert loop.remove_writer(fd)
    assert not loop.remove_writer(fd)
    theirs.close()  # a hang-up
    await readable.wait()
    assert loop.remove_reader(fd)
    assert not loop.remove_reader(fd)
    ours.close()


def test_the_selector_refuses_what_it_does_not_know() -> None:
    loop = SidecarLoop()
    ours, theirs = socket.socketpair()
    selector = loop.selector
    key = selector.register(ours, selectors.EVENT_READ, "data")
    assert selector.get_key(ours) is key
    assert selector.get_map()[ours.fileno()] is key
    with pytest.raises(KeyError, match="registered already"):
        selector.register(ours.fileno(), selectors.EVENT_READ)
    with pytest.raises(KeyError, match="not registered"):
        selector.unregister(theirs)
    with pytest.raises(KeyError, match="not registered"):
        selector.modify(theirs, selectors.EVENT_READ)
    assert selector.modify(ours, selectors.EVENT_READ | selectors.EVENT_WRITE, "more").data == "more"
    assert selector.select(0) == [(selector.get_key(ours), selectors.EVENT_WRITE)]
    theirs.close()
    both = selectors.EVENT_READ | selectors.EVENT_WRITE
    assert selector.select(0) == [(selector.get_key(ours), both)]
    fd = ours.fileno()
    ours.close()
    assert selector.unregister(fd).fd == fd
    loop.close()


@on_own_loop
async def test_it_looks_twice_for_what_is_to_leave_together_and_once_where_nothing_is(pair: Pair) -> None:
    loop = asyncio.get_running_loop()
    assert isinstance(loop, SidecarLoop)
    host, real, due = loop.host, loop.host.poll, loop.host.due
    receiver = Receiver()
    event = (pair.near.fileno(), select.EPOLLIN)
    batches: list[list[tuple[int, int]]] = []
    waited: list[bool] = []

    def poll(timeout_s: float, _: int) -> list[tuple[int, int]]:
        waited.append(timeout_s > 0.0)
        if batches:
            return batches.pop(0)
        host.called = True
        return []

    for told, expected in (
        (lambda: pair.poller.flush_later(receiver), [True, True, False, True]),
        (lambda: None, [True, True, True, True]),
    ):
        pair.told = told
        batches[:] = [[event, event], [event], [event]]
        waited.clear()
        host.poll, host.due, host.called = poll, time.monotonic() + LONG_S, False
        try:
            pair.poller.lead(host)
        finally:
            host.poll, host.due, host.called = real, due, True
        assert waited == expected
