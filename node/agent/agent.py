"""LocalAgent: what is registered on this node and everything that is done for it."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Coroutine
from typing import Any

import msgspec

from node.agent.checks.manager import CheckManager
from node.agent.definitions import (
    SIDECAR_SUFFIX,
    TYPE_SIDECAR,
    BadDefinition,
    CheckDefinition,
    ServiceDefinition,
    sidecar_of,
)
from node.agent.leaf import LeafManager
from node.agent.local import LocalCheck, LocalState
from node.agent.options import AgentOptions
from node.agent.store import AgentStore, SavedCheck, SavedService
from node.agent.streams import SidecarStreams
from node.agent.sync import AntiEntropy
from node.agent.views import Views
from node.backend import Backend
from node.errors import NodeError, Refused
from node.tasks import Tasks
from raftstate.model.catalog import CRITICAL, STATUSES, Node, Weights

log = logging.getLogger("lictor.agent")

SERVER_SERVICE = "consul"
"""The service under which Consul's servers are found; registered by each server's agent, hidden in its own lists."""
STREAM_REGISTER_WAIT_S = 2.0


class Unknown(NodeError):
    """No such service or check on this agent."""

    http_status = 404


def _unknown_service(service_id: str) -> Unknown:
    return Unknown(f'Unknown service ID "{service_id}". Ensure that the service ID is passed, not the service name.')


class LocalAgent:
    """One node's agent. Use on one event loop; ``await start()`` first, ``await stop()`` at the end."""

    def __init__(self, backend: Backend, options: AgentOptions, *, rng: random.Random | None = None) -> None:
        self.backend, self.options = backend, options
        self._rng = rng or random.Random()
        directory = options.data_dir / "agent"
        self.store = AgentStore(directory)
        self.local = LocalState(options.node)
        self.views = Views(backend)
        self.leaves = LeafManager(
            backend, self.views, directory / "leaves", datacenter=options.datacenter, rng=self._rng
        )
        self.sync = AntiEntropy(
            backend, self.views, self.local, self.node_row, interval_s=options.sync_interval_s, rng=self._rng
        )
        self.checks = CheckManager(self.local, self.views, self._reap, rng=self._rng)
        self.streams = SidecarStreams(options, self.views, self.leaves, self.local, self._register_sidecar)
        self.started_at = time.time()
        self.node_id = ""
        self._changes: set[asyncio.Future[None]] = set()
        self._locks: dict[str, asyncio.Lock] = {}
        self._tasks = Tasks("agent")

    async def start(self) -> None:
        """Load what was registered, and begin to check, sync and follow."""
        self.node_id = await asyncio.to_thread(self.store.node_id)
        services, checks = await asyncio.to_thread(self.store.load)
        self.checks.start()
        await self.leaves.start()
        if self.options.is_server:
            services.append(SavedService(self._server_service()))
        for saved in services:
            self._apply_service(saved.service, saved.checks)
        for one in checks:
            self.checks.add(self.local.put_check(one.check, self._now(), own_file=True))
        for check in tuple(self.local.checks.values()):
            kind = check.definition.type()
            check.unjudged = kind not in ("", "alias", TYPE_SIDECAR)
            if kind == TYPE_SIDECAR:
                self.streams.give_grace(check.definition.check_id)
        # Last, so that the first comparison sees all there is: what the catalog holds already is not written again.
        await self.sync.start()

    async def stop(self) -> None:
        """End streams and checks; registrations stay, here and in the catalog.

        The sidecars live on and stream again to the next agent of this node: their checks stay as they are.
        """
        self.streams.end_all()
        await asyncio.gather(*self._changes, return_exceptions=True)
        await self.checks.stop()
        await self.sync.stop()
        await self.leaves.stop()
        await self._tasks.close()
        await self.views.close()

    def node_row(self) -> Node:
        """Return this node's row in the catalog."""
        options = self.options
        meta = {**options.meta, "consul-network-segment": ""}
        if options.zone:
            meta.setdefault("zone", options.zone)
        address = options.address
        return Node(
            node=options.node,
            address=address,
            id=self.node_id,
            datacenter=options.datacenter,
            tagged_addresses={"lan": address, "lan_ipv4": address, "wan": address, "wan_ipv4": address},
            meta=meta,
        )

    # Services

    async def register_service(
        self, definition: ServiceDefinition, *, replace_checks: bool = False, wait_s: float | None = None
    ) -> None:
        """Register a service, and its sidecar if it asks for one.

        Returns when it is durable here, and in the catalog or ``wait_s`` has passed (then it is synced later).
        Raises BadDefinition, or Refused when the catalog refuses it: then nothing has changed.
        """
        await self._to_the_end(self._register(definition, replace_checks, wait_s))

    async def _register(self, definition: ServiceDefinition, replace_checks: bool, wait_s: float | None) -> None:
        self._require_valid(definition)
        service_id = definition.service_id()
        sidecar = sidecar_of(definition, self._sidecar_port(service_id))
        if sidecar is not None:
            self._require_valid(sidecar)
        before = self._saved(service_id)
        await self._register_one(definition, replace_checks, wait_s)
        if sidecar is None:
            # One that was started beside it: subsets are made of what its row says of the instance.
            sidecar, replace_checks = self.streams.heir_of(service_id), False
        if sidecar is None:
            return
        try:
            await self._register_one(sidecar, replace_checks, wait_s)
        except Refused:
            await self._restore(service_id, before)
            raise

    async def _register_sidecar(self, definition: ServiceDefinition) -> None:
        self._require_valid(definition)
        await self._to_the_end(self._register_one(definition, True, STREAM_REGISTER_WAIT_S))

    async def _register_one(self, definition: ServiceDefinition, replace_checks: bool, wait_s: float | None) -> None:
        service_id = definition.service_id()
        async with self._lock(service_id):
            before = self._saved(service_id)
            checks = {check.check_id: check for check in definition.all_checks()}
            if before is not None and not replace_checks:
                checks = {check.check_id: check for check in before.checks} | checks
            kept = msgspec.structs.replace(definition, check=None, checks=())
            saved = SavedService(kept, tuple(checks.values()))
            self._apply_service(saved.service, saved.checks)
            # The disk and the catalog at once; the answer waits for both.
            saving = asyncio.ensure_future(self.store.save_service(saved))
            refusal = await self.sync.settled(
                ("service", service_id), self.options.register_wait_s if wait_s is None else wait_s
            )
            try:
                await saving
            except OSError as error:
                # The file that was there before is there still: it is replaced whole or not at all.
                self._put_back(service_id, before)
                raise NodeError(f"the registration cannot be saved: {error}; nothing has changed") from error
            if isinstance(refusal, Refused):
                await self._restore(service_id, before)
                raise refusal

    async def deregister_service(self, service_id: str) -> None:
        """Withdraw a service, its checks and its sidecar. Raises Unknown."""
        if service_id not in self.local.services or (service_id == SERVER_SERVICE and self.options.is_server):
            raise _unknown_service(service_id)
        await self._to_the_end(self._deregister(service_id))

    async def _deregister(self, service_id: str) -> None:
        await self._withdraw(service_id)
        sidecar_id = service_id + SIDECAR_SUFFIX
        if sidecar_id in self.local.services:
            await self._withdraw(sidecar_id)

    async def _withdraw(self, service_id: str) -> None:
        async with self._lock(service_id):
            await self.store.forget_service(service_id)
            for check in self.local.checks_of(service_id):
                if check.own_file:
                    await self.store.forget_check(check.definition.check_id)
            self._remove_service(service_id)
            await self.sync.settled(("service", service_id), self.options.register_wait_s)

    def _apply_service(self, definition: ServiceDefinition, checks: tuple[CheckDefinition, ...]) -> None:
        service_id = definition.service_id()
        self.local.put_service(definition)
        wanted = {check.check_id for check in checks}
        for check in self.local.checks_of(service_id):
            if check.definition.check_id not in wanted and not check.own_file:
                self._drop_check(check.definition.check_id)
        for one in checks:
            self.checks.add(self.local.put_check(one, self._now()))

    def _remove_service(self, service_id: str) -> None:
        self.streams.end(service_id)
        for check in self.local.checks_of(service_id):
            self._drop_check(check.definition.check_id)
        self.local.drop_service(service_id)

    def _saved(self, service_id: str) -> SavedService | None:
        service = self.local.services.get(service_id)
        if service is None:
            return None
        own = tuple(check.definition for check in self.local.checks_of(service_id) if not check.own_file)
        return SavedService(service.definition, own)

    def _put_back(self, service_id: str, before: SavedService | None) -> None:
        if before is None:
            self._remove_service(service_id)
        else:
            self._apply_service(before.service, before.checks)

    async def _restore(self, service_id: str, before: SavedService | None) -> None:
        self._put_back(service_id, before)
        if before is None:
            await self.store.forget_service(service_id)
        else:
            await self.store.save_service(before)

    def _require_valid(self, definition: ServiceDefinition) -> None:
        problem = definition.problem()
        if problem:
            raise BadDefinition(problem)
        for check in definition.all_checks():
            self._require_valid_check(check)

    def _require_valid_check(self, check: CheckDefinition) -> None:
        problem = check.problem(scripts_enabled=self.options.enable_script_checks)
        if problem:
            raise BadDefinition(f"Invalid check: {problem}")

    def _sidecar_port(self, service_id: str) -> int:
        """Return the sidecar's port: the one it has, else the first that no service here has."""
        held = self.local.services.get(service_id + SIDECAR_SUFFIX)
        if held is not None and held.row.port:
            return held.row.port
        taken = {service.row.port for service in self.local.services.values()}
        for port in range(self.options.sidecar_port_min, self.options.sidecar_port_max + 1):
            if port not in taken:
                return port
        raise BadDefinition("no port is left for a sidecar: name one in Connect.SidecarService.Port")

    def _server_service(self) -> ServiceDefinition:
        return ServiceDefinition(
            name=SERVER_SERVICE, id=SERVER_SERVICE, port=self.options.rpc_port, weights=Weights(passing=1, warning=1)
        )

    # Checks

    async def register_check(self, definition: CheckDefinition) -> None:
        """Register a check on the node or on one of its services. Raises BadDefinition, Unknown, Refused."""
        if not definition.name and not definition.check_id:
            raise BadDefinition("Missing check name")
        definition = msgspec.structs.replace(definition, check_id=definition.check_id or definition.name)
        self._require_valid_check(definition)
        await self._to_the_end(self._put_own_check(definition))

    async def _put_own_check(self, definition: CheckDefinition) -> None:
        async with self._lock(self._owner_of(definition.service_id, definition.check_id)):
            if definition.service_id and definition.service_id not in self.local.services:
                raise Unknown(f'ServiceID "{definition.service_id}" does not exist')
            await self.store.save_check(SavedCheck(definition))
            self.checks.add(self.local.put_check(definition, self._now(), own_file=True))
            refusal = await self.sync.settled(("check", definition.check_id), self.options.register_wait_s)
            if isinstance(refusal, Refused):
                await self.store.forget_check(definition.check_id)
                self._drop_check(definition.check_id)
                raise refusal

    async def deregister_check(self, check_id: str) -> None:
        """Withdraw a check. Raises Unknown."""
        self._check(check_id)
        await self._to_the_end(self._withdraw_check(check_id))

    async def _withdraw_check(self, check_id: str) -> None:
        async with self._lock(self._owner_of(self._check(check_id).row.service_id, check_id)):
            check = self._check(check_id)  # as it is now: it may have gone while others held the lock
            if check.own_file:
                await self.store.forget_check(check_id)
                self._drop_check(check_id)
            else:
                self._drop_check(check_id)
                if (saved := self._saved(check.row.service_id)) is not None:
                    await self.store.save_service(saved)
            await self.sync.settled(("check", check_id), self.options.register_wait_s)

    @staticmethod
    def _owner_of(service_id: str, check_id: str) -> str:
        """Return what is locked while a check changes: its service, which comes and goes with its checks."""
        return service_id or f"check {check_id}"

    async def update_ttl(self, check_id: str, status: str, output: str) -> None:
        """Take a TTL check's update. Raises Unknown, BadDefinition."""
        check = self._check(check_id)
        if status not in STATUSES:
            raise BadDefinition(f"Invalid check status: '{status}'")
        if check.definition.type() != "ttl":
            raise Unknown(f'CheckID "{check_id}" does not have associated TTL')
        self.checks.heard(check_id, status, output)
        await self.sync.settled(("check", check_id), self.options.register_wait_s)

    async def set_maintenance(self, service_id: str, enable: bool, reason: str) -> None:
        """Put a service (or with an empty id the node) in or out of maintenance. Raises Unknown."""
        if service_id and service_id not in self.local.services:
            raise _unknown_service(service_id)
        check_id = f"_service_maintenance:{service_id}" if service_id else "_node_maintenance"
        what = "service" if service_id else "node"
        if not enable:
            if check_id in self.local.checks:
                await self.deregister_check(check_id)
            return
        default = (
            f"Maintenance mode is enabled for this {what}, but no reason was provided. This is a default message."
        )
        check = CheckDefinition(
            check_id=check_id,
            name=f"{what.capitalize()} Maintenance Mode",
            notes=reason or default,
            service_id=service_id,
            status=CRITICAL,
        )
        await self._to_the_end(self._put_own_check(check))

    def _check(self, check_id: str) -> LocalCheck:
        check = self.local.checks.get(check_id)
        if check is None:
            raise Unknown(f'Unknown check ID "{check_id}". Ensure that the check ID is passed, not the check name.')
        return check

    def _drop_check(self, check_id: str) -> None:
        self.streams.forget(check_id)
        self.checks.remove(check_id)
        self.local.drop_check(check_id)

    def _reap(self, service_id: str) -> None:
        async def reap() -> None:
            try:
                await self.deregister_service(service_id)
            except Unknown:
                return

        self._tasks.spawn(reap())

    async def _to_the_end(self, work: Coroutine[Any, Any, None]) -> None:
        """Run a change whole, even if whoever asked for it hangs up halfway: file and memory must agree."""
        task = asyncio.ensure_future(work)
        self._changes.add(task)
        task.add_done_callback(self._changes.discard)
        await asyncio.shield(task)

    def _lock(self, name: str) -> asyncio.Lock:
        return self._locks.setdefault(name, asyncio.Lock())

    def _now(self) -> float:
        return asyncio.get_running_loop().time()
