"""Which instances of its callers an agent knows of, for an Envoy's stream: what it has views of, and no more.

It is a hint by which connections are told apart: nobody is let in or kept out by it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from node.agent.views import View, Views
from raftstate.model.catalog import InstanceHealth

SIDECARS = "-sidecar-proxy"
"""How the names under which sidecars stand in the catalog end; apps are who calls."""
FOLLOWED_MAX = 128
"""Services whose instances are followed; those of others are not told apart."""


class KnownCallers:
    """Follows the instances of some services, or the names of all. ``changed`` is called when one comes or goes."""

    def __init__(self, views: Views, changed: Callable[[], None]) -> None:
        self._views, self._changed = views, changed
        self._held: dict[str, tuple[View, Callable[[], None]]] = {}

    def follow(self, services: Iterable[str], *, everyone: bool) -> None:
        """Follow the instances of these services; ``everyone``: and which services there are."""
        wanted: dict[str, tuple[str, dict[str, str]]] = {
            service: ("health.connect", {"service": service}) for service in sorted(services)[:FOLLOWED_MAX]
        }
        if everyone:
            wanted[""] = ("catalog.services", {})
        for key in self._held.keys() - wanted.keys():
            self._let_go(key)
        for key in wanted.keys() - self._held.keys():
            view = self._views.acquire(*wanted[key])
            self._held[key] = view, view.listen(self._changed)

    def instances(self) -> dict[str, tuple[str, ...]]:
        """Return the instances by service, without the services of which nothing is known yet."""
        return {key: _instances(view) for key, view in self._views_known() if key}

    def services(self) -> tuple[str, ...]:
        """Return the names of all services, none while they are not followed or not known."""
        found = next((view.rows for key, view in self._views_known() if not key), ())
        return tuple(sorted(name for name in found if not name.endswith(SIDECARS)))

    def close(self) -> None:
        """Follow nothing more."""
        for key in tuple(self._held):
            self._let_go(key)

    def _views_known(self) -> list[tuple[str, View]]:
        return [(key, view) for key, (view, _) in self._held.items() if view.known]

    def _let_go(self, key: str) -> None:
        view, stop = self._held.pop(key)
        stop()
        self._views.release(view)


def _instances(view: View) -> tuple[str, ...]:
    """Return the instances before which the sidecars in a view stand."""
    return view.memo("instances", lambda: _found(view.typed(InstanceHealth)))


def _found(rows: Iterable[InstanceHealth]) -> tuple[str, ...]:
    found = {row.service.proxy.destination_service_id for row in rows if row.service.proxy is not None}
    return tuple(sorted(found - {""}))
