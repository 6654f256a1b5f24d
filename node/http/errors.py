"""Errors that a handler answers with: Consul's status code and a plain text."""

from __future__ import annotations


class HttpError(Exception):
    """A request ends with this status and text. ``headers`` are added to the answer."""

    def __init__(self, status: int, text: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(text)
        self.status, self.text, self.headers = status, text, headers or {}


class BadRequest(HttpError):
    """400: the request is malformed; the text names the parameter or field."""

    def __init__(self, text: str) -> None:
        super().__init__(400, text)


class NotFound(HttpError):
    """404 with a text."""

    def __init__(self, text: str) -> None:
        super().__init__(404, text)


class NotSupported(HttpError):
    """501: an endpoint of Consul's that Lictor leaves out, said plainly."""

    def __init__(self, what: str, instead: str = "") -> None:
        super().__init__(501, f"{what} is not supported by Lictor" + (f"; {instead}" if instead else ""))
