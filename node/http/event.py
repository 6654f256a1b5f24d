"""``/v1/event``: user events, seen by every agent.

Consul carries events by gossip. Lictor has none; an event is a key below :data:`PREFIX`, which every agent can read,
and the last :data:`EVENTS_MAX` are kept.
"""

from __future__ import annotations

import base64
from typing import Any

import msgspec
from aiohttp import web

from node.http.context import Context, Routes
from node.http.errors import BadRequest
from node.http.ids import new_id
from node.http.reading import answer, read
from node.http.respond import json_response
from node.http.writing import read_body, write
from raftstate.model.kv import KVEntry
from raftstate.model.wire import Wire
from raftstate.state import commands

routes = Routes("event")

PREFIX = "_lictor/events/"
EVENTS_MAX = 256
PAYLOAD_MAX = 512
"""Consul's events travel in UDP packets; the same bound keeps them small here."""


class Event(Wire, frozen=True):
    """A user event. ``payload`` is base64, null when there is none."""

    id: str
    name: str
    payload: str | None = None
    node_filter: str = ""
    service_filter: str = ""
    tag_filter: str = ""
    version: int = 1
    l_time: int = msgspec.field(default=0, name="LTime")


@routes.add("PUT", "/v1/event/fire/{name:.*}", body=bytes, answer=Event)
async def fire(ctx: Context, request: web.Request) -> web.StreamResponse:
    """Fire an event; ``?node=``, ``?service=`` and ``?tag=`` (regular expressions) say whom it is for."""
    name, query = request.match_info["name"], request.query
    if not name:
        raise BadRequest("Missing name")
    if query.get("tag") and not query.get("service"):
        raise BadRequest("Cannot provide tag filter without service filter")
    payload = await read_body(request, PAYLOAD_MAX)
    event = Event(
        id=new_id(request, "event"),
        name=name,
        payload=base64.b64encode(payload).decode() if payload else None,
        node_filter=_pattern(query.get("node", "")),
        service_filter=_pattern(query.get("service", "")),
        tag_filter=_pattern(query.get("tag", "")),
    )
    await write(ctx, request, commands.KVSet(key=PREFIX + event.id, value=msgspec.json.encode(event)))
    held = (await ctx.backend.query("kv.list", {"prefix": PREFIX})).decode(list[KVEntry])
    oldest_first = sorted(held, key=lambda entry: entry.create_index)
    for entry in oldest_first[: max(len(held) - EVENTS_MAX, 0)]:
        await ctx.backend.apply(commands.KVDelete(key=entry.key))
    return json_response(request, event)


def _pattern(text: str) -> str:
    import re2

    if len(text) > 256:
        raise BadRequest("an event's filter is 256 characters at most")
    try:
        re2.compile(text)
    except re2.error as error:
        raise BadRequest(f"Invalid filter {text[:80]!r}: {error}") from error
    return text


def _matches(pattern: str, text: str) -> bool:
    import re2

    return re2.search(pattern, text) is not None


def concerns(ctx: Context, event: Event) -> bool:
    """Whether an event is for this node."""
    if event.node_filter and not _matches(event.node_filter, ctx.agent.options.node):
        return False
    if not event.service_filter:
        return True
    return any(
        _matches(event.service_filter, service.row.service)
        and (not event.tag_filter or any(_matches(event.tag_filter, tag) for tag in service.row.tags))
        for service in ctx.agent.local.services.values()
    )


@routes.add("GET", "/v1/event/list", answer=list[Event])
async def list_all(ctx: Context, request: web.Request) -> web.StreamResponse:
    """The last events for this node, oldest first; ``?name=`` narrows them."""
    reading = await read(ctx, request, "kv.list", {"prefix": PREFIX})
    wanted = request.query.get("name", "")
    found: list[Any] = []
    for entry in sorted(reading.decode(list[KVEntry]), key=lambda entry: entry.create_index):
        event = msgspec.json.decode(entry.value or b"{}", type=Event)
        if concerns(ctx, event) and (not wanted or event.name == wanted):
            found.append(msgspec.structs.replace(event, l_time=entry.create_index))
    return answer(request, reading, found)
