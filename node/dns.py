"""DNS for the mesh's names on UDP and TCP, answered from this node's views. Other names are refused."""

from __future__ import annotations

import asyncio
import logging
import random
import struct
from collections.abc import Callable
from typing import Any

from dnslib import RCODE, DNSError, DNSHeader, DNSRecord

from node.agent.agent import LocalAgent
from node.agent.views import View, Views
from node.backend import Backend
from node.dns_zone import Zone
from node.errors import NodeError
from node.nearness import place_of_node
from node.tasks import Tasks
from node.tokens import AccessControl
from raftstate.acl import ALLOW_ALL, READ, Authorizer
from raftstate.loop_load import LOOP
from raftstate.model.catalog import InstanceHealth, Node

log = logging.getLogger("lictor.dns")

KNOWN_WAIT_S = 2.0
"""How long a question may wait for a view that nobody has asked for before."""
UDP_INFLIGHT_MAX = 1024
TCP_CONNECTIONS_MAX = 256
TCP_IDLE_S = 10.0
REQUEST_MAX = 4096


class ViewDirectory:
    """The zone's questions, answered from views. Views of services are only made for services that there are."""

    def __init__(self, views: Views, access: AccessControl | None = None) -> None:
        self._views, self._access = views, access

    async def _authorizer(self) -> Authorizer:
        """Return what may be told: all of it without access control, else what the agent's token for DNS may read."""
        if self._access is None:
            return ALLOW_ALL
        return (await self._access.bearer("", "dns")).authorizer

    def start(self) -> None:
        """Follow the names of services and the nodes."""
        self._services = self._views.acquire("catalog.services")
        self._nodes = self._views.acquire("catalog.nodes")

    def stop(self) -> None:
        """Follow nothing more."""
        self._views.release(self._services)
        self._views.release(self._nodes)

    async def service_name(self, name: str) -> str | None:
        """Return the registered spelling of a service's name."""
        view = await _known(self._services)
        found = view.memo("by lower case", lambda: {str(key).lower(): str(key) for key in view.rows}).get(name)
        return found if found is not None and (await self._authorizer()).allows("service", found, READ) else None

    async def instances(self, service: str, *, connect: bool) -> list[InstanceHealth]:
        """Return a service's instances."""
        query = "health.connect" if connect else "health.service"
        async with self._views.holding(query, {"service": service}, timeout_s=KNOWN_WAIT_S) as view:
            rows, seen = list(view.typed(InstanceHealth)), await self._authorizer()
        if seen.everything:
            return rows
        return [
            row
            for row in rows
            if seen.allows("node", row.node.node, READ) and seen.allows("service", row.service.service, READ)
        ]

    async def node(self, name: str) -> Node | None:
        """Return a node by name."""
        view = await _known(self._nodes)
        return await self._visible(view.memo("by name", lambda: _by_name(view)).get(name))

    async def node_at(self, address: str) -> Node | None:
        """Return the node of an address."""
        view = await _known(self._nodes)
        return await self._visible(view.memo("by address", lambda: _by_address(view)).get(address))

    async def _visible(self, row: Node | None) -> Node | None:
        return row if row is not None and (await self._authorizer()).allows("node", row.node, READ) else None


def _by_name(view: View) -> dict[str, Node]:
    return {row.node.lower(): row for row in view.typed(Node)}


def _by_address(view: View) -> dict[str, Node]:
    return {row.address: row for row in view.typed(Node)}


async def _known(view: View) -> View:
    if not await view.ready(KNOWN_WAIT_S):
        raise NodeError(f"nothing is known yet of {view.name}")
    return view


class DnsServer:
    """The DNS of one node. ``await start(address, port)``, ``await stop()``; port 0 takes a free one."""

    def __init__(
        self,
        backend: Backend,
        agent: LocalAgent,
        *,
        domain: str = "consul",
        rng: random.Random | None = None,
        access: AccessControl | None = None,
    ) -> None:
        self._directory = ViewDirectory(agent.views, access)
        self._zone = Zone(
            self._directory,
            agent.options.datacenter,
            (domain,),
            here=place_of_node(agent.node_row()),
            rng=rng or random.Random(),
        )
        self._tasks = Tasks("dns")
        self._udp: asyncio.DatagramTransport | None = None
        self._tcp: asyncio.Server | None = None
        self._inflight = 0
        self._connections: set[asyncio.StreamWriter] = set()

    @property
    def port(self) -> int:
        """The port that is listened on."""
        return int(self._tcp.sockets[0].getsockname()[1]) if self._tcp is not None else 0

    async def start(self, address: str, port: int) -> None:
        """Listen on UDP and TCP. Raises OSError."""
        self._directory.start()
        self._tcp = await asyncio.start_server(self._serve_tcp, address, port, limit=REQUEST_MAX * 2)
        loop = asyncio.get_running_loop()
        self._udp, _ = await loop.create_datagram_endpoint(
            lambda: _Datagrams(self._received), local_addr=(address, self.port)
        )

    async def stop(self) -> None:
        """Listen no more."""
        if self._udp is not None:
            self._udp.close()
        if self._tcp is not None:
            self._tcp.close()
        for writer in tuple(self._connections):
            writer.close()
        await self._tasks.close()
        self._directory.stop()

    async def respond(self, data: bytes, *, udp: bool) -> bytes | None:
        """Return the reply to a message; None when none is due (an answer, or not even a header)."""
        try:
            request = DNSRecord.parse(data)
        except (DNSError, struct.error, ValueError, IndexError, KeyError):
            return _malformed(data)
        if request.header.qr:
            return None
        try:
            reply = await self._zone.answer(request, udp=udp)
            return bytes(reply.pack())
        except NodeError as error:
            log.info("no answer for %s: %s", request.q.qname, error)
        except (DNSError, struct.error, ValueError, UnicodeError) as error:
            # A name or address in the catalog that DNS cannot carry must not end the server.
            log.warning("the answer for %s cannot be written: %s", request.q.qname, error)
        failed = request.reply(ra=0, aa=0)
        failed.header.rcode = RCODE.SERVFAIL
        return bytes(failed.pack())

    def _received(self, data: bytes, sender: Any) -> None:
        if self._inflight >= UDP_INFLIGHT_MAX or self._udp is None or self._udp.is_closing():
            return
        self._inflight += 1
        self._tasks.spawn(self._answer_datagram(data, sender))

    async def _answer_datagram(self, data: bytes, sender: Any) -> None:
        try:
            reply = await self.respond(data, udp=True)
            if reply is not None and self._udp is not None and not self._udp.is_closing():
                self._udp.sendto(reply, sender)
        finally:
            self._inflight -= 1

    async def _serve_tcp(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(self._connections) >= TCP_CONNECTIONS_MAX:
            writer.close()
            return
        self._connections.add(writer)
        try:
            while True:
                async with asyncio.timeout(TCP_IDLE_S):
                    (length,) = struct.unpack("!H", await reader.readexactly(2))
                    if length > REQUEST_MAX:
                        return
                    data = await reader.readexactly(length)
                reply = await self.respond(data, udp=False)
                if reply is None:
                    return
                writer.write(struct.pack("!H", len(reply)) + reply)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError, TimeoutError):
            return
        finally:
            self._connections.discard(writer)
            writer.close()


class _Datagrams(asyncio.DatagramProtocol):
    def __init__(self, received: Callable[[bytes, Any], None]) -> None:
        self._received = received

    def datagram_received(self, data: bytes, addr: Any) -> None:
        LOOP.requests += 1
        self._received(data, addr)


def _malformed(data: bytes) -> bytes | None:
    if len(data) < 12 or data[2] & 0x80:
        return None
    header = DNSHeader(id=int.from_bytes(data[:2], "big"), qr=1, ra=0, rcode=RCODE.FORMERR)
    return bytes(DNSRecord(header).pack())
