"""The xDS server of an agent: ADS in its delta form over gRPC on loopback. Needs the extra ``lictor[envoy]``.

An Envoy names its sidecar as its node id. Its registration is the one the agent has, or comes with the node's
metadata (``lictor.definition``, JSON), as a Lictor sidecar sends it when it opens its stream: so an Envoy that
outlives the agent registers again by itself. While the stream lives the sidecar's check is passing.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, NoReturn

import grpc
import msgspec

from node.agent.agent import LocalAgent
from node.agent.definitions import BadDefinition, ServiceDefinition
from node.agent.sidecars import SidecarFeed
from node.agent.streams import StreamHeld, UnknownTarget
from node.errors import NodeError
from node.http.agent_services import definition_of
from node.http.errors import BadRequest
from node.xds import messages
from node.xds.session import Session

log = logging.getLogger("lictor.xds")

METHOD_SERVICE = "envoy.service.discovery.v3.AggregatedDiscoveryService"
FIRST_REQUEST_S = 10.0
TokenCheck = Callable[[str], Awaitable[str]]
"""Returns why a token does not do, empty when it does."""

_CODES: tuple[tuple[type[Exception], str], ...] = (
    (StreamHeld, "ALREADY_EXISTS"),
    (UnknownTarget, "NOT_FOUND"),
    (BadDefinition, "INVALID_ARGUMENT"),
)


class XdsServer:
    """Serves the Envoys of this node. ``await start(address, port)``, ``await stop()``."""

    def __init__(self, agent: LocalAgent, token_refusal: TokenCheck | None = None) -> None:
        self._agent = agent
        self._token_refusal = token_refusal
        self._server: grpc.aio.Server | None = None

    async def start(self, address: str, port: int) -> int:
        """Listen; returns the port. Raises OSError when it is taken."""
        # One listener per port: without this a second agent would share the port in silence.
        self._server = grpc.aio.server(
            options=[("grpc.so_reuseport", 0), ("grpc.max_receive_message_length", 64 << 20)]
        )
        handler = grpc.stream_stream_rpc_method_handler(
            self._delta,
            request_deserializer=messages.DeltaRequest.FromString,
            response_serializer=messages.DeltaResponse.SerializeToString,
        )
        self._server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler(METHOD_SERVICE, {"DeltaAggregatedResources": handler}),)
        )
        host = f"[{address}]" if ":" in address else address
        try:
            bound: int = self._server.add_insecure_port(f"{host}:{port}")
        except RuntimeError as error:
            raise OSError(f"xDS cannot listen on {host}:{port}: {error}") from error
        await self._server.start()
        return bound

    async def stop(self) -> None:
        """End all streams; the Envoys go on with what they have, and their checks stay as they are."""
        self._agent.streams.end_all()
        if self._server is not None:
            await self._server.stop(0.5)

    async def _delta(self, requests: AsyncIterator[Any], context: Any) -> None:
        if self._token_refusal is not None and (refusal := await self._token_refusal(_token(context))):
            await _abort(context, grpc.StatusCode.PERMISSION_DENIED, refusal)
        try:
            async with asyncio.timeout(FIRST_REQUEST_S):
                first = await anext(aiter(requests))
        except TimeoutError:
            await _abort(context, grpc.StatusCode.DEADLINE_EXCEEDED, "no request came")
        except StopAsyncIteration:
            return
        try:
            async with self._agent.streams.hold(self._definition(first), "of Envoy") as feed:
                log.info("Envoy of %s follows its configuration", first.node.id)
                await _Stream(first, requests, context, feed).run()
        except (NodeError, BadDefinition) as error:
            log.warning("Envoy of %s is turned away: %s", first.node.id or "?", error)
            code = next((name for kind, name in _CODES if isinstance(error, kind)), "UNAVAILABLE")
            await _abort(context, grpc.StatusCode[code], str(error))
        log.info("Envoy of %s has gone or was told to", first.node.id)

    def _definition(self, first: Any) -> ServiceDefinition:
        """Return the registration of the sidecar that a first request speaks for. Raises NodeError."""
        sidecar_id = first.node.id
        if not sidecar_id:
            raise BadDefinition("the Envoy's node.id must be the id of its sidecar: lictor connect envoy -bootstrap")
        brought = messages.metadata_of(first).get("lictor.definition")
        if isinstance(brought, str):
            try:
                definition = definition_of(brought.encode())
            except BadRequest as error:
                raise BadDefinition(f"lictor.definition in the node's metadata: {error}") from error
            if definition.service_id() != sidecar_id:
                raise BadDefinition(
                    f"node.id {sidecar_id!r} contradicts the registration's {definition.service_id()!r}"
                )
            return definition
        held = self._agent.local.services.get(sidecar_id)
        if held is None:
            raise UnknownTarget(f'unknown service ID "{sidecar_id}": register the sidecar with this agent first')
        return msgspec.structs.replace(held.definition, id=sidecar_id)


class _Stream:
    """One stream while it lives."""

    def __init__(self, first: Any, requests: AsyncIterator[Any], context: Any, feed: SidecarFeed) -> None:
        self._first, self._requests, self._context, self._feed = first, requests, context, feed
        self._session = Session(first.node.id)
        self._wake = asyncio.Event()

    async def run(self) -> None:
        """Serve until either side ends."""
        self._session.request(self._first)
        parts = [asyncio.ensure_future(part) for part in (self._read(), self._follow(), self._write())]
        try:
            done, _ = await asyncio.wait(parts, return_when=asyncio.FIRST_COMPLETED)
            for part in done:
                part.result()
        finally:
            for part in parts:
                part.cancel()
            await asyncio.gather(*parts, return_exceptions=True)

    async def _read(self) -> None:
        async for request in self._requests:
            self._session.request(request)
            self._wake.set()

    async def _follow(self) -> None:
        async for update in self._feed.updates():
            if self._session.update(update):
                self._wake.set()

    async def _write(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            for response in self._session.responses():
                await self._context.write(response)


def _token(context: Any) -> str:
    metadata = {key.lower(): value for key, value in context.invocation_metadata() or ()}
    if token := metadata.get("x-consul-token", ""):
        return str(token)
    scheme, _, token = str(metadata.get("authorization", "")).partition(" ")
    return token.strip() if scheme.lower() == "bearer" else ""


async def _abort(context: Any, code: grpc.StatusCode, text: str) -> NoReturn:
    await context.abort(code, text)
    raise AssertionError("abort raises")
