"""The headers with which spans are sent, from OpenTelemetry's environment variables: tokens of collectors, mostly.

Source: OpenTelemetry protocol exporter, "Specifying headers via environment variables": ``key=value`` pairs with
commas between them, keys and values percent-encoded. A value that is not encoded (``Bearer abc``) is taken as it
stands, as by Go's exporter: users of stricter ones complain.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from urllib.parse import unquote

VARIABLES = ("OTEL_EXPORTER_OTLP_TRACES_HEADERS", "OTEL_EXPORTER_OTLP_HEADERS")
"""The first that is set counts."""
CHARS_MAX = 8192
OURS = frozenset(
    {"user-agent", "content-type", "content-length", "content-encoding", "transfer-encoding", "connection", "host"}
)
"""What the exporter says itself, or what would make another request of it."""

_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_VALUE = re.compile(r"[\t\x20-\x7e]*")

Headers = tuple[tuple[str, str], ...]


def headers_of(environment: Mapping[str, str]) -> Headers:
    """Return the headers that the environment names. Raises ValueError, which names the variable and no value."""
    variable = next((name for name in VARIABLES if environment.get(name)), None)
    if variable is None:
        return ()
    try:
        return read_headers(environment[variable])
    except ValueError as error:
        raise ValueError(f"{variable}: {error}") from None


def read_headers(text: str) -> Headers:
    """Return the pairs of a list such as ``api-key=abc,x-scope-orgid=team``.

    Raises ValueError, which tells which pair is wrong and why, without its value.
    """
    if len(text) > CHARS_MAX:
        raise ValueError(f"longer than {CHARS_MAX} characters")
    headers: list[tuple[str, str]] = []
    for number, pair in enumerate(text.split(","), start=1):
        if not pair.strip():
            continue
        key, equals, value = pair.partition("=")
        name = unquote(key.strip())
        if not equals or not _NAME.fullmatch(name):
            raise ValueError(f"pair {number} must be a header's name, = and its value, such as api-key=abc")
        if name.lower() in OURS:
            raise ValueError(f"{name} cannot be set")
        value = unquote(value.strip())
        if not _VALUE.fullmatch(value):
            raise ValueError(f"the value of {name} may only hold printable ASCII characters")
        headers.append((name, value.strip()))
    return tuple(headers)
