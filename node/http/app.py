"""Puts the API together: all families' tables on one aiohttp application."""

from __future__ import annotations

import importlib
import random
from collections.abc import Awaitable, Callable

from aiohttp import web

from node.agent.agent import LocalAgent
from node.backend import Backend
from node.http.acl_guard import make_enforcer
from node.http.context import CONTEXT, Context, Handler, HttpOptions, Route
from node.http.front.guards import FrontOptions
from node.http.front.listener import FrontRunner
from node.http.middleware import guard
from node.http.plain_writes import PLAIN_WRITES
from node.tokens import AccessControl

FAMILIES = (
    "status", "agent", "agent_services", "agent_checks", "agent_connect", "catalog", "health", "intentions",
    "connect", "operator", "kv", "session", "txn", "config", "event", "coordinate", "snapshot", "acl_policies", "acl",
    "internal", "discovery", "openapi", "unsupported",
)  # fmt: skip
"""Modules with a ``routes`` table, in the order in which a request is matched."""


def all_routes() -> list[Route]:
    """Return every endpoint."""
    return [route for family in FAMILIES for route in importlib.import_module(f"node.http.{family}").routes.table]


def create_app(
    backend: Backend,
    agent: LocalAgent,
    options: HttpOptions | None = None,
    *,
    rng: random.Random | None = None,
    access: AccessControl | None = None,
) -> web.Application:
    """Return the API of a node. The agent must be started before the first request and outlive the last.

    ``access``: set to ask for tokens.
    """
    options = options or HttpOptions()
    # Handlers bound the bodies they read (413); snapshots stream and have no bound here.
    app = web.Application(middlewares=[guard], client_max_size=options.body_bytes_max)
    app[CONTEXT] = Context(backend, agent, options, rng or random.Random(), access=access)

    async def end_streams(_: web.Application) -> None:
        agent.streams.end_all()

    app.on_shutdown.append(end_streams)
    for route in all_routes():
        for method in route.methods:
            app.router.add_route(method, route.path, _bound(app[CONTEXT], route.handler))
    if access is not None:
        held = frozenset(canonical(route.path) for route in all_routes() if route.streams)
        app[CONTEXT].enforcer = make_enforcer(app[CONTEXT], access, held)
        app.middlewares.append(app[CONTEXT].enforcer)
    return app


def canonical(path: str) -> str:
    """Return a route's path as aiohttp names its resource: parameters without their patterns."""
    return str(web.UrlDispatcher().add_resource(path).canonical)


def _bound(ctx: Context, handler: Handler) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
    async def handle(request: web.Request) -> web.StreamResponse:
        return await handler(ctx, request)

    return handle


def make_runner(app: web.Application, options: FrontOptions | None = None) -> FrontRunner:
    """Return the runner to serve the API with; see `node.http.front`."""
    streams = tuple(sorted({route.path.partition("{")[0] for route in all_routes() if route.streams}))
    return FrontRunner(app, options or FrontOptions(), streams, PLAIN_WRITES)
