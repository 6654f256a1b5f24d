"""From a request to its handler: aiohttp's router finds it, and what it found is kept where that cannot differ.

A route found for a head holds for that head. A path without parameters has one route. Below ``/v1/kv/`` all paths
have the same one, which is the only rule here that is not aiohttp's own; a test compares the two.
"""

from __future__ import annotations

import functools
from typing import Any, cast

from aiohttp import web
from aiohttp.web_urldispatcher import PlainResource, UrlMappingMatchInfo

from node.http.front.heads import Head

KEYS = "/v1/kv/"


class Router:
    """Runs a request through the application's middlewares and handler."""

    def __init__(self, app: web.Application) -> None:
        self._app = app
        self._fixed: dict[tuple[str, str], UrlMappingMatchInfo] = {}
        self._keys: dict[str, web.AbstractRoute] = {}
        for resource in app.router.resources():
            if resource.canonical == KEYS + "{key}":
                self._keys |= {route.method: route for route in resource}
        self._chains: dict[Any, Any] = {}

    async def handle(self, head: Head, request: web.Request) -> web.StreamResponse:
        """Return the answer. Raises what a handler raises past the middlewares."""
        match = head.match
        if match is None:
            match = await self.match(request)
            if match.http_exception is None:  # else raised by its handler: an exception of one request
                head.match = match
        request._match_info = match
        handler = match.handler
        chain = self._chains.get(handler)
        if chain is None:
            chain = self._chain(handler, keep=match.http_exception is None)
        return cast(web.StreamResponse, await chain(request))

    async def match(self, request: web.Request) -> UrlMappingMatchInfo:
        """Return the request's route with its parameters, or the one that answers 404 or 405."""
        method, path = request.method, request.rel_url.raw_path
        found = self._fixed.get((method, path))
        if found is not None:
            return found
        route = self._keys.get(method) if path.startswith(KEYS) and "%" not in path else None
        if route is not None:
            found = UrlMappingMatchInfo({"key": path[len(KEYS) :]}, route)
        else:
            found = await self._app.router.resolve(request)
        found.add_app(self._app)
        found.freeze()
        if found.http_exception is None and isinstance(found.route.resource, PlainResource):
            self._fixed[method, path] = found
        return found

    def _chain(self, handler: Any, *, keep: bool) -> Any:
        """Return the handler within the middlewares, the first of them outermost."""
        chain = handler
        for middleware in reversed(self._app.middlewares):
            chain = functools.partial(cast(Any, middleware), handler=chain)
        if keep:
            self._chains[handler] = chain
        return chain
