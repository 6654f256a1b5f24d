"""Message heads: from parsed fields to what is decided on and what is sent on.

Nothing reaches the other side that was not parsed: heads are written anew from their fields, a line for each.

Sources: RFC 9110 (hop-by-hop fields 7.6.1, trailers 6.5.1), RFC 9112 (targets 3.2, framing 6).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

from proxy.authz import Request
from proxy.http.errors import BadRequest, BadResponse

Field = tuple[bytes, bytes]
FORWARDED_CERT: Final = b"x-forwarded-client-cert"

PLAIN: Final = 0
DROP: Final = 1
HOST: Final = 2
CONNECTION: Final = 3
LENGTH: Final = 4
CODING: Final = 5
UPGRADE: Final = 6
EXPECT: Final = 7
_KINDS: Final = {
    b"host": HOST, b"connection": CONNECTION, b"content-length": LENGTH, b"transfer-encoding": CODING,
    b"upgrade": UPGRADE, b"expect": EXPECT, b"keep-alive": DROP, b"proxy-connection": DROP, b"te": DROP,
    b"http2-settings": DROP, FORWARDED_CERT: DROP,
}  # fmt: skip
METHOD_NAMES: Final = {
    name.encode(): name for name in ("GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "CONNECT")
}
_NOT_BY_CONNECTION: Final = frozenset(
    (b"host", b"content-length", b"transfer-encoding", b"authorization", b"cookie", b"te", b"close", b"keep-alive")
)
"""Fields that ``Connection`` cannot take away (end-to-end ones), and its words that are not fields."""
_NOT_IN_TRAILERS: Final = frozenset(
    (
        b"host", b"connection", b"content-length", b"transfer-encoding", b"upgrade", b"expect", b"keep-alive", b"te",
        b"proxy-connection", b"trailer", b"authorization", b"cookie", b"set-cookie", b"content-type",
        b"content-encoding", b"content-range", b"range", b"cache-control", b"max-forwards", b"www-authenticate",
        b"proxy-authorization", b"proxy-authenticate", FORWARDED_CERT,
    )
)  # fmt: skip
NOT_BY_UNDERSCORE: Final = frozenset((b"content-length", b"transfer-encoding", FORWARDED_CERT))
"""CGI-like apps take ``_`` for ``-``: identity and framing must not be forged that way."""
HOST_VALUE: Final = re.compile(rb"[A-Za-z0-9._~%!$&'()*+,;=:\[\]\-]*")
_ABSOLUTE: Final = re.compile(rb"https?://([^/?#@]*)(.*)", re.IGNORECASE | re.DOTALL)
_ORDINARY_CONNECTION: Final = (b",keep-alive", b",close")
_BLANKS: Final = (b" ", b"\t")
LENGTH_DIGITS_MAX: Final = 20
"""As 64 bits have; Python reads no number of thousands of digits, be they all zeros."""
IDEMPOTENT: Final = frozenset((b"GET", b"HEAD", b"OPTIONS", b"TRACE", b"PUT", b"DELETE"))

NAMES: Final[dict[bytes, tuple[bytes, int]]] = {}
"""Names seen (tokens, all of them), with their lower-case form and kind. Bounded; a cache only."""


def classify(name: bytes) -> tuple[bytes, int]:
    """Return a field name, which must be a token, in lower case, and what kind it is."""
    lower = name.lower()
    kind = _KINDS.get(lower, PLAIN)
    if b"_" in lower and lower.replace(b"_", b"-") in NOT_BY_UNDERSCORE:
        kind = DROP
    if len(NAMES) < 4096 and len(name) <= 64:
        NAMES[name] = (lower, kind)
    return lower, kind


class RequestHead:
    """A request's start line and headers, checked."""

    __slots__ = (
        "chunked", "expects", "fields", "http10", "keep_alive", "length", "lines", "method", "target", "upgrade",
    )  # fmt: skip

    def __init__(self, method: bytes, target: bytes, *, http10: bool, keep_alive: bool) -> None:
        self.method = method
        self.target = target
        self.http10 = http10
        self.keep_alive = keep_alive
        self.fields: list[Field] = []
        """End-to-end fields, names in lower case."""
        self.lines: list[bytes] = []
        """The same as lines of the head to send, without their ends."""
        self.length: int | None = None
        self.chunked = False
        self.upgrade = ""
        """The protocol asked for, in lower case."""
        self.expects = False
        """The client waits for a 100 before it sends the body."""

    @property
    def has_body(self) -> bool:
        """Whether a body can follow."""
        return self.chunked or bool(self.length)

    @property
    def idempotent(self) -> bool:
        """Whether sending it twice does what sending it once does (RFC 9110, section 9.2.2)."""
        return self.method in IDEMPOTENT

    @property
    def method_name(self) -> str:
        """The method as text."""
        return METHOD_NAMES.get(self.method) or self.method.decode("latin-1")

    def request(self) -> Request:
        """Return what permissions see."""
        return Request(self.method_name, self.target.decode("latin-1"), self.fields)

    def wire(self, target: bytes, identity: bytes = b"") -> bytes:
        """Return the head to send, with ``target`` as its target and ``identity`` as the client's certificate."""
        lines = [self.method + b" " + target + b" HTTP/1.1", *self.lines]
        if self.chunked:
            lines.append(b"transfer-encoding: chunked")
        if self.upgrade:
            lines.append(b"connection: upgrade\r\nupgrade: " + self.upgrade.encode("latin-1"))
        if identity:
            lines.append(b"x-forwarded-client-cert: " + identity)
        lines.append(b"\r\n")
        return b"\r\n".join(lines)


def read_request_head(
    method: bytes, target: bytes, version: str, raw: Sequence[Field], *, keep_alive: bool
) -> RequestHead:
    """Check a request's fields and sort them. Raises :class:`BadRequest`."""
    if version != "1.1" and version != "1.0":
        raise BadRequest(505, f"HTTP version {version} is not spoken here")
    head = RequestHead(method, target, http10=version == "1.0", keep_alive=keep_alive)
    fields, lines = head.fields, head.lines
    host: bytes | None = None
    connection = b""
    coding: bytes | None = None
    upgrade: bytes | None = None
    for name, value in raw:
        if value[-1:] in _BLANKS:
            value = value.rstrip(b" \t")  # the parser leaves it; it is no part of the value (RFC 9110, section 5.5)
        lower, kind = NAMES.get(name) or classify(name)
        if kind:
            if kind == DROP:
                continue
            if kind == HOST:
                if host is not None:
                    raise BadRequest(400, "several Host headers")
                host = value
            elif kind == CONNECTION:
                connection += b"," + value.lower()
                continue
            elif kind == LENGTH:
                if head.length is not None or not value.isdigit() or len(value) > LENGTH_DIGITS_MAX:
                    raise BadRequest(400, "Content-Length must be one number")
                head.length = int(value)
            elif kind == CODING:
                if coding is not None or value.lower() != b"chunked":
                    raise BadRequest(501, "the only transfer coding accepted is chunked")
                coding = value
                continue
            elif kind == UPGRADE:
                upgrade = value if upgrade is None else upgrade + b"," + value
                continue
            else:
                head.expects = value.lower() == b"100-continue" and not head.http10
        fields.append((lower, value))
        lines.append(name + b": " + value)
    if host is None:
        if not head.http10:
            raise BadRequest(400, "Host header is missing")
    elif not HOST_VALUE.fullmatch(host):
        raise BadRequest(400, "Host header is malformed")
    if coding is not None:
        if head.length is not None or head.http10:
            raise BadRequest(400, "Transfer-Encoding beside Content-Length, or in HTTP/1.0")
        head.chunked = True
    if target[:1] != b"/" or b"#" in target:
        _read_target(head, host)
    if connection and connection not in _ORDINARY_CONNECTION:
        _drop_listed(head, connection)
        if upgrade is not None and b"upgrade" in (word.strip() for word in connection.split(b",")):
            head.upgrade = upgrade.decode("latin-1").strip().lower()
    return head


def name_host(head: RequestHead, service: str) -> None:
    """Give a request of HTTP/1.0 without ``Host`` the one that it has as HTTP/1.1 (RFC 9112, section 3.2)."""
    for name, _ in head.fields:
        if name == b"host":
            return
    host = service.encode()
    head.fields = [*head.fields, (b"host", host)]
    head.lines = [*head.lines, b"host: " + host]


def _read_target(head: RequestHead, host: bytes | None) -> None:
    """Turn an absolute target into its origin form; refuse what is no target."""
    if b"#" in head.target:
        raise BadRequest(400, "the request target has a fragment")
    if head.target == b"*" and head.method == b"OPTIONS":
        return
    match = _ABSOLUTE.fullmatch(head.target)
    if match is None:
        raise BadRequest(400, "the request target is neither a path nor an http URL")
    authority, rest = match.groups()
    if host is None or authority.lower() != host.lower():
        raise BadRequest(400, "Host header and the request target's host differ")
    head.target = rest if rest[:1] == b"/" else b"/" + rest


def _drop_listed(head: RequestHead | ResponseHead, connection: bytes) -> None:
    listed = {word.strip() for word in connection.split(b",")} - _NOT_BY_CONNECTION
    if listed:
        kept = [at for at, (name, _) in enumerate(head.fields) if name not in listed]
        if len(kept) != len(head.fields):
            head.fields = [head.fields[at] for at in kept]
            head.lines = [head.lines[at] for at in kept]


def without_upgrade(method: bytes, target: bytes, version: str, raw: Sequence[Field]) -> bytes:
    """Return a head, as parsed, with what asks for an upgrade taken out, to be parsed again."""
    pieces = [method, b" ", target, b" HTTP/", version.encode(), b"\r\n"]
    for name, value in raw:
        lower = name.lower()
        if lower == b"upgrade":
            continue
        if lower == b"connection":
            words = [word.strip() for word in value.split(b",")]
            value = b", ".join(word for word in words if word.lower() not in (b"upgrade", b"http2-settings"))
            if not value:
                continue
        pieces += (name, b": ", value, b"\r\n")
    pieces.append(b"\r\n")
    return b"".join(pieces)


class ResponseHead:
    """A response's start line and headers, checked."""

    __slots__ = ("chunked", "fields", "length", "lines", "reason", "status", "upgrade")

    def __init__(self, status: int, reason: bytes) -> None:
        self.status = status
        self.reason = reason
        self.fields: list[Field] = []
        self.lines: list[bytes] = []
        self.length: int | None = None
        self.chunked = False
        self.upgrade = b""

    def wire(self, *, extra: bytes = b"", body: bytes = b"") -> bytes:
        """Return the head to send, with ``extra`` as further lines (each with its end), and ``body`` behind it."""
        return b"\r\n".join((b"HTTP/1.1 %d %b" % (self.status, self.reason), *self.lines, extra + b"\r\n" + body))


def read_response_head(status: int, reason: bytes, raw: Sequence[Field]) -> ResponseHead:
    """Check a response's fields and sort them. Raises :class:`BadResponse`."""
    head = ResponseHead(status, reason)
    fields, lines = head.fields, head.lines
    connection = b""
    for name, value in raw:
        if value[-1:] in _BLANKS:
            value = value.rstrip(b" \t")  # the parser leaves it; it is no part of the value (RFC 9110, section 5.5)
        lower, kind = NAMES.get(name) or classify(name)
        if kind and kind not in (HOST, EXPECT):
            if kind == DROP:
                continue
            if kind == CONNECTION:
                connection += b"," + value.lower()
                continue
            if kind == UPGRADE:
                head.upgrade = value
                continue
            if kind == CODING:
                if head.chunked or value.lower() != b"chunked":
                    raise BadResponse("the app's Transfer-Encoding is not chunked")
                head.chunked = True
                continue
            if head.length is not None or not value.isdigit() or len(value) > LENGTH_DIGITS_MAX:
                raise BadResponse("the app's Content-Length is not one number")
            head.length = int(value)
            if status < 200 or status == 204:  # RFC 9110, section 8.6: there is none in these
                continue
        fields.append((lower, value))
        lines.append(name + b": " + value)
    if head.chunked and head.length is not None:
        raise BadResponse("the app's response has Transfer-Encoding and Content-Length")
    if connection and connection not in _ORDINARY_CONNECTION:
        _drop_listed(head, connection)
    return head


def trailer_lines(raw: Sequence[Field]) -> bytes:
    """Return the trailers that may be sent on, each with its line end (RFC 9110, section 6.5.1)."""
    return b"".join(
        b"%b: %b\r\n" % (name, value)
        for name, value in raw
        if name.lower().replace(b"_", b"-") not in _NOT_IN_TRAILERS
    )
