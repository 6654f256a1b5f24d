"""What is registered on this node, in memory: services, checks, and what the catalog must still be told.

Changed only on the loop, by the agent. Listeners are told which items changed; they must not block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import msgspec

from node.agent.definitions import CheckDefinition, ServiceDefinition
from raftstate.model.catalog import CRITICAL, PASSING, WARNING, Check, ServiceInstance

Item = tuple[Literal["node", "service", "check"], str]
"""Something the catalog holds for this node: its row, a service by id, a check by id."""
NODE_ITEM: Item = ("node", "")


@dataclass(slots=True)
class LocalService:
    """A registered service and the row it becomes. ``row.tags`` may be the catalog's (EnableTagOverride)."""

    definition: ServiceDefinition
    row: ServiceInstance


@dataclass(slots=True)
class LocalCheck:
    """A registered check and its latest verdict."""

    definition: CheckDefinition
    row: Check
    critical_since: float | None = None
    """Loop time since when it is critical without a break."""
    own_file: bool = field(default=False)
    """Whether it was registered on its own rather than with its service."""
    unjudged: bool = field(default=False)
    """Loaded from a file and not run since: the catalog's last verdict is as good as any."""


class LocalState:
    """The node's services and checks."""

    def __init__(self, node: str) -> None:
        self.node = node
        self.services: dict[str, LocalService] = {}
        self.checks: dict[str, LocalCheck] = {}
        self._listeners: list[Callable[[Item], None]] = []

    def listen(self, listener: Callable[[Item], None]) -> Callable[[], None]:
        """Call ``listener`` with each changed item; return how to stop."""
        self._listeners.append(listener)
        return lambda: self._listeners.remove(listener)

    def changed(self, item: Item) -> None:
        """Tell the listeners."""
        for listener in tuple(self._listeners):
            listener(item)

    def put_service(self, definition: ServiceDefinition) -> None:
        """Add or replace a service; its checks are put after it."""
        service_id = definition.service_id()
        self.services[service_id] = LocalService(definition, definition.to_row(self.node))
        self.changed(("service", service_id))

    def drop_service(self, service_id: str) -> LocalService | None:
        """Remove a service; its checks are dropped before it."""
        dropped = self.services.pop(service_id, None)
        if dropped is not None:
            self.changed(("service", service_id))
        return dropped

    def put_check(self, definition: CheckDefinition, now: float, *, own_file: bool = False) -> LocalCheck:
        """Add or replace a check; a check that is already there keeps its verdict."""
        service = self.services.get(definition.service_id)
        row = definition.to_row(self.node, service.row if service else None)
        before = self.checks.get(definition.check_id)
        if before is not None and before.row.service_id == row.service_id:
            row = msgspec.structs.replace(row, status=before.row.status, output=before.row.output)
            since = before.critical_since
        else:
            since = now if row.status == CRITICAL else None
        check = LocalCheck(definition, row, since, own_file)
        self.checks[definition.check_id] = check
        self.changed(("check", definition.check_id))
        return check

    def drop_check(self, check_id: str) -> LocalCheck | None:
        """Remove a check."""
        dropped = self.checks.pop(check_id, None)
        if dropped is not None:
            self.changed(("check", check_id))
        return dropped

    def set_verdict(self, check_id: str, status: str, output: str, now: float) -> bool:
        """Store a check's result; return whether the status changed. Unknown checks are ignored."""
        check = self.checks.get(check_id)
        if check is None:
            return False
        check.unjudged = False
        row = check.row
        if row.status == status and row.output == output:
            return False
        check.row = msgspec.structs.replace(row, status=status, output=output)
        if status != CRITICAL:
            check.critical_since = None
        elif check.critical_since is None:
            check.critical_since = now
        if row.status != status:
            self.changed(("check", check_id))
            return True
        return False

    def adopt(self, held: Mapping[str, Check], now: float) -> None:
        """Take the catalog's verdict for checks that have not run since they were loaded.

        Otherwise a restart of the agent would fail every service until its checks have run, or its app has reported.
        """
        for check_id, check in self.checks.items():
            row = held.get(check_id)
            if check.unjudged and row is not None and row.service_id == check.row.service_id:
                self.set_verdict(check_id, row.status, row.output, now)

    def set_tags(self, service_id: str, tags: tuple[str, ...]) -> None:
        """Take over tags that somebody set in the catalog (EnableTagOverride)."""
        service = self.services[service_id]
        service.row = msgspec.structs.replace(service.row, tags=tags)

    def checks_of(self, service_id: str) -> list[LocalCheck]:
        """Return the checks of one service."""
        return [check for check in self.checks.values() if check.row.service_id == service_id]

    def health(self, service_id: str) -> tuple[str, list[Check]]:
        """Return a service's status on this node, node checks included, and the checks it rests on."""
        rows = [check.row for check in self.checks.values() if check.row.service_id in ("", service_id)]
        return worst(row.status for row in rows), rows


def worst(statuses: Iterable[str]) -> str:
    """Return the worst status; passing when there is none."""
    found = set(statuses)
    return CRITICAL if CRITICAL in found else WARNING if WARNING in found else PASSING
