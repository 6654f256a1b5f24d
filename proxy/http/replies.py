"""Answers that the filter gives itself."""

from __future__ import annotations

import json
from http import HTTPStatus

from raftstate.model.identity import Identity, SpiffeId


def local_reply(
    status: int,
    error: str,
    *,
    head_only: bool = False,
    close: bool = False,
    http10: bool = False,
    limited: bool = False,
) -> bytes:
    """Return a whole response: ``{"error": …}``, with the status' standard phrase.

    ``limited``: a limit of ours is the reason, which Envoy's header of that meaning tells the client.
    """
    body = json.dumps({"error": error}).encode() + b"\n"
    lines = [
        f"HTTP/1.1 {status} {HTTPStatus(status).phrase}".encode(),
        b"content-type: application/json",
        b"content-length: %d" % len(body),
    ]
    if status == 405:
        lines.append(b"allow: GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS")
    if limited:
        lines.append(b"x-envoy-overloaded: true")
    if close:
        lines.append(b"connection: close")
    elif http10:
        lines.append(b"connection: keep-alive")
    lines += (b"", b"" if head_only else body)
    return b"\r\n".join(lines)


def denial(service: str, source: Identity) -> str:
    """Return the text of a 403: which side said no to whom, and nothing of the rule."""
    return f"destination {service!r} denies this request of source {source.service!r}"


def client_cert_header(peer: Identity, own_uri: str, certificate_sha256: str = "") -> bytes:
    """Return the value of ``x-forwarded-client-cert`` (Envoy's form) for a verified peer.

    ``certificate_sha256`` is the hex digest of the peer's certificate in DER; without it ``Hash`` is left out.
    """
    parts = []
    if own_uri:
        parts.append(f"By={own_uri}")
    if certificate_sha256:
        parts.append(f"Hash={certificate_sha256}")
    uri = SpiffeId(trust_domain=peer.trust_domain, datacenter=peer.datacenter or "dc1", service=peer.service).uri()
    parts.append(f"URI={uri}")
    return ";".join(parts).encode()
