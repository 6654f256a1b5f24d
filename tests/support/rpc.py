"""RPC ends for tests: a listener on a free port with certificates of its own, and ways to knock on it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path

from node import pki
from node.config import Limits
from node.rpc.client import ClientConnection, dial
from node.rpc.listener import Listener, RaftAccept
from node.rpc.server import Methods
from tests.support.promises import PATIENCE_S


async def eventually(condition: Callable[[], bool], timeout_s: float = PATIENCE_S) -> None:
    """Await a condition that no event announces."""
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.005)


def make_pki(directory: Path) -> pki.TlsFiles:
    """A CA with certificates for server-1, server-2, server-3, client-1 and client-2."""
    files = pki.create_node_ca(directory)
    pki.create_cluster_key(directory)
    for name in ("server-1", "server-2", "server-3", "client-1", "client-2"):
        pki.issue_node_cert(directory, name, name.partition("-")[0], "dc1")
    return files


@dataclass
class RpcEnds:
    """A listener and how to reach it."""

    files: pki.TlsFiles
    listener: Listener
    port: int

    async def dial(
        self, node: str = "client-1", *, blocked: Callable[[str], bool] = lambda node: False
    ) -> ClientConnection:
        """Open a connection as `node`."""
        context = pki.client_context(self.files, node, pki.ALPN_RPC)
        return await dial(("127.0.0.1", self.port), context, "dc1", expect_node="server-1", blocked=blocked)


@contextlib.asynccontextmanager
async def rpc_ends(
    directory: Path,
    methods: Methods,
    *,
    limits: Limits | None = None,
    accept_raft: RaftAccept | None = None,
    blocked: Callable[[str], bool] = lambda node: False,
) -> AsyncIterator[RpcEnds]:
    """Run a listener as server-1."""
    files = make_pki(directory / "tls")
    listener = Listener(
        pki.server_context(files, "server-1"),
        "dc1",
        methods,
        limits=limits or Limits(),
        accept_raft=accept_raft,
        blocked=blocked,
    )
    port = await listener.start("127.0.0.1", 0)
    try:
        yield RpcEnds(files, listener, port)
    finally:
        await listener.close()
