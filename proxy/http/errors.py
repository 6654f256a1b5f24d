"""What goes wrong with HTTP messages, with the status that says so to the client."""

from __future__ import annotations

from proxy.errors import ProxyError


class BadRequest(ProxyError):
    """The client's message cannot be accepted. ``status`` is the answer; the text goes to the client."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


class BadResponse(ProxyError):
    """The app's message cannot be accepted; the client gets a 502, the text goes to the log."""


class TooMuchHeld(BadResponse):
    """The sidecar has no memory for what is there of the response's head; the client gets a 503."""


class UnwantedStatus(BadResponse):
    """The status of the app's response is one for which the request is to be sent elsewhere."""
