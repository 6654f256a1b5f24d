"""What a sidecar's parent process and its workers say to each other, over a socketpair that only they hold.

Each message is a length (u32, big-endian) and MessagePack. The configuration, the leaf's key in it, goes to workers
this way and no other: never to a file, never to a command line.
"""

from __future__ import annotations

import asyncio
import struct
from typing import Any

import msgspec

from proxy.errors import ProxyError
from proxy.metrics import Snapshot
from proxy.otlp_headers import Headers
from raftstate.model.sidecar import SidecarUpdate

MAX_MESSAGE_BYTES = 256 << 20
_LENGTH = struct.Struct(">I")


class Begin(msgspec.Struct, tag="begin"):
    """First message to a worker: the listening sockets it inherited, by descriptor."""

    index: int
    public_fd: int
    upstream_fds: dict[str, int]
    log_level: int = 20
    access_log: str = ""
    otlp_endpoint: str = ""
    otlp_headers: Headers = ()
    otlp_sample: float = 0.0


class Configure(msgspec.Struct, tag="configure"):
    """An update of the configuration; the first one carries every section. Answered by :class:`Applied`."""

    number: int
    update: SidecarUpdate


class Drain(msgspec.Struct, tag="drain"):
    """Take no new calls, end when the live ones have, at most this much later."""

    timeout_s: float


class Ask(msgspec.Struct, tag="ask"):
    """Report. Answered by :class:`Report` with this number."""

    number: int


class Reopen(msgspec.Struct, tag="reopen"):
    """Open the access log anew."""


class Applied(msgspec.Struct, tag="applied"):
    """The update is in force in this worker."""

    number: int


class Report(msgspec.Struct, tag="report"):
    """How a worker is."""

    number: int
    metrics: Snapshot
    live_calls: int = 0
    ready: bool = False
    clusters: list[dict[str, Any]] = []
    sessions: dict[str, Any] = {}


ToWorker = Begin | Configure | Drain | Ask | Reopen
FromWorker = Applied | Report


class Link:
    """One end of the socketpair, as typed messages."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, incoming: Any) -> None:
        self._reader = reader
        self._writer = writer
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(incoming)

    def send(self, message: ToWorker | FromWorker) -> None:
        """Queue a message. Ignored when the other end is gone; :meth:`receive` tells that."""
        if not self._writer.is_closing():
            data = self._encoder.encode(message)
            self._writer.write(_LENGTH.pack(len(data)) + data)

    async def receive(self) -> Any:
        """Return the next message, or None when the other end is gone. Raises :class:`ProxyError` on nonsense."""
        try:
            (length,) = _LENGTH.unpack(await self._reader.readexactly(_LENGTH.size))
            if length > MAX_MESSAGE_BYTES:
                raise ProxyError(f"a message of {length} bytes between a sidecar and its worker")
            return self._decoder.decode(await self._reader.readexactly(length))
        except (asyncio.IncompleteReadError, ConnectionError):
            return None
        except msgspec.DecodeError as error:
            raise ProxyError(f"sidecar and worker do not understand each other: {error}") from error

    async def flush(self) -> None:
        """Wait until what was sent has left, or cannot."""
        try:
            await self._writer.drain()
        except ConnectionError:
            pass  # receive tells

    def close(self) -> None:
        """Close this end. Idempotent."""
        self._writer.close()
