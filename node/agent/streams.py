"""Who holds which sidecar's configuration stream: one live stream per sidecar, and its check follows the stream."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import msgspec

from node.agent.definitions import BadDefinition, CheckDefinition, ServiceDefinition
from node.agent.leaf import LeafManager
from node.agent.local import LocalState
from node.agent.options import AgentOptions
from node.agent.sidecars import SidecarFeed, StreamHolder
from node.agent.views import Views
from node.errors import NodeError
from raftstate.model.catalog import CRITICAL, KIND_CONNECT_PROXY, PASSING


class StreamHeld(NodeError):
    """The sidecar has a live stream already; the text names its holder."""

    http_status = 409


class UnknownTarget(NodeError):
    """A sidecar stands for a service that is not registered with this agent."""

    http_status = 404


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
        self._live: dict[str, tuple[SidecarFeed, StreamHolder]] = {}
        self._grace: dict[str, asyncio.TimerHandle] = {}
        self._ending = False

    def __len__(self) -> int:
        return len(self._live)

    @asynccontextmanager
    async def hold(self, definition: ServiceDefinition, pid: str = "") -> AsyncIterator[SidecarFeed]:
        """Register a sidecar and hold its configuration stream.

        While the context is held its check is passing; when it ends the check is critical at once. Raises StreamHeld,
        BadDefinition, UnknownTarget, Refused.
        """
        sidecar_id = definition.service_id()
        if (held := self._live.get(sidecar_id)) is not None:
            raise StreamHeld(
                f"sidecar {sidecar_id} has a live stream already (held by {held[1]}); stop that process first"
            )
        definition = self._complete(definition)
        feed = SidecarFeed(self._options, self._views, self._leaves, definition.to_row(self._options.node))
        self._live[sidecar_id] = (feed, StreamHolder(pid, time.time()))
        check_id = stream_check(sidecar_id)
        try:
            await self._register(definition)
            self.forget(check_id)
            self._judge(check_id, PASSING, "the sidecar holds its stream")
            yield feed
        finally:
            if self._live.get(sidecar_id, (None,))[0] is feed:
                del self._live[sidecar_id]
                if not self._ending:
                    self._judge(check_id, CRITICAL, "the sidecar's stream has ended")

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
        service = self._local.services[target].row.service
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
            definition, kind=KIND_CONNECT_PROXY, check=None, checks=(following, alias), connect=None
        )

    def end(self, sidecar_id: str) -> None:
        """End one sidecar's stream, because its registration goes."""
        if (held := self._live.get(sidecar_id)) is not None:
            held[0].close()

    def end_all(self) -> None:
        """End all streams because the process ends. The sidecars live on: their checks stay as they are."""
        self._ending = True
        for feed, _ in tuple(self._live.values()):
            feed.close()
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
