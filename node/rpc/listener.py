"""The one port of a server: mutual TLS, then RPC or raft, as ALPN says. Whoever does not belong is closed, and each
such closing is one log line with the cause and the address."""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import Callable
from typing import Any

from node.config import SERVER, Limits
from node.errors import PkiError
from node.pki import ALPN_RAFT, ALPN_RPC, Peer, peer_of
from node.rpc.client import Gate
from node.rpc.server import Methods, ServerConnection
from node.tasks import Tasks
from proxy.logs import BurstLog

log = logging.getLogger("lictor.rpc")

RaftAccept = Callable[[Peer], asyncio.Protocol]


class _Raw(asyncio.Protocol):
    """A connection before its handshake: nothing is read until TLS takes over."""

    def __init__(self, accepted: Callable[[Any], None]) -> None:
        self._accepted = accepted

    def connection_made(self, transport: Any) -> None:
        transport.pause_reading()
        self._accepted(transport)


def _cause(error: BaseException) -> str:
    """Say what was wrong with a handshake in words an operator can act on."""
    text = str(error)
    if isinstance(error, ssl.SSLError):
        reason = (error.reason or text).lower().replace("_", " ")
        if "http request" in reason or "wrong version number" in reason or "unknown protocol" in reason:
            return "it does not speak TLS"
        if "did not return a certificate" in reason or "certificate required" in reason:
            return "it showed no certificate"
        if "certificate verify failed" in reason:
            return (
                f"its certificate is not of this cluster's CA ({error.verify_message})"
                if hasattr(error, "verify_message")
                else "its certificate is not of this cluster's CA"
            )
        if "alert" in reason:
            return f"it refused our certificate or protocol ({reason})"
        return f"TLS handshake failed ({reason})"
    if isinstance(error, ConnectionAbortedError | TimeoutError):
        return "no TLS handshake in time"
    return f"it went away during the TLS handshake ({text or type(error).__name__})"


class Listener:
    """Accepts on one address. `accept_raft` gives the protocol for a server's raft link."""

    def __init__(
        self,
        context: ssl.SSLContext,
        datacenter: str,
        methods: Methods,
        *,
        limits: Limits,
        accept_raft: RaftAccept | None = None,
        blocked: Callable[[str], bool] = lambda node: False,
    ) -> None:
        self._context, self._datacenter, self._methods, self._limits = context, datacenter, methods, limits
        self._accept_raft, self._blocked = accept_raft, blocked
        self._tasks = Tasks("rpc listener")
        self._calls = Tasks("rpc calls")
        self._server: asyncio.Server | None = None
        self._handshakes: set[Any] = set()
        self._connections: set[ServerConnection] = set()
        self._closings = BurstLog(log)

    def __len__(self) -> int:
        """Connections that count towards the bound."""
        return len(self._handshakes) + len(self._connections)

    @property
    def connections(self) -> frozenset[ServerConnection]:
        """The RPC connections open now."""
        return frozenset(self._connections)

    async def start(self, host: str, port: int) -> int:
        """Listen; return the port (useful with 0)."""
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: _Raw(self._accepted), host, port, backlog=1024)
        return int(self._server.sockets[0].getsockname()[1])

    async def close(self) -> None:
        """Stop accepting and close every connection."""
        if self._server is not None:
            self._server.close()
        for connection in tuple(self._connections):
            connection.close()
        await self._tasks.close()
        await self._calls.close()
        for transport in tuple(self._handshakes):
            transport.abort()

    def _accepted(self, transport: Any) -> None:
        if len(self) >= self._limits.rpc_connections_max:
            self._refuse(transport, f"{self._limits.rpc_connections_max} connections are open")
            return
        self._handshakes.add(transport)
        self._tasks.spawn(self._shake(transport))

    def _refuse(self, transport: Any, cause: str) -> None:
        where = transport.get_extra_info("peername")
        address = f"{where[0]}:{where[1]}" if where else "an unknown address"
        self._closings.warning(f"rpc: closed a connection from {address}: {cause}")
        transport.abort()

    async def _shake(self, raw: Any) -> None:
        gate = Gate()
        try:
            transport = await asyncio.get_running_loop().start_tls(
                raw,
                gate,
                self._context,
                server_side=True,
                ssl_handshake_timeout=self._limits.rpc_handshake_timeout_s,
                ssl_shutdown_timeout=1.0,
            )
            if transport is None:
                raise ConnectionResetError("closed before the handshake")
        except (OSError, TimeoutError) as error:
            self._refuse(raw, _cause(error))
            return
        finally:
            self._handshakes.discard(raw)
        try:
            peer = peer_of(transport.get_extra_info("ssl_object"), self._datacenter)
            self._serve(peer, transport, gate)
        except PkiError as error:
            self._refuse(transport, str(error))

    def _serve(self, peer: Peer, transport: Any, gate: Gate) -> None:
        protocol = transport.get_extra_info("ssl_object").selected_alpn_protocol()
        if self._blocked(peer.node):
            transport.abort()
        elif protocol == ALPN_RPC:
            connection = ServerConnection(
                peer,
                self._methods,
                self._calls,
                inflight_max=self._limits.rpc_inflight_max,
                blocked=self._blocked,
                on_end=self._connections.discard,
            )
            self._connections.add(connection)
            gate.hand_over(transport, connection)
        elif protocol == ALPN_RAFT and self._accept_raft is not None:
            if peer.role != SERVER:
                raise PkiError(f"{peer.node} is a {peer.role}: only a server may speak raft")
            gate.hand_over(transport, self._accept_raft(peer))
        else:
            raise PkiError(f"it asked for no protocol of this port ({ALPN_RAFT}, {ALPN_RPC}), but for {protocol}")
