"""Raft messages between servers: `PeerTransport`, and its real form over mutual TLS.

Each server dials one link to every other and uses it only to send; what it hears comes in on the links that the
others dialled. So no two servers ever argue about which of two connections is the one, and a broken link is
mended by the only side that knows it is needed. A frame is a 4-byte big-endian length and that many bytes.

Nothing here promises delivery or order across lanes; Raft does not need it.
"""

from __future__ import annotations

import asyncio
import logging
import random
import ssl
from collections.abc import Callable, Mapping
from typing import Any, Protocol, cast

from raftstate.errors import RaftError
from raftstate.transport_link import (
    FRAME_BYTES_MAX,
    LaneOf,
    PeerRefused,
    Receiver,
    Sender,
    lane_of_message,
    server_address,
)

__all__ = ["FRAME_BYTES_MAX", "PeerTransport", "TlsPeerTransport"]

log = logging.getLogger(__name__)

ALPN_RAFT = "lictor-raft/1"
DIAL_TIMEOUT_S = 2.0
READ_BYTES = 256 << 10
CLOSE_TIMEOUT_S = 0.5
BACKOFF_S_MIN, BACKOFF_S_MAX = 0.02, 0.5
STEADY_S = 1.0
"""A link that lived shorter than this counts as a failed dial, so that two sides that disagree do not spin."""


class PeerTransport(Protocol):
    """What a replica needs to talk to its peers, and a test may replace."""

    def send(self, peer: str, frame: bytes) -> None:
        """Queue one message; never blocks. Dropped without a link, or when the queue is full."""

    def set_peers(self, addresses: Mapping[str, str]) -> None:
        """The other servers now, id -> host:port: link to these, drop the rest."""

    @property
    def connected(self) -> set[str]:
        """Peers that messages can be sent to now."""

    async def start(self) -> None:
        """Begin to dial."""

    async def stop(self) -> None:
        """Close every link, in and out."""


class TlsPeerTransport:
    """PeerTransport over TLS. Belongs to the event loop it is started on.

    - `context`: client context with this server's certificate, the cluster's CA and ALPN `lictor-raft/1`.
    - `peer_name(ssl_object)`: node name of a verified certificate if it is a *server's*, else None.
    - `on_frame(peer, frame)`: a message has come. If it raises RaftError, the link it came on is closed.
    - `on_read()`: nothing more has come on a link for now.
    - `on_connected(peer)`, `on_disconnected(peer)`: a link for sending is up, or lost.
    - `fault_filter(peer, direction)`: True drops a message, `direction` is "out" or "in"; only for test clusters.

    Incoming links are handed in by whoever listens, once ALPN and role are checked: `accept` takes streams, and
    `incoming` gives a protocol for `transport.set_protocol`.
    """

    def __init__(
        self,
        self_id: str,
        context: ssl.SSLContext,
        *,
        peer_name: Callable[[Any], str | None],
        on_frame: Callable[[str, bytes], None],
        on_read: Callable[[], None] = lambda: None,
        on_connected: Callable[[str], None] | None = None,
        on_disconnected: Callable[[str], None] | None = None,
        fault_filter: Callable[[str, str], bool] | None = None,
        lane_of: LaneOf = lane_of_message,
        frame_bytes_max: int = FRAME_BYTES_MAX,
        queue_bytes_max: int = 32 << 20,
        queue_frames_max: int = 10_000,
        rng: random.Random | None = None,
    ) -> None:
        self.self_id = self_id
        self.context = context
        """Replaced when the certificate is renewed; used from the next dial on."""
        self.fault_filter = fault_filter
        self.frames_dropped = 0
        self._peer_name, self._on_frame, self._on_read = peer_name, on_frame, on_read
        self._on_connected, self._on_disconnected = on_connected, on_disconnected
        self._lane_of, self._frame_bytes_max = lane_of, frame_bytes_max
        self._queue_bytes_max, self._queue_frames_max = queue_bytes_max, queue_frames_max
        self._rng = rng or random.Random()
        self._dialers: dict[str, _Dialer] = {}
        self._receivers: dict[str, Receiver] = {}  # newest incoming link of each peer
        self._addresses: dict[str, str] = {}
        self._pumps: set[asyncio.Task[None]] = set()
        self._running = False

    @property
    def connected(self) -> set[str]:
        """Peers with a link to send on."""
        return {peer for peer, dialer in self._dialers.items() if dialer.sender is not None}

    async def start(self) -> None:
        """Begin to dial the peers set so far."""
        self._running = True
        self.set_peers(self._addresses)

    async def stop(self) -> None:
        """Close every link and wait for the dialers to end."""
        self._running = False
        dialers = list(self._dialers.values())
        self._dialers.clear()
        for receiver in list(self._receivers.values()):
            receiver.abort()
        pumps = list(self._pumps)
        for pump in pumps:
            pump.cancel()
        await asyncio.gather(*(dialer.stop() for dialer in dialers), return_exceptions=True)
        await asyncio.gather(*pumps, return_exceptions=True)

    def set_peers(self, addresses: Mapping[str, str]) -> None:
        """See PeerTransport. A peer whose address is none gets no link: the others must go on without it."""
        self._addresses = {
            peer: address
            for peer, address in addresses.items()
            if peer != self.self_id and _is_address(peer, address)
        }
        if not self._running:
            return
        for peer, dialer in list(self._dialers.items()):
            if self._addresses.get(peer) != dialer.address:
                del self._dialers[peer]
                dialer.cancel()
        for peer, address in self._addresses.items():
            if peer not in self._dialers:
                self._dialers[peer] = _Dialer(self, peer, address)

    def send(self, peer: str, frame: bytes) -> None:
        """Never blocks. Raises RaftError for a frame above the size bound: the peer would refuse it."""
        if len(frame) > self._frame_bytes_max:
            raise RaftError(
                f"a raft message has {len(frame)} bytes, more than {self._frame_bytes_max}: make it smaller"
            )
        dialer = self._dialers.get(peer)
        if self.fault_filter is not None and self.fault_filter(peer, "out"):
            return
        if dialer is None or dialer.sender is None or not dialer.sender.send(frame):
            self.frames_dropped += 1

    def incoming(self, peer: str) -> Receiver:
        """A protocol for a connection that `peer` dialled, its ALPN and certificate checked by the caller."""
        return Receiver(
            peer,
            self._frame_bytes_max,
            on_frame=self._received,
            on_read=self._on_read,
            on_open=self._opened,
            on_closed=self._closed,
        )

    def accept(self, peer: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """The same for a connection that is a pair of streams already."""
        task = asyncio.get_running_loop().create_task(self._pump(peer, reader, writer), name=f"raft-hear-{peer}")
        self._pumps.add(task)
        task.add_done_callback(self._pumps.discard)
        task.add_done_callback(_report)

    async def _pump(self, peer: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        receiver = self.incoming(peer)
        error: Exception | None = None
        try:
            receiver.connection_made(writer.transport)
            while data := await reader.read(READ_BYTES):
                receiver.data_received(data)
        except OSError as lost:
            error = lost
        finally:
            receiver.connection_lost(error)
            writer.transport.abort()

    def _opened(self, receiver: Receiver) -> None:
        if not self._running:
            receiver.abort()
            return
        old = self._receivers.get(receiver.peer)
        self._receivers[receiver.peer] = receiver
        if old is not None:
            old.abort()  # the peer has dialled anew, so it has given that one up
        if (dialer := self._dialers.get(receiver.peer)) is not None:
            dialer.hurry()

    def _closed(self, receiver: Receiver) -> None:
        if self._receivers.get(receiver.peer) is receiver:
            del self._receivers[receiver.peer]

    def _received(self, peer: str, frame: bytes) -> None:
        if self.fault_filter is None or not self.fault_filter(peer, "in"):
            self._on_frame(peer, frame)

    # --- for the dialers ---

    async def _dial(self, peer: str, address: str) -> Sender:
        host, port = server_address(address)
        loop = asyncio.get_running_loop()
        sender = Sender(self._lane_of, self._queue_bytes_max, self._queue_frames_max)
        try:
            async with asyncio.timeout(DIAL_TIMEOUT_S):
                transport, _ = await loop.create_connection(lambda: sender, host, port, ssl=self.context)
                tls = transport.get_extra_info("ssl_object")
                if tls.selected_alpn_protocol() != ALPN_RAFT:
                    raise PeerRefused("it does not speak raft")
                if (name := self._peer_name(tls)) != peer:
                    raise PeerRefused(f"its certificate is that of {f'server {name!r}' if name else 'no server'}")
                await asyncio.shield(sender.ready)
        except BaseException:
            sender.abort()
            raise
        return sender

    def _link_up(self, peer: str) -> None:
        if self._on_connected is not None:
            self._on_connected(peer)

    def _link_down(self, peer: str) -> None:
        if self._on_disconnected is not None:
            self._on_disconnected(peer)

    def _backoff_s(self, failures: int) -> float:
        ceiling: float = min(BACKOFF_S_MAX, BACKOFF_S_MIN * cast(float, 2 ** min(failures, 10)))
        return ceiling * self._rng.uniform(0.5, 1.0)


class _Dialer:
    """Keeps one link to one peer: dials, waits until it breaks, dials again with a jittered back-off."""

    def __init__(self, owner: TlsPeerTransport, peer: str, address: str) -> None:
        self.address = address
        self.sender: Sender | None = None  # set while the link is up
        self._owner, self._peer = owner, peer
        self._hurry = asyncio.Event()
        self._task = asyncio.get_running_loop().create_task(self._run(), name=f"raft-dial-{peer}")
        self._task.add_done_callback(_report)

    def hurry(self) -> None:
        """The peer is alive: do not wait out the back-off."""
        self._hurry.set()

    def cancel(self) -> None:
        """Give this peer up. What is queued is still written out."""
        self._task.cancel()
        if (sender := self.sender) is not None:
            # The TLS farewell may never be answered.
            asyncio.get_running_loop().call_later(CLOSE_TIMEOUT_S, sender.abort)

    async def stop(self) -> None:
        """Cancel, and wait until what is queued is written and the link closed, for a moment at most."""
        sender = self.sender
        self._task.cancel()
        await asyncio.wait([self._task])
        if sender is not None:
            await asyncio.wait([sender.closed], timeout=CLOSE_TIMEOUT_S)
            sender.abort()
            await asyncio.wait([sender.closed], timeout=CLOSE_TIMEOUT_S)

    async def _run(self) -> None:
        failures = 0
        loop = asyncio.get_running_loop()
        while True:
            self._hurry.clear()
            try:
                self.sender = await self._owner._dial(self._peer, self.address)
            except (OSError, PeerRefused, TimeoutError) as error:  # ssl.SSLError is an OSError
                if not failures:  # one line per outage
                    why = "no answer in time" if isinstance(error, TimeoutError) else error
                    log.warning(
                        "raft: no link to server %s at %s: %s; will keep trying", self._peer, self.address, why
                    )
                failures += 1
            else:
                log.info("raft: linked to server %s at %s", self._peer, self.address)
                began = loop.time()
                await self._use(self.sender)
                failures = failures + 1 if loop.time() - began < STEADY_S else 0
            await asyncio.sleep(BACKOFF_S_MIN / 2)
            try:
                async with asyncio.timeout(self._owner._backoff_s(failures)):
                    await self._hurry.wait()
            except TimeoutError:
                pass

    async def _use(self, sender: Sender) -> None:
        self._owner._link_up(self._peer)
        try:
            error = await asyncio.shield(sender.closed)
            log.info("raft: lost the link to server %s: %s", self._peer, error or "closed by the peer")
        finally:
            self.sender = None
            sender.close()
            self._owner._link_down(self._peer)


def _is_address(peer: str, address: str) -> bool:
    try:
        server_address(address)
    except RaftError as error:
        log.warning("raft: no link to server %s: %s", peer, error)
        return False
    return True


def _report(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        log.error("raft: the task %s failed: %r", task.get_name(), error, exc_info=error)
