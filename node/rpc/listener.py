"""The one port of a server: mutual TLS, then RPC or raft, as ALPN says. Whoever does not belong is closed, and each
such closing is one log line with the cause and the address."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import select
import socket
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from node.config import SERVER, Limits
from node.errors import PkiError
from node.liveness import Losses
from node.node_tls import ALPN_PEER, ALPN_RAFT, ALPN_RPC, Peer, peer_of
from node.rpc.admission import Admission, Lane, Started
from node.rpc.client import Gate
from node.rpc.hello import ALERT_BUSY, HELLO_BYTES_MAX, alpn_offered
from node.rpc.server import Methods, ServerConnection
from node.tasks import Tasks
from proxy.logs import BurstLog

log = logging.getLogger("lictor.rpc")

ACCEPT_PAUSE_S = 0.1
BACKLOG = 1024
ACCEPTS_AT_ONCE = 64
SILENT_MAX = 256
"""Connections that have sent nothing yet; beyond these the oldest is closed."""
WAITING_MAX = 1024
"""Connections that wait for their handshake; fewer when they would wait too long."""
STARTS_A_TURN = 4
CROWDED_WAIT_S, CROWDED_FOR_S = 0.1, 1.0
FULL_PAUSE_S = 0.05
HANDSHAKE_S_MIN = 0.5
"""However long one had to wait for its turn, it has this long to shake hands."""

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


@dataclass(eq=False, slots=True)
class _Arrival:
    """A connection that has proved nothing yet."""

    sock: socket.socket
    address: str
    deadline: float
    """Loop time by which it must have shaken hands."""

    def hung_up(self) -> bool:
        """Whether the client has given us up while it waited."""
        poll = select.poll()
        poll.register(self.sock, select.POLLRDHUP)
        return bool(poll.poll(0))


class Listener:
    """Accepts on one address. `accept_raft` gives the protocol for a server's raft link.

    Whoever has proved nothing has bounds of its own, in number and time, so that strangers take no agent's place:
    those who say nothing, those who wait for their handshake (`admission`), and those whose handshake is under way.
    """

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
        self._silent: dict[_Arrival, asyncio.TimerHandle] = {}
        """Who has sent nothing yet, the oldest first."""
        self._admission = Admission[_Arrival](waiting_max=WAITING_MAX)
        self._handshakes = 0
        self._unbegun: set[_Arrival] = set()
        """Whose handshake is a task that has not run yet: if it is cancelled first, nobody else has their sockets."""
        self._paused: asyncio.TimerHandle | None = None
        """Set while no connection can be accepted."""
        self._put_off_at = float("-inf")
        self._planned: asyncio.Handle | None = None
        self._connections: set[ServerConnection] = set()
        self._losses = Losses()
        self._closings = BurstLog(log)

    def __len__(self) -> int:
        """Connections of any kind, those that have proved nothing included."""
        return len(self._silent) + len(self._admission) + self._handshakes + len(self._connections)

    @property
    def connections(self) -> frozenset[ServerConnection]:
        """The RPC connections open now."""
        return frozenset(self._connections)

    @property
    def crowded(self) -> bool:
        """Whether someone waits for a handshake for long, or was put off a moment ago, or many will be back soon."""
        now = asyncio.get_running_loop().time()
        if self._admission.waited_s(now) > CROWDED_WAIT_S or now - self._put_off_at < CROWDED_FOR_S:
            return True
        return self._losses.many(now, len(self._connections))

    def _ended(self, connection: ServerConnection) -> None:
        self._connections.discard(connection)
        if connection.peer.role != SERVER:
            self._losses.note(asyncio.get_running_loop().time())

    async def start(self, host: str, port: int) -> int:
        """Listen; return the port (useful with 0). Raises OSError."""
        loop = asyncio.get_running_loop()
        found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, _, _, _, address = found[0]
        self._socket = socket.create_server(address[:2], family=family, backlog=BACKLOG)
        self._socket.setblocking(False)
        self._go_on_accepting()
        return int(self._socket.getsockname()[1])

    async def close(self) -> None:
        """Stop accepting and close every connection."""
        if self._paused is not None:
            self._paused.cancel()
        if self._socket is not None:
            asyncio.get_running_loop().remove_reader(self._socket)
            self._socket.close()
        await self._tasks.close()
        for arrival in self._unbegun:
            arrival.sock.close()
        if self._planned is not None:
            self._planned.cancel()
        for arrival in tuple(self._silent):
            self._forget_silent(arrival)
            arrival.sock.close()
        for arrival in self._admission.clear():
            arrival.sock.close()
        for connection in tuple(self._connections):
            connection.close()
        await self._calls.close()

    # -- who has proved nothing yet --------------------------------------------------------------------------------

    def _go_on_accepting(self) -> None:
        assert self._socket is not None
        self._paused = None
        asyncio.get_running_loop().add_reader(self._socket, self._accept, self._socket)

    def _accept(self, listening: socket.socket) -> None:
        # Accepted by hand, since only `connect_accepted_socket` tells us of a handshake that failed, and why; and not
        # in a task, since whom `sock_accept` has taken is lost when its task is cancelled before it goes on.
        try:
            for _ in range(ACCEPTS_AT_ONCE):
                self._arrived(*listening.accept())
        except BlockingIOError:
            pass
        except OSError as error:
            log.error("rpc: cannot accept connections for now: %s", error)  # noqa: TRY400 - the text says it all
            loop = asyncio.get_running_loop()
            loop.remove_reader(listening)
            self._paused = loop.call_later(ACCEPT_PAUSE_S, self._go_on_accepting)

    def _arrived(self, sock: socket.socket, where: Any) -> None:
        loop = asyncio.get_running_loop()
        sock.setblocking(False)
        timeout_s = self._limits.rpc_handshake_timeout_s
        arrival = _Arrival(sock, f"{where[0]}:{where[1]}", loop.time() + timeout_s)
        if self._look(arrival):
            return
        if len(self._silent) >= SILENT_MAX:
            oldest = next(iter(self._silent))
            self._forget_silent(oldest)
            self._turn_away(oldest, f"{SILENT_MAX} later ones have not said anything either")
        self._silent[arrival] = loop.call_later(timeout_s, self._stayed_silent, arrival)
        loop.add_reader(sock, self._spoke, arrival)

    def _stayed_silent(self, arrival: _Arrival) -> None:
        self._forget_silent(arrival)
        self._turn_away(arrival, _cause(TimeoutError()))

    def _spoke(self, arrival: _Arrival) -> None:
        self._forget_silent(arrival)
        self._look(arrival)

    def _forget_silent(self, arrival: _Arrival) -> None:
        self._silent.pop(arrival).cancel()
        asyncio.get_running_loop().remove_reader(arrival.sock)

    def _look(self, arrival: _Arrival) -> bool:
        """Put one in its queue by the first that it says; False when it has said nothing."""
        try:
            said = arrival.sock.recv(HELLO_BYTES_MAX, socket.MSG_PEEK)
        except BlockingIOError:
            return False
        except OSError as error:
            self._turn_away(arrival, _cause(error))
            return True
        if not said:
            self._turn_away(arrival, _cause(ConnectionResetError("closed")))
            return True
        lane = Lane.AGENT if {ALPN_RAFT, ALPN_PEER}.isdisjoint(alpn_offered(said)) else Lane.PEER
        why = self._full() if lane is Lane.AGENT else ""
        if why := why or self._admission.offer(arrival, lane, asyncio.get_running_loop().time()):
            self._put_off_at = asyncio.get_running_loop().time()
            with contextlib.suppress(OSError):  # it may be gone
                arrival.sock.send(ALERT_BUSY)
                arrival.sock.shutdown(socket.SHUT_WR)
                arrival.sock.recv(HELLO_BYTES_MAX)  # what is left unread would have the kernel take the alert back
            self._turn_away(arrival, why)
        else:
            self._plan()
        return True

    def _full(self) -> str:
        bound = self._limits.rpc_connections_max
        return f"{bound} connections are open" if len(self._connections) >= bound else ""

    def _turn_away(self, arrival: _Arrival, cause: str) -> None:
        arrival.sock.close()
        self._log_refusal(arrival.address, cause)

    def _log_refusal(self, address: str, cause: str) -> None:
        self._closings.warning(f"rpc: closed a connection from {address}: {cause}")

    # -- handshakes ------------------------------------------------------------------------------------------------

    def _plan(self, after_s: float = 0.0) -> None:
        if self._planned is None and len(self._admission):
            loop = asyncio.get_running_loop()
            self._planned = loop.call_later(after_s, self._turn) if after_s else loop.call_soon(self._turn)

    def _turn(self) -> None:
        """Start a few, so that what else the loop has to do waits for a few milliseconds at most."""
        self._planned = None
        now = asyncio.get_running_loop().time()
        for _ in range(STARTS_A_TURN):
            if (found := self._admission.next(now)) is None:
                self._plan(FULL_PAUSE_S)
                return
            arrival, ticket = found
            self._handshakes += 1
            self._unbegun.add(arrival)
            self._tasks.spawn(self._shake(arrival, ticket))
        self._plan()

    async def _shake(self, arrival: _Arrival, ticket: Started) -> None:
        self._unbegun.discard(arrival)
        gate, loop, sock = Gate(), asyncio.get_running_loop(), arrival.sock
        try:
            if arrival.hung_up():
                raise ConnectionResetError("it gave up while it waited for its turn")
            transport, _ = await loop.connect_accepted_socket(
                lambda: gate,
                sock,
                ssl=self._context,
                ssl_handshake_timeout=max(HANDSHAKE_S_MIN, arrival.deadline - loop.time()),
                ssl_shutdown_timeout=1.0,
            )
        except (OSError, TimeoutError) as error:
            self._turn_away(arrival, _cause(error))
            return
        except asyncio.CancelledError:
            sock.close()
            raise
        finally:
            self._handshakes -= 1
            self._admission.ended(ticket)
            self._plan()
        try:
            peer = peer_of(transport.get_extra_info("ssl_object"), self._datacenter)
            self._serve(peer, transport, gate)
        except PkiError as error:
            self._log_refusal(arrival.address, str(error))
            transport.abort()

    def _serve(self, peer: Peer, transport: Any, gate: Gate) -> None:
        protocol = transport.get_extra_info("ssl_object").selected_alpn_protocol()
        if self._blocked(peer.node):
            transport.abort()
        elif protocol == ALPN_RPC and peer.role != SERVER and (why := self._full()):
            raise PkiError(why)
        elif protocol == ALPN_RPC:
            connection = ServerConnection(
                peer,
                self._methods,
                self._calls,
                inflight_max=self._limits.rpc_inflight_max,
                blocked=self._blocked,
                on_end=self._ended,
            )
            self._connections.add(connection)
            gate.hand_over(transport, connection)
        elif protocol == ALPN_RAFT and self._accept_raft is not None:
            if peer.role != SERVER:
                raise PkiError(f"{peer.node} is a {peer.role}: only a server may speak raft")
            gate.hand_over(transport, self._accept_raft(peer))
        else:
            raise PkiError(f"it asked for no protocol of this port ({ALPN_RAFT}, {ALPN_RPC}), but for {protocol}")
