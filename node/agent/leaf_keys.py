"""A leaf's key, its signing request, and what a signed certificate says. Pure but for the key's randomness.

Apart from :mod:`node.agent.leaf`, and imported with the first leaf: the package cryptography takes 7 MiB, and an
agent whose services have no sidecar never needs it.
"""

from __future__ import annotations

import datetime

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from node.errors import NodeError
from raftstate.model.connect import Leaf
from raftstate.model.identity import SpiffeId


def make_request(wanted: SpiffeId, instance: str) -> tuple[str, str]:
    """Make a P-256 key and a signing request for it; returns both in PEM."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = [x509.NameAttribute(NameOID.COMMON_NAME, wanted.service[:64])]
    if instance:
        name.append(x509.NameAttribute(NameOID.USER_ID, instance))
    request = (
        x509.CertificateSigningRequestBuilder()
        .subject_name(x509.Name(name))
        .add_extension(x509.SubjectAlternativeName([x509.UniformResourceIdentifier(wanted.uri())]), critical=False)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return private.decode(), request.public_bytes(pem).decode()


def make_leaf(service: str, chain_pem: str, key_pem: str, index: int, create_index: int) -> Leaf:
    """Return the leaf that a signed chain and its key make. Raises NodeError when the chain is not one."""
    try:
        certificate = x509.load_pem_x509_certificates(chain_pem.encode())[0]
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        uri = names.get_values_for_type(x509.UniformResourceIdentifier)[0]
    except (ValueError, IndexError, x509.ExtensionNotFound) as error:
        raise NodeError(f"the certificate authority answered with something that is no leaf: {error}") from error
    serial = f"{certificate.serial_number:x}"
    serial = serial if len(serial) % 2 == 0 else "0" + serial
    return Leaf(
        serial_number=":".join(serial[i : i + 2] for i in range(0, len(serial), 2)),
        cert_pem=chain_pem,
        private_key_pem=key_pem,
        service=service,
        service_uri=uri,
        valid_after=_text(certificate.not_valid_before_utc),
        valid_before=_text(certificate.not_valid_after_utc),
        create_index=create_index,
        modify_index=index,
    )


def signed_by(leaf_pem: str, root_pem: str, intermediates: tuple[str, ...] = ()) -> bool:
    """Whether the leaf's issuer is this root or one of its intermediates (by name and signature)."""
    try:
        leaf = x509.load_pem_x509_certificates(leaf_pem.encode())[0]
    except (ValueError, IndexError):
        return False
    for pem in (root_pem, *intermediates):
        try:
            leaf.verify_directly_issued_by(x509.load_pem_x509_certificate(pem.encode()))
        except (InvalidSignature, ValueError, TypeError):
            continue
        return True
    return False


def _text(moment: datetime.datetime) -> str:
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")
