"""A request that has ended, as a span: OpenTelemetry's attributes, in OTLP's JSON form.

Sources: OpenTelemetry's semantic conventions 1.45 for HTTP spans and for gRPC (there: ``rpc.system.name``, a method's
full name, statuses by name), and its protocol (ids in hexadecimal, 64-bit numbers as text). Pure.
"""

from __future__ import annotations

import functools
import re

import msgspec

from proxy.access import INBOUND, Entry
from proxy.tracing import RequestTrace

SERVER, CLIENT = 2, 3
ERROR = 2
TEXT_MAX = 1024
"""Characters of an attribute that a caller chooses; what is longer is cut."""
METHODS = frozenset({"CONNECT", "DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT", "QUERY", "TRACE"})
"""Those that the conventions know; any other one is ``_OTHER``."""
GRPC_STATUSES = (
    "OK", "CANCELLED", "UNKNOWN", "INVALID_ARGUMENT", "DEADLINE_EXCEEDED", "NOT_FOUND", "ALREADY_EXISTS",
    "PERMISSION_DENIED", "RESOURCE_EXHAUSTED", "FAILED_PRECONDITION", "ABORTED", "OUT_OF_RANGE", "UNIMPLEMENTED",
    "INTERNAL", "UNAVAILABLE", "DATA_LOSS", "UNAUTHENTICATED",
)  # fmt: skip
_SERVER_FAULTS = frozenset(
    {"UNKNOWN", "DEADLINE_EXCEEDED", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS"}
)  # fmt: skip
"""gRPC statuses that a server's span tells as errors; a client's tells all but OK."""
_HAS_IS_REMOTE, _IS_REMOTE = 0x100, 0x200
_HOST = re.compile(rb"(\[[0-9A-Fa-f:.%]+\]|[^:\[\]]+)(?::([0-9]{1,5}))?")
_VERSIONS = {"http/1.1": "1.1", "h2": "2"}

Attribute = dict[str, object]


class _Status(msgspec.Struct, gc=False, omit_defaults=True):
    code: int = 0


class _Span(msgspec.Struct, gc=False, rename="camel", omit_defaults=True):
    trace_id: str
    span_id: str
    name: str
    kind: int
    start_time_unix_nano: str
    end_time_unix_nano: str
    attributes: list[Attribute | msgspec.Raw]
    status: _Status
    flags: int
    parent_span_id: str = ""
    trace_state: str = ""


_UNSET, _FAILED = _Status(), _Status(ERROR)
_encoder = msgspec.json.Encoder()


def attribute(key: str, value: str | int) -> Attribute:
    """Return an attribute in OTLP's JSON form."""
    return {"key": key, "value": {"intValue": str(value)} if isinstance(value, int) else {"stringValue": value}}


def split_host(host: bytes) -> tuple[str, int]:
    """Return host and port (0: none) of a ``Host`` header or ``:authority``; ``("", 0)`` for what is neither."""
    found = _HOST.fullmatch(host[:TEXT_MAX])
    if found is None:
        return "", 0
    return found[1].strip(b"[]").decode("latin-1"), int(found[2] or 0)


def encode_span(entry: Entry, trace: RequestTrace, end_ns: int) -> bytes:
    """Return the span of a request that ended at ``end_ns``, nanoseconds of Unix time, as JSON."""
    inbound = entry.direction == INBOUND
    host = trace.host[:TEXT_MAX]
    method = "" if trace.grpc else entry.method[:TEXT_MAX]
    attributes: list[Attribute | msgspec.Raw] = [
        *_common(inbound, entry.protocol, method, host, entry.source, entry.destination, entry.instance, entry.origin)
    ]
    if trace.peer is not None:
        attributes += (
            attribute("network.peer.address", trace.peer[0]),
            attribute("network.peer.port", trace.peer[1]),
        )
        if inbound:
            attributes.append(attribute("client.address", trace.peer[0]))
    if trace.grpc:
        name, error = _tell_grpc(entry, trace, attributes, inbound=inbound)
    else:
        name, error = _tell_http(entry, trace, attributes, inbound=inbound)
    if error:
        attributes.append(attribute("error.type", error))
    span = _Span(
        trace.trace_id,
        trace.span_id,
        name,
        SERVER if inbound else CLIENT,
        str(trace.began_ns),
        str(max(end_ns, trace.began_ns)),  # the clock may have been set back
        attributes,
        _FAILED if error else _UNSET,
        trace.flags | _HAS_IS_REMOTE | (_IS_REMOTE if trace.parent_id else 0),
        trace.parent_id,
        trace.state.decode("latin-1"),
    )
    return _encoder.encode(span)


@functools.lru_cache(maxsize=256)
def _common(
    inbound: bool, protocol: str, method: str, host: bytes, source: str, destination: str, instance: str, origin: str
) -> tuple[msgspec.Raw, ...]:
    """Return the attributes that many requests have in common, encoded. ``method`` is empty for a gRPC call."""
    address, port = split_host(host)
    attributes = [
        attribute("server.address", address or destination),
        attribute("network.protocol.name", "http"),
        attribute("network.protocol.version", _VERSIONS.get(protocol, protocol)),
        attribute("lictor.source", source),
        attribute("lictor.destination", destination),
        attribute("lictor.instance", instance),
        attribute("lictor.origin", origin),
    ]
    if port:
        attributes.append(attribute("server.port", port))
    if method:
        attributes += (
            attribute("http.request.method", method if method in METHODS else "_OTHER"),
            attribute("url.scheme", "http"),
        )
        if method not in METHODS:
            attributes.append(attribute("http.request.method_original", method))
    return tuple(msgspec.Raw(_encoder.encode(each)) for each in attributes)


def _tell_http(
    entry: Entry, trace: RequestTrace, attributes: list[Attribute | msgspec.Raw], *, inbound: bool
) -> tuple[str, str]:
    """Add what else is HTTP's; return the span's name and its ``error.type``."""
    path = entry.path[:TEXT_MAX]
    attributes.append(attribute("url.path", path))
    if not inbound:
        host = trace.host[:TEXT_MAX].decode("latin-1") or entry.destination
        attributes.append(attribute("url.full", f"http://{host}{path}"))
        if trace.attempts > 1:
            attributes.append(attribute("http.request.resend_count", trace.attempts - 1))
    if entry.code:
        attributes.append(attribute("http.response.status_code", entry.code))
    failed = not entry.code or entry.code >= (500 if inbound else 400)
    error = "" if not failed else str(entry.code) if entry.origin == "app" and entry.code else entry.origin
    return f"{entry.method if entry.method in METHODS else 'HTTP'} {entry.destination}", error


def _tell_grpc(
    entry: Entry, trace: RequestTrace, attributes: list[Attribute | msgspec.Raw], *, inbound: bool
) -> tuple[str, str]:
    """As :func:`_tell_http`, of a gRPC call."""
    method = entry.path[1 : TEXT_MAX + 1] or "_OTHER"
    attributes += (attribute("rpc.system.name", "grpc"), attribute("rpc.method", method))
    number = trace.grpc_status
    if not number.isdigit() or len(number) > 9:
        return method, entry.origin if entry.origin != "app" else str(entry.code or "_OTHER")
    at = int(number)
    status = GRPC_STATUSES[at] if at < len(GRPC_STATUSES) else str(at)
    attributes.append(attribute("rpc.response.status_code", status))
    failed = status in _SERVER_FAULTS if inbound else status != "OK"
    return method, status if failed else ""
