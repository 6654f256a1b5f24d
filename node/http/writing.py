"""Writing through the Backend, and reading request bodies."""

from __future__ import annotations

import asyncio
import re
from typing import Any, TypeVar

from aiohttp import web

from node.http.acl_writes import permit_command
from node.http.context import CONTEXT, Context
from node.http.errors import BadRequest, HttpError
from node.http.front.repeats import Body
from node.loose_json import BadJson, loads

T = TypeVar("T")
REQUEST_ID_HEADER = "X-Lictor-Request-Id"
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{8,128}")


def request_id(request: web.Request) -> str | None:
    """Return the client's id of this write, under which it happens once however often it is sent."""
    given = request.headers.get(REQUEST_ID_HEADER)
    if given is not None and not _REQUEST_ID.fullmatch(given):
        raise BadRequest(f"Invalid {REQUEST_ID_HEADER}: 8 to 128 characters out of letters, digits and . _ : -")
    return given


async def write(ctx: Context, request: web.Request, command: Any) -> Any:
    """Apply a command and return its value. Raises the refusal, or the backend's errors; 403 without permission."""
    if ctx.access is not None:
        await permit_command(ctx, request, command)
    return (await ctx.backend.apply(command, request_id=request_id(request))).unwrap()


async def read_body(request: web.Request, limit: int) -> bytes:
    """Return the body. Raises 413 beyond ``limit`` bytes, without reading further; 408 when it does not come."""
    if request.content_length is not None and request.content_length > limit:
        raise _too_large(limit)
    content: Any = request.content
    if isinstance(content, Body):
        return content.whole()
    data = bytearray()
    try:
        async with asyncio.timeout(request.app[CONTEXT].options.body_timeout_s):
            async for chunk in request.content.iter_any():
                data += chunk
                if len(data) > limit:
                    raise _too_large(limit)
    except TimeoutError:
        raise too_late() from None
    return bytes(data)


def too_late() -> HttpError:
    """Return the error for a body that does not come."""
    return HttpError(408, "The request's body did not come in time", {"Connection": "close"})


def _too_large(limit: int) -> HttpError:
    return HttpError(413, f"Request body too large, max allowed is {limit} bytes.", {"Connection": "close"})


async def body_as(ctx: Context, request: web.Request, kind: type[T], *, aliases: dict[str, str] | None = None) -> T:
    """Return the JSON body as ``kind``. Raises BadRequest naming the field."""
    try:
        return loads(await read_body(request, ctx.options.body_bytes_max), kind, aliases=aliases)
    except BadJson as error:
        raise BadRequest(str(error)) from error
