"""Errors of the sidecar. Each text says what happened and, where the user can act, what to do next."""

from __future__ import annotations


class ProxyError(Exception):
    """Root of everything the ``proxy`` package raises on purpose."""


class BadConfiguration(ProxyError):
    """An option or a section of the configuration stream cannot be used; the text names it."""


class PortUnavailable(ProxyError):
    """A listening socket could not be bound."""


_OURS = frozenset(("closed", "no-descriptors", "not-ready", "too-many-pending"))


class BadCertificate(ProxyError):
    """A peer's certificate proves no identity that is acceptable here. ``cause`` is a short label for metrics."""

    def __init__(self, cause: str, text: str) -> None:
        super().__init__(text)
        self.cause = cause


class ConnectFailed(ProxyError):
    """A peer could not be reached or did not complete the handshake. ``cause`` is a short label for metrics."""

    def __init__(self, cause: str, text: str) -> None:
        super().__init__(text)
        self.cause = cause

    @property
    def ours(self) -> bool:
        """Whether it is this sidecar that cannot connect: no peer is to blame, and none would do better."""
        return self.cause in _OURS


class MuxError(ProxyError):
    """The peer broke the multiplexing protocol; the session ends, the text says how it broke it."""


class StreamClosed(ProxyError):
    """The stream is gone: reset by the peer, cut by policy, or its session was lost."""


class StreamRefused(ProxyError):
    """The destination's sidecar did not admit the stream; nothing sent on it has reached the app."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)
        self.code = code


class NoEndpoint(ProxyError):
    """An upstream has no instance to dial; the text says why."""
