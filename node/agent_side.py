"""The side of a node that the programs of its host talk to: the agent, the HTTP API, DNS, the door for Envoys.

Importing it takes longer than all that raft needs, so `node.main` does that when the cluster's side runs already.
"""

from __future__ import annotations

import asyncio
import importlib
import importlib.util
import logging
import ssl
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from aiohttp import web

from node.agent.agent import LocalAgent
from node.agent.options import AgentOptions
from node.backend import Backend
from node.config import ClusterConfig, NodeConfig
from node.dns import DnsServer
from node.errors import PkiError
from node.http.app import create_app, make_runner
from node.http.context import HttpOptions
from node.http.front.guards import FrontOptions
from node.tokens import AccessControl, AgentTokens, tokens_of
from node.version import lictor_version
from node.xds.checks import Checks
from node.xds.door import Inner, XdsDoor

if TYPE_CHECKING:
    from aiohttp.web_runner import BaseSite

log = logging.getLogger("lictor.node")


class AgentSide:
    """Agent, API, DNS and xDS over a backend. `on_stop(why)` is called when an operator has the node leave."""

    def __init__(
        self, config: ClusterConfig, node: NodeConfig, backend: Backend, *, on_stop: Callable[[str], None]
    ) -> None:
        self.config, self.node, self.backend = config, node, backend
        self._on_stop = on_stop
        self._undo: list[Callable[[], Any]] = []

    async def start(self) -> None:
        """Start all of it. Raises OSError (a port is taken), NodeError; `stop` undoes what was started."""
        config, node, backend = self.config, self.node, self.backend
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
        access = None
        if config.acl_enabled:
            own = await asyncio.to_thread(AgentTokens, node.data_dir / "agent" / "acl-tokens.json")
            access = AccessControl(tokens_of(config, backend), own)
        await self._serve_http(backend, agent, access)
        await self._serve_dns(backend, agent, access)
        await self._serve_xds(agent, access)

    async def _serve_http(self, backend: Backend, agent: LocalAgent, access: AccessControl | None) -> None:
        config, node = self.config, self.node
        options = HttpOptions(
            fault_injection=config.fault_injection,
            lictor_version=lictor_version(),
            body_timeout_s=config.limits.http_body_timeout_s,
            on_leave=lambda: self._on_stop("an operator asked this node to leave"),
        )
        app = create_app(backend, agent, options, access=access)
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

    async def _serve_dns(self, backend: Backend, agent: LocalAgent, access: AccessControl | None) -> None:
        node = self.node
        if not node.dns_port:
            return
        dns = DnsServer(backend, agent, domain=self.config.dns_domain, access=access)
        self._undo.append(dns.stop)
        await dns.start(node.dns_address, node.dns_port)

    async def _serve_xds(self, agent: LocalAgent, access: AccessControl | None) -> None:
        node = self.node
        if not agent.options.grpc_port:
            return

        async def make() -> Inner:
            module = await asyncio.to_thread(importlib.import_module, "node.xds.server")
            xds: Inner = module.XdsServer(agent, access, checks)
            return xds

        checks = Checks()
        door = XdsDoor(make, checks)
        self._undo.append(door.stop)
        try:
            await door.start(node.grpc_address, node.grpc_port)
        except OSError as error:
            log.warning("Envoys get no configuration here: %s; set grpc_port of %s", error, node.name)

    async def stop(self) -> None:
        """Take everything down, last started first."""
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
