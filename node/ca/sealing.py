"""Sealing the root's private key with AES-256-GCM under the cluster key, so that log, snapshot and backup never hold
it in clear. Form: one version byte, a 12-byte nonce, ciphertext and tag; the root's id is bound in."""

from __future__ import annotations

import os

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from node.errors import NodeError

VERSION = b"\x01"
NONCE_BYTES = 12


class SealError(NodeError):
    """A sealed key cannot be opened: another cluster key, another root, or damage."""

    code = "ca-seal"


def seal(key_pem: bytes, cluster_key: bytes, root_id: str) -> bytes:
    """Seal a key for the root of that id. `cluster_key` has 32 bytes."""
    nonce = os.urandom(NONCE_BYTES)
    return VERSION + nonce + AESGCM(cluster_key).encrypt(nonce, key_pem, _bound(root_id))


def unseal(sealed: bytes, cluster_key: bytes, root_id: str) -> bytes:
    """Open what `seal` made. Raises SealError."""
    if sealed[:1] != VERSION:
        raise SealError(f"the sealed key of root {root_id} has an unknown form: upgrade this server")
    nonce, text = sealed[1 : 1 + NONCE_BYTES], sealed[1 + NONCE_BYTES :]
    try:
        return AESGCM(cluster_key).decrypt(nonce, text, _bound(root_id))
    except (InvalidTag, ValueError):
        raise SealError(
            f"the key of root {root_id} cannot be opened with this server's cluster key: "
            "copy cluster.key from the server that made the root"
        ) from None


def _bound(root_id: str) -> bytes:
    return b"lictor-ca-key/1 " + root_id.encode()
