"""One worker process of a sidecar: it serves, the parent (:mod:`proxy.workers`) tells it what.

Started by the parent as ``python -m proxy.worker FD``; the descriptor is its end of a socketpair. When the other end
is gone, so is the sidecar, and the worker ends.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import sys
from collections.abc import AsyncIterator

from proxy.descriptors import raise_limit
from proxy.errors import ProxyError
from proxy.event_loop import SidecarLoop
from proxy.sidecar import Sidecar, SidecarOptions
from proxy.worker_wire import Applied, Ask, Begin, Configure, Drain, Link, Reopen, Report, ToWorker
from raftstate.model.sidecar import SidecarUpdate

log = logging.getLogger("lictor.proxy")


class Worker:
    """A sidecar on inherited sockets, led over a link."""

    def __init__(self, link: Link, begin: Begin) -> None:
        self._link = link
        self._sidecar = Sidecar(
            SidecarOptions(
                shared=True,
                access_log=begin.access_log,
                otlp_endpoint=begin.otlp_endpoint,
                otlp_headers=begin.otlp_headers,
                otlp_sample=begin.otlp_sample,
            )
        )
        self._sidecar.adopt(
            socket.socket(fileno=begin.public_fd),
            {name: socket.socket(fileno=fd) for name, fd in begin.upstream_fds.items()},
        )

    async def run(self) -> None:
        """Serve until drained or left alone. Raises :class:`ProxyError` when the parent talks nonsense."""
        sidecar = self._sidecar
        first = await self._link.receive()
        if not isinstance(first, Configure):
            return
        # Before it serves: an app's call must not meet a sidecar that knows no instance yet.
        await sidecar.apply(first.update)
        running = asyncio.ensure_future(sidecar.run(_nothing()))
        following = asyncio.ensure_future(self._follow())
        await asyncio.sleep(0)  # it serves from now on
        self._link.send(Applied(first.number))
        try:
            await asyncio.wait({running, following}, return_when=asyncio.FIRST_COMPLETED)
            if following.done():
                following.result()
        finally:
            await sidecar.close()
            for task in (running, following):
                task.cancel()
            await asyncio.gather(running, following, return_exceptions=True)

    async def _follow(self) -> None:
        while (message := await self._link.receive()) is not None:
            if isinstance(message, Configure):
                await self._sidecar.apply(message.update)
                self._link.send(Applied(message.number))
            elif isinstance(message, Drain):
                self._sidecar.start_drain(message.timeout_s)
            elif isinstance(message, Reopen):
                self._sidecar.reopen_log()
            elif isinstance(message, Ask):
                self._link.send(self._report(message.number))

    def _report(self, number: int) -> Report:
        sidecar = self._sidecar
        return Report(
            number=number,
            metrics=sidecar.metrics.snapshot(),
            live_calls=sidecar.live_calls(),
            ready=sidecar.ready,
            clusters=sidecar.clusters(),
            sessions=sidecar.sessions(),
        )


async def _nothing() -> AsyncIterator[SidecarUpdate]:
    """The updates come by :meth:`Worker._follow`, which answers each."""
    await asyncio.Event().wait()
    yield SidecarUpdate(version=0)


async def _main(descriptor: int) -> None:
    # Ctrl-C reaches a terminal's whole group, a service manager's signal all processes of the service; but it is the
    # parent who says when to end, and how.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        asyncio.get_running_loop().add_signal_handler(number, lambda: None)
    reader, writer = await asyncio.open_connection(sock=socket.socket(fileno=descriptor))
    link = Link(reader, writer, ToWorker)
    begin = await link.receive()
    if isinstance(begin, Begin):
        logging.basicConfig(
            level=begin.log_level, format=f"%(asctime)s %(levelname)s worker {begin.index}: %(message)s"
        )
        await Worker(link, begin).run()
        await link.flush()


def main() -> int:
    """Run one worker to its end."""
    raise_limit()
    try:
        with asyncio.Runner(loop_factory=SidecarLoop) as runner:
            runner.run(_main(int(sys.argv[1])))
    except ProxyError as error:
        log.error("%s", error)  # noqa: TRY400 - the text says it all
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
