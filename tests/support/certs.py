"""A certificate authority for tests: roots, leaves with a SPIFFE id and an instance id, bad ones on request."""

from __future__ import annotations

import datetime
from dataclasses import dataclass, field

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from raftstate.model.connect import Leaf
from raftstate.model.identity import SpiffeId

TRUST_DOMAIN = "11111111-2222-3333-4444-555555555555.consul"
_DAY = datetime.timedelta(days=1)


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC).replace(microsecond=0)


@dataclass
class TestCA:
    """A root. ``cross_sign`` makes the intermediate form of another root, signed by this one."""

    __test__ = False

    name: str = "Test CA"
    trust_domain: str = TRUST_DOMAIN
    key: ec.EllipticCurvePrivateKey = field(default_factory=lambda: ec.generate_private_key(ec.SECP256R1()))

    def __post_init__(self) -> None:
        self.certificate = self._ca_certificate(self.key.public_key(), self.name, self.name, self.key)

    @property
    def root_pem(self) -> str:
        return self.certificate.public_bytes(Encoding.PEM).decode()

    def cross_sign(self, other: TestCA) -> str:
        """Return ``other``'s key certified by this root, PEM."""
        certificate = self._ca_certificate(other.key.public_key(), other.name, self.name, self.key)
        return certificate.public_bytes(Encoding.PEM).decode()

    def leaf(
        self,
        service: str,
        instance: str = "",
        *,
        trust_domain: str | None = None,
        not_before: datetime.datetime | None = None,
        not_after: datetime.datetime | None = None,
        uris: list[str] | None = None,
        ca: bool = False,
        intermediates: str = "",
    ) -> Leaf:
        """Return a leaf for ``service``; the keyword arguments make unusual or bad ones."""
        key = ec.generate_private_key(ec.SECP256R1())
        uri = SpiffeId(trust_domain=trust_domain or self.trust_domain, service=service).uri()
        start = not_before or _now() - datetime.timedelta(minutes=5)
        end = not_after or _now() + 3 * _DAY
        names = [x509.NameAttribute(NameOID.COMMON_NAME, service)]
        if instance:
            names.append(x509.NameAttribute(NameOID.USER_ID, instance))
        builder = (
            x509.CertificateBuilder()
            .subject_name(x509.Name(names))
            .issuer_name(self.certificate.subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(start)
            .not_valid_after(end)
            .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
            .add_extension(
                x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH]),
                critical=False,
            )
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key()), critical=False)
        )
        san = [uri] if uris is None else uris
        if san:
            general = [x509.UniformResourceIdentifier(name) for name in san]
            builder = builder.add_extension(x509.SubjectAlternativeName(general), critical=False)
        certificate = builder.sign(self.key, hashes.SHA256())
        number = certificate.serial_number
        return Leaf(
            serial_number=number.to_bytes((number.bit_length() + 7) // 8, "big").hex(":"),
            cert_pem=certificate.public_bytes(Encoding.PEM).decode() + intermediates,
            private_key_pem=key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode(),
            service=service,
            service_uri=uri,
            valid_after=start.isoformat().replace("+00:00", "Z"),
            valid_before=end.isoformat().replace("+00:00", "Z"),
        )

    @staticmethod
    def _ca_certificate(
        public_key: ec.EllipticCurvePublicKey, subject: str, issuer: str, signing_key: ec.EllipticCurvePrivateKey
    ) -> x509.Certificate:
        return (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, subject)]))
            .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, issuer)]))
            .public_key(public_key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(_now() - _DAY)
            .not_valid_after(_now() + 3650 * _DAY)
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .add_extension(
                x509.KeyUsage(
                    digital_signature=False,
                    content_commitment=False,
                    key_encipherment=False,
                    data_encipherment=False,
                    key_agreement=False,
                    key_cert_sign=True,
                    crl_sign=True,
                    encipher_only=False,
                    decipher_only=False,
                ),
                critical=True,
            )
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
            .sign(signing_key, hashes.SHA256())
        )
