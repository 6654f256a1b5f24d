"""``/v1/kv``: keys and values, with check-and-set and locks."""

from __future__ import annotations

from typing import Any

from aiohttp import web

from node.http.context import Context, Routes
from node.http.errors import BadRequest, HttpError
from node.http.reading import Reading, answer, read
from node.http.respond import json_response
from node.http.writing import read_body, write
from raftstate.model.kv import KVEntry
from raftstate.state import commands

routes = Routes("kv")
_MAX_UINT = 1 << 64


def _key(request: web.Request) -> str:
    key: str = request.match_info["key"]
    return key


def _uint(request: web.Request, name: str) -> int | None:
    given = request.query.get(name)
    if given is None:
        return None
    if not (given.isascii() and given.isdigit()) or len(given) > 20 or int(given) >= _MAX_UINT:
        raise BadRequest(f"Invalid value for ?{name}: {given[:30]!r}")
    return int(given)


@routes.add("GET", "/v1/kv/{key:.*}", answer=list[KVEntry | str], text="text/plain")
async def get(ctx: Context, request: web.Request) -> web.StreamResponse:
    """A key; with ``?recurse`` all below a prefix, with ``?keys`` their names."""
    key = _key(request)
    if "keys" in request.query:
        params = {"prefix": key, "separator": request.query.get("separator", "")}
        reading = await read(ctx, request, "kv.keys", params, rows=False)
        return answer(request, reading, reading.value) if reading.value else _missing(reading)
    if "recurse" in request.query:
        reading = await read(ctx, request, "kv.list", {"prefix": key}, rows=False)
        return answer(request, reading, reading.raw) if reading.raw else _missing(reading)
    if not key:
        raise BadRequest("Missing key name")
    reading = await read(ctx, request, "kv.get", {"key": key}, rows=False)
    entry = reading.optional(KVEntry)
    if entry is None:
        return _missing(reading)
    if "raw" in request.query:
        headers = reading.headers | {"Content-Security-Policy": "sandbox", "X-Content-Type-Options": "nosniff"}
        return web.Response(body=entry.value or b"", headers=headers, content_type="text/plain")
    return answer(request, reading, [entry])


def _missing(reading: Reading) -> web.Response:
    """Answer 404 with an empty body, and with the index: a client may block until the key comes to be."""
    return web.Response(status=404, headers=reading.headers)


@routes.add("PUT", "/v1/kv/{key:.*}", body=bytes, answer=bool)
async def put(ctx: Context, request: web.Request) -> web.StreamResponse:
    """Set a key; ``?cas=``, ``?acquire=`` and ``?release=`` make it conditional, and ``?flags=`` go with it."""
    key = _key(request)
    if not key:
        raise BadRequest("Missing key name")
    conditions = [name for name in ("cas", "acquire", "release") if name in request.query]
    if len(conditions) > 1:
        raise BadRequest(f"Conflicting flags: {' and '.join(conditions)}")
    flags, cas = _uint(request, "flags") or 0, _uint(request, "cas")
    value = await _value(ctx, request, key)
    command: Any
    if cas is not None:
        command = commands.KVCas(key=key, value=value, index=cas, flags=flags)
    elif "acquire" in request.query:
        command = commands.KVLock(key=key, value=value, session=request.query["acquire"], flags=flags)
    elif "release" in request.query:
        command = commands.KVUnlock(key=key, value=value, session=request.query["release"], flags=flags)
    else:
        command = commands.KVSet(key=key, value=value, flags=flags)
    return json_response(request, await write(ctx, request, command))


async def _value(ctx: Context, request: web.Request, key: str) -> bytes:
    limit = ctx.options.kv_value_bytes_max
    try:
        return await read_body(request, limit)
    except HttpError as error:
        if error.status != 413:
            raise
        text = f"Value for key {key[:100]!r} is too large, max allowed is {limit} bytes."
        raise HttpError(413, text, error.headers) from None


@routes.add("DELETE", "/v1/kv/{key:.*}", answer=bool)
async def delete(ctx: Context, request: web.Request) -> web.StreamResponse:
    """Delete a key; with ``?recurse`` all below a prefix."""
    key, cas = _key(request), _uint(request, "cas")
    if "recurse" in request.query:
        if cas is not None:
            raise BadRequest("Conflicting flags: cas and recurse")
        return json_response(request, await write(ctx, request, commands.KVDeleteTree(prefix=key)))
    if not key:
        raise BadRequest("Missing key name")
    return json_response(request, await write(ctx, request, commands.KVDelete(key=key, cas_index=cas)))
