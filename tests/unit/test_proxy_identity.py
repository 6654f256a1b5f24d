"""Certificates to identities, revocations, and chains that lead to a root or do not."""

from __future__ import annotations

import ssl

import pytest

from proxy.errors import BadCertificate, BadConfiguration
from proxy.identity import Revoked, TrustBundle, check_expected, check_peer, identity_of
from proxy.tls import make_material, proof_of, shown_chain
from raftstate.model.connect import Revocation
from raftstate.model.identity import Identity
from tests.support.certs import TRUST_DOMAIN, TestCA


def der(pem: str) -> bytes:
    return ssl.PEM_cert_to_DER_cert(pem)


def test_identity_has_service_instance_and_serial() -> None:
    leaf = TestCA().leaf("web", "web-1")
    identity = identity_of(der(leaf.cert_pem))
    assert identity == Identity("web", "web-1", leaf.serial_number, TRUST_DOMAIN, "dc1")


def test_identity_without_instance() -> None:
    assert identity_of(der(TestCA().leaf("web").cert_pem)).instance == ""


def test_noise_is_not_a_certificate() -> None:
    with pytest.raises(BadCertificate) as caught:
        identity_of(b"\x30\x03\x02\x01\x01")
    assert caught.value.cause == "malformed"


WEB = Identity("web", "web-1", "0a:1b", TRUST_DOMAIN, "dc1")


@pytest.mark.parametrize(
    ("revocation", "hit"),
    [
        (Revocation("instance", "web-1"), True),
        (Revocation("instance", "web-1", service="web"), True),
        (Revocation("instance", "web-1", service="other"), False),
        (Revocation("instance", "web-2"), False),
        (Revocation("service", "web"), True),
        (Revocation("service", "web-1"), False),
        (Revocation("serial", "0A:1B"), True),
        (Revocation("serial", "0a:1c"), False),
    ],
)
def test_revocations(revocation: Revocation, hit: bool) -> None:
    revoked = Revoked([revocation])
    assert bool(revoked.reason(WEB)) == hit
    if hit:
        with pytest.raises(BadCertificate, match="revoked"):
            check_peer(WEB, TRUST_DOMAIN, revoked)
    else:
        check_peer(WEB, TRUST_DOMAIN, revoked)


def test_an_identity_without_instance_is_not_every_instance() -> None:
    assert Revoked([Revocation("instance", "")]).reason(Identity("web", "", "01", TRUST_DOMAIN)) == ""


def test_expected_instance() -> None:
    check_expected(WEB, "web", "web-1")
    for service, instance in (("web", "web-2"), ("other", "web-1"), ("web", "")):
        with pytest.raises(BadCertificate):
            check_expected(WEB, service, instance)


def test_bundle_knows_which_chains_lead_to_it() -> None:
    old, new, evil = TestCA("old"), TestCA("new"), TestCA("evil")
    crossed = der(old.cross_sign(new))
    by_new = der(new.leaf("web").cert_pem)
    assert TrustBundle([old.root_pem]).leads_here([der(old.leaf("web").cert_pem)])
    assert not TrustBundle([old.root_pem]).leads_here([by_new])
    assert TrustBundle([old.root_pem]).leads_here([by_new, crossed])
    assert TrustBundle([new.root_pem]).leads_here([by_new, crossed])
    assert not TrustBundle([evil.root_pem]).leads_here([by_new, crossed])
    assert not TrustBundle([old.root_pem]).leads_here([])


def test_a_leaf_does_not_certify_another() -> None:
    """A workload's key is no CA, even when it signs a certificate and sends its own as the intermediate."""
    ca = TestCA()
    rogue = TestCA("rogue")
    not_ca = der(ca.leaf("rogue").cert_pem)
    assert not TrustBundle([ca.root_pem]).leads_here([der(rogue.leaf("web").cert_pem), not_ca])


def test_material_says_what_is_wrong_with_it() -> None:
    ca = TestCA()
    leaf, other = ca.leaf("web", "web-1"), ca.leaf("web", "web-1")
    assert make_material(leaf, [ca.root_pem]).identity.instance == "web-1"
    import msgspec

    with pytest.raises(BadConfiguration, match="bundle is empty"):
        make_material(leaf, [])
    with pytest.raises(BadConfiguration, match="bundle cannot be used"):
        make_material(leaf, ["nonsense"])
    with pytest.raises(BadConfiguration, match="leaf or its key"):
        make_material(msgspec.structs.replace(leaf, private_key_pem=other.private_key_pem), [ca.root_pem])
    with pytest.raises(BadConfiguration, match="leaf certificate"):
        make_material(msgspec.structs.replace(leaf, cert_pem="nonsense"), [ca.root_pem])


def test_a_leaf_alone_is_shown_with_its_root_and_a_chain_as_it_is() -> None:
    ca, old = TestCA("new"), TestCA("old")
    leaf = ca.leaf("web", "web-1")
    bundle = TrustBundle([old.root_pem, ca.root_pem])
    chain = leaf.cert_pem.rstrip() + "\n" + ca.root_pem
    assert shown_chain(leaf.cert_pem, bundle) == chain
    assert shown_chain(leaf.cert_pem.rstrip(), bundle) == chain
    assert shown_chain(leaf.cert_pem, TrustBundle([old.root_pem])) == leaf.cert_pem, "its root is not known"
    crossed = ca.leaf("web", "web-1", intermediates=old.cross_sign(ca))
    assert shown_chain(crossed.cert_pem, bundle) == crossed.cert_pem


def test_peers_see_the_chain_that_openssl_would_have_made() -> None:
    ca = TestCA()
    ours, theirs = (make_material(ca.leaf(service, f"{service}-1"), [ca.root_pem]) for service in ("web", "db"))
    to_us, from_us = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = ours.client_plain.wrap_bio(to_us, from_us, server_side=False)
    server = theirs.server.current().wrap_bio(from_us, to_us, server_side=True)
    for side in (client, server, client, server):
        try:
            side.do_handshake()
        except ssl.SSLWantReadError:
            continue
    for side, service in ((client, "db"), (server, "web")):
        proof = proof_of(side)
        assert proof.identity.service == service
        assert proof.chain_der[1:] == (der(ca.root_pem),)
