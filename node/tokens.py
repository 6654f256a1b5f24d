"""Who may use a node's HTTP API when ``acl_enabled`` is set: whoever shows a token.

There is one level of access: the secret in ``acl_token_file``, and every token in the replicated state, may do
everything. A token is looked for where Consul's clients put it: ``?token``, ``X-Consul-Token``, ``Authorization``.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path

from aiohttp import web
from aiohttp.typedefs import Middleware

from node.backend import Backend
from node.errors import NodeError, PkiError

log = logging.getLogger("lictor.http")

SECRET_CHARS_MIN = 32
Next = Callable[[web.Request], Awaitable[web.StreamResponse]]


def load_secret(path: str) -> str:
    """Read the first management token. Raises PkiError: missing, short, or open to others."""
    file = Path(path)
    try:
        mode = file.stat().st_mode & 0o777
        secret = file.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise PkiError(
            f"acl_token_file {path} cannot be read ({error}): uuidgen > {path}; chmod 600 {path}"
        ) from None
    if mode & 0o077:
        raise PkiError(f"acl_token_file {path} can be read by others (mode {mode:04o}): chmod 600 it")
    if len(secret) < SECRET_CHARS_MIN:
        raise PkiError(f"acl_token_file {path} must hold at least {SECRET_CHARS_MIN} characters: uuidgen > {path}")
    return secret


def token_of(request: web.Request) -> str:
    """Return the token that a request shows, or an empty text."""
    if token := request.query.get("token"):
        return token
    if token := request.headers.get("X-Consul-Token"):
        return token
    scheme, _, token = request.headers.get("Authorization", "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" else ""


class TokenGuard:
    """Turns requests without a good token away."""

    def __init__(self, backend: Backend, secret: str) -> None:
        self._backend = backend
        self._own_hash = _hash(secret)

    def middleware(self) -> Middleware:
        """Return the middleware; it must stand before all others."""

        @web.middleware
        async def require_token(request: web.Request, handler: Next) -> web.StreamResponse:
            if refusal := await self.refusal(token_of(request)):
                return web.Response(status=403, text=refusal, content_type="text/plain")
            return await handler(request)

        return require_token

    async def refusal(self, token: str) -> str:
        """Return Consul's text for a token that does not do, or an empty one."""
        if not token:
            return "Permission denied: anonymous token lacks permission; show a token (X-Consul-Token)"
        hashed = _hash(token)
        if hmac.compare_digest(hashed, self._own_hash):
            return ""
        try:
            found = await self._backend.query("acl.token", {"secret_hash": hashed}, mode="stale")
        except NodeError as error:
            log.warning("http: a token could not be looked up: %s", error)
            return "Permission denied: the token cannot be checked now; try again"
        return "" if found.raw is not None else "ACL not found"


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()
