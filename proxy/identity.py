"""From a peer's certificate to its :class:`~raftstate.model.identity.Identity`, and whether that is acceptable.

The chain itself was verified by the TLS handshake; here is what TLS does not know: the SPIFFE id, the instance, the
trust domain, revocations. Pure.

Sources: SPIFFE X.509-SVID standard, sections 2 to 5 (exactly one URI SAN, not a CA on a leaf); the instance id in
the subject's UID is Lictor's own.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Final, NamedTuple

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.x509.oid import NameOID

from proxy.errors import BadCertificate
from raftstate.model.connect import Revocation
from raftstate.model.identity import Identity, InvalidSpiffeId, SpiffeId

MAX_WAYS: Final = 1024
"""Chains of which a bundle remembers where they lead, at 1 to 2 KiB each."""


class Window(NamedTuple):
    """When something is valid, in Unix time."""

    from_s: float
    until_s: float


@lru_cache(maxsize=1024)  # the same few peers come again and again
def identity_of(der: bytes) -> Identity:
    """Return who a leaf certificate speaks for. Raises :class:`BadCertificate`."""
    try:
        certificate = x509.load_der_x509_certificate(der)
        san = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        uris = san.get_values_for_type(x509.UniformResourceIdentifier)
        is_ca = _is_ca(certificate)
        uids = certificate.subject.get_attributes_for_oid(NameOID.USER_ID)
    except x509.ExtensionNotFound as error:
        raise BadCertificate("no-spiffe-id", "certificate has no SPIFFE id (no subject alternative name)") from error
    except (ValueError, x509.DuplicateExtension) as error:
        raise BadCertificate("malformed", f"certificate cannot be read: {error}") from error
    if is_ca:
        raise BadCertificate("not-a-leaf", "certificate is a CA's, not a workload's")
    if len(uris) != 1:
        raise BadCertificate("no-spiffe-id", f"certificate has {len(uris)} URI names; a workload's has exactly one")
    try:
        spiffe = SpiffeId.parse(uris[0])
    except InvalidSpiffeId as error:
        raise BadCertificate("no-spiffe-id", str(error)) from error
    if len(uids) > 1:
        raise BadCertificate("malformed", "certificate names several instances (UID)")
    return Identity(
        service=spiffe.service,
        instance=str(uids[0].value) if uids else "",
        serial=format_serial(certificate.serial_number),
        trust_domain=spiffe.trust_domain,
        datacenter=spiffe.datacenter,
    )


def format_serial(number: int) -> str:
    """Return a serial number as Consul prints it: lower-case hex bytes joined by ``:``."""
    return number.to_bytes(max(1, (number.bit_length() + 7) // 8), "big").hex(":")


class Revoked:
    """The revocations in force, indexed for lookup per handshake."""

    def __init__(self, revocations: Iterable[Revocation] = ()) -> None:
        self._instances: dict[str, set[str]] = {}
        """Instance id to the services it is revoked for; ``""`` stands for any."""
        self._services: set[str] = set()
        self._serials: set[str] = set()
        for revocation in revocations:
            if revocation.kind == "instance":
                self._instances.setdefault(revocation.value, set()).add(revocation.service)
            elif revocation.kind == "service":
                self._services.add(revocation.value)
            elif revocation.kind == "serial":
                self._serials.add(revocation.value.lower())

    def reason(self, identity: Identity) -> str:
        """Return why the identity is revoked, or ``""``."""
        if identity.service in self._services:
            return f"service {identity.service} is revoked"
        services = self._instances.get(identity.instance)
        if services and identity.instance and ("" in services or identity.service in services):
            return f"instance {identity.instance} of {identity.service} is revoked"
        if identity.serial in self._serials:
            return f"certificate {identity.serial} of {identity.service} is revoked"
        return ""


def check_peer(identity: Identity, trust_domain: str, revoked: Revoked) -> None:
    """Raise :class:`BadCertificate` unless the identity is of our trust domain and in force."""
    if identity.trust_domain != trust_domain.lower():
        text = f"certificate is of trust domain {identity.trust_domain}, ours is {trust_domain}"
        raise BadCertificate("trust-domain", text)
    if reason := revoked.reason(identity):
        raise BadCertificate("revoked", reason)


def check_expected(identity: Identity, service: str, instance: str) -> None:
    """Raise :class:`BadCertificate` unless the peer is the very instance that was dialed."""
    if identity.service != service or identity.instance != instance:
        text = (
            f"dialed {service} ({instance}), but {identity.service} ({identity.instance or 'no instance'}) answered"
        )
        raise BadCertificate("wrong-identity", text)


class TrustBundle:
    """The roots in force; tells whether a chain that was verified once still leads to one of them."""

    def __init__(self, roots_pem: Sequence[str] = ()) -> None:
        self._roots: list[x509.Certificate] = []
        for pem in roots_pem:
            self._roots.extend(x509.load_pem_x509_certificates(pem.encode()))
        self._ways: dict[tuple[bytes, ...], Window | None] = {}
        """What :meth:`window` has answered: the same few peers come again and again, and a signature takes 100 µs."""

    def __len__(self) -> int:
        return len(self._roots)

    def issuer_of(self, certificate: x509.Certificate) -> x509.Certificate | None:
        """Return the root that issued the certificate itself, the one that lasts longest; None: none did."""
        issuers = [root for root in self._roots if _issued(certificate, root)]
        return max(issuers, key=lambda root: root.not_valid_after_utc) if issuers else None

    def leads_here(self, chain_der: Sequence[bytes]) -> bool:
        """Whether the leaf ``chain_der[0]`` leads to a root, over the other certificates where needed. At what time
        they are valid is not asked."""
        return self.window(chain_der) is not None

    def window(self, chain_der: Sequence[bytes]) -> Window | None:
        """Return when all certificates from the leaf ``chain_der[0]`` to a root are valid; None: it leads to none."""
        chain = tuple(chain_der)
        if chain not in self._ways:
            if len(self._ways) >= MAX_WAYS:
                self._ways.clear()
            self._ways[chain] = self._find_way(chain)
        return self._ways[chain]

    def _find_way(self, chain_der: tuple[bytes, ...]) -> Window | None:
        chain = [x509.load_der_x509_certificate(der) for der in chain_der]
        if not chain:
            return None
        reached, others = chain[0], chain[1:]
        way = [reached]
        for _ in range(len(others) + 1):
            if (root := self.issuer_of(reached)) is not None:
                way.append(root)
                return Window(
                    max(each.not_valid_before_utc.timestamp() for each in way),
                    min(each.not_valid_after_utc.timestamp() for each in way),
                )
            above = next((other for other in others if _is_ca(other) and _issued(reached, other)), None)
            if above is None:
                return None
            others.remove(above)
            way.append(above)
            reached = above
        return None


def check_trusted(chain_der: Sequence[bytes], bundle: TrustBundle, now_s: float) -> Window:
    """Return when the chain is valid, in Unix time. Raise :class:`BadCertificate` unless it leads to a root of the
    bundle, and is valid now: a handshake that shows a certificate has verified both, a resumed one neither."""
    window = bundle.window(chain_der)
    if window is None:
        raise BadCertificate("untrusted-certificate", "peer's root has left the trust bundle")
    if now_s > window.until_s:
        raise BadCertificate("expired-certificate", "peer's certificate has expired, or that of its issuer")
    if now_s < window.from_s:
        raise BadCertificate("untrusted-certificate", "peer's certificate is not valid yet, or that of its issuer")
    return window


def _issued(certificate: x509.Certificate, issuer: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(issuer)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


def _is_ca(certificate: x509.Certificate) -> bool:
    try:
        return certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except x509.ExtensionNotFound:
        return False
