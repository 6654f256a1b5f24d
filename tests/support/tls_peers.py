"""Foreign TLS peers for tests: what Envoy or an attacker would do, with the ssl module alone."""

from __future__ import annotations

import ssl
import tempfile
from pathlib import Path

from raftstate.model.connect import Leaf


def context(
    leaf: Leaf | None, root_pem: str, *, server: bool = False, alpn: tuple[str, ...] = (), verify: bool = True
) -> ssl.SSLContext:
    """Return a context that shows ``leaf`` (or nothing) and trusts ``root_pem``."""
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
    made.check_hostname = False
    made.verify_mode = ssl.CERT_REQUIRED if verify else ssl.CERT_NONE
    made.load_verify_locations(cadata=root_pem)
    if alpn:
        made.set_alpn_protocols(list(alpn))
    if leaf is not None:
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory) / "leaf.pem"
            path.write_text(leaf.cert_pem + leaf.private_key_pem)
            made.load_cert_chain(path)
    return made
