"""The one port of a server: mutual TLS, then RPC or raft, as ALPN says. Whoever does not belong is closed, and each
such closing is one log line with the cause and the address."""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
from collections.abc import Callable
from typing import Any

from node.config import SERVER, Limits
from node.errors import PkiError
from node.node_tls import ALPN_RAFT, ALPN_RPC, Peer, peer_of
from node.rpc.client import Gate
from node.rpc.server import Methods, ServerConnection
from node.tasks import Tasks
from proxy.logs import BurstLog

log = logging.getLogger("lictor.rpc")

ACCEPT_PAUSE_S = 0.1

RaftAccept = Callable[[Peer], asyncio.Protocol]


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
        self._socket: socket.socket | None = None
        self._handshakes = 0
        self._connections: set[ServerConnection] = set()
        self._closings = BurstLog(log)

    def __len__(self) -> int:
        """Connections that count towards the bound."""
        return self._handshakes + len(self._connections)

    @property
    def connections(self) -> frozenset[ServerConnection]:
        """The RPC connections open now."""
        return frozenset(self._connections)

    async def start(self, host: str, port: int) -> int:
        """Listen; return the port (useful with 0). Raises OSError."""
        loop = asyncio.get_running_loop()
        found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, _, _, _, address = found[0]
        self._socket = socket.create_server(address[:2], family=family, backlog=1024)
        self._socket.setblocking(False)
        self._tasks.spawn(self._accept(self._socket))
        return int(self._socket.getsockname()[1])

    async def close(self) -> None:
        """Stop accepting and close every connection."""
        await self._tasks.close()
        if self._socket is not None:
            self._socket.close()
        for connection in tuple(self._connections):
            connection.close()
        await self._calls.close()

    async def _accept(self, listening: socket.socket) -> None:
        # Accepted by hand, since only `connect_accepted_socket` tells us of a handshake that failed, and why.
        loop = asyncio.get_running_loop()
        while True:
            try:
                sock, where = await loop.sock_accept(listening)
            except OSError as error:
                log.error("rpc: cannot accept connections for now: %s", error)  # noqa: TRY400 - the text says it all
                await asyncio.sleep(ACCEPT_PAUSE_S)
                continue
            address = f"{where[0]}:{where[1]}"
            if len(self) >= self._limits.rpc_connections_max:
                self._log_refusal(address, f"{self._limits.rpc_connections_max} connections are open")
                sock.close()
                continue
            self._handshakes += 1
            self._tasks.spawn(self._shake(sock, address))

    def _log_refusal(self, address: str, cause: str) -> None:
        self._closings.warning(f"rpc: closed a connection from {address}: {cause}")

    async def _shake(self, sock: socket.socket, address: str) -> None:
        gate = Gate()
        try:
            sock.setblocking(False)
            transport, _ = await asyncio.get_running_loop().connect_accepted_socket(
                lambda: gate,
                sock,
                ssl=self._context,
                ssl_handshake_timeout=self._limits.rpc_handshake_timeout_s,
                ssl_shutdown_timeout=1.0,
            )
        except (OSError, TimeoutError) as error:
            self._log_refusal(address, _cause(error))
            sock.close()
            return
        finally:
            self._handshakes -= 1
        try:
            peer = peer_of(transport.get_extra_info("ssl_object"), self._datacenter)
            self._serve(peer, transport, gate)
        except PkiError as error:
            self._log_refusal(address, str(error))
            transport.abort()

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
