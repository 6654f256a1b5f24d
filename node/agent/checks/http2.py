"""Probes that speak HTTP/2: an H2 ping, and gRPC's health protocol (grpc.health.v1.Health/Check).

Written on h2, the protocol without I/O; the one message and its answer are short enough to be packed by hand.
Source: gRPC "Health Checking Protocol" and "gRPC over HTTP2"; RFC 9113, section 6.7 for PING.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import ssl

import h2.config
import h2.connection
import h2.events
import h2.exceptions

from node.agent.checks.probes import tls_context
from node.agent.checks.runner import Probe, Verdict
from node.agent.definitions import CheckDefinition, split_host_port
from raftstate.model.catalog import CRITICAL, PASSING

SERVING = 1
_STATUS_NAMES = {0: "UNKNOWN", 1: "SERVING", 2: "NOT_SERVING", 3: "SERVICE_UNKNOWN"}
_ANSWER_BYTES_MAX = 65536


def http2_probe(definition: CheckDefinition) -> Probe:
    """Return the probe of a ``grpc`` (``host:port[/service]``) or ``h2ping`` (``host:port``) check."""
    if definition.grpc:
        target, _, service = definition.grpc.partition("/")
        host, port = split_host_port(target)
        use_tls = definition.grpc_use_tls
    else:
        service, use_tls = "", definition.h2ping_use_tls
        host, port = split_host_port(definition.h2ping)

    async def probe() -> Verdict:
        context: ssl.SSLContext | None = None
        if use_tls:
            context = tls_context(definition)
            context.set_alpn_protocols(["h2"])
        server_name = (definition.tls_server_name or host) if context else None
        reader, writer = await asyncio.open_connection(host, port, ssl=context, server_hostname=server_name)
        try:
            session = _Session(reader, writer)
            if definition.grpc:
                return await session.grpc_health(f"{host}:{port}", service, use_tls, definition.grpc)
            return await session.ping(definition.h2ping)
        finally:
            writer.close()
            with contextlib.suppress(OSError, ssl.SSLError):
                await writer.wait_closed()

    return probe


class _Session:
    """One connection's life: one question, one answer."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self._h2 = h2.connection.H2Connection(h2.config.H2Configuration(client_side=True, header_encoding="utf-8"))
        self._h2.initiate_connection()

    async def ping(self, target: str) -> Verdict:
        mark = os.urandom(8)
        self._h2.ping(mark)
        while True:
            for event in await self._exchange():
                if isinstance(event, h2.events.PingAckReceived) and event.ping_data == mark:
                    return Verdict(PASSING, f"HTTP2 ping {target}: Success")

    async def grpc_health(self, authority: str, service: str, use_tls: bool, target: str) -> Verdict:
        stream = self._h2.get_next_available_stream_id()
        headers = [
            (":method", "POST"),
            (":scheme", "https" if use_tls else "http"),
            (":path", "/grpc.health.v1.Health/Check"),
            (":authority", authority),
            ("content-type", "application/grpc"),
            ("te", "trailers"),
        ]
        self._h2.send_headers(stream, headers)
        self._h2.send_data(stream, pack_request(service), end_stream=True)
        body, trailers = b"", dict[str, str]()
        while True:
            for event in await self._exchange():
                if isinstance(event, h2.events.ResponseReceived | h2.events.TrailersReceived):
                    trailers.update({str(name): str(value) for name, value in event.headers or ()})
                elif isinstance(event, h2.events.DataReceived):
                    body += event.data or b""
                    if len(body) > _ANSWER_BYTES_MAX:
                        return Verdict(CRITICAL, f"gRPC check {target}: the answer is too long")
                elif isinstance(event, h2.events.StreamReset):
                    return Verdict(CRITICAL, f"gRPC check {target}: the stream was reset")
                elif isinstance(event, h2.events.StreamEnded):
                    return judge(target, trailers, body)

    async def _exchange(self) -> list[h2.events.Event]:
        self._writer.write(self._h2.data_to_send())
        await self._writer.drain()
        data = await self._reader.read(65536)
        if not data:
            raise ConnectionError("the peer closed the connection without an answer (is it HTTP/2?)")
        try:
            return list(self._h2.receive_data(data))
        except h2.exceptions.ProtocolError as error:
            raise ConnectionError(f"the peer does not speak HTTP/2: {error}") from error


def pack_request(service: str) -> bytes:
    """Return a HealthCheckRequest in gRPC's frame: field 1, the service's name."""
    name = service.encode()
    message = b"\x0a" + _varint(len(name)) + name if name else b""
    return b"\x00" + len(message).to_bytes(4, "big") + message


def judge(target: str, headers: dict[str, str], body: bytes) -> Verdict:
    """Return the verdict of an answer: its ``grpc-status`` and the message's field 1, the serving status."""
    code = headers.get("grpc-status", "")
    if code not in ("", "0"):
        return Verdict(CRITICAL, f"gRPC check {target}: status {code} {headers.get('grpc-message', '')}".rstrip())
    status = 0
    if len(body) >= 7 and body[5] == 0x08:
        status = body[6]
    name = _STATUS_NAMES.get(status, str(status))
    return Verdict(PASSING if status == SERVING else CRITICAL, f"gRPC check {target}: {name}")


def _varint(number: int) -> bytes:
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)
