"""``lictor agent``: one node as a process, put together and taken down in order."""

from __future__ import annotations

import asyncio
import gc
import importlib
import importlib.util
import logging
import resource
import signal
import ssl
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from aiohttp import web

from node.agent.agent import LocalAgent
from node.agent.options import AgentOptions
from node.backend import Backend
from node.client_process import ClientNode
from node.config import ClusterConfig, NodeConfig
from node.data_dir import DataDir
from node.dns import DnsServer
from node.errors import NodeError, PkiError
from node.http.app import create_app, make_runner
from node.http.context import HttpOptions
from node.http.front.guards import FrontOptions
from node.logs import set_up_logging
from node.tokens import TokenGuard, load_secret
from node.version import lictor_version
from node.xds.door import Inner, XdsDoor
from proxy.memory import give_back_freed_memory
from raftstate.errors import RaftError

if TYPE_CHECKING:
    from aiohttp.web_runner import BaseSite

    from node.server_process import ServerNode

log = logging.getLogger("lictor.node")

HAND_OVER_TIMEOUT_S = 2.0


class NodeProcess:
    """A node: its cluster side, its agent, its HTTP API and its DNS."""

    def __init__(self, config: ClusterConfig, node: NodeConfig, *, on_stop: Callable[[str], None]) -> None:
        self.config, self.node = config, node
        self._on_stop = on_stop
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

            server = ServerNode(config, node, on_failure=lambda error: self._on_stop(f"raft has stopped: {error}"))
            self.side = server
            self._hand_over = server.hand_over
        else:
            self.side = ClientNode(config, node)
        self._undo.append(self.side.stop)
        await self.side.start()
        backend: Backend = self.side.backend

        agent = LocalAgent(
            backend,
            AgentOptions(
                node=node.name,
                address=node.advertise_address,
                data_dir=node.data_dir,
                datacenter=config.datacenter,
                zone=node.zone,
                meta=node.meta,
                is_server=node.is_server,
                rpc_port=node.rpc_port,
                http_port=node.http_port,
                dns_port=node.dns_port,
                grpc_port=node.grpc_port if xds_available() else 0,
                default_allow=config.default_intention_policy == "allow",
                enable_script_checks=node.enable_script_checks,
            ),
        )
        self._undo.append(agent.stop)
        await agent.start()
        guard = TokenGuard(backend, load_secret(config.acl_token_file)) if config.acl_enabled else None
        await self._serve_http(backend, agent, guard)
        await self._serve_dns(backend, agent)
        await self._serve_xds(agent, guard)

    async def _serve_http(self, backend: Backend, agent: LocalAgent, guard: TokenGuard | None) -> None:
        config, node = self.config, self.node
        options = HttpOptions(
            fault_injection=config.fault_injection,
            acl_enabled=config.acl_enabled,
            lictor_version=lictor_version(),
            body_timeout_s=config.limits.http_body_timeout_s,
            on_leave=lambda: self._on_stop("an operator asked this node to leave"),
        )
        app = create_app(backend, agent, options)
        if guard is not None:
            app.middlewares.insert(0, guard.middleware())
        limits = config.limits
        front = FrontOptions(
            connections_max=limits.http_connections_max,
            connections_per_client_max=limits.http_connections_per_client_max,
            head_timeout_s=limits.http_head_timeout_s,
            body_timeout_s=limits.http_body_timeout_s,
        )
        runner = make_runner(app, front)
        await runner.setup()
        self._undo.append(runner.cleanup)
        sites: list[BaseSite] = []
        if node.http_port:
            sites.append(web.TCPSite(runner, node.http_address, node.http_port, backlog=1024))
        if node.https_port:
            context = https_context(node)
            sites.append(web.TCPSite(runner, node.http_address, node.https_port, ssl_context=context, backlog=1024))
        for site in sites:
            await site.start()

    async def _serve_dns(self, backend: Backend, agent: LocalAgent) -> None:
        node = self.node
        if not node.dns_port:
            return
        dns = DnsServer(backend, agent, domain=self.config.dns_domain)
        self._undo.append(dns.stop)
        await dns.start(node.dns_address, node.dns_port)

    async def _serve_xds(self, agent: LocalAgent, guard: TokenGuard | None) -> None:
        node = self.node
        if not agent.options.grpc_port:
            return

        async def make() -> Inner:
            module = await asyncio.to_thread(importlib.import_module, "node.xds.server")
            xds: Inner = module.XdsServer(agent, guard.refusal if guard is not None else None)
            return xds

        door = XdsDoor(make)
        self._undo.append(door.stop)
        try:
            await door.start(node.grpc_address, node.grpc_port)
        except OSError as error:
            log.warning("Envoys get no configuration here: %s; set grpc_port of %s", error, node.name)

    async def stop(self) -> None:
        """Hand leadership over while the API still answers, then take everything down, last started first."""
        if self._hand_over is not None:
            await self._hand_over(HAND_OVER_TIMEOUT_S)
        while self._undo:
            await self._undo.pop()()


def xds_available() -> bool:
    """Whether the packages of the extra ``lictor[envoy]`` are there."""
    try:
        return importlib.util.find_spec("grpc") is not None and (
            importlib.util.find_spec("envoy.service.discovery.v3") is not None
        )
    except ModuleNotFoundError:
        return False


def https_context(node: NodeConfig) -> ssl.SSLContext:
    """Return the API's TLS context. Raises PkiError."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2  # Consul's clients of every age
    try:
        context.load_cert_chain(node.https_cert_file, node.https_key_file)
    except (OSError, ssl.SSLError) as error:
        raise PkiError(f"https_cert_file and https_key_file of {node.name} cannot be used: {error}") from None
    return context


async def _run(config: ClusterConfig, node: NodeConfig) -> int:
    loop = asyncio.get_running_loop()
    ending: asyncio.Future[tuple[str, int]] = loop.create_future()

    def end(why: str, status: int) -> None:
        if not ending.done():
            ending.set_result((why, status))

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, end, f"{number.name} received", 0)
    process = NodeProcess(config, node, on_stop=lambda why: end(why, 0 if "leave" in why else 1))
    try:
        await process.start()
    except OSError as error:
        log.critical("cannot start: %s", error)
        return 1
    _calm_the_collector()
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


def _calm_the_collector() -> None:
    """Rows live for long and refer to one another without cycles: full collections would only stop the loop."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 50, 100)
    give_back_freed_memory()


def _raise_file_limit() -> None:
    """Each parked query and each sidecar is a socket."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        except (OSError, ValueError) as error:
            log.warning("the limit of open files stays at %d: %s", soft, error)


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop]:
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop
    return uvloop.new_event_loop


def run_agent(config: ClusterConfig, node: NodeConfig) -> int:
    """Run one node until a signal or a failure ends it; return the exit status. Raises NodeError at a bad start."""
    set_up_logging(config.log_level)
    data_dir = DataDir(node.data_dir)
    data_dir.open()
    _raise_file_limit()
    try:
        with asyncio.Runner(loop_factory=_loop_factory()) as runner:
            return runner.run(_run(config, node))
    except RaftError as error:
        raise NodeError(str(error)) from error
    finally:
        data_dir.close()
