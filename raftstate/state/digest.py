"""A fingerprint of the whole state: equal content gives equal digests, whatever the order it came in."""

from __future__ import annotations

import hashlib
from typing import Any

import msgspec

from raftstate.state.store import Store
from raftstate.state.table import Table

_encoder = msgspec.msgpack.Encoder(order="sorted")


def digest_of(store: Store) -> str:
    """Return the digest as hex. Reads every row: about 2 µs each."""
    whole = hashlib.blake2b(digest_size=20)
    whole.update(_encoder.encode((store.index, store.clock_us)))
    for table in store.tables():
        whole.update(_encoder.encode((table.name, len(table.rows), _sum(table))))
    return whole.hexdigest()


def _sum(table: Table[Any, Any]) -> bytes:
    total = 0
    blake2b, encode, pack = hashlib.blake2b, _encoder.encode, table.pack
    for key, row in table.rows.items():
        total += int.from_bytes(blake2b(encode(pack(key, row)), digest_size=16).digest(), "big")
    return (total % (1 << 128)).to_bytes(16, "big")
