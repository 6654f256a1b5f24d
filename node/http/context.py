"""What every handler is given, and the table that says which handler answers what."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from aiohttp import web

from node.agent.agent import LocalAgent
from node.backend import Backend

VERSION = "1.20.0"
"""The version of Consul's API that this one follows; clients read it from ``/v1/agent/self``."""


@dataclass(frozen=True)
class HttpOptions:
    """How the API is served."""

    allowed_hosts: frozenset[str] = frozenset()
    """Names (without port) that a request's Host may have besides loopback ones and addresses."""
    body_bytes_max: int = 1024 * 1024
    kv_value_bytes_max: int = 512 * 1024
    fault_injection: bool = False
    acl_enabled: bool = False
    lictor_version: str = "0.1.0"
    on_leave: Callable[[], None] | None = None
    """Ends the process, when an operator asks the node to leave."""


@dataclass
class Context:
    """The state behind the API of one node."""

    backend: Backend
    agent: LocalAgent
    options: HttpOptions
    rng: random.Random = field(default_factory=random.Random)


Handler = Callable[[Context, web.Request], Awaitable[web.StreamResponse]]
CONTEXT: web.AppKey[Context] = web.AppKey("lictor", Context)


@dataclass(frozen=True, slots=True)
class Route:
    """One endpoint. ``path`` is aiohttp's form; ``{x:.*}`` takes ids that hold slashes."""

    methods: tuple[str, ...]
    path: str
    handler: Handler
    summary: str


class Routes:
    """A family's table, filled by decorators beside the handlers."""

    def __init__(self, family: str) -> None:
        self.family = family
        self.table: list[Route] = []

    def add(self, methods: str, path: str) -> Callable[[Handler], Handler]:
        """Answer ``methods`` (separated by blanks) at ``path``; the docstring's first line is the summary."""

        def register(handler: Handler) -> Handler:
            summary = (handler.__doc__ or "").strip().splitlines()[0].rstrip(".") if handler.__doc__ else ""
            self.table.append(Route(tuple(methods.split()), path, handler, summary))
            return handler

        return register
