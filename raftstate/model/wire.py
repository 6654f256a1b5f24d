"""How model types look outside: Consul's JSON names, and MessagePack for RPC, journal and snapshots.

Field names are snake_case in Python and Consul's spelling outside (``service_id`` <-> ``ServiceID``).
Decoding is the edge where network input becomes typed values; it raises :class:`msgspec.ValidationError`
whose text names the field.
"""

from __future__ import annotations

from typing import Any, TypeVar

import msgspec

_UPPER = {
    "id": "ID", "ttl": "TTL", "ns": "NS", "ca": "CA", "pem": "PEM", "uri": "URI", "tls": "TLS",
    "http": "HTTP", "tcp": "TCP", "udp": "UDP", "grpc": "GRPC", "dns": "DNS", "h2ping": "H2PING",
}  # fmt: skip


def consul_name(field: str) -> str:
    """Return Consul's spelling of a snake_case field name: ``check_id`` -> ``CheckID``."""
    return "".join(_UPPER.get(part) or part[:1].upper() + part[1:] for part in field.split("_"))


class Wire(msgspec.Struct, frozen=True, rename=consul_name):
    """Base of all model types: immutable, Consul's names outside."""


T = TypeVar("T")

_json_encoder = msgspec.json.Encoder()
_msgpack_encoder = msgspec.msgpack.Encoder()


def to_json(value: Any) -> bytes:
    """Encode a model value (or builtins holding some) as Consul-shaped JSON."""
    return _json_encoder.encode(value)


def to_msgpack(value: Any) -> bytes:
    """Encode a model value as MessagePack; the same value always gives the same bytes."""
    return _msgpack_encoder.encode(value)


def from_msgpack(data: bytes, kind: type[T]) -> T:
    """Decode MessagePack into ``kind``. Raises :class:`msgspec.ValidationError` naming the field."""
    return msgspec.msgpack.decode(data, type=kind)
