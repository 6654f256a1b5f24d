"""Making certificates: roots, their cross-signed forms, and leaves. Times and serials are handed in."""

from __future__ import annotations

import datetime
from dataclasses import dataclass

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from node.ca.policy import LeafPlan
from node.errors import NodeError
from raftstate.model.connect import CARoot

ROOT_DAYS = 3650
SKEW = datetime.timedelta(minutes=1)
"""Certificates begin this much in the past: hosts' clocks differ."""


class SigningError(NodeError):
    """The authority's own material is unfit; the text says what to do."""

    code = "ca"


def serial_text(serial: int) -> str:
    """Return a serial number as Consul prints it: lower-case hex bytes joined by ``:``."""
    return serial.to_bytes((serial.bit_length() + 7) // 8 or 1, "big").hex(":")


def rfc3339(moment: datetime.datetime) -> str:
    """Return a UTC time as ``2026-01-02T03:04:05Z``."""
    return moment.astimezone(datetime.UTC).replace(microsecond=0).isoformat().replace("+00:00", "Z")


def _usage(*, ca: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=ca,
        crl_sign=ca,
        encipher_only=False,
        decipher_only=False,
    )


@dataclass(frozen=True)
class Signer:
    """A root and its opened key."""

    root: CARoot
    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    @classmethod
    def load(cls, root: CARoot, key_pem: bytes) -> Signer:
        """Raises SigningError when certificate and key do not belong together."""
        try:
            certificate = x509.load_pem_x509_certificate(root.root_cert.encode())
            key = load_pem_private_key(key_pem, None)
        except (ValueError, TypeError) as error:
            raise SigningError(f"root {root.id} cannot be read ({error}): rotate with `lictor ca rotate`") from None
        if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != certificate.public_key():
            raise SigningError(f"the key of root {root.id} does not belong to it: rotate with `lictor ca rotate`")
        return cls(root, certificate, key)


def new_key() -> ec.EllipticCurvePrivateKey:
    """Make a P-256 key."""
    return ec.generate_private_key(ec.SECP256R1())


def key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    """Return a key's PEM; only ever to be sealed."""
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _ca_builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, trust_domain: str
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(_usage(ca=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
        .add_extension(
            x509.SubjectAlternativeName([x509.UniformResourceIdentifier(f"spiffe://{trust_domain}")]), critical=False
        )
    )


def make_root(trust_domain: str, key: ec.EllipticCurvePrivateKey, now: datetime.datetime) -> CARoot:
    """Make a self-signed root, not yet active."""
    public = key.public_key()
    key_id = x509.SubjectKeyIdentifier.from_public_key(public).digest
    # The key's id keeps names of successive roots apart, so that chains are found by name without trial.
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"Lictor CA {key_id[:6].hex()}")])
    certificate = (
        _ca_builder(name, name, public, trust_domain)
        .not_valid_before(now - SKEW)
        .not_valid_after(now + datetime.timedelta(days=ROOT_DAYS))
        .sign(key, hashes.SHA256())
    )
    return CARoot(
        id=certificate.fingerprint(hashes.SHA1()).hex(":"),  # noqa: S303 - Consul's id of a root, not a protection
        name="Lictor CA Root Cert",
        root_cert=certificate.public_bytes(Encoding.PEM).decode(),
        serial_number=certificate.serial_number & (2**63 - 1),
        signing_key_id=key_id.hex(":"),
        not_before=rfc3339(certificate.not_valid_before_utc),
        not_after=rfc3339(certificate.not_valid_after_utc),
    )


def cross_sign(new_root: CARoot, old: Signer, trust_domain: str, now: datetime.datetime) -> str:
    """Return the new root's name and key signed by the old root, PEM: who trusts only the old one trusts it too."""
    new = x509.load_pem_x509_certificate(new_root.root_cert.encode())
    key = new.public_key()
    assert isinstance(key, ec.EllipticCurvePublicKey)
    certificate = (
        _ca_builder(new.subject, old.certificate.subject, key, trust_domain)
        .not_valid_before(now - SKEW)
        .not_valid_after(min(new.not_valid_after_utc, old.certificate.not_valid_after_utc))
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(old.key.public_key()), critical=False)
        .sign(old.key, hashes.SHA256())
    )
    return certificate.public_bytes(Encoding.PEM).decode()


def sign_leaf(plan: LeafPlan, signer: Signer, *, now: datetime.datetime, ttl_s: float, serial: int) -> str:
    """Return a leaf, PEM. It never outlives its root."""
    names = [x509.NameAttribute(NameOID.COMMON_NAME, plan.spiffe_id.service[:64])]
    if plan.instance:
        names.append(x509.NameAttribute(NameOID.USER_ID, plan.instance))
    uri = x509.UniformResourceIdentifier(plan.spiffe_id.uri())
    certificate = (
        x509.CertificateBuilder()
        .subject_name(x509.Name(names))
        .issuer_name(signer.certificate.subject)
        .public_key(plan.public_key)
        .serial_number(serial)
        .not_valid_before(now - SKEW)
        .not_valid_after(min(now + datetime.timedelta(seconds=ttl_s), signer.certificate.not_valid_after_utc))
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(ca=False), critical=True)
        .add_extension(
            x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH]), critical=False
        )
        .add_extension(x509.SubjectAlternativeName([uri]), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(plan.public_key), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.key.public_key()), critical=False)
        .sign(signer.key, hashes.SHA256())
    )
    return certificate.public_bytes(Encoding.PEM).decode()
