"""Certificates and a minimal listener for tests of the raft transport on loopback."""

from __future__ import annotations

import asyncio
import datetime
import ssl
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from raftstate.transport import ALPN_RAFT, TlsPeerTransport
from tests.support.promises import PATIENCE_S


class TestCA:
    """A certificate authority that lives in a directory."""

    __test__ = False

    def __init__(self, directory: Path, name: str = "ca") -> None:
        self._directory, self._name = directory, name
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        self._certificate = self._sign(self._subject, self._key, [], ca=True)
        self._file = directory / f"{name}.pem"
        self._file.write_bytes(self._certificate.public_bytes(serialization.Encoding.PEM))

    def context(self, purpose: int, node: str, *, role: str = "server", alpn: str = ALPN_RAFT) -> ssl.SSLContext:
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, node)])
        certificate = self._sign(subject, key, [f"{node}.{role}.test"])
        path = self._directory / f"{self._name}-{node}-{role}.pem"
        path.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
            + certificate.public_bytes(serialization.Encoding.PEM)
        )
        context = ssl.SSLContext(purpose)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_REQUIRED
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.load_verify_locations(self._file)
        context.load_cert_chain(path)
        context.set_alpn_protocols([alpn])
        return context

    def _sign(self, subject: x509.Name, key: Any, names: list[str], *, ca: bool = False) -> x509.Certificate:
        now = datetime.datetime.now(datetime.UTC)
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(hours=1))
            .not_valid_after(now + datetime.timedelta(hours=1))
            .add_extension(x509.BasicConstraints(ca, None), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), critical=False)
        )
        if ca:
            usage = x509.KeyUsage(True, False, False, False, False, True, True, False, False)
            builder = builder.add_extension(usage, critical=True)
        if names:
            builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName(n) for n in names]), False)
        return builder.sign(self._key, hashes.SHA256())


def server_name(tls: Any) -> str | None:
    """Name of the server whose certificate this is; None for any other role."""
    for kind, value in tls.getpeercert().get("subjectAltName", ()):
        if kind == "DNS" and value.endswith(".server.test"):
            return str(value).removesuffix(".server.test")
    return None


class Front(asyncio.Protocol):
    """What a node's listener does: name the peer, then hand the connection over."""

    def __init__(self, transport: TlsPeerTransport) -> None:
        self._raft = transport

    def connection_made(self, transport: Any) -> None:
        tls = transport.get_extra_info("ssl_object")
        peer = server_name(tls)
        if peer is None or tls.selected_alpn_protocol() != ALPN_RAFT:
            transport.abort()
        else:
            receiver = self._raft.incoming(peer)
            transport.set_protocol(receiver)
            receiver.connection_made(transport)


class TlsNode:
    """One server: its transport, listener, and what it heard."""

    def __init__(self, ca: TestCA, name: str, **options: Any) -> None:
        self.name = name
        self.heard: list[tuple[str, bytes]] = []
        self.events: list[str] = []
        self._changed = asyncio.Condition()
        options.setdefault("on_frame", self._frame)
        self.transport = TlsPeerTransport(
            name,
            ca.context(ssl.PROTOCOL_TLS_CLIENT, name),
            peer_name=server_name,
            on_connected=lambda peer: self._event(f"+{peer}"),
            on_disconnected=lambda peer: self._event(f"-{peer}"),
            **options,
        )
        self._context = ca.context(ssl.PROTOCOL_TLS_SERVER, name)
        self._server: asyncio.Server | None = None
        self.port = 0

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    async def listen_with_streams(self) -> None:
        """Listen once more, as a listener does that deals in streams."""

        def accepted(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            peer = server_name(writer.get_extra_info("ssl_object"))
            assert peer is not None
            self.transport.accept(peer, reader, writer)

        assert self._server is not None
        self._server.close()
        self._server = await asyncio.start_server(accepted, "127.0.0.1", 0, ssl=self._context)
        self.port = self._server.sockets[0].getsockname()[1]

    async def listen(self) -> None:
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(
            lambda: Front(self.transport), "127.0.0.1", self.port, ssl=self._context, reuse_address=True
        )
        self.port = self._server.sockets[0].getsockname()[1]

    async def start(self) -> None:
        await self.transport.start()

    async def stop(self) -> None:
        if self._server is not None:
            self._server.close()
        await self.transport.stop()

    async def until(self, condition: Any, timeout_s: float = PATIENCE_S) -> None:
        """Wait until `condition()` holds; it is asked again after each frame and link event of this node."""
        async with asyncio.timeout(timeout_s):
            async with self._changed:
                await self._changed.wait_for(condition)

    def _frame(self, peer: str, frame: bytes) -> None:
        self.heard.append((peer, frame))
        self._tell()

    def _event(self, event: str) -> None:
        self.events.append(event)
        self._tell()

    def _tell(self) -> None:
        async def notify() -> None:
            async with self._changed:
                self._changed.notify_all()

        task = asyncio.get_running_loop().create_task(notify())
        self._tasks = {*(t for t in getattr(self, "_tasks", ()) if not t.done()), task}
