"""Anti-entropy: the catalog is made to hold for this node exactly what the agent holds, and nothing else.

A changed item is pushed at once. What the catalog holds is followed by two views; whatever differs, in either
direction, is pushed again: after a restart, after a loss of the catalog, after somebody changed it behind our back.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable
from typing import Any

import msgspec

from node.agent.local import NODE_ITEM, Item, LocalState
from node.agent.views import View, Views
from node.backend import Applied, Backend
from node.errors import BadRequest, NodeError, Refused
from node.tasks import Tasks
from node.views import WHOLE
from raftstate.model.catalog import PASSING, SERF_HEALTH, Check, Node, ServiceInstance
from raftstate.state import commands

log = logging.getLogger("lictor.agent.sync")

PUSHES_MAX = 16
"""Writes in flight at once; one per item."""
RETRY_MIN_S, RETRY_MAX_S = 0.5, 3.0
PUSH_TIMEOUT_S = 10.0
LATE_S = 2.0
"""After this time a server that does not show our writes has nothing to show."""


class AntiEntropy:
    """Keeps the catalog true to ``local``. ``node_row`` gives this node's own row."""

    def __init__(
        self,
        backend: Backend,
        views: Views,
        local: LocalState,
        node_row: Callable[[], Node],
        *,
        interval_s: float = 60.0,
        rng: random.Random | None = None,
    ) -> None:
        self._backend, self._views, self._local, self._node_row = backend, views, local, node_row
        self._interval_s, self._rng = interval_s, rng or random.Random()
        self._dirty: dict[Item, None] = {}
        self._in_flight: set[Item] = set()
        self._waiters: dict[Item, list[asyncio.Future[NodeError | None]]] = {}
        self._pushed_index = 0
        """Index of our latest write; a view that is older says nothing about it."""
        self._refusals: dict[Item, str] = {}
        self._retry: asyncio.TimerHandle | None = None
        self._tasks = Tasks("anti-entropy")
        self._catalog: View | None = None
        self._health: View | None = None
        self._stop: list[Callable[[], None]] = []
        self._compare_due = False
        self._adopted = self._muted = False
        self._late: asyncio.TimerHandle | None = None

    async def start(self) -> None:
        """Begin to follow and to push."""
        self._catalog = self._views.acquire("catalog.node_rows", {"node": self._local.node})
        self._health = self._views.acquire("health.node", {"node": self._local.node})
        self._stop = [
            self._local.listen(self.mark),
            self._catalog.listen(self._compare_soon),
            self._health.listen(self._compare_soon),
        ]
        if self._catalog.known and self._health.known:
            self._compare_soon()
        self._tasks.spawn(self._periodic())

    async def stop(self) -> None:
        """Push nothing more."""
        for stop in self._stop:
            stop()
        for timer in (self._retry, self._late):
            if timer is not None:
                timer.cancel()
        await self._tasks.close()
        for view in (self._catalog, self._health):
            if view is not None:
                self._views.release(view)

    @property
    def pending(self) -> int:
        """How many items the catalog is still to be told of."""
        return len(self._dirty) + len(self._in_flight)

    def mark(self, item: Item) -> None:
        """Push the item's present state, or its absence, as soon as can be."""
        if self._muted:
            return
        if item[0] == "check":
            item = self._carrier(item)
        self._refusals.pop(item, None)
        self._dirty[item] = None
        self._kick()

    def compare_now(self) -> None:
        """Compare with the catalog without waiting for the period; what was refused is tried again."""
        self._refusals.clear()
        self._compare(late=True)

    async def settled(self, item: Item, timeout_s: float) -> NodeError | None:
        """Wait until the item has been pushed. Returns what the catalog refused it with, or None; also None when
        the time runs out first: the push goes on behind."""
        if item not in self._dirty and item not in self._in_flight:
            return None
        waiter: asyncio.Future[NodeError | None] = asyncio.get_running_loop().create_future()
        self._waiters.setdefault(item, []).append(waiter)
        try:
            async with asyncio.timeout(timeout_s):
                return await waiter
        except TimeoutError:
            return None

    def _carrier(self, item: Item) -> Item:
        """A service on its way takes its checks along; they need not, and before it could not, go on their own."""
        check = self._local.checks.get(item[1])
        if check is not None and check.row.service_id:
            service: Item = ("service", check.row.service_id)
            if service in self._dirty or service in self._in_flight:
                return service
        return item

    def _kick(self) -> None:
        for item in tuple(self._dirty):
            if len(self._in_flight) >= PUSHES_MAX:
                return
            if item not in self._in_flight:
                del self._dirty[item]
                self._in_flight.add(item)
                self._tasks.spawn(self._push(item))

    async def _push(self, item: Item) -> None:
        failed: NodeError | None = None
        try:
            applied = await self._send(item)
            self._pushed_index = max(self._pushed_index, applied.index)
            applied.unwrap()
        except (Refused, BadRequest) as error:
            # A bad request is one that no server can take, however often it is sent: as final as a refusal.
            failed = error if isinstance(error, Refused) else Refused(str(error))
            self._note_refusal(item, failed)
        except NodeError as error:
            log.info("%s %s is not in the catalog yet: %s; trying again", *item, error)
            self._dirty[item] = None
            self._retry_later()
            return
        finally:
            self._in_flight.discard(item)
        if item not in self._dirty:
            for waiter in self._waiters.pop(item, ()):
                if not waiter.done():
                    waiter.set_result(failed)
        self._kick()

    def _note_refusal(self, item: Item, error: Refused) -> None:
        """An item that is refused is not pushed again until it changes or the catalog does."""
        if self._refusals.get(item) != str(error):
            self._refusals[item] = str(error)
            log.warning("the catalog refuses %s %s: %s", *item, error)
        check = self._local.checks.get(item[1]) if item[0] == "check" else None
        if check is not None and check.row.service_id in self._local.services:
            self.mark(("service", check.row.service_id))

    def _retry_later(self) -> None:
        if self._retry is None or self._retry.when() <= asyncio.get_running_loop().time():
            pause_s = self._rng.uniform(RETRY_MIN_S, RETRY_MAX_S)
            self._retry = asyncio.get_running_loop().call_later(pause_s, self._kick)

    async def _send(self, item: Item) -> Applied:
        node, (kind, name) = self._local.node, item
        command: Any
        if kind == "node":
            command = commands.CatalogRegister(node=self._node_row(), checks=self._first_liveness())
        elif kind == "service" and name in self._local.services:
            command = commands.CatalogRegister(
                node=self._node_row(),
                service=self._local.services[name].row,
                checks=tuple(check.row for check in self._local.checks_of(name)),
                skip_node_update=True,
            )
        elif kind == "service":
            command = commands.DeregisterService(node=node, service_id=name)
        elif name in self._local.checks:
            row = self._local.checks[name].row
            command = commands.CatalogRegister(node=self._node_row(), checks=(row,), skip_node_update=True)
        else:
            command = commands.DeregisterCheck(node=node, check_id=name)
        return await self._backend.apply(command, timeout_s=PUSH_TIMEOUT_S)

    def _first_liveness(self) -> tuple[Check, ...]:
        """The liveness check is the servers' to judge; the agent only sees to it that there is one."""
        if self._health is not None and any(row.check_id == SERF_HEALTH for row in self._health.typed(Check)):
            return ()
        return (
            Check(
                node=self._local.node,
                check_id=SERF_HEALTH,
                name="Serf Health Status",
                status=PASSING,
                output="Agent alive and reachable",
            ),
        )

    def _compare_soon(self) -> None:
        """Compare once the loop has delivered what belongs together."""
        if not self._compare_due:
            self._compare_due = True
            asyncio.get_running_loop().call_soon(self._compare)

    async def _periodic(self) -> None:
        while True:
            await asyncio.sleep(self._interval_s * self._rng.uniform(0.75, 1.25))
            self.compare_now()

    def _compare(self, *, late: bool = False) -> None:
        """Mark what differs. ``late``: nothing of ours can still be on its way, so that output counts as well."""
        self._compare_due = False
        catalog, health = self._catalog, self._health
        if catalog is None or health is None or not (catalog.connected and health.connected):
            return
        if not self._adopted:
            self._adopt(health)
        fresh = {
            view for view in (catalog, health) if late or view.index >= self._pushed_index
        }  # the others do not show our own writes yet: a comparison would undo or repeat these
        if len(fresh) < 2 and self._late is None:
            # They will show them and be compared then; where a write changed no row, this sees that all is well.
            self._late = asyncio.get_running_loop().call_later(LATE_S, self._compare_late)
        found = self._services_that_differ(catalog) if catalog in fresh else []
        if health in fresh:
            found += self._checks_that_differ(health, with_output=late)
        for item in found:
            if item not in self._dirty and item not in self._in_flight and item not in self._refusals:
                self.mark(item)

    def _adopt(self, health: View) -> None:
        """Before the first comparison; what is adopted is what the catalog holds, so nothing of it is pushed."""
        self._adopted = True
        self._muted = True
        try:
            held = {row.check_id: row for row in health.typed(Check)}
            self._local.adopt(held, asyncio.get_running_loop().time())
        finally:
            self._muted = False

    def _compare_late(self) -> None:
        self._late = None
        self._compare(late=True)

    def _services_that_differ(self, catalog: View) -> list[Item]:
        found: list[Item] = []
        node, services = node_and_services(catalog)
        if node is None or not same_node(node, self._node_row()):
            found.append(NODE_ITEM)
        for service_id, service in self._local.services.items():
            remote = services.get(service_id)
            if remote is not None and service.row.enable_tag_override and remote.tags != service.row.tags:
                self._local.set_tags(service_id, remote.tags)
            if remote is None or remote != plain(service.row):
                found.append(("service", service_id))
        found.extend(("service", gone) for gone in services if gone not in self._local.services)
        return found

    def _checks_that_differ(self, health: View, *, with_output: bool) -> list[Item]:
        found: list[Item] = []
        checks = {row.check_id: row for row in health.typed(Check)}
        if SERF_HEALTH not in checks:
            found.append(NODE_ITEM)
        for check_id, check in self._local.checks.items():
            row = checks.get(check_id)
            # A new output alone is not worth a write each time; it goes along with the next change or period.
            same = plain if with_output else without_output
            if row is None or same(row) != same(check.row):
                found.append(("check", check_id))
        # The checks of a service that is not ours go with it.
        found.extend(
            ("check", gone)
            for gone, row in checks.items()
            if gone not in self._local.checks
            and gone != SERF_HEALTH
            and (not row.service_id or row.service_id in self._local.services)
        )
        return found


def node_and_services(view: View) -> tuple[Node | None, dict[str, ServiceInstance]]:
    """Return what a ``catalog.node_rows`` view holds, without indexes; only what changed is converted anew."""

    def read() -> tuple[Node | None, dict[str, ServiceInstance]]:
        rows = view.mapped("node rows", _node_row)
        services = {key: row for key, row in rows.items() if isinstance(row, ServiceInstance)}
        node = rows.get(WHOLE)
        return node if isinstance(node, Node) else None, services

    return view.memo("node and services", read)


def _node_row(key: str, row: Any) -> Node | ServiceInstance:
    kind: type[Node | ServiceInstance] = Node if key == WHOLE else ServiceInstance
    converted: Node | ServiceInstance = plain(row if type(row) is kind else msgspec.convert(row, kind))
    return converted


def same_node(one: Node, other: Node) -> bool:
    """Whether two rows say the same of a node."""
    return bool(plain(one) == plain(other))


def plain(row: Any) -> Any:
    """Return a row without its indexes."""
    return msgspec.structs.replace(row, create_index=0, modify_index=0)


def without_output(row: Check) -> Check:
    """Return what of a check's row is compared with the catalog."""
    return msgspec.structs.replace(row, output="", create_index=0, modify_index=0)
