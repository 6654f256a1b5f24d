"""Who holds which sidecar's configuration stream: one live stream per sidecar, and its check follows the stream.

A broken stream shows that a process is gone. That one has stopped, and holds its stream still, shows by its silence:
a sidecar that says it will answers every line it has taken.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

import msgspec

from node.agent.definitions import BadDefinition, CheckDefinition, ServiceDefinition
from node.agent.leaf import LeafManager
from node.agent.local import LocalState
from node.agent.options import AgentOptions
from node.agent.sidecars import SidecarFeed, StreamHolder
from node.agent.views import Views
from node.errors import NodeError
from node.tasks import Tasks
from raftstate.model.catalog import CRITICAL, KIND_CONNECT_PROXY, PASSING, WARNING
from raftstate.model.sidecar import SidecarAnswer

log = logging.getLogger("lictor.agent")

HOLDS = "the sidecar holds its stream"
LOOKS = 5
"""How often within the silence that is allowed it is looked for."""


class StreamHeld(NodeError):
    """The sidecar, or another one of the same instance, has a live stream already; the text names its holder."""

    http_status = 409


class UnknownTarget(NodeError):
    """A sidecar stands for a service that is not registered with this agent."""

    http_status = 404


@dataclass(slots=True)
class _Live:
    """One stream that is held."""

    feed: SidecarFeed
    holder: StreamHolder
    instance: str
    asked: ServiceDefinition
    """The registration as the sidecar has it, without what it inherits from its instance."""
    answered_at: float
    """Loop time of the last answer."""
    silent: bool = False


class SidecarStreams:
    """All streams of this node. ``register`` puts a sidecar's registration where it survives."""

    def __init__(
        self,
        options: AgentOptions,
        views: Views,
        leaves: LeafManager,
        local: LocalState,
        register: Callable[[ServiceDefinition], Awaitable[None]],
    ) -> None:
        self._options, self._views, self._leaves, self._local = options, views, leaves, local
        self._register = register
        self._live: dict[str, _Live] = {}
        self._grace: dict[str, asyncio.TimerHandle] = {}
        self._ending = False
        self._tasks = Tasks("sidecar streams")

    def __len__(self) -> int:
        return len(self._live)

    @asynccontextmanager
    async def hold(
        self, definition: ServiceDefinition, pid: str = "", *, answers: bool = False
    ) -> AsyncIterator[SidecarFeed]:
        """Register a sidecar and hold its configuration stream.

        While the context is held its check is passing; when it ends the check is critical at once. ``answers``: the
        sidecar will answer its lines (:meth:`answered`), and its check is critical too while it does not. Raises
        StreamHeld, BadDefinition, UnknownTarget, Refused.
        """
        sidecar_id = definition.service_id()
        self._require_free(sidecar_id, definition)
        asked, definition = definition, self._complete(definition)
        instance = definition.proxy.destination_service_id if definition.proxy is not None else ""
        feed = SidecarFeed(self._options, self._views, self._leaves, definition.to_row(self._options.node))
        live = _Live(feed, StreamHolder(pid, time.time()), instance, asked, asyncio.get_running_loop().time())
        self._live[sidecar_id] = live
        check_id = stream_check(sidecar_id)
        watch: asyncio.Task[None] | None = None
        try:
            await self._register(definition)
            self.forget(check_id)
            self._judge(check_id, PASSING, HOLDS)
            if answers:
                watch = self._tasks.spawn(self._watch(sidecar_id, live))
            yield feed
        finally:
            if watch is not None:
                watch.cancel()
            if self._live.get(sidecar_id) is live:
                del self._live[sidecar_id]
                if not self._ending:
                    self._judge(check_id, CRITICAL, "the sidecar's stream has ended")

    def _require_free(self, sidecar_id: str, definition: ServiceDefinition) -> None:
        if (held := self._live.get(sidecar_id)) is not None:
            raise StreamHeld(
                f"sidecar {sidecar_id} has a live stream already (held by {held.holder}); stop that process first"
            )
        instance = definition.proxy.destination_service_id if definition.proxy is not None else ""
        for other, live in self._live.items():
            if instance and live.instance == instance:
                raise StreamHeld(
                    f"instance {instance} has a sidecar already: {other} (held by {live.holder}); stop that process"
                    f" before {sidecar_id} takes its place"
                )

    def answered(self, sidecar_id: str, pid: str, answer: SidecarAnswer = SidecarAnswer()) -> bool:  # noqa: B008 - frozen
        """Note a sidecar's answer to a line; return whether it is the one that holds the stream."""
        live = self._live.get(sidecar_id)
        if live is None or live.holder.pid != pid:
            return False
        live.answered_at = asyncio.get_running_loop().time()
        live.feed.remember(answer.left)
        if live.silent:
            live.silent = False
            log.info("sidecar %s answers again", sidecar_id)
            self._judge(stream_check(sidecar_id), PASSING, HOLDS)
        return True

    def note_trouble(self, sidecar_id: str, trouble: str) -> None:
        """Say in its check what a sidecar that holds its stream does not take; empty: it takes everything."""
        if sidecar_id in self._live:
            text = f"{HOLDS} and does not take all that it is sent: {trouble}"
            self._judge(stream_check(sidecar_id), WARNING if trouble else PASSING, text if trouble else HOLDS)

    async def _watch(self, sidecar_id: str, live: _Live) -> None:
        """Turn a sidecar's check critical while it is silent."""
        loop = asyncio.get_running_loop()
        allowed_s = self._options.sidecar_silence_s
        pause_s = allowed_s / LOOKS
        live.answered_at = looked_at = loop.time()
        while True:
            await asyncio.sleep(pause_s)
            now = loop.time()
            # Answers that came while this process itself was stopped or starved are still to be read.
            live.answered_at += max(0.0, now - looked_at - 2 * pause_s)
            looked_at = now
            silent_s = now - live.answered_at
            if not live.silent and silent_s > allowed_s:
                live.silent = True
                log.warning("sidecar %s (%s) has not answered for %.0f s", sidecar_id, live.holder, silent_s)
                text = f"the sidecar holds its stream and has not answered for {silent_s:.0f} s: it is stopped"
                self._judge(stream_check(sidecar_id), CRITICAL, text)

    def _complete(self, definition: ServiceDefinition) -> ServiceDefinition:
        """Return the registration with its kind and checks: the stream's own, and an alias of the app's."""
        sidecar_id, proxy = definition.service_id(), definition.proxy
        if proxy is None or not proxy.destination_service_id:
            raise BadDefinition("Proxy.DestinationServiceID must say which instance the sidecar stands for")
        target = proxy.destination_service_id
        if target not in self._local.services:
            raise UnknownTarget(
                f'unknown service ID: "{target}": the sidecar {sidecar_id} stands for a service that is not '
                f"registered with this agent; first: lictor services register -name NAME -id {target}"
            )
        if (own := self._local.services.get(sidecar_id)) is not None and own.row.kind != KIND_CONNECT_PROXY:
            raise BadDefinition(f"{sidecar_id} is a service of its own here: give the sidecar another ID")
        app = self._local.services[target].row
        service = app.service
        if proxy.destination_service_name != service:
            raise BadDefinition(
                f"{target!r} is an instance of {service!r}, not of {proxy.destination_service_name!r}: "
                "correct Proxy.DestinationServiceName"
            )
        check_id = stream_check(sidecar_id)
        alias = CheckDefinition(
            check_id=f"{check_id}:alias", name=f"Connect Sidecar Aliasing {target}", alias_service=target
        )
        following = CheckDefinition(check_id=check_id, name="Sidecar Stream", status=PASSING, sidecar=True)
        return msgspec.structs.replace(
            definition,
            kind=KIND_CONNECT_PROXY,
            check=None,
            checks=(following, alias),
            connect=None,
            # As Consul's sidecar registrations do: subsets are made of what stands here.
            tags=definition.tags or app.tags,
            meta=definition.meta or app.meta,
            weights=definition.weights or app.weights,
            locality=definition.locality or app.locality,
        )

    def heir_of(self, instance: str) -> ServiceDefinition | None:
        """Return the registration of the live sidecar that stands for an instance, without checks, if what it
        inherits from it has changed."""
        live = next((one for one in self._live.values() if one.instance == instance), None)
        if live is None or (known := self._local.services.get(live.asked.service_id())) is None:
            return None
        try:
            now = msgspec.structs.replace(self._complete(live.asked), checks=())
        except BadDefinition:
            return None  # the instance is of another service now, for which the sidecar does not stand
        return now if now.to_row(self._options.node) != known.definition.to_row(self._options.node) else None

    def end(self, sidecar_id: str) -> None:
        """End one sidecar's stream, because its registration goes."""
        if (held := self._live.get(sidecar_id)) is not None:
            held.feed.close(deregistered=True)

    def end_all(self) -> None:
        """End all streams because the process ends. The sidecars live on: their checks stay as they are."""
        self._ending = True
        for live in tuple(self._live.values()):
            live.feed.close()
        for timer in self._grace.values():
            timer.cancel()
        self._grace.clear()

    def give_grace(self, check_id: str) -> None:
        """After a start: the sidecar has most likely outlived us and streams again in a moment."""
        self._judge(check_id, PASSING, "the agent has started; awaiting the sidecar's stream")

        def over() -> None:
            self._grace.pop(check_id, None)
            self._judge(check_id, CRITICAL, "the sidecar has not streamed since the agent started")

        self._grace[check_id] = asyncio.get_running_loop().call_later(self._options.sidecar_grace_s, over)

    def forget(self, check_id: str) -> None:
        """Await nothing for this check any more."""
        if (timer := self._grace.pop(check_id, None)) is not None:
            timer.cancel()

    def _judge(self, check_id: str, status: str, output: str) -> None:
        self._local.set_verdict(check_id, status, output, asyncio.get_running_loop().time())


def stream_check(sidecar_id: str) -> str:
    """Return the id of the check that follows a sidecar's stream."""
    return f"service:{sidecar_id}"
