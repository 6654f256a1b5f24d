"""Which field lists are well-formed (RFC 9113, section 8): what is not is refused before anything is decided on it.

Names and values are checked as they come in as literals, and what the list as a whole has to be when it is whole.
"""

from __future__ import annotations

from typing import Any, Final

from h2.errors import ErrorCodes

from proxy.http.head import Field
from proxy.http2.errors import StreamError

_NAME_OCTETS: Final = bytes(octet for octet in range(0x21, 0x7F) if not 0x41 <= octet <= 0x5A)
"""Visible ASCII without capitals (section 8.2.1)."""
_CONNECTION_SPECIFIC: Final = frozenset(
    (b"connection", b"proxy-connection", b"keep-alive", b"transfer-encoding", b"upgrade")
)
_METHODS: Final = frozenset((b"GET", b"POST", b"HEAD", b"PUT", b"DELETE", b"PATCH", b"OPTIONS", b"CONNECT"))
"""Those that need no look at what they consist of."""
_TOKEN_OCTETS: Final = bytes(octet for octet in range(0x21, 0x7F) if octet not in b'"(),/:;<=>?@[\\]{}')
"""What a method may consist of (RFC 9110, section 5.6.2)."""
_SCHEME_OCTETS: Final = b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789+-."
"""RFC 3986, section 3.1."""
_AUTHORITY_OCTETS: Final = (
    b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-._~%!$&'()*+,;=:[]"  # no @: it may name no user
)
"""What a host and its port may consist of (RFC 3986, section 3.2)."""
_PSEUDO_OF_REQUESTS: Final = frozenset((b":method", b":scheme", b":authority", b":path", b":protocol"))
_COLON: Final = 0x3A
_SPACE: Final = 0x20
_TAB: Final = 0x09
_LENGTH_DIGITS_MAX: Final = 18
UNKNOWN: Final = -1
"""No length was declared."""


def malformed(text: str) -> StreamError:
    """Return the error of a message that is not well-formed (section 8.1.1)."""
    return StreamError(ErrorCodes.PROTOCOL_ERROR, f"a malformed message: {text}")


def name_problem(name: bytes) -> str:
    """Return why a field may not be called so; empty when it may."""
    if not name:
        return "a field without a name"
    if name.translate(None, _NAME_OCTETS):
        return f"a field's name is {name[:80]!r}"
    if name.find(b":", 1) >= 0:
        return f"a colon within a field's name, {name[:80]!r}"
    return ""


def value_problem(value: bytes) -> str:
    """Return why a field's value may not be this; empty when it may."""
    if not value:
        return ""
    if b"\n" in value or b"\r" in value or b"\0" in value:
        return "a field's value has a line break or a NUL"
    first, last = value[0], value[-1]
    if first in (_SPACE, _TAB) or last in (_SPACE, _TAB):
        return "a field's value begins or ends with white space"
    return ""


class Checked:
    """What the checks have learnt of a message."""

    def __init__(self) -> None:
        self.length = UNKNOWN
        """What ``content-length`` says."""
        self.status = 0
        """Of a response."""
        self.head = False
        """It is a request by HEAD, whose response has no body."""
        self.cookies = 0


def check_request(fields: list[Field]) -> Checked:
    """Check a request's fields. Raises :class:`StreamError`."""
    seen = Checked()
    pseudo: set[bytes] = set()
    method = scheme = authority = host = path = b""
    has_host = regular = False
    for each in fields:
        field: Any = each
        name: bytes = field[0]
        value: bytes = field[1]
        if name[0] != _COLON:
            regular = True
            if name == b"host":
                if has_host:
                    raise malformed("several Host fields")
                host, has_host = value, True
            else:
                _check_regular(seen, name, value)
            continue
        if regular:
            raise malformed(f"{name.decode()} after other fields")
        if name in pseudo:
            raise malformed(f"{name.decode()} twice")
        if name not in _PSEUDO_OF_REQUESTS:
            raise malformed(f"{name[:80]!r} in a request")
        pseudo.add(name)
        if name == b":method":
            method = value
        elif name == b":authority":
            authority = value
        elif name == b":path":
            path = value
        elif name == b":scheme":
            scheme = value
    _check_pseudo(pseudo, method, scheme, path)
    _check_written(method, scheme)
    if b":authority" not in pseudo:
        if not has_host:
            raise malformed("neither :authority nor Host")
        authority = host
    elif has_host and host != authority:
        raise malformed("Host is not what :authority is")
    if not authority or authority.translate(None, _AUTHORITY_OCTETS):
        raise malformed(f"the host is {authority[:80]!r}")
    seen.head = method == b"HEAD"
    return seen


def _check_pseudo(pseudo: set[bytes], method: bytes, scheme: bytes, path: bytes) -> None:
    """Check that a request has what it must have, and nothing that it must not (section 8.3.1, 8.5; RFC 8441)."""
    if b":method" not in pseudo:
        raise malformed("no :method")
    extended = b":protocol" in pseudo
    if method == b"CONNECT" and not extended:
        if b":scheme" in pseudo or b":path" in pseudo or b":authority" not in pseudo:
            raise malformed("CONNECT with :scheme or :path, or without :authority")
        return
    if not scheme or b":path" not in pseudo:
        raise malformed("no :scheme, or no :path")
    if not path:
        raise malformed("an empty :path")
    if extended and method != b"CONNECT":
        raise malformed(":protocol without CONNECT")


def _check_written(method: bytes, scheme: bytes) -> None:
    """Check what a request line of HTTP/1.1 could be forged with, wherever this may become one (section 10.3)."""
    if method not in _METHODS and (not method or method.translate(None, _TOKEN_OCTETS)):
        raise malformed(f"the method is {method[:80]!r}")
    if scheme != b"http" and scheme != b"https" and scheme.translate(None, _SCHEME_OCTETS):
        raise malformed(f"the scheme is {scheme[:80]!r}")


def check_response(fields: list[Field]) -> Checked:
    """Check a response's fields, be it an informational one. Raises :class:`StreamError`."""
    seen = Checked()
    regular = False
    for each in fields:
        field: Any = each
        name: bytes = field[0]
        value: bytes = field[1]
        if name[0] != _COLON:
            regular = True
            _check_regular(seen, name, value)
        elif name != b":status" or seen.status or regular:
            raise malformed(f"{name[:80]!r} in a response, twice or after other fields")
        elif len(value) != 3 or not value.isdigit() or value < b"100" or value == b"101":
            raise malformed(f"the status is {value[:80]!r}")
        else:
            seen.status = int(value)
    if not seen.status:
        raise malformed("no :status")
    return seen


def check_trailers(fields: list[Field]) -> Checked:
    """Check trailers. Raises :class:`StreamError`."""
    seen = Checked()
    for each in fields:
        field: Any = each
        name: bytes = field[0]
        if name[0] == _COLON:
            raise malformed(f"{name[:80]!r} in trailers")
        value: bytes = field[1]
        _check_regular(seen, name, value)
    return seen


def _check_regular(seen: Checked, name: bytes, value: bytes) -> None:
    if name == b"content-length":
        # What int() would take beside digits, as RFC 9110 (section 8.6) does not: signs, spaces, underscores.
        if not value.isdigit() or len(value) > _LENGTH_DIGITS_MAX:
            raise malformed(f"Content-Length is {value[:80]!r}")
        length = int(value)
        if seen.length != UNKNOWN and seen.length != length:
            raise malformed("several Content-Length fields that differ")
        seen.length = length
    elif name == b"te":
        if value.lower() != b"trailers":
            raise malformed(f"TE is {value[:80]!r}")
    elif name == b"cookie":
        seen.cookies += 1
    elif name in _CONNECTION_SPECIFIC:
        raise malformed(f"{name.decode()} has no place in HTTP/2")
