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


class StreamError(ProxyError):
    """The same of what ends a stream and no more (section 5.4.2): a malformed message, above all (section 8.1.1)."""

    def __init__(self, code: ErrorCodes, text: str) -> None:
        super().__init__(text)
        self.code = code
