"""What every handler is given, and the table that says which handler answers what."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from node.agent.agent import LocalAgent
from node.backend import Backend
from node.tokens import AccessControl
from raftstate.model.wire import to_json

VERSION = "1.20.0"
"""The version of Consul's API that this one follows; clients read it from ``/v1/agent/self``."""


@dataclass(frozen=True)
class HttpOptions:
    """How the API is served."""

    allowed_hosts: frozenset[str] = frozenset()
    """Names (without port) that a request's Host may have besides loopback ones and addresses."""
    body_bytes_max: int = 1024 * 1024
    kv_value_bytes_max: int = 512 * 1024
    body_timeout_s: float = 30.0
    """Within which a body must have come; a snapshot's: its next part."""
    fault_injection: bool = False
    lictor_version: str = "0.1.0"
    on_leave: Callable[[], None] | None = None
    """Ends the process, when an operator asks the node to leave."""


class Rendered:
    """Bodies of answers that were asked for again while nothing changed, least recently used first to go."""

    def __init__(self, entries_max: int = 512, bytes_max: int = 1 << 20) -> None:
        self._entries_max, self._bytes_max = entries_max, bytes_max
        self._held: dict[str, tuple[Any, bytes]] = {}

    def body(self, key: str, raw: Any, make: Callable[[], Any]) -> bytes:
        """Return the JSON of ``make()``, or the one held for this key if it was made from an equal ``raw``.

        Rows are replaced, never changed, so that comparing them ends at their identity.
        """
        held = self._held.pop(key, None)
        if held is not None and (held[0] is raw or held[0] == raw):
            self._held[key] = held
            return held[1]
        made = to_json(make())
        if len(made) <= self._bytes_max:
            self._held[key] = (raw, made)
            if len(self._held) > self._entries_max:
                del self._held[next(iter(self._held))]
        return made


@dataclass
class Context:
    """The state behind the API of one node."""

    backend: Backend
    agent: LocalAgent
    options: HttpOptions
    rng: random.Random = field(default_factory=random.Random)
    rendered: Rendered = field(default_factory=Rendered)
    access: AccessControl | None = None
    """Set where tokens are asked for."""
    enforcer: Any = None
    """The middleware that asks for them."""


Handler = Callable[[Context, web.Request], Awaitable[web.StreamResponse]]
CONTEXT: web.AppKey[Context] = web.AppKey("lictor", Context)


@dataclass(frozen=True, slots=True)
class Route:
    """One endpoint. ``path`` is aiohttp's form; ``{x:.*}`` takes ids that hold slashes."""

    methods: tuple[str, ...]
    path: str
    handler: Handler
    summary: str
    body: Any = None
    """Type of the JSON body, for the API's description; None: any."""
    answer: Any = None
    """Type of the JSON in the answer; bytes: no JSON; None: an empty body; Never: there is only a refusal."""
    statuses: tuple[int, ...] = (200,)
    """With which the answer may come."""
    text: str = ""
    """Media type of the answer's other form, that some parameter asks for."""
    streams: bool = False
    """The handler sends its answer, or reads the body, piece by piece."""


class Routes:
    """A family's table, filled by decorators beside the handlers."""

    def __init__(self, family: str) -> None:
        self.family = family
        self.table: list[Route] = []

    def add(
        self,
        methods: str,
        path: str,
        *,
        body: Any = None,
        answer: Any = None,
        statuses: tuple[int, ...] = (200,),
        text: str = "",
        streams: bool = False,
    ) -> Callable[[Handler], Handler]:
        """Answer ``methods`` (separated by blanks) at ``path``; the docstring's first line is the summary.

        ``body``, ``answer``, ``statuses`` and ``text`` are for the API's description; see `Route`. ``streams``: the
        answer is no whole ``web.Response``, or the body may be too large to be gathered first.
        """

        def register(handler: Handler) -> Handler:
            summary = (handler.__doc__ or "").strip().splitlines()[0].rstrip(".") if handler.__doc__ else ""
            self.table.append(
                Route(tuple(methods.split()), path, handler, summary, body, answer, statuses, text, streams)
            )
            return handler

        return register
