"""What an upstream's name means: ``NAME[=SERVICE][:PORT]``. Pure.

The service that is named (or of the upstream's own name); else, with a port, the one service registered on that port
which the source may reach. None or several is an error whose text lists them. On a sidecar's own service the
port of its own app means the app itself.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Protocol

from raftstate.model.catalog import KIND_CONNECT_PROXY, ServiceInstance, Upstream
from raftstate.model.identity import Identity


class Decided(Protocol):
    """The part of a decision that matters here."""

    @property
    def allowed(self) -> bool: ...


class Decides(Protocol):
    """A compiled policy (``proxy.authz.Policy``)."""

    def decide(self, source: Identity, service: str, instance: str) -> Decided:
        """Decide a connection."""


@dataclass(frozen=True, slots=True)
class Resolution:
    """Where an upstream leads: a service, or the sidecar's own app (``loopback_port``), or nowhere (``error``)."""

    service: str = ""
    loopback_port: int = 0
    error: str = ""


def resolve(
    upstream: Upstream,
    source: Identity,
    local_port: int,
    services: Collection[str],
    on_port: Iterable[ServiceInstance],
    policy: Decides,
) -> Resolution:
    """Resolve one upstream of ``source``'s sidecar, whose app listens on ``local_port`` (0: on none).

    ``services`` are the names in the catalog, ``on_port`` the instances registered on the upstream's port.
    """
    name, port = upstream.destination_name, upstream.destination_port
    label = upstream.upstream_name or name
    if name and (name in services or not port):
        # A service that is named but not there yet is waited for: it resolves to itself, with no instance behind it.
        return Resolution(service=name)
    if not name and upstream.upstream_name in services:
        return Resolution(service=upstream.upstream_name)
    if not port:
        return Resolution(error=f"upstream {label!r}: no service of that name; name one as {label}=SERVICE")
    if port == local_port:
        return Resolution(service=source.service, loopback_port=port)
    return _by_port(label, port, source, list(on_port), policy)


def _by_port(label: str, port: int, source: Identity, rows: list[ServiceInstance], policy: Decides) -> Resolution:
    found = sorted({row.service for row in rows if row.kind != KIND_CONNECT_PROXY and row.service != source.service})
    reachable = sorted(
        {row.service for row in rows if row.service in found and policy.decide(source, row.service, row.id).allowed}
    )
    if len(reachable) == 1:
        return Resolution(service=reachable[0])
    who = source.instance or source.service
    if reachable:
        several = ", ".join(reachable)
        return Resolution(
            error=f"upstream {label!r}: {who} may reach several services on port {port}: {several}; "
            f"say which, as {label}={reachable[0]}:{port}"
        )
    if found:
        return Resolution(
            error=f"upstream {label!r}: on port {port} there is {', '.join(found)}, and no intention lets {who} "
            f"reach it; create one: lictor intentions create -from {who} -to {found[0]}"
        )
    return Resolution(
        error=f"upstream {label!r}: no service of that name, and none is registered on port {port}; "
        f"register it, or name a service as {label}=SERVICE"
    )
