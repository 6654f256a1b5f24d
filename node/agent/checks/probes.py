"""Probes: HTTP, TCP, UDP and script. Each looks once, bounded in what it reads, and may raise: that is critical.

Source of the rules: Consul's "Health Checks": HTTP 2xx passes, 429 warns, anything else is critical; a script's exit
status 0 passes, 1 warns, any other is critical.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import ssl

import aiohttp

from node.agent.checks.runner import OUTPUT_BYTES_MAX, Probe, Verdict
from node.agent.definitions import CheckDefinition, split_host_port
from raftstate.model.catalog import CRITICAL, PASSING, WARNING

_WARNING_STATUS = 429
USER_AGENT = "Lictor Health Check"


def tls_context(definition: CheckDefinition) -> ssl.SSLContext:
    """Return a client context; with TLSSkipVerify whatever certificate the service has will do."""
    context = ssl.create_default_context()
    if definition.tls_skip_verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


def http_probe(definition: CheckDefinition) -> Probe:
    """GET (or the given method) a URL."""
    headers = {name: ", ".join(values) for name, values in definition.header.items()}
    headers.setdefault("User-Agent", USER_AGENT)
    headers.setdefault("Accept", "text/plain, text/*, */*")
    method = definition.method or "GET"

    async def probe() -> Verdict:
        context = tls_context(definition) if definition.http.startswith("https:") else False
        connector = aiohttp.TCPConnector(ssl=context, force_close=True, limit=1)
        async with aiohttp.ClientSession(
            connector=connector, auto_decompress=False, cookie_jar=aiohttp.DummyCookieJar()
        ) as http:
            async with http.request(
                method,
                definition.http,
                headers=headers,
                data=definition.body.encode() or None,
                allow_redirects=not definition.disable_redirects,
                server_hostname=definition.tls_server_name or None if context else None,
            ) as answer:
                body = await answer.content.read(OUTPUT_BYTES_MAX)
                text = f"HTTP {method} {definition.http}: {answer.status} {answer.reason} Output: "
                status = (
                    PASSING
                    if 200 <= answer.status < 300
                    else WARNING
                    if answer.status == _WARNING_STATUS
                    else CRITICAL
                )
                return Verdict(status, text + body.decode(errors="replace"))

    return probe


def tcp_probe(definition: CheckDefinition) -> Probe:
    """Connect, and hang up."""
    host, port = split_host_port(definition.tcp)

    async def probe() -> Verdict:
        context = tls_context(definition) if definition.tcp_use_tls else None
        server_name = (definition.tls_server_name or host) if context else None
        _, writer = await asyncio.open_connection(host, port, ssl=context, server_hostname=server_name)
        writer.close()
        with contextlib.suppress(OSError, ssl.SSLError):
            await writer.wait_closed()
        return Verdict(PASSING, f"TCP connect {definition.tcp}: Success")

    return probe


class _Datagram(asyncio.DatagramProtocol):
    def __init__(self) -> None:
        self.outcome: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    def datagram_received(self, data: bytes, addr: object) -> None:
        if not self.outcome.done():
            self.outcome.set_result("answered")

    def error_received(self, exc: Exception) -> None:
        if not self.outcome.done():
            self.outcome.set_exception(exc)


UDP_SILENCE_S = 1.0
"""A port that is closed says so by ICMP; one that stays silent for this long is taken as open, as Consul does. Never
more than half the check's timeout: on a host that is late, silence must not be told as a missed deadline."""


def udp_probe(definition: CheckDefinition) -> Probe:
    """Send a datagram; only a refusal fails."""
    host, port = split_host_port(definition.udp)

    async def probe() -> Verdict:
        loop = asyncio.get_running_loop()
        transport, protocol = await loop.create_datagram_endpoint(_Datagram, remote_addr=(host, port))
        try:
            transport.sendto(b"lictor health check")
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(UDP_SILENCE_S, (definition.timeout or 2 * UDP_SILENCE_S) / 2)):
                    await protocol.outcome
        finally:
            transport.close()
        return Verdict(PASSING, f"UDP connect {definition.udp}: Success")

    return probe


def script_probe(definition: CheckDefinition) -> Probe:
    """Run a program; its group is killed at the deadline, so that no child of it stays."""

    async def probe() -> Verdict:
        process = await asyncio.create_subprocess_exec(
            *definition.args,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            start_new_session=True,
        )
        assert process.stdout is not None
        try:
            output = await _read_tail(process.stdout, definition.output_max_size)
            code = await process.wait()
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            await asyncio.shield(process.wait())
        status = PASSING if code == 0 else WARNING if code == 1 else CRITICAL
        return Verdict(status, output.decode(errors="replace"))

    return probe


async def _read_tail(reader: asyncio.StreamReader, limit: int) -> bytes:
    limit = min(limit, OUTPUT_BYTES_MAX)
    kept = b""
    while chunk := await reader.read(65536):
        kept = (kept + chunk)[-limit:]
    return kept


def probe_for(definition: CheckDefinition) -> Probe | None:
    """Return the probe of a check that is run at intervals; None for one that is not (TTL, alias, sidecar).

    Raises ValueError when the target is malformed.
    """
    match definition.type():
        case "http":
            return http_probe(definition)
        case "tcp":
            return tcp_probe(definition)
        case "udp":
            return udp_probe(definition)
        case "script":
            return script_probe(definition)
        case "grpc" | "h2ping":
            from node.agent.checks.http2 import http2_probe

            return http2_probe(definition)
    return None
