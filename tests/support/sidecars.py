"""Sidecars without agents: a little mesh on loopback whose configuration the test pushes by hand."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import msgspec

from proxy.sidecar import BoundPorts, Sidecar, SidecarOptions
from proxy.workers import WorkerGroup
from raftstate.model.connect import Leaf, Revocation
from raftstate.model.intention import ALLOW, DENY, Intention
from raftstate.model.sidecar import Endpoint, SidecarSelf, SidecarUpdate, SidecarUpstream
from tests.support.certs import TestCA
from tests.support.ports import free_ports
from tests.support.promises import PATIENCE_S

WAIT_S = PATIENCE_S
Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


async def until(condition: Callable[[], bool], timeout_s: float = WAIT_S) -> None:
    """Wait until ``condition`` holds; fail when it does not in time."""
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110 - any condition, not only events
            await asyncio.sleep(0.002)


class App:
    """A TCP app on loopback."""

    def __init__(self, handler: Handler) -> None:
        self._handler = handler
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self.port = 0
        self.connections = 0

    async def start(self) -> App:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port, backlog=1024)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.get_running_loop().create_task(self._run(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _run(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            await self._handler(reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()

    async def stop(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Send back what comes, then the end."""
    while data := await reader.read(65536):
        writer.write(data)
        await writer.drain()
    writer.write_eof()


def naming(name: str) -> Handler:
    """An app that answers each line with its own name."""

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.readline():
            writer.write(name.encode() + b"\n")
            await writer.drain()

    return handler


def allow(source: str, destination: str) -> Intention:
    return Intention(source_name=source, destination_name=destination, action=ALLOW)


def deny(source: str, destination: str) -> Intention:
    return Intention(source_name=source, destination_name=destination, action=DENY)


class Member:
    """One sidecar of the mesh with the configuration that was last pushed to it."""

    def __init__(
        self,
        mesh: Mesh,
        service: str,
        instance: str,
        local_port: int,
        upstreams: tuple[str, ...],
        workers: int = 0,
        more: dict[str, Any] | None = None,
    ) -> None:
        self.mesh = mesh
        self.service = service
        self.instance = instance
        self.local_port = local_port
        self.upstream_names = upstreams
        # Not those that sidecars choose themselves: who still calls another test's at its port would call ours.
        public, *ports = free_ports(1 + len(upstreams))
        bound = tuple((name, "127.0.0.1", port) for name, port in zip(upstreams, ports, strict=True))
        options = SidecarOptions(public_port=public, upstreams=bound, admin_port=0, **(more or {}))
        self.group = WorkerGroup(options, workers) if workers else None
        self.sidecar = Sidecar(options)
        """The sidecar of this process; unused where there is a group of workers."""
        self.ports = BoundPorts(0)
        self.version = 0
        self._queue: asyncio.Queue[SidecarUpdate] = asyncio.Queue()
        self._running: asyncio.Task[None] | None = None

    @property
    def endpoint(self) -> Endpoint:
        return Endpoint("node", "127.0.0.1", self.ports.public_port, self.service, self.instance)

    async def start(self, leaf: Leaf | None = None) -> None:
        sidecar = self.group or self.sidecar
        self.ports = await sidecar.bind()
        self._running = asyncio.get_running_loop().create_task(sidecar.run(self._updates()))
        await self.push(
            self=SidecarSelf(
                proxy_id=f"{self.instance}-sidecar-proxy",
                service=self.service,
                service_id=self.instance,
                node="node",
                datacenter="dc1",
                trust_domain=self.mesh.ca.trust_domain,
                public_address="127.0.0.1",
                public_port=self.ports.public_port,
                local_address="127.0.0.1",
                local_port=self.local_port,
            ),
            leaf=leaf or self.mesh.ca.leaf(self.service, self.instance),
            roots=(self.mesh.ca.root_pem,),
            intentions=(),
            default_allow=False,
            revocations=(),
            upstreams=(),
        )

    async def _updates(self) -> AsyncIterator[SidecarUpdate]:
        while True:
            yield await self._queue.get()
            self._queue.task_done()

    async def push(self, /, **parts: object) -> None:
        """Send an update and wait until the sidecar has taken it."""
        self.version += 1
        self._queue.put_nowait(SidecarUpdate(version=self.version, **parts))  # type: ignore[arg-type]
        async with asyncio.timeout(WAIT_S):
            await self._queue.join()

    async def allow(self, *sources: str) -> None:
        await self.push(intentions=tuple(allow(source, self.service) for source in sources))

    async def revoke(self, *revocations: Revocation) -> None:
        await self.push(revocations=revocations)

    async def route(self, name: str, *endpoints: Endpoint, **fields: object) -> None:
        """Set the endpoints of one upstream (the only one that then is known)."""
        service = endpoints[0].service if endpoints else "backend"
        spec = SidecarUpstream(name, service, "127.0.0.1", self.ports.upstreams[name], endpoints=endpoints)
        await self.push(upstreams=(msgspec.structs.replace(spec, **fields),))

    async def dial(self, name: str = "backend") -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Connect to an upstream as the app does."""
        return await asyncio.open_connection("127.0.0.1", self.ports.upstreams[name])

    async def talk(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Connect to the upstream ``backend``, and return once its app has echoed a line: the call is live."""
        reader, writer = await self.dial()
        writer.write(b"one\n")
        async with asyncio.timeout(WAIT_S):
            assert await reader.readline() == b"one\n"
        return reader, writer

    async def ask(self, line: bytes = b"hi\n", name: str = "backend") -> bytes:
        """One short exchange: what comes back until the first line's end, ``b""`` when the call is refused."""
        reader, writer = await self.dial(name)
        try:
            writer.write(line)
            async with asyncio.timeout(WAIT_S):
                return await reader.readline()
        except ConnectionError:
            return b""
        finally:
            await hang_up(writer)

    async def stop(self) -> None:
        await (self.group or self.sidecar).close()
        if self._running is not None:
            self._running.cancel()
            await asyncio.gather(self._running, return_exceptions=True)


async def hang_up(writer: asyncio.StreamWriter) -> None:
    """Close a client connection, whatever became of it."""
    writer.close()
    with contextlib.suppress(ConnectionError):
        await writer.wait_closed()


class Mesh:
    """Members that trust one CA."""

    def __init__(self) -> None:
        self.ca = TestCA()
        self.members: list[Member] = []
        self.apps: list[App] = []

    async def app(self, handler: Handler = echo) -> App:
        app = await App(handler).start()
        self.apps.append(app)
        return app

    async def member(
        self,
        service: str,
        instance: str,
        *,
        port: int = 0,
        upstreams: tuple[str, ...] = (),
        leaf: Leaf | None = None,
        workers: int = 0,
        options: dict[str, Any] | None = None,
    ) -> Member:
        member = Member(self, service, instance, port, upstreams, workers, options)
        self.members.append(member)
        await member.start(leaf)
        return member

    async def pair(self, handler: Handler = echo) -> tuple[Member, Member, App]:
        """A client ``web`` that may call ``backend``, and the backend with its app."""
        app = await self.app(handler)
        server = await self.member("backend", "backend-1", port=app.port)
        client = await self.member("web", "web-1", upstreams=("backend",))
        await server.allow("web")
        await client.route("backend", server.endpoint)
        return client, server, app

    async def __aenter__(self) -> Mesh:
        return self

    async def __aexit__(self, *exc: object) -> None:
        for member in self.members:
            await member.stop()
        for app in self.apps:
            await app.stop()
        assert [member.instance for member in self.members if member.sidecar._tasks.failures] == []


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
