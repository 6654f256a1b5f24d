"""Instances of several services and versions behind one sidecar, which follows configuration entries."""

from __future__ import annotations

from typing import Any

import msgspec

from node.agent.departures import Departures
from raftstate.chain import check_entry, compile_plan
from raftstate.filter import compile_filter
from raftstate.model.sidecar import Endpoint
from tests.support.http_filter import Answer, App, simple
from tests.support.sidecars import Member, Mesh

SUBSETS = {v: {"Filter": f"Service.Meta.version == {v}"} for v in ("v1", "v2")}
HTTP = {"Config": {"protocol": "http"}}


class Stage:
    """Instances of several services and versions behind one upstream of ``web``, which follows entries."""

    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh
        self.client: Member
        self.endpoints: list[Endpoint] = []
        self.apps: dict[str, App] = {}
        self.servers: dict[str, Member] = {}
        self.departures = Departures()
        self.fields: dict[str, Any] = {}
        """Of the upstream, beside what follows from the entries."""
        self.entries: dict[tuple[str, str], dict[str, Any]] = {("proxy-defaults", "global"): HTTP}

    async def server(self, service: str, instance: str, version: str = "", answer: Answer | None = None) -> Member:
        app = self.apps[instance] = App(answer=answer or simple(instance.encode()))
        listening = await self.mesh.app(app.handle)
        return await self.add(service, instance, version, listening.port)

    async def add(self, service: str, instance: str, version: str, port: int) -> Member:
        server = self.servers[instance] = await self.mesh.member(service, instance, port=port)
        await server.allow("web")
        self.endpoints.append(msgspec.structs.replace(server.endpoint, meta={"version": version}))
        return server

    async def caller(self) -> None:
        self.client = await self.mesh.member("web", "web-1", upstreams=("backend",))
        await self.follow()

    async def follow(self, **entries: Any) -> None:
        """Write entries (``router_backend={...}``; None deletes), and send the sidecar what its agent would."""
        for name, entry in entries.items():
            kind, _, service = name.partition("_")
            key = (f"service-{kind}", service)
            self.entries.pop(key, None)
            if entry is not None:
                self.entries[key] = check_entry(*key, entry)
        plan = compile_plan("backend", lambda kind, name: self.entries.get((kind, name)), "dc1")
        targets: dict[str, tuple[Endpoint, ...]] = {}
        for id, target in plan.targets.items():
            holds = compile_filter(target.filter) if target.filter else lambda row: True
            targets[id] = tuple(
                one
                for one in self.endpoints
                if one.service == target.service and holds({"Service": {"Meta": one.meta}})
            )
        fields: dict[str, Any] = {"plan": plan, "targets": targets}
        if plan.default:
            fields = {"endpoints": targets[next(iter(targets))]}
        by_service = {
            one.service: [other for other in self.endpoints if other.service == one.service] for one in self.endpoints
        }
        followed = {service: by_service.get(service, []) for service in (*by_service, *self.departures.services)}
        self.departures.follow([one for each in targets.values() for one in each], followed)
        fields["deregistered"] = self.departures.deregistered
        await self.client.route("backend", **fields, **self.fields, protocol=plan.protocol)
