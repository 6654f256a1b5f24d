"""What the other end of an HTTP/2 connection did wrong."""

from __future__ import annotations

from h2.errors import ErrorCodes

from proxy.errors import ProxyError


class Http2Error(ProxyError):
    """The other end broke HTTP/2 in a way that ends the connection. ``code`` is what it is told so by (RFC 9113,
    section 7); the text goes to the log."""

    def __init__(self, code: ErrorCodes, text: str) -> None:
        super().__init__(text)
        self.code = code
