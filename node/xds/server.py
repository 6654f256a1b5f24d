"""The xDS server of an agent: ADS in its delta form over gRPC on loopback. Needs the extra ``lictor[envoy]``.

An Envoy names its sidecar as its node id. Its registration is the one the agent has, or comes with the node's
metadata (``lictor.definition``, JSON), as a Lictor sidecar sends it when it opens its stream: so an Envoy that
outlives the agent registers again by itself. While the stream lives the sidecar's check is passing.
"""

from __future__ import annotations

import asyncio
import functools
import ipaddress
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, NoReturn

import grpc
import msgspec

from node.agent.agent import LocalAgent
from node.agent.definitions import BadDefinition, ServiceDefinition
from node.agent.sidecars import SidecarFeed
from node.agent.streams import StreamHeld, UnknownTarget
from node.errors import NodeError, Refused
from node.http.acl_needs import first_lacking, lacks
from node.http.agent_services import definition_of, registration_needs
from node.http.errors import BadRequest
from node.tokens import AccessControl
from node.xds import messages
from node.xds.checks import Checks
from node.xds.delta import TooMuch
from node.xds.known import KnownCallers
from node.xds.leaving import Checked
from node.xds.session import Session

log = logging.getLogger("lictor.xds")

METHOD_SERVICE = "envoy.service.discovery.v3.AggregatedDiscoveryService"
FIRST_REQUEST_S = 10.0
REQUEST_BYTES_MAX = 4 << 20
"""A request has names, versions and, first, a registration; that of an Envoy with 256 callers takes some 50 KB."""
STREAMS_MAX = 1024
"""Of all Envoys together: more are turned away."""
STREAMS_OF_ONE_MAX = 16
"""Of one connection: an Envoy has one."""
SHOWN_MAX = 200
"""How much of what a client calls itself is logged."""
PING_S = ANSWER_S = 5.0
"""An Envoy that is stopped but not dead keeps its connection and answers no ping: its stream ends after these two."""
SENDING_S = PING_S + ANSWER_S
"""How long a stream that is to end waits for its last message to leave: whoever reads none is gone by then."""
_PINGS = [
    ("grpc.keepalive_time_ms", int(PING_S * 1000)),
    ("grpc.keepalive_timeout_ms", int(ANSWER_S * 1000)),
    ("grpc.http2.ping_timeout_ms", int(ANSWER_S * 1000)),  # what newer versions wait for
    ("grpc.http2.max_pings_without_data", 0),
]

Withdrawn = Callable[[], Awaitable[str]]
"""Returns, with the reason, once an Envoy's token does not do any more."""

_CODES: tuple[tuple[type[Exception], str], ...] = (
    (StreamHeld, "ALREADY_EXISTS"),
    (UnknownTarget, "NOT_FOUND"),
    (BadDefinition, "INVALID_ARGUMENT"),
    (TooMuch, "RESOURCE_EXHAUSTED"),
)


class XdsServer:
    """Serves the Envoys of this node. ``await start(address, port)``, ``await stop()``."""

    def __init__(self, agent: LocalAgent, access: AccessControl | None = None, checks: Checks | None = None) -> None:
        """``access``: set to ask for tokens. ``checks``: what answers Envoys that ask about instances."""
        self._agent, self._access = agent, access
        self._checks = checks or Checks()
        self._server: grpc.aio.Server | None = None

    async def start(self, address: str, port: int) -> int:
        """Listen; returns the port. Raises OSError when it is taken."""
        # One listener per port: without this a second agent would share the port in silence.
        options = [
            ("grpc.so_reuseport", 0),
            ("grpc.max_receive_message_length", REQUEST_BYTES_MAX),
            ("grpc.max_concurrent_streams", STREAMS_OF_ONE_MAX),
            *_PINGS,
        ]
        self._server = grpc.aio.server(options=options, maximum_concurrent_rpcs=STREAMS_MAX)
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
        try:
            async with asyncio.timeout(FIRST_REQUEST_S):
                first = await anext(aiter(requests))
        except TimeoutError:
            await _abort(context, grpc.StatusCode.DEADLINE_EXCEEDED, "no request came")
        except StopAsyncIteration:
            return
        try:
            definition = self._definition(first)
            withdrawn = await self._permit(_token(context), definition)
            async with self._agent.streams.hold(definition, "of Envoy") as feed:
                log.info("Envoy of %s follows its configuration", _shown(first))
                session = Session(first.node.id, self._checks, _checked(first))
                note = functools.partial(self._agent.streams.note_trouble, first.node.id)
                gone = self._is_gone(first.node.id)
                stream = _Stream(first, requests, context, feed, session, gone, withdrawn, note)
                known = KnownCallers(self._agent.views, stream.look_anew)
                self._checks.follow(first.node.id, stream.look_anew)
                try:
                    await stream.run(known)
                finally:
                    known.close()
                    self._checks.forget(first.node.id)
        except (NodeError, BadDefinition, TooMuch) as error:
            log.warning("Envoy of %s is turned away: %s", _shown(first), ascii(str(error)[:SHOWN_MAX])[1:-1])
            code = next((name for kind, name in _CODES if isinstance(error, kind)), "UNAVAILABLE")
            if getattr(error, "http_status", 0) == 403:
                code = "PERMISSION_DENIED"
            await _abort(context, grpc.StatusCode[code], str(error)[:1000])
        log.info("Envoy of %s has gone or was told to", _shown(first))

    async def _permit(self, token: str, definition: ServiceDefinition) -> Withdrawn | None:
        """Return what ends once the token does not do any more. Raises Refused (403) when it does not now."""
        access = self._access
        if access is None:
            return None
        needs = registration_needs(self._agent, definition)
        bearer = await access.bearer(token)
        if lacking := first_lacking(bearer, needs):
            raise Refused(lacks(bearer, lacking), http_status=403)
        hashed = access.hash_for(token)
        return lambda: access.tokens.until_withdrawn(hashed, lambda held: first_lacking(held, needs) is None)

    def _is_gone(self, sidecar_id: str) -> Callable[[], bool]:
        """Return what tells whether the sidecar is registered no more."""
        return lambda: sidecar_id not in self._agent.local.services

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

    def __init__(
        self,
        first: Any,
        requests: AsyncIterator[Any],
        context: Any,
        feed: SidecarFeed,
        session: Session,
        deregistered: Callable[[], bool],
        withdrawn: Withdrawn | None = None,
        on_trouble: Callable[[str], None] = lambda text: None,
    ) -> None:
        """``on_trouble``: told what Envoy does not take, whenever that changes."""
        self._first, self._requests, self._context, self._feed = first, requests, context, feed
        self._deregistered = deregistered
        self._withdrawn = withdrawn
        self._session = session
        self._trouble, self._on_trouble = "", on_trouble
        self._wake = asyncio.Event()
        self._sending: asyncio.Future[None] | None = None
        """The message that was handed to gRPC last."""

    def look_anew(self) -> None:
        """Be told that an instance of a caller has come or gone, or that the calls to a withdrawn one have ended."""
        self._wake.set()

    async def run(self, known: KnownCallers) -> None:
        """Serve until either side ends."""
        self._session.request(self._first)
        work = [self._read(), self._follow(), self._write(known)]
        if self._withdrawn is not None:
            work.append(self._until_withdrawn(self._withdrawn))
        parts = [asyncio.ensure_future(part) for part in work]
        try:
            done, _ = await asyncio.wait(parts, return_when=asyncio.FIRST_COMPLETED)
            for part in done:
                part.result()
        finally:
            for part in parts:
                part.cancel()
            await asyncio.gather(*parts, return_exceptions=True)
            if self._sending is not None:
                # gRPC can't end a stream on which a message is on its way; cancelling does not call that back.
                await asyncio.wait([self._sending], timeout=SENDING_S)
        if self._deregistered():
            for response in self._session.closed():
                await self._send(response)
            if (trouble := self._session.trouble) != self._trouble:
                self._trouble = trouble
                self._on_trouble(trouble)

    async def _send(self, response: Any) -> None:
        self._sending = asyncio.ensure_future(self._context.write(response))
        await asyncio.shield(self._sending)

    async def _until_withdrawn(self, withdrawn: Withdrawn) -> None:
        log.warning("Envoy of %s gets nothing more: %s", self._first.node.id, await withdrawn())

    async def _read(self) -> None:
        async for request in self._requests:
            self._session.request(request)
            self._wake.set()

    async def _follow(self) -> None:
        async for update in self._feed.updates():
            if self._session.update(update):
                self._wake.set()

    async def _write(self, known: KnownCallers) -> None:
        while True:
            at = self._session.settle_at
            try:
                async with asyncio.timeout(None if at is None else max(0.0, at - time.monotonic())):
                    await self._wake.wait()
            except TimeoutError:
                pass  # it is time to settle
            self._wake.clear()
            self._session.settle()
            services, anyone = self._session.callers
            known.follow(services, everyone=anyone)
            self._session.know(known.instances(), known.services())
            for response in self._session.responses():
                await self._send(response)
            if (trouble := self._session.trouble) != self._trouble:
                self._trouble = trouble
                self._on_trouble(trouble)


def _shown(first: Any) -> str:
    """Return how a client calls itself, fit for a line of a log: it may be anything."""
    return ascii(first.node.id[:SHOWN_MAX])[1:-1] or "?"


def _checked(first: Any) -> Checked | None:
    """Return how an Envoy can ask about instances: where it says that it reaches this agent. None: it does not."""
    said = messages.metadata_of(first).get("lictor.agent")
    host, _, port = said.rpartition(":") if isinstance(said, str) else ("", "", "")
    try:
        address = ipaddress.ip_address(host.strip("[]"))
        number = int(port)
    except ValueError:
        return None
    return Checked(str(address), number, first.node.id) if 0 < number < 65536 else None


def _token(context: Any) -> str:
    metadata = {key.lower(): value for key, value in context.invocation_metadata() or ()}
    if token := metadata.get("x-consul-token", ""):
        return str(token)
    scheme, _, token = str(metadata.get("authorization", "")).partition(" ")
    return token.strip() if scheme.lower() == "bearer" else ""


async def _abort(context: Any, code: grpc.StatusCode, text: str) -> NoReturn:
    await context.abort(code, text)
    raise AssertionError("abort raises")
