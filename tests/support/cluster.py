"""A cluster inside one event loop: real TLS on loopback, real journals, ports found free."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator
from pathlib import Path

from node import pki
from node.client_process import ClientNode
from node.config import ClusterConfig, parse_config
from node.server_process import ServerNode
from tests.support.ports import free_ports
from tests.support.rpc import eventually


def make_config(directory: Path, servers: int, clients: int, extra: str = "") -> ClusterConfig:
    """A configuration with free ports, and its certificates."""
    ports = free_ports(servers)
    text = "[cluster]\nfault_injection = true\n" + extra
    for number, port in enumerate(ports, 1):
        text += f'[nodes.server-{number}]\nrole = "server"\nrpc_port = {port}\nhttp_port = 0\ndns_port = 0\n'
    for number in range(1, clients + 1):
        text += f'[nodes.client-{number}]\nrole = "client"\nhttp_port = 0\ndns_port = 0\n'
    config = parse_config(text, directory / "cluster.toml")
    pki.ensure_local_pki(config)
    return config


class Cluster:
    """Servers and clients by name."""

    def __init__(self, config: ClusterConfig) -> None:
        self.config = config
        self.servers: dict[str, ServerNode] = {}
        self.clients: dict[str, ClientNode] = {}

    async def start_server(self, name: str) -> ServerNode:
        server = ServerNode(self.config, self.config.node(name), rng=random.Random(name))
        await server.start()
        self.servers[name] = server
        return server

    async def start_client(self, name: str) -> ClientNode:
        client = ClientNode(self.config, self.config.node(name), rng=random.Random(name))
        await client.start()
        self.clients[name] = client
        return client

    async def stop_server(self, name: str) -> None:
        await self.servers.pop(name).stop()

    async def leader(self) -> ServerNode:
        """The server that leads and has taken office."""

        def leads() -> bool:
            return any(server.duties.in_office for server in self.servers.values())

        await eventually(leads)
        return next(server for server in self.servers.values() if server.duties.in_office)

    async def follower(self) -> ServerNode:
        leader = await self.leader()
        other = next(server for server in self.servers.values() if server is not leader)
        await eventually(lambda: other.replica.leader == leader.node.name)
        return other


@contextlib.asynccontextmanager
async def cluster(directory: Path, *, servers: int = 3, clients: int = 0, extra: str = "") -> AsyncIterator[Cluster]:
    """Run one; everything is stopped at the end."""
    made = Cluster(make_config(directory, servers, clients, extra))
    try:
        await asyncio.gather(*(made.start_server(node.name) for node in made.config.servers()))
        for node in made.config.nodes.values():
            if not node.is_server:
                await made.start_client(node.name)
        yield made
    finally:
        for client in made.clients.values():
            await client.stop()
        await asyncio.gather(*(server.stop() for server in made.servers.values()))
