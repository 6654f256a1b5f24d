"""``/v1/snapshot``: the whole state as a file, streamed both ways."""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import AsyncIterator

from aiohttp import web

from node.http.context import CONTEXT, Context, Routes
from node.http.errors import BadRequest
from node.http.respond import empty
from node.http.writing import too_late

routes = Routes("snapshot")


@routes.add("GET", "/v1/snapshot", answer=bytes, streams=True)
async def save(ctx: Context, request: web.Request) -> web.StreamResponse:
    """Save a snapshot (gzip)."""
    chunks = ctx.backend.snapshot_save()
    # The first chunk decides whether there is a snapshot at all: an error after the headers could not be told.
    first = await anext(chunks, b"")
    response = web.StreamResponse(headers={"Content-Type": "application/x-gzip"})
    await response.prepare(request)
    pack = zlib.compressobj(level=1, wbits=31)
    await response.write(pack.compress(first))
    async for chunk in chunks:
        if data := pack.compress(chunk):
            await response.write(data)
    await response.write(pack.flush())
    await response.write_eof()
    return response


@routes.add("PUT", "/v1/snapshot", body=bytes, streams=True)
async def restore(ctx: Context, request: web.Request) -> web.StreamResponse:
    """Replace the cluster's state by a saved snapshot; with ?foreign=true, by another cluster's too."""
    foreign = request.query.get("foreign")
    if foreign not in (None, "", "true", "false"):
        raise BadRequest(f"foreign is {foreign!r}: it is true or false")
    await ctx.backend.snapshot_restore(_unpacked(request), foreign=foreign in ("", "true"))
    return empty()


async def _unpacked(request: web.Request) -> AsyncIterator[bytes]:
    unpack = zlib.decompressobj(wbits=31)
    try:
        while chunk := await _chunk(request):
            # Bounded output a step: a small file that unpacks to a huge one is taken in pieces, not at once.
            data = unpack.decompress(chunk, 1 << 20)
            while data:
                yield data
                data = unpack.decompress(unpack.unconsumed_tail, 1 << 20) if unpack.unconsumed_tail else b""
        if tail := unpack.flush():
            yield tail
    except zlib.error as error:
        raise BadRequest(f"the body is not a snapshot file (gzip): {error}") from error
    if not unpack.eof:
        raise BadRequest("the snapshot file is cut short")


async def _chunk(request: web.Request) -> bytes:
    """Return what of the body has come, empty at its end. Raises 408 when nothing comes for long."""
    try:
        return await asyncio.wait_for(request.content.read(256 * 1024), request.app[CONTEXT].options.body_timeout_s)
    except TimeoutError:
        raise too_late() from None
