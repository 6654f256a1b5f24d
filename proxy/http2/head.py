"""HTTP/2 header lists: what is decided on, what is sent on, and answers of our own.

Sources: RFC 9113, section 8; gRPC over HTTP/2 (the status mapping for a denied or unreachable call).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Any, Final

from proxy.authz import Request
from proxy.http.errors import BadRequest
from proxy.http.head import FORWARDED_CERT, IDEMPOTENT, METHOD_NAMES, NOT_BY_UNDERSCORE, Field

_GRPC = b"application/grpc"
_GRPC_STATUS = {400: 13, 403: 7, 502: 14, 503: 14, 504: 4, 500: 13}
"""HTTP status -> gRPC status of an answer of our own: INTERNAL, PERMISSION_DENIED, UNAVAILABLE, DEADLINE_EXCEEDED."""
_TARGET = re.compile(rb"/[\x21\x22\x24-\x7e]*")
_DROP = frozenset((b"keep-alive", b"proxy-connection", b"http2-settings", b"upgrade", b"connection"))
_PLAIN: Final = 0
_TYPE: Final = 1
_LENGTH: Final = 2
_CODING: Final = 3
"""What is up to here is passed on."""
_STATUS: Final = 4
_DROPPED: Final = 5
_HOST: Final = 6
_METHOD: Final = 7
_PATH: Final = 8
_AUTHORITY: Final = 9
_SCHEME: Final = 10
_OTHER: Final = 11
"""A pseudo-header that is none of these."""
_KINDS: Final[dict[bytes, int]] = {
    b"content-type": _TYPE, b"content-length": _LENGTH, b"transfer-encoding": _CODING, b":status": _STATUS,
    b"host": _HOST, b":method": _METHOD, b":path": _PATH, b":authority": _AUTHORITY, b":scheme": _SCHEME,
}  # fmt: skip
"""What fields are by their names: these, and such as were seen."""
_KINDS_MAX: Final = 4096
_KIND_BYTES_MAX: Final = 64


class RequestHead:
    """A request's header list, checked."""

    __slots__ = ("authority", "fields", "grpc", "method", "scheme", "target")

    def __init__(self) -> None:
        self.method = self.target = self.authority = b""
        self.scheme = b"http"
        self.fields: list[Field] = []
        self.grpc = False

    @property
    def idempotent(self) -> bool:
        """Whether sending it twice does what sending it once does (RFC 9110, section 9.2.2)."""
        return self.method in IDEMPOTENT

    @property
    def method_name(self) -> str:
        """The method as text."""
        return METHOD_NAMES.get(self.method) or self.method.decode("latin-1")

    def all_fields(self) -> list[Field]:
        """Return the fields as HTTP/1.1 would have them, the authority as ``host``."""
        return [(b"host", self.authority), *self.fields] if self.authority else self.fields

    def request(self) -> Request:
        """Return what permissions see."""
        return Request(self.method_name, self.target.decode("latin-1"), self.all_fields())

    def wire(self, target: bytes, identity: bytes) -> list[Field]:
        """Return the list to send on."""
        out = [(b":method", self.method), (b":scheme", self.scheme)]
        if self.authority:
            out.append((b":authority", self.authority))
        out.append((b":path", target))
        out += self.fields
        if identity:
            out.append((FORWARDED_CERT, identity))
        return out


def read_request(headers: list[Field]) -> RequestHead:
    """Sort a request's header list, which is well-formed (:mod:`proxy.http2.fields`). Raises :class:`BadRequest`."""
    head = RequestHead()
    came: list[Any] = headers  # compiled, a loop over what is typed would make plain tuples of them
    fields: list[Any] = []  # as they came: those that no table may hold are of a type of their own
    host = b""
    lengths = 0
    for field in came:
        name: bytes = field[0]
        value: bytes = field[1]
        kind = _kind_of(name)
        if kind <= _CODING:
            if kind == _TYPE:
                head.grpc = value.startswith(_GRPC)
            elif kind == _LENGTH:
                lengths += 1
            elif kind == _CODING:
                raise BadRequest(400, "Transfer-Encoding has no place in HTTP/2")
            fields.append(field)
        elif kind == _METHOD:
            head.method = value
        elif kind == _PATH:
            head.target = value
        elif kind == _AUTHORITY:
            head.authority = value
        elif kind == _SCHEME:
            head.scheme = value
        elif kind == _HOST:
            host = value
        elif kind != _DROPPED:
            raise BadRequest(400, "an extended CONNECT is not served here")
    head.fields = fields
    head.authority = head.authority or host
    if lengths > 1:
        raise BadRequest(400, "several Content-Length headers")
    if head.method == b"CONNECT":
        raise BadRequest(405, "CONNECT is not served here")
    if not _TARGET.fullmatch(head.target) and not (head.target == b"*" and head.method == b"OPTIONS"):
        raise BadRequest(400, "the request's path is malformed")
    return head


def passed_on(headers: list[Field], *, response: bool) -> list[Field]:
    """Return a response's header list, or trailers, as they are sent on."""
    came: list[Any] = headers  # as above
    kept: list[Any] = []
    for field in came:
        name: bytes = field[0]
        kind = _kind_of(name)
        if kind <= _CODING or (response and kind == _STATUS):
            kept.append(field)
    return kept


def value_of(fields: Iterable[Field], wanted: bytes) -> bytes:
    """Return the value of the first field of this name; empty when there is none."""
    for field in fields:
        if field[0] == wanted:
            return field[1]
    return b""


def _kind_of(name: bytes) -> int:
    """Return what a field is to be taken for."""
    kind = _KINDS.get(name, -1)
    if kind < 0:
        if name.startswith(b":"):
            kind = _OTHER
        else:
            kind = _DROPPED if name in _DROP or _forges(name) else _PLAIN
        if len(_KINDS) < _KINDS_MAX and len(name) <= _KIND_BYTES_MAX:
            _KINDS[name] = kind
    return kind


def _forges(name: bytes) -> bool:
    """Whether a field could be taken for the caller's identity, or, behind a gateway, for a message's framing."""
    return name == FORWARDED_CERT or (b"_" in name and name.replace(b"_", b"-") in NOT_BY_UNDERSCORE)


def grpc_status_of(status: int) -> bytes:
    """Return the gRPC status of an answer of our own with this HTTP status; empty when it has none."""
    return b"%d" % _GRPC_STATUS[status] if status in _GRPC_STATUS else b""


def grpc_ending(status: int, error: str) -> list[Field]:
    """Return the trailers of a gRPC call whose answer we have to end ourselves, as with this HTTP status."""
    message = "".join(c if " " <= c <= "~" and c != "%" else _escaped(c) for c in error)
    return [(b"grpc-status", grpc_status_of(status) or b"2"), (b"grpc-message", message.encode())]


def _escaped(character: str) -> str:
    return "".join(f"%{byte:02X}" for byte in character.encode())


def local_answer(status: int, error: str, *, grpc: bool, room: int, head: bool) -> tuple[list[Field], bytes]:
    """Return header list and body of an answer of our own; a gRPC client gets a gRPC status and no body.

    ``room``: bytes of body that can be sent. One that finds none is left out, and then not declared either, as the
    answer would else be malformed (RFC 9113, section 8.1.1); what answers HEAD declares the body it does not have.
    """
    if grpc and status in _GRPC_STATUS:
        return [(b":status", b"200"), (b"content-type", _GRPC), *grpc_ending(status, error)], b""
    body = json.dumps({"error": error}).encode() + b"\n"
    fields = [(b":status", b"%d" % status), (b"content-type", b"application/json")]
    if not head and room < len(body):
        return fields, b""
    fields.append((b"content-length", b"%d" % len(body)))
    return fields, b"" if head else body
