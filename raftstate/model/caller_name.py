"""The server name (SNI) that a sidecar gives when it dials another: a hint of who calls.

An Envoy sorts its callers by it before the handshake, so that it can end the connections of one and of no other. It
proves nothing, and nothing is decided by it: who calls is what the certificate says. Names are hashed, so that any
of them fits a DNS label (RFC 1035: 63 bytes, letters and digits) and none is shown on the wire.
"""

from __future__ import annotations

import base64
import hashlib

DOMAIN = "caller.lictor"
_LABEL_BYTES = 16


def caller_name(service: str, instance: str) -> str:
    """Return the server name of an instance's calls."""
    return f"{_label(service, instance)}.{service_domain(service)}"


def service_domain(service: str) -> str:
    """Return the domain in which the names of a service's instances are."""
    return f"{_label(service)}.{DOMAIN}"


def _label(*parts: str) -> str:
    # Each part after its length: no two lists of parts read the same.
    text = "".join(f"{len(part)}:{part}" for part in parts)
    digest = hashlib.sha256(text.encode()).digest()[:_LABEL_BYTES]
    return base64.b32encode(digest).decode().rstrip("=").lower()
