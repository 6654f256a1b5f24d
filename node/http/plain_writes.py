"""Writes whose command follows from path and body alone; `front/writes.py` begins them without their handlers."""

from __future__ import annotations

from collections.abc import Mapping

from node.http.catalog import Registration, registration
from node.http.context import Context
from node.http.errors import BadRequest, HttpError
from node.http.front.writes import Maker
from node.loose_json import loads
from raftstate.state import commands


def _register(ctx: Context, _: str, body: bytes) -> commands.CatalogRegister:
    return registration(ctx, loads(body, Registration))


def _set_key(ctx: Context, key: str, body: bytes) -> commands.KVSet:
    if not key:
        raise BadRequest("Missing key name")
    if len(body) > ctx.options.kv_value_bytes_max:
        raise HttpError(413, "too large")
    return commands.KVSet(key, body)


PLAIN_WRITES: Mapping[tuple[str, str], Maker] = {
    ("PUT", "/v1/catalog/register"): _register,
    ("PUT", "/v1/kv/{key}"): _set_key,
}
"""By method and path, as their routes have them."""
