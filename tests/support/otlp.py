"""A collector of traces: takes OTLP over HTTP in JSON, and nothing that the protocol's schema does not know."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
from aiohttp import web


class Value(msgspec.Struct, forbid_unknown_fields=True, rename="camel"):
    """``AnyValue``: a 64-bit number travels as text."""

    string_value: str | None = None
    int_value: str | None = None

    @property
    def plain(self) -> str | int:
        assert (self.string_value is None) != (self.int_value is None)
        return int(self.int_value) if self.int_value is not None else str(self.string_value)


class KeyValue(msgspec.Struct, forbid_unknown_fields=True):
    key: str
    value: Value


class Status(msgspec.Struct, forbid_unknown_fields=True):
    code: int = 0
    message: str = ""


class Span(msgspec.Struct, forbid_unknown_fields=True, rename="camel"):
    """The fields of ``opentelemetry.proto.trace.v1.Span`` that a sidecar has something to say in."""

    trace_id: str
    span_id: str
    name: str
    kind: int
    start_time_unix_nano: str
    end_time_unix_nano: str
    attributes: list[KeyValue]
    status: Status
    flags: int = 0
    parent_span_id: str = ""
    trace_state: str = ""

    @property
    def values(self) -> dict[str, str | int]:
        found = {one.key: one.value.plain for one in self.attributes}
        assert len(found) == len(self.attributes), "no attribute comes twice"
        return found

    def check(self) -> None:
        """Whether it is what OTLP asks of any span."""
        assert len(self.trace_id) == 32
        assert len(self.span_id) == 16
        assert len(self.parent_span_id) in (0, 16)
        for id in (self.trace_id, self.span_id, self.parent_span_id):
            assert set(id) <= set("0123456789abcdef")
        assert self.span_id != "0" * 16
        assert self.name
        assert self.kind in (2, 3)
        assert 0 < int(self.start_time_unix_nano) <= int(self.end_time_unix_nano)
        assert self.status.code in (0, 2)
        assert (self.status.code == 2) == ("error.type" in self.values)


class Scope(msgspec.Struct, forbid_unknown_fields=True):
    name: str
    version: str = ""


class ScopeSpans(msgspec.Struct, forbid_unknown_fields=True, rename="camel"):
    scope: Scope
    spans: list[Span]


class Resource(msgspec.Struct, forbid_unknown_fields=True):
    attributes: list[KeyValue]


class ResourceSpans(msgspec.Struct, forbid_unknown_fields=True, rename="camel"):
    resource: Resource
    scope_spans: list[ScopeSpans]


class Export(msgspec.Struct, forbid_unknown_fields=True, rename="camel"):
    """``ExportTraceServiceRequest``."""

    resource_spans: list[ResourceSpans]


def decode(body: bytes) -> list[tuple[dict[str, str | int], Span]]:
    """Return the spans of a request, each with its resource's attributes. Raises on what OTLP does not allow."""
    found = []
    for each in msgspec.json.decode(body, type=Export).resource_spans:
        resource = {one.key: one.value.plain for one in each.resource.attributes}
        for scope in each.scope_spans:
            for span in scope.spans:
                span.check()
                found.append((resource, span))
    return found


class Collector:
    """Takes spans. ``answers`` says what to answer next: (status, headers, body); then ``status``."""

    def __init__(self, status: int = 200) -> None:
        self.status = status
        self.answers: list[tuple[int, dict[str, str], bytes]] = []
        self.hold: asyncio.Event | None = None
        self.asked: list[float] = []
        """When each request came, by the loop's clock."""
        self.headers: list[dict[str, str]] = []
        self.batches: list[int] = []
        self.taken: list[tuple[dict[str, str | int], Span]] = []
        """Of requests that were answered well."""
        self.faults: list[str] = []
        self.connections: set[object] = set()
        """Addresses from which somebody sent."""
        self.endpoint = ""

    async def start(self) -> str:
        app = web.Application(client_max_size=32 << 20)
        app.router.add_post("/v1/traces", self._take)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        self.endpoint = f"http://127.0.0.1:{self._runner.addresses[0][1]}"
        return self.endpoint

    async def stop(self) -> None:
        await self._runner.cleanup()
        assert self.faults == []

    async def _take(self, request: web.Request) -> web.Response:
        self.asked.append(asyncio.get_running_loop().time())
        self.connections.add(request.transport.get_extra_info("peername") if request.transport else None)
        self.headers.append(dict(request.headers))
        body = await request.read()
        if self.hold is not None:
            await self.hold.wait()
        if request.headers["Content-Type"] != "application/json":
            self.faults.append(f"content type {request.headers['Content-Type']}")
        status, headers, answer = self.answers.pop(0) if self.answers else (self.status, {}, b"{}")
        try:
            spans = decode(body)
        except (AssertionError, msgspec.ValidationError, msgspec.DecodeError) as error:
            self.faults.append(f"{error!r} in {body[:2000]!r}")
            return web.Response(status=400)
        self.batches.append(len(spans))
        if status < 300:
            self.taken += spans
        return web.Response(status=status, headers=headers, body=answer)

    @property
    def spans(self) -> list[Span]:
        return [span for _, span in self.taken]

    def of(self, service: str) -> list[Span]:
        """The spans of one service's sidecars."""
        return [span for resource, span in self.taken if resource["service.name"] == service]

    def resource(self, service: str) -> dict[str, Any]:
        return next(resource for resource, _ in self.taken if resource["service.name"] == service)
