"""Node certificates: modes of files, the role in the name, and handshakes that must not happen."""

from __future__ import annotations

import os
import ssl
import stat
from pathlib import Path

import pytest

from node import pki
from node.config import parse_config
from node.errors import PkiError


def shake(client: ssl.SSLContext, server: ssl.SSLContext) -> tuple[ssl.SSLObject, ssl.SSLObject]:
    """Run a handshake in memory; return (client side, server side)."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = (client.wrap_bio(to_client, to_server), server.wrap_bio(to_server, to_client, server_side=True))
    done = [False, False]
    for _ in range(10):
        for number, end in enumerate(ends):
            try:
                end.do_handshake()
                done[number] = True
            except ssl.SSLWantReadError:
                pass
        if all(done):
            return ends
    raise AssertionError("handshake did not end")


@pytest.fixture
def files(tmp_path: Path) -> pki.TlsFiles:
    made = pki.create_node_ca(tmp_path / "tls")
    pki.issue_node_cert(made.directory, "server-1", "server", "dc1")
    pki.issue_node_cert(made.directory, "client-1", "client", "dc1")
    pki.create_cluster_key(made.directory)
    return made


def test_keys_are_for_the_owner_alone(files: pki.TlsFiles) -> None:
    assert stat.S_IMODE(files.directory.stat().st_mode) == 0o700
    for path in (files.ca_key, files.cluster_key, files.key("server-1")):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert sorted(path.name for path in files.directory.iterdir() if path.name.startswith(".")) == []


def test_both_sides_learn_name_and_role(files: pki.TlsFiles) -> None:
    client, server = shake(pki.client_context(files, "client-1", pki.ALPN_RPC), pki.server_context(files, "server-1"))
    assert pki.peer_of(client, "dc1") == pki.Peer("server-1", "server", "dc1")
    assert pki.peer_of(server, "dc1") == pki.Peer("client-1", "client", "dc1")
    assert server.version() == "TLSv1.3"
    assert server.selected_alpn_protocol() == "lictor-rpc/1"


def test_another_datacenter_is_nobody(files: pki.TlsFiles) -> None:
    client, _ = shake(pki.client_context(files, "client-1", pki.ALPN_RPC), pki.server_context(files, "server-1"))
    with pytest.raises(PkiError, match="dc2"):
        pki.peer_of(client, "dc2")


def test_another_ca_is_refused(files: pki.TlsFiles, tmp_path: Path) -> None:
    foreign = pki.create_node_ca(tmp_path / "foreign")
    pki.issue_node_cert(foreign.directory, "server-1", "server", "dc1")
    with pytest.raises(ssl.SSLError):
        shake(pki.client_context(foreign, "server-1", pki.ALPN_RAFT), pki.server_context(files, "server-1"))
    with pytest.raises(ssl.SSLError):
        shake(pki.client_context(files, "client-1", pki.ALPN_RPC), pki.server_context(foreign, "server-1"))


def test_no_certificate_and_old_tls_are_refused(files: pki.TlsFiles) -> None:
    naked = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    naked.check_hostname = False
    naked.load_verify_locations(str(files.ca))
    with pytest.raises(ssl.SSLError):
        shake(naked, pki.server_context(files, "server-1"))
    old = pki.client_context(files, "client-1", pki.ALPN_RPC)
    with pytest.warns(DeprecationWarning, match="TLSv1"):
        old.minimum_version = ssl.TLSVersion.TLSv1
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    with pytest.raises(ssl.SSLError):
        shake(old, pki.server_context(files, "server-1"))


class _Certificate:
    def __init__(self, *names: str) -> None:
        self._names = names

    def getpeercert(self) -> dict[str, object]:
        return {"subjectAltName": tuple(("DNS", name) for name in self._names)}


@pytest.mark.parametrize(
    "names",
    [
        (),
        ("server.dc1.lictor",),
        ("a.server.dc1.lictor",),
        ("client.dc1.lictor", "a.server.dc1.lictor"),
        ("server.dc1.lictor", "a.server.dc1.lictor", "b.server.dc1.lictor"),
        ("server.dc1.lictor", "a.server.dc1.lictor", "client.dc1.lictor", "a.client.dc1.lictor"),
        ("server.dc1.lictor", "a.b.server.dc1.lictor"),
        ("server.dc1.lictor", ".server.dc1.lictor"),
        ("*.dc1.lictor", "*.server.dc1.lictor"),
        ("server.dc1.lictor.evil", "a.server.dc1.lictor.evil"),
    ],
)
def test_only_exactly_one_node_in_one_role_is_somebody(names: tuple[str, ...]) -> None:
    with pytest.raises(PkiError):
        pki.peer_of(_Certificate(*names), "dc1")


def test_a_key_that_others_can_read_is_refused(files: pki.TlsFiles) -> None:
    os.chmod(files.key("server-1"), 0o640)
    with pytest.raises(PkiError, match="chmod 600"):
        pki.server_context(files, "server-1")
    os.chmod(files.cluster_key, 0o604)
    with pytest.raises(PkiError, match="chmod 600"):
        pki.load_cluster_key(files.cluster_key)


def test_missing_and_short_files_say_what_to_do(files: pki.TlsFiles, tmp_path: Path) -> None:
    with pytest.raises(PkiError, match="lictor tls cert create -node nobody"):
        pki.server_context(files, "nobody")
    with pytest.raises(PkiError, match="copy it from another server"):
        pki.load_cluster_key(tmp_path / "none")
    files.cluster_key.write_bytes(b"short")
    with pytest.raises(PkiError, match="32 bytes"):
        pki.load_cluster_key(files.cluster_key)


def test_a_second_ca_or_cluster_key_is_refused(files: pki.TlsFiles) -> None:
    with pytest.raises(PkiError, match="cut this cluster in two"):
        pki.create_node_ca(files.directory)
    with pytest.raises(PkiError, match="could not open"):
        pki.create_cluster_key(files.directory)


@pytest.mark.parametrize("name", ["", "a.b", "../a", "-a", "a b", "a" * 64])
def test_unfit_node_names_are_refused(files: pki.TlsFiles, name: str) -> None:
    with pytest.raises(PkiError):
        pki.issue_node_cert(files.directory, name, "client", "dc1")


def test_local_pki_is_made_once_and_mended(tmp_path: Path) -> None:
    text = '[nodes.s1]\nrole = "server"\n[nodes.c1]\nrole = "client"\nhttp_port = 1\ndns_port = 2\n'
    config = parse_config(text, tmp_path / "cluster.toml")
    files = pki.ensure_local_pki(config)
    before = {path.name: path.read_bytes() for path in files.directory.iterdir()}
    assert set(before) == {"ca.pem", "ca-key.pem", "cluster.key", "s1.pem", "s1-key.pem", "c1.pem", "c1-key.pem"}
    pki.ensure_local_pki(config)
    assert {path.name: path.read_bytes() for path in files.directory.iterdir()} == before
    files.cert("c1").write_bytes(b"torn")
    pki.ensure_local_pki(config)
    after = {path.name: path.read_bytes() for path in files.directory.iterdir()}
    assert {name for name in after if after[name] != before[name]} == {"c1.pem", "c1-key.pem"}
