"""What a running node does with its certificate: TLS contexts, who the peer is, the cluster key's file.

Apart from :mod:`node.pki`, which issues certificates: that needs the package cryptography, which costs a process
7 MiB, and an agent without a sidecar has no use for it.
"""

from __future__ import annotations

import re
import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from node.config import ROLES
from node.errors import PkiError

ALPN_RAFT, ALPN_RPC = "lictor-raft/1", "lictor-rpc/1"
ALPN_PEER = "lictor-peer/1"
"""Offered by servers beside what they speak, never chosen: it asks for a server's place among handshakes."""
CLUSTER_KEY_BYTES = 32
NODE_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?")


@dataclass(frozen=True)
class Peer:
    """Who is at the other end of a verified connection."""

    node: str
    role: str
    datacenter: str


@dataclass(frozen=True)
class TlsFiles:
    """The files of one TLS directory."""

    directory: Path

    @property
    def ca(self) -> Path:
        return self.directory / "ca.pem"

    @property
    def ca_key(self) -> Path:
        return self.directory / "ca-key.pem"

    @property
    def cluster_key(self) -> Path:
        return self.directory / "cluster.key"

    def cert(self, node: str) -> Path:
        return self.directory / f"{node}.pem"

    def key(self, node: str) -> Path:
        return self.directory / f"{node}-key.pem"


def load_cluster_key(path: Path) -> bytes:
    """Read the cluster key. Raises PkiError when it is missing, of the wrong size or open to others."""
    refuse_open_file(path)
    try:
        key = path.read_bytes()
    except OSError as error:
        raise PkiError(f"cluster key {path} cannot be read ({error.strerror}): copy it from another server") from None
    if len(key) != CLUSTER_KEY_BYTES:
        raise PkiError(f"cluster key {path} must hold {CLUSTER_KEY_BYTES} bytes: copy it from another server")
    return key


def refuse_open_file(path: Path) -> None:
    """Raise PkiError when others than its owner may read a secret file; a missing one is not refused here."""
    try:
        mode = path.stat().st_mode & 0o777
    except OSError:
        return  # the reader that follows names the missing file
    if mode & 0o077:
        raise PkiError(f"{path} can be read by others (mode {mode:04o}): chmod 600 it, and replace it if it leaked")


def _context(purpose: int, files: TlsFiles, node: str, alpn: list[str]) -> ssl.SSLContext:
    context = ssl.SSLContext(purpose)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False  # names are roles and nodes, checked by peer_of
    context.verify_mode = ssl.CERT_REQUIRED
    context.set_alpn_protocols(alpn)
    refuse_open_file(files.key(node))
    for path in (files.ca, files.cert(node), files.key(node)):
        if not path.is_file():
            raise PkiError(f"{path} is missing: run `lictor tls cert create -node {node}` and copy the files here")
    try:
        context.load_verify_locations(cafile=str(files.ca))
        context.load_cert_chain(str(files.cert(node)), str(files.key(node)))
    except (OSError, ssl.SSLError) as error:
        raise PkiError(f"certificate of {node} in {files.directory} is unfit ({error}): issue it anew") from None
    return context


def server_context(files: TlsFiles, node: str) -> ssl.SSLContext:
    """TLS 1.3, client certificate required; offers raft and RPC."""
    context = _context(ssl.PROTOCOL_TLS_SERVER, files, node, [ALPN_RAFT, ALPN_RPC])
    context.num_tickets = 0  # connections are few and long: no resumption, so every one proves its certificate
    return context


def client_context(files: TlsFiles, node: str, alpn: str) -> ssl.SSLContext:
    """TLS 1.3 with this node's certificate, for one protocol."""
    return _context(ssl.PROTOCOL_TLS_CLIENT, files, node, [alpn])


def peer_of(ssl_object: Any, datacenter: str) -> Peer:
    """Return the bearer of a verified peer certificate. Raises PkiError when it is not one node of `datacenter`."""
    names = [value for kind, value in (ssl_object.getpeercert() or {}).get("subjectAltName", ()) if kind == "DNS"]
    for role in ROLES:
        suffix = f".{role}.{datacenter}.lictor"
        nodes = [name[: -len(suffix)] for name in names if name.endswith(suffix)]
        if f"{role}.{datacenter}.lictor" in names and len(nodes) == 1 and NODE_NAME.fullmatch(nodes[0]):
            if len(names) != 2:
                break
            return Peer(nodes[0], role, datacenter)
    raise PkiError(f"peer certificate names {names or 'nobody'}, not one node of datacenter {datacenter!r}")
