"""Node certificates: who may speak RPC and raft. Separate from Connect's CA, which names services.

A node's certificate carries two DNS names, ``<role>.<dc>.lictor`` and ``<node>.<role>.<dc>.lictor``; the role in it
decides what its bearer may speak (only a server speaks raft), so a client's key cannot become a voter.

Files of a TLS directory (0700; keys 0600): ``ca.pem``, ``ca-key.pem`` (needed to issue only: keep it off the nodes),
``<node>.pem``, ``<node>-key.pem``, ``cluster.key`` (32 bytes; seals the Connect CA's key in the log; servers only).
"""

from __future__ import annotations

import datetime
import os
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from node.config import ROLES, ClusterConfig
from node.errors import PkiError
from node.node_tls import (
    ALPN_RAFT,
    ALPN_RPC,
    CLUSTER_KEY_BYTES,
    NODE_NAME,
    Peer,
    TlsFiles,
    client_context,
    load_cluster_key,
    peer_of,
    server_context,
)

__all__ = [
    "ALPN_RAFT",
    "ALPN_RPC",
    "Peer",
    "TlsFiles",
    "client_context",
    "create_cluster_key",
    "create_node_ca",
    "ensure_local_pki",
    "issue_node_cert",
    "load_cluster_key",
    "node_names",
    "peer_of",
    "server_context",
]

CA_DAYS = 3650
NODE_DAYS = 730


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)


def _write(path: Path, data: bytes, *, secret: bool) -> None:
    """Write a new file whole or not at all, never readable by others when secret."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600 if secret else 0o644)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _usage(*, ca: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not ca,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=ca,
        crl_sign=ca,
        encipher_only=False,
        decipher_only=False,
    )


def _make_directory(directory: Path) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        directory.chmod(0o700)
    except OSError as error:
        raise PkiError(
            f"TLS directory {directory} cannot be made: {error.strerror}; choose another tls_dir"
        ) from None


def create_node_ca(directory: Path | str) -> TlsFiles:
    """Make the CA that signs node certificates. Raises PkiError if there is one."""
    files = TlsFiles(Path(directory))
    _make_directory(files.directory)
    if files.ca.exists() or files.ca_key.exists():
        raise PkiError(f"{files.ca} exists: a second CA would cut this cluster in two; use another directory")
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Lictor node CA")])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(_now() - datetime.timedelta(minutes=5))
        .not_valid_after(_now() + datetime.timedelta(days=CA_DAYS))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(ca=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    _write(files.ca_key, _key_pem(key), secret=True)
    _write(files.ca, certificate.public_bytes(Encoding.PEM), secret=False)
    return files


def _load_ca(files: TlsFiles) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    try:
        certificate = x509.load_pem_x509_certificate(files.ca.read_bytes())
        key = load_pem_private_key(files.ca_key.read_bytes(), None)
    except (OSError, ValueError, TypeError) as error:
        raise PkiError(f"node CA in {files.directory} cannot be read ({error}): run `lictor tls ca create`") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise PkiError(f"{files.ca_key} is not an elliptic-curve key: make a new CA with `lictor tls ca create`")
    if key.public_key() != certificate.public_key():
        raise PkiError(f"{files.ca_key} does not belong to {files.ca}: restore the matching pair")
    return certificate, key


def node_names(node: str, role: str, datacenter: str) -> tuple[str, str]:
    """Return the two DNS names of a node's certificate."""
    return f"{role}.{datacenter}.lictor", f"{node}.{role}.{datacenter}.lictor"


def issue_node_cert(directory: Path | str, node: str, role: str, datacenter: str) -> tuple[Path, Path]:
    """Make a key and certificate for a node; return their paths. An older pair of that name is replaced."""
    if not NODE_NAME.fullmatch(node):
        raise PkiError(f"node name {node!r} must be letters, digits and inner dashes, 63 at most")
    if role not in ROLES:
        raise PkiError(f"role must be one of {', '.join(ROLES)}, not {role!r}")
    files = TlsFiles(Path(directory))
    ca, ca_key = _load_ca(files)
    key = ec.generate_private_key(ec.SECP256R1())
    names = [x509.DNSName(name) for name in node_names(node, role, datacenter)]
    certificate = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, node)]))
        .issuer_name(ca.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(_now() - datetime.timedelta(minutes=5))
        .not_valid_after(min(_now() + datetime.timedelta(days=NODE_DAYS), ca.not_valid_after_utc))
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(ca=False), critical=True)
        .add_extension(
            x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False
        )
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()), critical=False)
        .sign(ca_key, hashes.SHA256())
    )
    # The key first: a certificate without its key stops the node with a clear text, the reverse would not match.
    _write(files.key(node), _key_pem(key), secret=True)
    _write(files.cert(node), certificate.public_bytes(Encoding.PEM), secret=False)
    return files.cert(node), files.key(node)


def create_cluster_key(directory: Path | str) -> Path:
    """Make the key that seals the Connect CA's key. Raises PkiError if there is one."""
    files = TlsFiles(Path(directory))
    _make_directory(files.directory)
    if files.cluster_key.exists():
        raise PkiError(f"{files.cluster_key} exists: a new one could not open what the old one sealed")
    _write(files.cluster_key, os.urandom(CLUSTER_KEY_BYTES), secret=True)
    return files.cluster_key


def ensure_local_pki(config: ClusterConfig) -> TlsFiles:
    """Make whatever a local cluster lacks: CA, cluster key, a certificate for each node. Idempotent."""
    files = TlsFiles(config.tls_dir)
    if not files.ca.exists() or not files.ca_key.exists():
        create_node_ca(config.tls_dir)
    if not files.cluster_key.exists():
        create_cluster_key(config.tls_dir)
    for node in config.nodes.values():
        if not _fits(files, node.name, node.role, config.datacenter):
            issue_node_cert(config.tls_dir, node.name, node.role, config.datacenter)
    return files


def _fits(files: TlsFiles, node: str, role: str, datacenter: str) -> bool:
    """Return whether a node's pair exists, is of this CA, names the role, and has a month to live."""
    try:
        ca = x509.load_pem_x509_certificate(files.ca.read_bytes())
        certificate = x509.load_pem_x509_certificate(files.cert(node).read_bytes())
        key = load_pem_private_key(files.key(node).read_bytes(), None)
        certificate.verify_directly_issued_by(ca)
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (OSError, ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm, x509.ExtensionNotFound):
        return False
    return (
        key.public_key() == certificate.public_key()
        and set(names.get_values_for_type(x509.DNSName)) == set(node_names(node, role, datacenter))
        and certificate.not_valid_after_utc > _now() + datetime.timedelta(days=30)
    )
