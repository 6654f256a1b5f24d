"""Reading through the Backend or a local view, by the rules that all read endpoints share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import msgspec
from aiohttp import web

from node.backend import ReadMode
from node.errors import NodeError
from node.http.context import Context
from node.http.errors import BadRequest
from node.http.filter import BadFilter, apply_filter
from node.http.front.repeats import Body, Parked, note
from node.http.options import ReadOptions, read_options
from node.http.respond import json_response, query_headers
from node.nearness import Place, distance, place_of_node
from raftstate.model.catalog import CatalogNode

T = TypeVar("T")
CACHED_WAIT_S = 5.0


@dataclass(slots=True)
class Reading:
    """A query's answer with its headers. ``raw`` holds model values or builtins."""

    raw: Any
    index: int
    headers: dict[str, str]
    options: ReadOptions
    query: tuple[str, dict[str, Any]] | None = None
    """Set for a stale read that did not wait: name and parameters, under which it can be asked again."""

    def decode(self, kind: type[T]) -> T:
        """Return the value as a model type."""
        return msgspec.convert(self.raw, kind, from_attributes=False)

    def optional(self, kind: type[T]) -> T | None:
        """Return the value as a model type, or None."""
        return None if self.raw is None else self.decode(kind)

    @property
    def value(self) -> Any:
        """Return the value as builtins."""
        return msgspec.to_builtins(self.raw, builtin_types=(bytes,))


async def read(
    ctx: Context, request: web.Request, name: str, params: dict[str, Any] | None = None, *, rows: bool = True
) -> Reading:
    """Run a query as the request's parameters say. ``rows``: the value is a list that a view keeps as rows.

    A blocking query that has to wait raises :class:`Parked` where the listener can hold the request without a task
    of its own; the handler runs again when there may be an answer.
    """
    options = read_options(request.query, request.headers, ctx.rng)
    if options.cached and rows:
        return await _read_view(ctx, name, params, options)
    body = cast(Any, request.content)
    parks = (
        isinstance(body, Body) and request.method == "GET" and options.min_index > 0 and options.max_stale_s is None
    )
    wait_s = 0.0 if parks else options.wait_s
    result = await ctx.backend.query(
        name, params, mode=cast(ReadMode, options.mode), min_index=options.min_index, wait_s=wait_s
    )
    if parks and body.waits and not result.ends_wait(options.min_index):
        stale = options.mode == "stale"
        raise Parked(name, params or {}, options.min_index, options.wait_s, stale=stale)
    if options.max_stale_s is not None and result.last_contact_ms > options.max_stale_s * 1000:
        result = await ctx.backend.query(
            name, params, mode="default", min_index=options.min_index, wait_s=options.wait_s
        )
    headers = query_headers(
        result.index, result.known_leader, result.last_contact_ms, _consistency_name(result.consistency)
    )
    plain = options.mode == "stale" and options.max_stale_s is None and not options.min_index
    return Reading(result.raw, result.index, headers, options, (name, params or {}) if plain else None)


async def _read_view(ctx: Context, name: str, params: dict[str, Any] | None, options: ReadOptions) -> Reading:
    """Answer from the view that this node keeps: current within the time that a change takes to reach it."""
    known_before = False
    view = ctx.agent.views.acquire(name, params)
    try:
        known_before = view.known
        if not await view.ready(CACHED_WAIT_S):
            raise NodeError("No cluster leader: nothing is known here yet; retry in a moment")
        if options.min_index and view.index == options.min_index:
            await view.wait(options.min_index, options.wait_s)
        contact = ctx.backend.contact()
        age_s = contact.last_contact_ms / 1000
        if known_before and _too_old(age_s, options):
            try:
                return await _read_anew(ctx, name, params, options)
            except NodeError:
                if options.stale_if_error_s is None or age_s > options.stale_if_error_s:
                    raise
        headers = query_headers(view.index, contact.known_leader, contact.last_contact_ms, "stale")
        headers |= {"X-Cache": "HIT" if known_before else "MISS", "Age": str(int(age_s))}
        return Reading(list(view.rows.values()), view.index, headers, options)
    finally:
        ctx.agent.views.release(view)


def _too_old(age_s: float, options: ReadOptions) -> bool:
    """Whether ``Cache-Control`` forbids an answer of this age."""
    return options.max_age_s is not None and (options.max_age_s == 0 or age_s > options.max_age_s)


async def _read_anew(ctx: Context, name: str, params: dict[str, Any] | None, options: ReadOptions) -> Reading:
    result = await ctx.backend.query(name, params)
    headers = query_headers(result.index, result.known_leader, result.last_contact_ms, "leader")
    return Reading(result.raw, result.index, headers | {"X-Cache": "MISS", "Age": "0"}, options)


def _consistency_name(mode: str) -> str:
    return "leader" if mode == "default" else mode


def filtered(rows: list[Any], options: ReadOptions) -> list[Any]:
    """Apply ``?filter=``. Raises BadRequest."""
    if not options.filter:
        return rows
    try:
        return apply_filter(options.filter, rows)
    except BadFilter as error:
        raise BadRequest(f"Failed to create boolean expression evaluator: {error}") from error


async def near_what(ctx: Context, options: ReadOptions) -> Place | None:
    """Return the place that ``?near=`` names; one of an unknown node is known by its name only."""
    if not options.near:
        return None
    own = place_of_node(ctx.agent.node_row())
    if options.near in ("_agent", own.node):
        return own
    found = await ctx.backend.query("catalog.node", {"node": options.near}, mode="stale")
    return Place(options.near) if found.raw is None else place_of_node(found.decode(CatalogNode).node)


def nearest(rows: list[T], here: Place | None, there: Callable[[T], Place]) -> list[T]:
    """Apply ``?near=``: rows of that node first, then of its zone, its region, and the rest; equals stay in order."""
    return rows if here is None else sorted(rows, key=lambda row: distance(here, there(row)))


def with_meta(rows: list[Any], options: ReadOptions, meta_of: Callable[[Any], dict[str, str]]) -> list[Any]:
    """Apply ``?node-meta=``: rows whose node has all of it."""
    wanted = options.node_meta
    if not wanted:
        return rows
    return [row for row in rows if all(meta_of(row).get(key) == value for key, value in wanted.items())]


def answer(request: web.Request, reading: Reading, value: Any, *, status: int = 200) -> web.Response:
    """Answer with a reading's headers."""
    return json_response(request, value, status=status, headers=reading.headers)


def answer_rendered(ctx: Context, request: web.Request, reading: Reading, make: Callable[[], Any]) -> web.Response:
    """Answer with ``make()``'s JSON, made again only when the rows have changed since the same request before."""
    if reading.options.near not in ("", "_agent"):
        return json_response(request, make(), headers=reading.headers)  # it follows from another node's row too
    if reading.query is not None:
        note(request, *reading.query, reading.raw)
    return json_response(request, ctx.rendered.body(request.path_qs, reading.raw, make), headers=reading.headers)
