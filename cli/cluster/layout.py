"""Where things of a local cluster lie, and the ``cluster.toml`` that describes it."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cli.errors import CliError, UsageError

if TYPE_CHECKING:
    from node.config import ClusterConfig, NodeConfig

DEFAULT_DIR = "lictor-data"
HOST = "127.0.0.1"
HTTP_PORT, DNS_PORT, RPC_PORT = 8500, 8600, 8300
MORE_CLIENTS_PORT = 8700
MAX_SERVERS, MAX_CLIENTS = 7, 50


@dataclass(frozen=True)
class Layout:
    """The paths of a local cluster."""

    directory: Path

    @property
    def config(self) -> Path:
        return self.directory / "cluster.toml"

    def log(self, node: str) -> Path:
        return self.directory / "logs" / f"{node}.log"

    def pid(self, node: str) -> Path:
        return self.directory / "run" / f"{node}.pid"

    def load(self) -> ClusterConfig:
        """Read the cluster's file. Raises :class:`CliError`."""
        from node.config import load_config
        from node.errors import NodeError

        if not self.config.exists():
            raise CliError(
                f"there is no cluster in {self.directory}. Start one: lictor cluster up -dir {self.directory}"
            )
        try:
            return load_config(self.config)
        except NodeError as error:
            raise CliError(str(error)) from None


@dataclass(frozen=True)
class Plan:
    """How many nodes, and how far from the standard ports."""

    servers: int
    clients: int
    port_offset: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.servers <= MAX_SERVERS:
            raise UsageError(f"-servers must be from 1 to {MAX_SERVERS} (3 survive the loss of one)")
        if not 0 <= self.clients <= MAX_CLIENTS:
            raise UsageError(f"-clients must be from 0 to {MAX_CLIENTS}")
        if max(port for ports in self.ports().values() for port in ports.values()) > 65535:
            raise UsageError(f"-port-offset {self.port_offset} leads past port 65535")

    def ports(self) -> dict[str, dict[str, int]]:
        """Return each node's ports by key of ``cluster.toml``. client-1 has Consul's standard ones."""
        offset, nodes = self.port_offset, {}
        for n in range(1, self.servers + 1):
            step = 10 * (n + 1)
            nodes[f"server-{n}"] = {
                "rpc_port": RPC_PORT + n - 1 + offset,
                "http_port": HTTP_PORT + step + offset,
                "dns_port": DNS_PORT + step + offset,
            }
        for n in range(1, self.clients + 1):
            http, dns = HTTP_PORT + 10 * (n - 1), DNS_PORT + 10 * (n - 1)
            if n > 2:  # beyond the servers' ports
                http = MORE_CLIENTS_PORT + 10 * (n - 3)
                dns = http + 1
            nodes[f"client-{n}"] = {"http_port": http + offset, "dns_port": dns + offset}
        return nodes

    def toml(self) -> str:
        """Return the text of ``cluster.toml``."""
        lines = [
            "# Written by `lictor cluster up`. The sample at the repository's root explains every key.",
            "",
            "[cluster]",
            'datacenter = "dc1"',
            'data_dir = "data"',
            'tls_dir = "tls"',
            "# Lets `lictor cluster partition` cut nodes off. For clusters on one machine only.",
            "fault_injection = true",
        ]
        for name, ports in self.ports().items():
            lines += ["", f"[nodes.{name}]", f'role = "{name.partition("-")[0]}"']
            lines += [f"{key} = {port}" for key, port in ports.items()]
        return "\n".join(lines) + "\n"


def write_plan(layout: Layout, plan: Plan) -> None:
    """Write the cluster's file, whole or not at all."""
    try:
        for part in ("", "logs", "run"):
            (layout.directory / part).mkdir(parents=True, exist_ok=True)
        temporary = layout.config.with_suffix(f".{os.getpid()}")
        temporary.write_text(plan.toml())
        temporary.replace(layout.config)
    except OSError as error:
        raise CliError(f"can't write in {layout.directory}: {error.strerror}. Choose another -dir") from None


def node_ports(node: NodeConfig) -> list[tuple[str, int, bool]]:
    """Return (address, port, whether UDP too) of everything a node listens on."""
    ports = [(node.http_address, node.http_port, False), (node.dns_address, node.dns_port, True)]
    ports += [(node.bind_address, node.rpc_port, False), (node.http_address, node.https_port, False)]
    ports.append((node.grpc_address, node.grpc_port, False))
    return [entry for entry in ports if entry[1]]


def is_free(address: str, port: int, *, udp: bool = False) -> bool:
    """Tell whether a port can be bound."""
    for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM) if udp else (socket.SOCK_STREAM,):
        with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, kind) as probe:
            if kind == socket.SOCK_STREAM:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((address, port))
                if kind == socket.SOCK_STREAM:
                    probe.listen(1)
            except OSError:
                return False
    return True


def owner_of(port: int) -> str:
    """Return who listens on a port, as far as we may know, such as `` (held by redis-server, pid 42)``."""
    import psutil

    try:
        for entry in psutil.net_connections("inet"):
            if entry.laddr and entry.laddr.port == port and entry.pid and entry.status in ("LISTEN", "NONE"):
                return f" (held by {psutil.Process(entry.pid).name()}, pid {entry.pid})"
    except psutil.Error:
        pass
    return ""


def refuse_taken_ports(nodes: Iterable[NodeConfig]) -> None:
    """Raise :class:`CliError` that names every port in the way of these nodes, and its owner."""
    taken = []
    for node in nodes:
        for address, port, udp in node_ports(node):
            if not is_free(address, port, udp=udp):
                taken.append(f"{address}:{port} of {node.name} is taken{owner_of(port)}")
    if taken:
        raise CliError(
            "; ".join(taken) + ". End that process, or choose other ports: -port-offset 1000 and a new -dir"
        )
