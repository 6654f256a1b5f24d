"""TLS between sidecars: contexts made of a leaf and a trust bundle, and what a finished handshake proves.

TLS 1.3 only, a certificate on both sides. Sessions may be resumed (:mod:`proxy.resumption`), but never with a
material other than theirs; a resumed one proves what its first handshake did, and whoever takes it checks that again.
There is no early data (0-RTT): Python's ssl module cannot send it, and a context takes none unless it is told to.

A :class:`TlsMaterial` never changes; on a new leaf or bundle the sidecar makes a new one, and handshakes from then
on use it. Connections made before go on.
"""

from __future__ import annotations

import hashlib
import os
import ssl
import tempfile
from _ssl import ENCODING_DER
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import msgspec
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from proxy.errors import BadCertificate, BadConfiguration
from proxy.identity import TrustBundle, identity_of
from proxy.mux import ALPN
from proxy.resumption import ServerContext
from raftstate.model.connect import Leaf
from raftstate.model.identity import Identity


class TlsMaterial(NamedTuple):
    """Contexts for both sides, the bundle they trust, and who they speak for."""

    server: ServerContext
    server_http2: ServerContext
    """As ``server``, offering HTTP/2 first to a foreign peer: for an app that speaks it."""
    client: ssl.SSLContext
    client_plain: ssl.SSLContext
    """As ``client`` without offering mux: for peers known to speak plain mTLS, one connection for each app's."""
    client_http2: ssl.SSLContext
    """As ``client``, offering HTTP/2 to a foreign peer."""
    client_only_http2: ssl.SSLContext
    """As ``client_plain``, offering HTTP/2."""
    bundle: TrustBundle
    identity: Identity
    not_after_s: float
    """Unix time at which the leaf expires."""
    not_before_s: float
    """Unix time from which it holds: its issue, up to what is allowed for clocks that differ."""

    def client_for(self, *, mux: bool, http2: bool) -> ssl.SSLContext:
        """Return the context for dialing a peer to which these are offered."""
        if http2:
            return self.client_http2 if mux else self.client_only_http2
        return self.client if mux else self.client_plain

    def forget_sessions(self) -> None:
        """Let no peer resume a session that it made with us so far."""
        self.server.forget()
        self.server_http2.forget()


class PeerProof(NamedTuple):
    """What a handshake proved."""

    identity: Identity
    chain_der: tuple[bytes, ...]
    """The leaf and the intermediates that the peer sent."""
    alpn: str
    """The application protocol agreed on; empty when none."""
    resumed: bool = False
    """The peer showed no certificate now: what is here it proved in an earlier handshake."""

    @property
    def sha256(self) -> str:
        """Hex digest of the leaf in DER: ``Hash`` of ``x-forwarded-client-cert``."""
        return hashlib.sha256(self.chain_der[0]).hexdigest()


def make_material(leaf: Leaf, roots_pem: Sequence[str]) -> TlsMaterial:
    """Make the contexts. Raises :class:`BadConfiguration` naming what is wrong with the leaf or the bundle."""
    try:
        certificate = x509.load_pem_x509_certificate(leaf.cert_pem.encode())
        identity = identity_of(ssl.PEM_cert_to_DER_cert(_first_certificate(leaf.cert_pem)))
    except (ValueError, BadCertificate) as error:
        raise BadConfiguration(f"the leaf certificate cannot be used: {error}") from error
    try:
        bundle = TrustBundle(roots_pem)
    except ValueError as error:
        raise BadConfiguration(f"the trust bundle cannot be used: {error}") from error
    if not len(bundle):
        raise BadConfiguration("the trust bundle is empty; the cluster has no certificate authority yet")
    leaf = msgspec.structs.replace(leaf, cert_pem=shown_chain(leaf.cert_pem, bundle))
    try:
        server = ServerContext(partial(_server_context, leaf, roots_pem, (ALPN, "http/1.1")))
        server_http2 = ServerContext(partial(_server_context, leaf, roots_pem, (ALPN, "h2", "http/1.1")))
        with _as_file(leaf) as path:
            client = _context(ssl.PROTOCOL_TLS_CLIENT, path, roots_pem, (ALPN,))
            client_plain = _context(ssl.PROTOCOL_TLS_CLIENT, path, roots_pem, ())
            client_http2 = _context(ssl.PROTOCOL_TLS_CLIENT, path, roots_pem, (ALPN, "h2"))
            client_only_http2 = _context(ssl.PROTOCOL_TLS_CLIENT, path, roots_pem, ("h2",))
    except (ssl.SSLError, ValueError) as error:
        raise BadConfiguration(f"the leaf or its key cannot be used: {error}") from error
    lifetime = certificate.not_valid_after_utc.timestamp(), certificate.not_valid_before_utc.timestamp()
    clients = (client, client_plain, client_http2, client_only_http2)
    return TlsMaterial(server, server_http2, *clients, bundle, identity, *lifetime)


def shown_chain(chain_pem: str, bundle: TrustBundle) -> str:
    """Return what peers are shown, PEM: the chain, with the root if there is no more than a leaf that it issued.

    That is what OpenSSL sends in any case: where it is given a leaf alone it looks for the rest among the roots that
    it trusts, and verifies what it has found, in each handshake anew. That took a tenth of a handshake's time.
    """
    certificates = x509.load_pem_x509_certificates(chain_pem.encode())
    root = bundle.issuer_of(certificates[0]) if len(certificates) == 1 else None
    return chain_pem if root is None else f"{chain_pem.rstrip()}\n{root.public_bytes(Encoding.PEM).decode()}"


def _server_context(leaf: Leaf, roots_pem: Sequence[str], alpn: Sequence[str]) -> ssl.SSLContext:
    with _as_file(leaf) as path:
        return _context(ssl.PROTOCOL_TLS_SERVER, path, roots_pem, alpn)


def _context(protocol: int, path: str, roots_pem: Sequence[str], alpn: Sequence[str]) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False  # the peer is known by its SPIFFE id and instance, checked after the handshake
    context.verify_mode = ssl.CERT_REQUIRED
    context.options |= ssl.OP_NO_TICKET  # in TLS 1.3: tickets that name a session, and do not carry it
    if protocol == ssl.PROTOCOL_TLS_SERVER:
        context.num_tickets = 1  # each resumed connection gets another one
    context.load_verify_locations(cadata="\n".join(roots_pem))
    context.load_cert_chain(path)
    if alpn:
        context.set_alpn_protocols(list(alpn))
    return context


def proof_of(ssl_object: ssl.SSLObject | ssl.SSLSocket, shown: Sequence[bytes] = ()) -> PeerProof:
    """Return what a finished handshake proved. Raises :class:`BadCertificate`.

    ``shown``: the chain that the peer showed when it gave the session that was offered to it now. OpenSSL remembers
    the leaf; of the rest a client's session, copied by Python, knows nothing.
    """
    der = ssl_object.getpeercert(binary_form=True)
    if not der:
        raise BadCertificate("no-certificate", "peer showed no certificate")
    resumed = bool(ssl_object.session_reused)
    if resumed and shown:
        if shown[0] != der:
            raise BadCertificate("wrong-identity", "a session was resumed that is not the one that was offered")
        chain = tuple(shown)
    else:
        chain = (der, *_sent_chain(ssl_object)[1:])
    return PeerProof(identity_of(der), chain, ssl_object.selected_alpn_protocol() or "", resumed)


def _sent_chain(ssl_object: Any) -> list[bytes]:
    if hasattr(ssl_object, "get_unverified_chain"):  # Python 3.13
        return [bytes(der) for der in ssl_object.get_unverified_chain()]
    chain = ssl_object._sslobj.get_unverified_chain() or ()
    return [certificate.public_bytes(ENCODING_DER) for certificate in chain]


_CAUSES = (
    ("HTTP_REQUEST", "plain-text", "plain-text HTTP, not TLS"),
    ("WRONG_VERSION_NUMBER", "plain-text", "not TLS"),
    ("RECORD_LAYER_FAILURE", "plain-text", "not TLS"),
    ("UNSUPPORTED_PROTOCOL", "tls-version", "TLS older than 1.3"),
    ("NO_PROTOCOLS_AVAILABLE", "tls-version", "TLS older than 1.3"),
    ("PROTOCOL_VERSION", "tls-version", "no common TLS version"),
    ("PEER_DID_NOT_RETURN_A_CERTIFICATE", "no-certificate", "peer showed no certificate"),
    ("CERTIFICATE_REQUIRED", "peer-rejects-us", "peer demands a certificate"),
    ("UNKNOWN_CA", "peer-rejects-us", "peer does not trust our certificate authority"),
    ("ALERT", "peer-rejects-us", "peer ended the handshake"),
    ("UNEXPECTED_EOF", "closed", "peer closed the connection during the handshake"),
)


def explain_handshake_failure(error: BaseException) -> tuple[str, str]:
    """Return a short label (for metrics) and a text for a failed handshake."""
    if isinstance(error, BadCertificate):
        return error.cause, str(error)
    if isinstance(error, ssl.SSLCertVerificationError):
        label = "expired-certificate" if error.verify_code == 10 else "untrusted-certificate"
        return label, f"peer's certificate is not acceptable: {error.verify_message}"
    if isinstance(error, ssl.SSLError):
        reason = str(error.reason or error)
        for part, label, text in _CAUSES:
            if part in reason:
                return label, f"{text} ({reason})"
        return "tls", f"TLS error ({reason})"
    if isinstance(error, TimeoutError) or "timed out" in str(error) or "is taking longer" in str(error):
        return "timeout", "handshake took too long"
    if isinstance(error, ConnectionError | EOFError | OSError):
        return "closed", f"connection was lost during the handshake ({error or type(error).__name__})"
    return "other", repr(error)


def _first_certificate(pem: str) -> str:
    end = "-----END CERTIFICATE-----"
    return pem[pem.index("-----BEGIN CERTIFICATE-----") : pem.index(end) + len(end)] + "\n"


@contextmanager
def _as_file(leaf: Leaf) -> Iterator[str]:
    """Give the ssl module, which reads keys from files only, a file that nobody else can open."""
    text = leaf.private_key_pem + "\n" + leaf.cert_pem
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("leaf", os.MFD_CLOEXEC)
        try:
            os.write(descriptor, text.encode())
            yield f"/proc/self/fd/{descriptor}"
        finally:
            os.close(descriptor)
        return
    with tempfile.TemporaryDirectory() as directory:  # 0700, and mkstemp makes 0600
        descriptor, path = tempfile.mkstemp(dir=directory)
        with os.fdopen(descriptor, "w") as file:
            file.write(text)
        yield path
