"""A client agent's cluster side put together: its link to the servers, and the backend over it."""

from __future__ import annotations

import logging
import random

from node import node_tls
from node.client import RpcBackend
from node.config import ClusterConfig, NodeConfig
from node.faults import FaultFilter
from node.server_link import ServerLink

log = logging.getLogger("lictor.client")


class ClientNode:
    """One client agent. `await start()`, then use `backend`; `await stop()`."""

    def __init__(self, config: ClusterConfig, node: NodeConfig, *, rng: random.Random | None = None) -> None:
        self.config, self.node = config, node
        rng = rng or random.Random()
        self.faults = FaultFilter(enabled=config.fault_injection)
        context = node_tls.client_context(node_tls.TlsFiles(config.tls_dir), node.name, node_tls.ALPN_RPC)
        self.link = ServerLink(
            [(server.name, server.rpc_endpoint) for server in config.servers()],
            context,
            config.datacenter,
            config.liveness,
            blocked=self.faults.blocks,
            rng=rng,
        )
        self.backend = RpcBackend(self.link, node=node.name, faults=self.faults, rng=rng)

    async def start(self) -> None:
        """Begin to look for a server; does not wait for one."""
        self.link.start()

    async def stop(self) -> None:
        """Leave the servers."""
        await self.backend.close()
        await self.link.stop()
