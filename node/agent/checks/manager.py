"""All checks of this node at work: a runner for each probed one, timers for TTLs, aliases that follow other checks,
and the removal of services that stay critical for too long."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable
from typing import Any

from node.agent.checks.probes import probe_for
from node.agent.checks.runner import OUTPUT_BYTES_MAX, bounded, run_check
from node.agent.local import Item, LocalCheck, LocalState, worst
from node.agent.views import View, Views
from node.tasks import Tasks
from raftstate.model.catalog import CRITICAL, PASSING, Check

log = logging.getLogger("lictor.agent.checks")

REAP_AFTER_MIN_S = 60.0
"""Consul's least DeregisterCriticalServiceAfter."""
REAP_PERIOD_S = 5.0


class CheckManager:
    """Runs the checks of ``local``; ``reap`` is told the id of a service that has been critical for too long."""

    def __init__(
        self, local: LocalState, views: Views, reap: Callable[[str], None], *, rng: random.Random | None = None
    ) -> None:
        self._local, self._views, self._reap = local, views, reap
        self._rng = rng or random.Random()
        self._tasks = Tasks("health checks")
        self._runners: dict[str, asyncio.Task[Any]] = {}
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._aliased: dict[str, tuple[View, Callable[[], None]]] = {}
        self._stop_listening: Callable[[], None] | None = None

    def start(self) -> None:
        """Begin to follow the local state and to reap."""
        self._stop_listening = self._local.listen(self._changed)
        self._tasks.spawn(self._reap_loop())

    async def stop(self) -> None:
        """Run nothing more."""
        if self._stop_listening is not None:
            self._stop_listening()
        for check_id in tuple(self._timers) + tuple(self._aliased):
            self.remove(check_id)
        await self._tasks.close()

    def add(self, check: LocalCheck) -> None:
        """Set a check to work; one of the same id ends first."""
        definition = check.definition
        check_id = definition.check_id
        self.remove(check_id)
        kind = definition.type()
        if kind == "ttl":
            self._arm(check_id, definition.ttl)
        elif kind == "alias":
            if definition.alias_node and definition.alias_node != self._local.node:
                view = self._views.acquire("health.node", {"node": definition.alias_node})
                self._aliased[check_id] = (view, view.listen(lambda: self._judge_alias(check_id)))
            self._judge_alias(check_id)
        elif (probe := probe_for(definition)) is not None:

            def report(status: str, output: str) -> None:
                self._verdict(check_id, status, output)

            self._runners[check_id] = self._tasks.spawn(
                run_check(definition, probe, lambda: check.row.status, report, self._rng)
            )

    def remove(self, check_id: str) -> None:
        """Stop working on a check."""
        if (runner := self._runners.pop(check_id, None)) is not None:
            runner.cancel()
        if (timer := self._timers.pop(check_id, None)) is not None:
            timer.cancel()
        if (aliased := self._aliased.pop(check_id, None)) is not None:
            aliased[1]()
            self._views.release(aliased[0])

    def heard(self, check_id: str, status: str, output: str) -> None:
        """Take a TTL check's update from outside; its time starts again."""
        check = self._local.checks[check_id]
        self._verdict(check_id, status, bounded(output, min(check.definition.output_max_size, OUTPUT_BYTES_MAX)))
        self._arm(check_id, check.definition.ttl)

    def _verdict(self, check_id: str, status: str, output: str) -> None:
        if self._local.set_verdict(check_id, status, output, asyncio.get_running_loop().time()):
            log.info("check %s is now %s", check_id, status)

    def _arm(self, check_id: str, ttl_s: float) -> None:
        if (timer := self._timers.pop(check_id, None)) is not None:
            timer.cancel()
        self._timers[check_id] = asyncio.get_running_loop().call_later(ttl_s, self._expired, check_id)

    def _expired(self, check_id: str) -> None:
        self._timers.pop(check_id, None)
        check = self._local.checks.get(check_id)
        if check is not None:
            last = f" (last output before timeout follows): {check.row.output}" if check.row.output else ""
            self._verdict(check_id, CRITICAL, bounded(f"TTL expired{last}"))

    def _changed(self, item: Item) -> None:
        """Aliases follow at once: an alias of a service by its checks, and by its coming and going."""
        kind, name = item
        changed = self._local.checks.get(name) if kind == "check" else None
        for check_id, check in tuple(self._local.checks.items()):
            if check.definition.type() != "alias" or check_id == name:
                continue
            target = check.definition.alias_service
            bears = kind == "service" and name == target
            if kind == "check":
                # Of a check that is gone it is no longer known whose it was.
                bears = changed is None or changed.row.service_id in ("", target)
            if bears:
                self._judge_alias(check_id)

    def _judge_alias(self, check_id: str) -> None:
        check = self._local.checks.get(check_id)
        if check is None:
            return
        node, service_id = check.definition.alias_node, check.definition.alias_service
        if node and node != self._local.node:
            view = self._aliased[check_id][0]
            if not view.known:
                return
            rows = [row for row in view.typed(Check) if row.service_id in ("", service_id)]
        elif service_id and service_id not in self._local.services:
            self._verdict(check_id, CRITICAL, f"Service {service_id} could not be found on node {self._local.node}")
            return
        else:
            rows = [row for row in self._local.health(service_id)[1] if row.check_id != check_id]
        status = worst(row.status for row in rows)
        if status == PASSING:
            self._verdict(check_id, PASSING, "All checks passing." if rows else "No checks found.")
        else:
            bad = next(row for row in rows if row.status == status)
            self._verdict(check_id, status, bounded(f"Aliased check {bad.name!r} failing: {bad.output}"))

    async def _reap_loop(self) -> None:
        while True:
            await asyncio.sleep(REAP_PERIOD_S)
            now = asyncio.get_running_loop().time()
            for check in tuple(self._local.checks.values()):
                after_s = check.definition.deregister_critical_service_after
                since = check.critical_since
                if not after_s or since is None or not check.row.service_id:
                    continue
                if now - since > max(after_s, REAP_AFTER_MIN_S):
                    why = f"check {check.row.check_id} has been critical for too long"
                    log.warning("service %s is deregistered: %s", check.row.service_id, why)
                    self._reap(check.row.service_id)
