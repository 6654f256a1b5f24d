"""Whether a leaf may be signed. Pure: the request, what is registered and revoked, and the rules.

Sources: the SPIFFE X.509-SVID standard (one URI SAN), Consul's leaf signing, and law 10 of docs/architecture.md.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from node.errors import Refused
from raftstate.model.connect import Revocation
from raftstate.model.identity import InvalidSpiffeId, SpiffeId

CSR_BYTES_MAX = 16 * 1024
NAME_BYTES_MAX = 255
TTL_S_MIN, TTL_S_MAX = 3600.0, 8760 * 3600.0
"""Consul's bounds of LeafCertTTL: one hour and one year."""


class LeafRefused(Refused):
    """A leaf is not signed; the text names the rule."""

    def __init__(self, message: str, *, reason: str = "csr", http_status: int = 400) -> None:
        super().__init__(message, reason=reason, http_status=http_status)


@dataclass(frozen=True)
class LeafRequest:
    """Who asks for whose identity."""

    service: str
    instance: str
    """Empty: a leaf for the service as a whole."""
    node: str
    """The asking node, from its certificate."""


@dataclass(frozen=True)
class LeafPlan:
    """What is to be signed: nothing of the CSR but its key is taken over."""

    public_key: ec.EllipticCurvePublicKey
    spiffe_id: SpiffeId
    instance: str


def parse_csr(csr_pem: str) -> x509.CertificateSigningRequest:
    """Parse a CSR. Raises LeafRefused."""
    if len(csr_pem.encode(errors="replace")) > CSR_BYTES_MAX:
        raise LeafRefused(f"the CSR is larger than {CSR_BYTES_MAX} bytes: send one P-256 request")
    try:
        return x509.load_pem_x509_csr(csr_pem.encode())
    except (ValueError, UnsupportedAlgorithm, UnicodeEncodeError) as error:
        raise LeafRefused(f"the CSR cannot be read as PEM: {error}") from None


def judge(
    csr: x509.CertificateSigningRequest,
    request: LeafRequest,
    *,
    trust_domain: str,
    datacenter: str,
    registered_service: str | None,
    revocations: Iterable[Revocation],
    neighbours: Iterable[str] = (),
) -> LeafPlan:
    """Return what to sign, or raise LeafRefused with the rule that was broken.

    `registered_service` is the service whose instance `request.instance` is on the asking node; None if none is.
    `neighbours`: the instances of the service on the asking node, for a leaf of the service as a whole: it names no
    instance, so that a revoked one could live on under it.
    """
    _check_name("service", request.service)
    if request.instance:
        _check_name("instance", request.instance)
    for instance in (request.instance,) if request.instance else ("", *neighbours):
        _check_revoked(request.service, instance, revocations)
    _check_registered(request, registered_service)
    key = _check_key(csr)
    wanted = SpiffeId(trust_domain=trust_domain, service=request.service, datacenter=datacenter)
    _check_san(csr, wanted)
    _check_subject(csr, request)
    return LeafPlan(key, wanted, request.instance)


def _check_name(what: str, name: str) -> None:
    if not name or len(name.encode()) > NAME_BYTES_MAX or not name.isprintable() or name == "*":
        raise LeafRefused(f"{what} name {name[:80]!r} cannot stand in a certificate: use printable text, 255 bytes")


def _check_revoked(service: str, instance: str, revocations: Iterable[Revocation]) -> None:
    for row in revocations:
        hit = (row.kind == "service" and row.value == service) or (
            row.kind == "instance" and instance != "" and row.value == instance and row.service in ("", service)
        )
        if hit:
            raise LeafRefused(
                f"{row.kind} {row.value!r} is revoked ({row.reason or 'no reason given'}): "
                f"`lictor identity restore` takes it back",
                reason="revoked",
                http_status=403,
            )


def _check_registered(request: LeafRequest, registered_service: str | None) -> None:
    if not request.instance:
        return
    if registered_service is None:
        raise LeafRefused(
            f"instance {request.instance!r} is not registered on node {request.node!r}: register it there first",
            reason="not-registered",
            http_status=403,
        )
    if registered_service != request.service:
        raise LeafRefused(
            f"instance {request.instance!r} on node {request.node!r} is of service {registered_service!r}, "
            f"not of {request.service!r}",
            reason="not-registered",
            http_status=403,
        )


def _check_key(csr: x509.CertificateSigningRequest) -> ec.EllipticCurvePublicKey:
    try:
        key = csr.public_key()
        valid = csr.is_signature_valid
    except (ValueError, UnsupportedAlgorithm, InvalidSignature) as error:
        raise LeafRefused(f"the CSR's key cannot be used ({error}): make a P-256 key") from None
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise LeafRefused("the CSR's key must be ECDSA on curve P-256")
    if not valid:
        raise LeafRefused("the CSR's signature does not fit its key: the requester does not hold that key")
    return key


def _check_san(csr: x509.CertificateSigningRequest, wanted: SpiffeId) -> None:
    try:
        names = csr.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (x509.ExtensionNotFound, x509.DuplicateExtension, ValueError):
        raise LeafRefused(f"the CSR must carry exactly one subject alternative name: URI {wanted.uri()}") from None
    uris = names.get_values_for_type(x509.UniformResourceIdentifier)
    if len(list(names)) != 1 or len(uris) != 1:
        raise LeafRefused(f"the CSR must carry exactly one subject alternative name: URI {wanted.uri()}")
    try:
        asked = SpiffeId.parse(uris[0])
    except (InvalidSpiffeId, ValueError) as error:
        raise LeafRefused(f"the CSR's URI is no SPIFFE id of a service: {error}") from None
    if asked != wanted:
        raise LeafRefused(f"the CSR asks for {asked.uri()}, the request for {wanted.uri()}")


def _check_subject(csr: x509.CertificateSigningRequest, request: LeafRequest) -> None:
    uids = [str(attribute.value) for attribute in csr.subject.get_attributes_for_oid(NameOID.USER_ID)]
    if uids and uids != [request.instance]:
        raise LeafRefused(f"the CSR's subject has UID {uids}, the request is for instance {request.instance!r}")


def bounded_ttl_s(ttl_s: float) -> float:
    """Return the lifetime within Consul's bounds."""
    return min(max(ttl_s, TTL_S_MIN), TTL_S_MAX)
