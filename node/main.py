"""``lictor agent``: one node as a process, put together and taken down in order."""

from __future__ import annotations

import asyncio
import gc
import importlib
import logging
import signal
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from node.backend import Backend
from node.config import ClusterConfig, NodeConfig
from node.data_dir import DataDir
from node.errors import NodeError
from node.logs import set_up_logging
from proxy.descriptors import raise_limit
from proxy.memory import give_back_freed_memory
from raftstate.clock import boot_clock
from raftstate.errors import RaftError

if TYPE_CHECKING:
    from node.agent_side import AgentSide
    from node.client_process import ClientNode
    from node.server_process import ServerNode

log = logging.getLogger("lictor.node")

HAND_OVER_TIMEOUT_S = 2.0


class NodeProcess:
    """A node: its cluster side, its agent, its HTTP API and its DNS."""

    def __init__(
        self,
        config: ClusterConfig,
        node: NodeConfig,
        *,
        on_stop: Callable[[str], None],
        silent_since: float | None = None,
    ) -> None:
        """`silent_since`: when this process got the lock on the node's data, by `boot_clock`."""
        self.config, self.node = config, node
        self._on_stop, self._silent_since = on_stop, silent_since
        self._undo: list[Callable[[], Any]] = []
        self.side: ServerNode | ClientNode | None = None
        self._hand_over: Callable[[float], Awaitable[Any]] | None = None

    async def start(self) -> None:
        """Start everything; what was started is stopped again when a later part fails."""
        try:
            await self._start()
        except BaseException:
            await self.stop()
            raise

    async def _start(self) -> None:
        config, node = self.config, self.node
        if node.is_server:
            from node.server_process import ServerNode  # what only servers need would cost an agent 3 MiB

            server = ServerNode(
                config,
                node,
                on_failure=lambda error: self._on_stop(f"raft has stopped: {error}"),
                silent_since=self._silent_since,
            )
            self.side = server
            self._hand_over = server.hand_over
        else:
            from node.client_process import ClientNode

            self.side = ClientNode(config, node)
        self._undo.append(self.side.stop)
        await self.side.start()
        backend: Backend = self.side.backend

        # The programs of this host wait for what follows; the other servers wait for what is running now.
        module = await asyncio.to_thread(importlib.import_module, "node.agent_side")
        agent_side: AgentSide = module.AgentSide(config, node, backend, on_stop=self._on_stop)
        self._undo.append(agent_side.stop)
        await agent_side.start()

    async def stop(self) -> None:
        """Hand leadership over while the API still answers, then take everything down, last started first."""
        if self._hand_over is not None:
            await self._hand_over(HAND_OVER_TIMEOUT_S)
        while self._undo:
            await self._undo.pop()()


async def _run(config: ClusterConfig, node: NodeConfig, silent_since: float) -> int:
    loop = asyncio.get_running_loop()
    ending: asyncio.Future[tuple[str, int]] = loop.create_future()

    def end(why: str, status: int) -> None:
        if not ending.done():
            ending.set_result((why, status))

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, end, f"{number.name} received", 0)
    process = NodeProcess(
        config, node, on_stop=lambda why: end(why, 0 if "leave" in why else 1), silent_since=silent_since
    )
    try:
        await process.start()
    except OSError as error:
        log.critical("cannot start: %s", error)
        return 1
    _calm_the_collector(whole=not node.is_server)
    log.info(
        "ready: node=%s role=%s http=%s:%d dns=%s:%d%s",
        node.name,
        node.role,
        node.http_address,
        node.http_port or node.https_port,
        node.dns_address,
        node.dns_port,
        f" rpc={node.rpc_endpoint}" if node.is_server else "",
    )
    why, status = await ending
    log.info("stopping: %s", why)
    await process.stop()
    log.info("stopped: node=%s", node.name)
    return status


def _calm_the_collector(*, whole: bool) -> None:
    """Rows live for long and refer to one another without cycles: to walk all of them would only stop the loop.

    A collection of the middle generation walks what came since the last: 50,000 objects, about 20 ms. With a million,
    as thousands of agents' registrations bring, a leader lost its office. ``whole``: also walk everything at times.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(5_000, 10, 100 if whole else 1_000_000)
    gc.enable()
    give_back_freed_memory()


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop]:
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop
    return uvloop.new_event_loop


def run_agent(config: ClusterConfig, node: NodeConfig) -> int:
    """Run one node until a signal or a failure ends it; return the exit status. Raises NodeError at a bad start."""
    gc.disable()  # until what is loaded now is frozen: a third of a start went into walking it again and again
    set_up_logging(config.log_level)
    data_dir = DataDir(node.data_dir)
    data_dir.open()
    silent_since = boot_clock()
    raise_limit()  # each parked query and each sidecar is a socket
    try:
        with asyncio.Runner(loop_factory=_loop_factory()) as runner:
            return runner.run(_run(config, node, silent_since))
    except RaftError as error:
        raise NodeError(str(error)) from error
    finally:
        data_dir.close()
