"""Foreign TLS peers that resume sessions, on blocking sockets, and may be stopped within the handshake."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from tests.support.promises import PATIENCE_S

TIMEOUT_S = PATIENCE_S
Meanwhile = Callable[[], Awaitable[None]]


@dataclass(frozen=True)
class Called:
    """How a foreign peer's call went."""

    answer: bytes = b""
    """``b""`` when it was not let in."""
    resumed: bool = False
    session: ssl.SSLSession | None = None


def _exchange(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, incoming: ssl.MemoryBIO, outgoing: ssl.MemoryBIO
) -> Callable[[], Awaitable[None]]:
    """Return what sends all that TLS has to say and awaits more from the peer. At the end it raises."""

    async def more() -> None:
        if outgoing.pending:
            writer.write(outgoing.read())
        data = await reader.read(65536)
        if not data:
            raise ConnectionError("closed")
        incoming.write(data)

    return more


async def call(
    port: int, context: ssl.SSLContext, session: ssl.SSLSession | None = None, meanwhile: Meanwhile | None = None
) -> Called:
    """Dial, send a line, read the answer and hang up. ``meanwhile`` runs when the server has said all it has to say
    in the handshake, and we have not answered yet."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = context.wrap_bio(incoming, outgoing, session=session)
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    more = _exchange(reader, writer, incoming, outgoing)

    answer, resumed, given = b"", False, None
    try:
        async with asyncio.timeout(TIMEOUT_S):
            while True:
                try:
                    tls.do_handshake()
                    break
                except ssl.SSLWantReadError:
                    await more()
            resumed = bool(tls.session_reused)
            if meanwhile is not None:
                await meanwhile()
            tls.write(b"hi\n")
            while not answer.endswith(b"\n"):
                try:
                    answer += tls.read(100)
                except ssl.SSLWantReadError:
                    await more()
            given = tls.session
            with contextlib.suppress(ssl.SSLWantReadError):
                tls.unwrap()
            writer.write(outgoing.read())
            while await reader.read(65536):
                pass
    except (ssl.SSLError, ConnectionError):
        pass
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()
    return Called(answer, resumed, given)


@dataclass
class Server:
    """A foreign sidecar that answers every line with itself."""

    context: ssl.SSLContext
    port: int = 0
    resumed: list[bool] = field(default_factory=list)
    """For each handshake that was completed, whether it was resumed."""
    heard: bytearray = field(default_factory=bytearray)
    meanwhile: Meanwhile | None = None
    """Runs once, when a client has said that it wants a handshake and has had no answer."""
    _listener: asyncio.Server | None = None

    async def start(self, port: int = 0) -> Server:
        self._listener = await asyncio.start_server(self._serve, "127.0.0.1", port)
        self.port = self._listener.sockets[0].getsockname()[1]
        return self

    async def stop(self) -> None:
        """Stop to listen."""
        if self._listener is not None:
            self._listener.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        tls = self.context.wrap_bio(incoming, outgoing, server_side=True)
        more = _exchange(reader, writer, incoming, outgoing)

        try:
            await more()
            meanwhile, self.meanwhile = self.meanwhile, None
            if meanwhile is not None:
                await meanwhile()
            while True:
                try:
                    tls.do_handshake()
                    break
                except ssl.SSLWantReadError:
                    await more()
            self.resumed.append(bool(tls.session_reused))
            while True:
                try:
                    data = tls.read(65536)
                except ssl.SSLWantReadError:
                    await more()
                    continue
                if not data:
                    break
                self.heard += data
                tls.write(data)
            with contextlib.suppress(ssl.SSLError):
                tls.unwrap()
            writer.write(outgoing.read())
        except (ssl.SSLError, ConnectionError):
            pass
        finally:
            writer.close()
