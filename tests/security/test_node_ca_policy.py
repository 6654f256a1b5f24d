"""The authority's policy, sealing and signing: who gets whose identity, and who does not."""

from __future__ import annotations

import datetime
import os
import ssl
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509 import verification
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from hypothesis import given
from hypothesis import strategies as st

from node.ca.policy import LeafPlan, LeafRefused, LeafRequest, bounded_ttl_s, judge, parse_csr
from node.ca.sealing import SealError, seal, unseal
from node.ca.signing import Signer, SigningError, cross_sign, key_pem, make_root, new_key, serial_text, sign_leaf
from raftstate.model.connect import Revocation
from raftstate.model.identity import SpiffeId

DOMAIN = "11111111-2222-3333-4444-555555555555.consul"
NOW = datetime.datetime(2026, 5, 1, tzinfo=datetime.UTC)
WEB = SpiffeId(trust_domain=DOMAIN, service="web").uri()


def csr(
    *, key: Any = None, uris: list[str] | None = None, uid: str = "", dns: str = "", alien_key: bool = False
) -> str:
    """A CSR for web unless told otherwise."""
    names = [x509.NameAttribute(NameOID.COMMON_NAME, "whatever")]
    if uid:
        names.append(x509.NameAttribute(NameOID.USER_ID, uid))
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name(names))
    san: list[x509.GeneralName] = [x509.UniformResourceIdentifier(uri) for uri in ([WEB] if uris is None else uris)]
    if dns:
        san.append(x509.DNSName(dns))
    if san:
        builder = builder.add_extension(x509.SubjectAlternativeName(san), critical=False)
    key = key or ec.generate_private_key(ec.SECP256R1())
    algorithm = None if isinstance(key, ed25519.Ed25519PrivateKey) else hashes.SHA256()
    pem = builder.sign(key, algorithm).public_bytes(Encoding.PEM)
    if alien_key:
        der = bytearray(x509.load_pem_x509_csr(pem).public_bytes(Encoding.DER))
        der[-1] ^= 1
        pem = x509.load_der_x509_csr(bytes(der)).public_bytes(Encoding.PEM)
    return pem.decode()


def decide(
    text: str,
    *,
    service: str = "web",
    instance: str = "web-1",
    registered: str | None = "web",
    revocations: tuple[Revocation, ...] = (),
    neighbours: tuple[str, ...] = (),
) -> LeafPlan:
    return judge(
        parse_csr(text),
        LeafRequest(service, instance, "client-1"),
        trust_domain=DOMAIN,
        datacenter="dc1",
        registered_service=registered,
        revocations=revocations,
        neighbours=neighbours,
    )


def refusal(text: str, **more: Any) -> str:
    with pytest.raises(LeafRefused) as caught:
        decide(text, **more)
    return str(caught.value)


def test_a_registered_instance_gets_its_leaf() -> None:
    plan = decide(csr(uid="web-1"))
    assert plan.spiffe_id.uri() == WEB
    assert plan.instance == "web-1"


def test_a_service_leaf_needs_no_registration() -> None:
    assert decide(csr(), instance="", registered=None).instance == ""


def test_an_instance_must_be_registered_on_the_asking_node_as_that_service() -> None:
    assert "not registered on node 'client-1'" in refusal(csr(), registered=None)
    assert "is of service 'db'" in refusal(csr(), registered="db")


@pytest.mark.parametrize(
    "key",
    [
        ec.generate_private_key(ec.SECP384R1()),
        ed25519.Ed25519PrivateKey.generate(),
        rsa.generate_private_key(65537, 2048),
    ],
)
def test_only_p256_keys(key: Any) -> None:
    assert "P-256" in refusal(csr(key=key))


def test_the_requester_must_hold_the_key() -> None:
    assert "does not hold that key" in refusal(csr(alien_key=True))


@pytest.mark.parametrize(
    "uris",
    [
        [],
        [WEB, WEB],
        ["https://example.org/"],
        [SpiffeId(trust_domain=DOMAIN, service="db").uri()],
        [SpiffeId(trust_domain="other.consul", service="web").uri()],
        [SpiffeId(trust_domain=DOMAIN, service="web", datacenter="dc2").uri()],
        [SpiffeId(trust_domain=DOMAIN, service="web", namespace="x").uri()],
        [WEB + "/more"],
    ],
)
def test_the_uri_must_be_exactly_the_services(uris: list[str]) -> None:
    assert "CSR" in refusal(csr(uris=uris))


def test_other_names_are_not_smuggled_in() -> None:
    assert "exactly one subject alternative name" in refusal(csr(dns="bank.example"))
    assert "has UID" in refusal(csr(uid="web-2"))
    assert "has UID" in refusal(csr(uid="web-2"), instance="", registered=None)


@pytest.mark.parametrize("name", ["", "*", "a\nb", "a\x00b", "x" * 256])
def test_unfit_names_are_refused(name: str) -> None:
    assert "cannot stand in a certificate" in refusal(csr(), service=name, registered=name)


@pytest.mark.parametrize(
    ("row", "refused"),
    [
        (Revocation("service", "web"), True),
        (Revocation("service", "db"), False),
        (Revocation("instance", "web-1"), True),
        (Revocation("instance", "web-1", service="web"), True),
        (Revocation("instance", "web-1", service="db"), False),
        (Revocation("instance", "web-2"), False),
        (Revocation("serial", "web-1"), False),
    ],
)
def test_the_revoked_get_no_new_leaf(row: Revocation, refused: bool) -> None:
    if refused:
        assert "is revoked" in refusal(csr(), revocations=(row,))
    else:
        assert decide(csr(), revocations=(row,))


def test_an_instance_revocation_does_not_touch_the_service_leaf() -> None:
    assert decide(csr(), instance="", registered=None, revocations=(Revocation("instance", ""),))


@given(st.text(max_size=200))
def test_any_text_for_a_csr_is_refused_cleanly(text: str) -> None:
    with pytest.raises(LeafRefused):
        parse_csr(text)


def test_a_huge_csr_is_refused_unread() -> None:
    with pytest.raises(LeafRefused, match="larger than"):
        parse_csr("x" * 20_000)


def test_lifetimes_are_bounded() -> None:
    assert bounded_ttl_s(1) == 3600
    assert bounded_ttl_s(1e12) == 8760 * 3600


def make_signer() -> Signer:
    key = new_key()
    return Signer.load(make_root(DOMAIN, key, NOW), key_pem(key))


def leaf_of(signer: Signer, ttl_s: float = 3600.0) -> x509.Certificate:
    plan = decide(csr(uid="web-1"))
    return x509.load_pem_x509_certificate(sign_leaf(plan, signer, now=NOW, ttl_s=ttl_s, serial=0xABCDEF).encode())


def test_a_leaf_says_who_it_is_and_nothing_more() -> None:
    leaf = leaf_of(make_signer())
    san = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert [name.value for name in san] == [WEB]
    assert leaf.subject.get_attributes_for_oid(NameOID.USER_ID)[0].value == "web-1"
    usage = leaf.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert set(usage) == {ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH}
    assert not leaf.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    assert serial_text(leaf.serial_number) == "ab:cd:ef"
    assert leaf.not_valid_after_utc == NOW + datetime.timedelta(hours=1)


def test_a_leaf_never_outlives_its_root() -> None:
    signer = make_signer()
    assert leaf_of(signer, ttl_s=1e10).not_valid_after_utc == signer.certificate.not_valid_after_utc


def trusts(root_pem: str, leaf: x509.Certificate, *intermediates: str) -> bool:
    store = verification.Store([x509.load_pem_x509_certificate(root_pem.encode())])
    verifier = (
        verification.PolicyBuilder()
        .store(store)
        .time(NOW + datetime.timedelta(minutes=5))
        .extension_policies(
            ca_policy=verification.ExtensionPolicy.webpki_defaults_ca(),
            ee_policy=verification.ExtensionPolicy.permit_all(),
        )
        .build_client_verifier()
    )
    try:
        verifier.verify(leaf, [x509.load_pem_x509_certificate(pem.encode()) for pem in intermediates])
    except verification.VerificationError:
        return False
    return True


def test_a_rotated_root_is_trusted_by_who_knows_only_the_old_one() -> None:
    old, new = make_signer(), make_signer()
    crossed = cross_sign(new.root, old, DOMAIN, NOW)
    leaf = leaf_of(new)
    assert trusts(new.root.root_cert, leaf)
    assert trusts(old.root.root_cert, leaf, crossed)
    assert not trusts(old.root.root_cert, leaf)
    assert not trusts(make_signer().root.root_cert, leaf, crossed)


def test_the_root_is_consuls_in_form() -> None:
    root = make_signer().root
    certificate = x509.load_pem_x509_certificate(root.root_cert.encode())
    san = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert [name.value for name in san] == [f"spiffe://{DOMAIN}"]
    assert len(root.id.split(":")) == 20
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(cadata=root.root_cert)


def test_a_key_that_does_not_fit_its_root_is_refused() -> None:
    with pytest.raises(SigningError, match="does not belong to it"):
        Signer.load(make_signer().root, key_pem(new_key()))
    with pytest.raises(SigningError, match="cannot be read"):
        Signer.load(make_signer().root, b"noise")


def test_sealing_binds_cluster_key_and_root() -> None:
    cluster_key = os.urandom(32)
    sealed = seal(b"-----BEGIN PRIVATE KEY-----", cluster_key, "aa:bb")
    assert b"PRIVATE" not in sealed
    assert unseal(sealed, cluster_key, "aa:bb") == b"-----BEGIN PRIVATE KEY-----"
    assert seal(b"x", cluster_key, "a") != seal(b"x", cluster_key, "a")
    for bad in (
        lambda: unseal(sealed, os.urandom(32), "aa:bb"),
        lambda: unseal(sealed, cluster_key, "aa:cc"),
        lambda: unseal(sealed[:-1] + bytes([sealed[-1] ^ 1]), cluster_key, "aa:bb"),
        lambda: unseal(sealed[:5], cluster_key, "aa:bb"),
        lambda: unseal(b"\x02" + sealed[1:], cluster_key, "aa:bb"),
        lambda: unseal(b"", cluster_key, "aa:bb"),
    ):
        with pytest.raises(SealError):
            bad()


def test_a_revoked_instance_gets_no_leaf_under_its_services_name() -> None:
    """A leaf of the service names no instance: no revocation of an instance would ever reach it."""
    row = Revocation(kind="instance", value="web-1")
    text = refusal(csr(), instance="", registered=None, revocations=(row,), neighbours=("web-2", "web-1"))
    assert "instance 'web-1' is revoked" in text
    narrowed = Revocation(kind="instance", value="web-1", service="db")
    decide(csr(), instance="", registered=None, revocations=(narrowed,), neighbours=("web-1",))
    decide(csr(), instance="", registered=None, revocations=(row,), neighbours=("web-2",))
