"""An inbound HTTP filter between real sockets: client, filter, and an app that counts what reaches it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from proxy.authz import Decision, Policy, Request, compile_policy
from proxy.http import HttpCounters, HttpOptions, InboundHttp, client_cert_header
from proxy.relay import SocketChannel, as_protocol
from proxy.relay import dial as connect
from proxy.stream import Channel
from raftstate.model.identity import Identity
from raftstate.model.intention import Intention

WEB = Identity(service="web", instance="web-1", trust_domain="td.consul", datacenter="dc1")
OWN_URI = "spiffe://td.consul/ns/default/dc/dc1/svc/db"
ALLOW_ALL = compile_policy([], True)


@dataclass
class Seen:
    """One request as the app read it."""

    method: str
    target: str
    headers: list[tuple[str, str]]
    body: bytes = b""

    def header(self, name: str) -> list[str]:
        return [value for key, value in self.headers if key.lower() == name]


Answer = Callable[["App", Seen, asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


def simple(body: bytes = b"ok", status: str = "200 OK", extra: str = "") -> Answer:
    async def answer(app: App, seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(f"HTTP/1.1 {status}\r\ncontent-length: {len(body)}\r\n{extra}\r\n".encode())
        if seen.method != "HEAD":
            writer.write(body)

    return answer


@dataclass
class App:
    """A small strict HTTP/1.1 server of its own making: what the filter sends must satisfy it."""

    answer: Answer = field(default_factory=simple)
    read_body: bool = True
    seen: list[Seen] = field(default_factory=list)
    connections: int = 0
    raw: bytearray = field(default_factory=bytearray)
    cut: int = 0
    """Connections that ended within a request."""
    port: int = 0
    writers: set[asyncio.StreamWriter] = field(default_factory=set)
    unread: bytes = b""

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self.writers.add(writer)
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                self.raw += head
                seen = parse_head(head)
                if self.read_body:
                    seen.body = await self.body(seen, reader)
                self.seen.append(seen)
                await self.answer(self, seen, reader, writer)
                await writer.drain()
        except asyncio.IncompleteReadError as error:
            self.cut += bool(error.partial)
        except ConnectionError:
            self.cut += 1
        finally:
            self.writers.discard(writer)
            writer.close()

    async def body(self, seen: Seen, reader: asyncio.StreamReader) -> bytes:
        if seen.header("transfer-encoding"):
            assert seen.header("transfer-encoding") == ["chunked"]
            assert not seen.header("content-length")
            body = b""
            while True:
                size = int((await reader.readuntil(b"\r\n")).strip(), 16)
                if not size:
                    break
                body += await reader.readexactly(size)
                assert await reader.readexactly(2) == b"\r\n"
            trailers = b""
            while (line := await reader.readuntil(b"\r\n")) != b"\r\n":
                trailers += line
            seen.headers += [("trailer:" + n, v) for n, v in parse_head(b"X X X\r\n" + trailers + b"\r\n").headers]
            return body
        lengths = seen.header("content-length")
        assert len(lengths) <= 1
        return await reader.readexactly(int(lengths[0])) if lengths else b""


def parse_head(head: bytes) -> Seen:
    start, *lines = head[:-4].split(b"\r\n") if not head.endswith(b"X X X\r\n\r\n") else [b"X X X"]
    method, target, _ = start.decode("latin-1").split(" ")
    pairs = [tuple(line.decode("latin-1").split(": ", 1)) for line in lines if line]
    assert all(len(pair) == 2 for pair in pairs), head
    return Seen(method, target, pairs)  # type: ignore[arg-type]


@dataclass
class Rig:
    http: InboundHttp
    app: App
    stats: HttpCounters
    port: int
    policy: Policy

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection("127.0.0.1", self.port)

    async def exchange(self, data: bytes, *, pieces: int = 0, eof: bool = True) -> bytes:
        """Send ``data``, then our end; return all that comes back."""
        reader, writer = await self.connect()
        try:
            if pieces:
                for at in range(0, len(data), pieces):
                    writer.write(data[at : at + pieces])
                    await asyncio.sleep(0)
            else:
                writer.write(data)
            if eof:
                writer.write_eof()
            return await asyncio.wait_for(reader.read(), 10)
        finally:
            writer.close()


def permissive(rig_policy: Callable[[], Policy]) -> Callable[[Request], Decision]:
    return lambda request: rig_policy().decide_request(WEB, "db", "db-1", request)


@contextlib.asynccontextmanager
async def rig(app: App | None = None, policy: Policy = ALLOW_ALL, **options: Any) -> AsyncIterator[Rig]:
    """Client -> filter -> app, on loopback."""
    app = app or App()
    loop = asyncio.get_running_loop()
    server = await asyncio.start_server(app.handle, "127.0.0.1", 0)
    app.port = server.sockets[0].getsockname()[1]

    async def dial(peer: Channel) -> Channel:
        made = SocketChannel()
        made.peer = peer
        await connect(made, "127.0.0.1", app.port)
        return made

    stats = HttpCounters()
    options.setdefault("linger_s", 0.2)
    options.setdefault("sweep_s", 0.02)
    http = InboundHttp(HttpOptions(service="db", uri=OWN_URI, **options))
    identity = client_cert_header(WEB, OWN_URI, "ab" * 32)
    made: Rig

    class Accepted(SocketChannel):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            super().connection_made(transport)
            decide = permissive(lambda: made.policy)
            http.serve(self, peer=WEB, dial=dial, decide=decide, stats=stats, identity=identity)

    listener = await loop.create_server(lambda: as_protocol(Accepted()), "127.0.0.1", 0)
    made = Rig(http, app, stats, listener.sockets[0].getsockname()[1], policy)
    try:
        yield made
    finally:
        listener.close()
        server.close()
        await http.close()
        for writer in list(app.writers):
            writer.transport.abort()
        await asyncio.sleep(0)


def policy_of(*intentions: Intention, default: bool = False) -> Policy:
    return compile_policy(intentions, default)
