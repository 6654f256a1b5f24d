"""A sidecar made of several worker processes, for hosts with cores to spare.

The parent follows the one stream of configuration, answers the admin endpoint and watches the workers; the workers
serve. It binds, for each port, one listening socket per worker (SO_REUSEPORT: the kernel spreads connections) and
keeps them all, so what waits in the queue of a worker that died is served by the one started in its place.

Limits and the view of instances (connections, ejections) are each worker's own.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec

from proxy.admin import AdminServer
from proxy.config import Configuration
from proxy.errors import PortUnavailable, ProxyError
from proxy.following import follow_until
from proxy.listeners import bind, bind_shared
from proxy.metrics import Labels, Snapshot, merged
from proxy.sidecar import (
    FIRST_ADMIN_PORT,
    FIRST_PUBLIC_PORT,
    FIRST_UPSTREAM_PORT,
    OFF,
    BoundPorts,
    SidecarOptions,
)
from proxy.tasks import Tasks
from proxy.worker_wire import Applied, Ask, Begin, Configure, Drain, FromWorker, Link, Reopen, Report
from raftstate.model.sidecar import SidecarUpdate

log = logging.getLogger("lictor.proxy")

MAX_WORKERS = 64
START_TIMEOUT_S = 30.0
APPLY_TIMEOUT_S = 5.0
"""A worker that has not taken an update by then is replaced: what it still admits may be forbidden."""
REPORT_TIMEOUT_S = 2.0
REPORT_INTERVAL_S = 1.0
END_GRACE_S = 3.0
_ROOT = str(Path(__file__).resolve().parents[1])
"""Where the worker finds this package, whatever its working directory."""
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.05, 5.0
_LIVED_S = 10.0
"""A worker that lived this long before it died is replaced at once."""


class _Worker:
    """One worker process as the parent sees it."""

    def __init__(self, index: int, process: subprocess.Popen[bytes], link: Link) -> None:
        self.index = index
        self.process = process
        self.link = link
        self.applied = -1
        self.changed = asyncio.Event()
        """Set when ``applied`` grows, and when the worker is gone."""
        self.gone = False
        self.report = Report(0, Snapshot())
        self.reports: dict[int, asyncio.Future[Report]] = {}

    def took(self, message: FromWorker) -> None:
        if isinstance(message, Applied):
            self.applied = max(self.applied, message.number)
            self.changed.set()
            return
        self.report = message
        waiter = self.reports.pop(message.number, None)
        if waiter is not None and not waiter.done():
            waiter.set_result(message)

    def ended(self) -> None:
        self.gone = True
        self.changed.set()
        for waiter in self.reports.values():
            waiter.cancel()
        self.reports.clear()
        self.link.close()

    async def has_applied(self, number: int) -> None:
        """Wait until the update is in force in this worker, or the worker is gone."""
        while self.applied < number and not self.gone:
            self.changed.clear()
            await self.changed.wait()


class WorkerGroup:
    """A sidecar of ``workers`` processes; to its user the same as :class:`~proxy.sidecar.Sidecar`."""

    def __init__(self, options: SidecarOptions, workers: int) -> None:
        if not 1 <= workers <= MAX_WORKERS:
            raise ProxyError(f"workers must be from 1 to {MAX_WORKERS}, not {workers}")
        self.options = options
        self.config = Configuration()
        self.draining = False
        self.restarts = 0
        """Workers that were replaced."""
        self._count = workers
        self._tasks = Tasks("sidecar parent")
        self._public: list[socket.socket] = []
        self._upstreams: dict[str, list[socket.socket]] = {}
        self._workers: dict[int, _Worker] = {}
        self._admin: AdminServer | None = None
        self._whole = SidecarUpdate(version=0)
        """All sections as last received, for a worker that is started later."""
        self._number = 0
        self._ask_number = 0
        self._known = asyncio.Event()
        """There is a configuration to start workers with."""
        self._past = Snapshot()
        """What workers had counted that are gone."""
        self._drained = asyncio.Event()
        self._running = False
        self._closed = False
        self._keeping: list[asyncio.Task[None]] = []
        self._draining_task: asyncio.Task[None] | None = None

    # Life

    async def bind(self) -> BoundPorts:
        """Bind every listening socket; nothing is accepted yet. Raises :class:`PortUnavailable`."""
        options, count = self.options, self._count
        try:
            self._public = bind_shared(options.public_host, options.public_port, FIRST_PUBLIC_PORT, count)
            for name, host, port in options.upstreams:
                if name in self._upstreams:
                    raise PortUnavailable(f"upstream {name} is named twice")
                self._upstreams[name] = bind_shared(host or "127.0.0.1", port, FIRST_UPSTREAM_PORT, count)
            if options.admin_port != OFF:
                self._admin = AdminServer(bind("127.0.0.1", options.admin_port, FIRST_ADMIN_PORT), self)
        except PortUnavailable:
            await self.close()
            raise
        return BoundPorts(
            public_port=self._public[0].getsockname()[1],
            upstreams={name: socks[0].getsockname()[1] for name, socks in self._upstreams.items()},
            admin_port=self._admin.port if self._admin else 0,
        )

    async def run(self, updates: AsyncIterator[SidecarUpdate]) -> None:
        """Serve, following ``updates``, until cancelled or drained. Raises :class:`ProxyError` if not bound."""
        if not self._public:
            raise ProxyError("bind the sidecar's ports before it runs")
        if self._admin is not None:
            await self._admin.start()
        self._running = True
        self._keeping = [self._tasks.spawn(self._keep(index)) for index in range(self._count)]
        self._tasks.spawn(self._poll())
        try:
            await follow_until(self._drained, updates, self.apply, self._tasks, log)
        finally:
            self._running = False

    async def apply(self, update: SidecarUpdate) -> None:
        """Take one update; returns when it is in force in every worker."""
        first = not self._known.is_set()
        sections = {name: value for name in update.__struct_fields__ if (value := getattr(update, name)) is not None}
        self._whole = msgspec.structs.replace(self._whole, **sections)
        self.config.apply(update)
        if len(sections) == 1 and not first:
            return  # only a sign of life
        self._number += 1
        number = self._number
        for worker in self._workers.values():
            worker.link.send(Configure(number, update))
        self._known.set()
        if first:
            await self._all_ready()
            return
        late = [worker for worker in self._workers.values() if worker.applied >= 0]
        try:
            async with asyncio.timeout(APPLY_TIMEOUT_S):
                for worker in late:
                    await worker.has_applied(number)
        except TimeoutError:
            for worker in late:
                if worker.applied < number:
                    log.warning("worker %d did not take an update in time; it is replaced", worker.index)
                    worker.process.kill()

    async def _all_ready(self) -> None:
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                while not self.ready:  # noqa: ASYNC110 - once, at the start
                    await asyncio.sleep(0.01)
        except TimeoutError:
            log.warning("not all workers have started yet; going on with those that have")

    # Workers

    async def _keep(self, index: int) -> None:
        """Have a worker in this place for as long as the sidecar lives."""
        loop = asyncio.get_running_loop()
        pause_s = _FIRST_PAUSE_S
        await self._known.wait()
        while not self.draining:
            started = loop.time()
            try:
                worker = await self._start(index)
            except OSError as error:
                log.warning("worker %d can't be started: %s; trying again", index, error)
            else:
                try:
                    await self._serve(worker)
                finally:
                    await self._bury(worker)
                self._ended(worker)
            pause_s = _FIRST_PAUSE_S if loop.time() - started > _LIVED_S else min(pause_s * 2, _LONGEST_PAUSE_S)
            await asyncio.sleep(pause_s)

    def _ended(self, worker: _Worker) -> None:
        if not self.draining:
            self.restarts += 1
            process = worker.process
            log.warning(
                "worker %d (pid %d) ended: %s; starting another", worker.index, process.pid, process.returncode
            )

    async def _start(self, index: int) -> _Worker:
        ours, theirs = socket.socketpair()
        upstreams = {name: socks[index].fileno() for name, socks in self._upstreams.items()}
        public = self._public[index].fileno()
        path = os.environ.get("PYTHONPATH")
        try:
            process = subprocess.Popen(  # noqa: ASYNC220 - a fork, milliseconds, once per worker
                [sys.executable, "-P", "-m", "proxy.worker", str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(), public, *upstreams.values()),
                env={**os.environ, "PYTHONPATH": _ROOT + (os.pathsep + path if path else "")},
            )
        finally:
            theirs.close()
        reader, writer = await asyncio.open_connection(sock=ours)
        worker = _Worker(index, process, Link(reader, writer, FromWorker))
        level = logging.getLogger().getEffectiveLevel()
        options = self.options
        worker.link.send(
            Begin(
                index, public, upstreams, log_level=level,
                access_log=options.access_log, otlp_endpoint=options.otlp_endpoint, otlp_sample=options.otlp_sample,
                otlp_headers=options.otlp_headers,
            )
        )  # fmt: skip
        worker.link.send(Configure(self._number, self._whole))
        self._workers[index] = worker
        if self.draining:
            worker.link.send(Drain(0.0))  # the others were told before this one was there
        return worker

    async def _serve(self, worker: _Worker) -> None:
        """Hear the worker until it is gone."""
        try:
            while (message := await worker.link.receive()) is not None:
                worker.took(message)
        except ProxyError as error:
            log.warning("worker %d is replaced: %s", worker.index, error)

    async def _bury(self, worker: _Worker) -> None:
        worker.ended()
        if self._workers.get(worker.index) is worker:
            del self._workers[worker.index]
        self._past = merged([self._past, worker.report.metrics.ended()])
        if not self._closed:
            try:
                await asyncio.to_thread(worker.process.wait, END_GRACE_S)
                return
            except (subprocess.TimeoutExpired, asyncio.CancelledError):
                pass  # killed below
        worker.process.kill()
        worker.process.wait()

    async def _poll(self) -> None:
        """Know how the workers are: what one has counted must outlive it."""
        while True:
            await asyncio.sleep(REPORT_INTERVAL_S)
            await self._ask_all()

    async def _ask_all(self) -> None:
        self._ask_number += 1
        waiters = []
        for worker in self._workers.values():
            if worker.applied >= 0:
                waiter = worker.reports[self._ask_number] = asyncio.get_running_loop().create_future()
                waiters.append(waiter)
                worker.link.send(Ask(self._ask_number))
        if waiters:
            await asyncio.wait(waiters, timeout=REPORT_TIMEOUT_S)
        for worker in self._workers.values():
            worker.reports.pop(self._ask_number, None)

    # End

    def start_drain(self, timeout_s: float) -> None:
        """Run :meth:`drain` in the background; :meth:`run` returns when it is done."""
        self._draining_task = asyncio.get_running_loop().create_task(self.drain(timeout_s))

    async def drain(self, timeout_s: float) -> None:
        """Take no new calls, let live ones end, for at most ``timeout_s``; then :meth:`close`."""
        self.draining = True
        log.info("draining: live calls have %g s to end", timeout_s)
        for worker in self._workers.values():
            worker.link.send(Drain(timeout_s))
        self._close_sockets()
        if self._workers:
            await asyncio.wait(self._keeping, timeout=timeout_s + END_GRACE_S)
        await self.close()

    async def close(self) -> None:
        """End everything at once. Idempotent."""
        self.draining = self._closed = True
        self._close_sockets()
        if self._admin is not None:
            await self._admin.close()
        self._drained.set()
        for worker in self._workers.values():
            worker.process.kill()
        await self._tasks.close()

    def _close_sockets(self) -> None:
        for sock in (*self._public, *(sock for socks in self._upstreams.values() for sock in socks)):
            sock.close()

    def reopen_log(self) -> None:
        """Open the access log anew, after it was moved away."""
        for worker in self._workers.values():
            worker.link.send(Reopen())

    # Seen from outside

    @property
    def ready(self) -> bool:
        """Whether every worker takes and makes calls."""
        served = len(self._workers) == self._count and all(each.applied >= 0 for each in self._workers.values())
        able = self.config.ready and self.config.registered and not self.draining
        return able and self._running and served

    @property
    def pids(self) -> list[int]:
        """The workers' process ids, by their places."""
        return [worker.process.pid for _, worker in sorted(self._workers.items())]

    def live_calls(self) -> int:
        """Calls that had not ended when the workers last reported."""
        return sum(worker.report.live_calls for worker in self._workers.values())

    async def snapshot(self) -> Snapshot:
        """Return the counters of all workers, past ones included."""
        await self._ask_all()
        whole = merged([self._past, *(worker.report.metrics for worker in self._workers.values())])
        own: list[tuple[str, Labels, float]] = [
            ("lictor_workers", (), len(self._workers)),
            ("lictor_worker_restarts_total", (), self.restarts),
        ]
        whole.gauges += own
        return whole

    async def stats(self) -> dict[str, object]:
        """Return all figures in plain values; sessions worker by worker."""
        figures = await self.snapshot()
        workers = [
            {
                "index": worker.index,
                "pid": worker.process.pid,
                "ready": worker.report.ready,
                "live_calls": worker.report.live_calls,
                "sessions": worker.report.sessions,
            }
            for _, worker in sorted(self._workers.items())
        ]
        return {**figures.as_dict(), "live_calls": self.live_calls(), "workers": workers}

    async def metrics_text(self) -> str:
        """Return all figures as Prometheus text."""
        return (await self.snapshot()).render()

    async def cluster_list(self) -> list[dict[str, object]]:
        """Return the upstreams with their instances as each worker sees them."""
        await self._ask_all()
        return [
            {"worker": worker.index, **cluster}
            for _, worker in sorted(self._workers.items())
            for cluster in worker.report.clusters
        ]
