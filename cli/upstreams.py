"""``-upstreams "NAME[=SERVICE][:PORT]"``, several separated by commas: what a sidecar's app wants to reach."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from cli.errors import UsageError

_SPEC = re.compile(r"(?P<name>[^=:,\s]+)(?:=(?P<service>[^=:,\s]+))?(?::(?P<port>[^=:,\s]+))?")
_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?")


@dataclass(frozen=True)
class UpstreamSpec:
    """One upstream as the user gave it. Without a ``service``, NAME is looked up, and failing that the port."""

    name: str
    service: str = ""
    port: int = 0
    bind_port: int = 0
    """Local listener's port; 0: the first free one."""
    config: dict[str, Any] = field(default_factory=dict, hash=False)
    """How it is called: see :mod:`proxy.upstream_settings`."""

    @property
    def variable(self) -> str:
        """Return the stem of the environment variables: ``backend-v2`` -> ``BACKEND_V2``."""
        return re.sub(r"[^A-Z0-9]", "_", self.name.upper())

    def __str__(self) -> str:
        return self.name + (f"={self.service}" if self.service else "") + (f":{self.port}" if self.port else "")


def parse_upstreams(text: str) -> tuple[UpstreamSpec, ...]:
    """Parse the flag's value. Raises :class:`UsageError` naming the part that is wrong."""
    return tuple(parse_upstream(part.strip()) for part in text.split(",") if part.strip())


def parse_upstream(text: str) -> UpstreamSpec:
    """Parse one ``NAME[=SERVICE][:PORT]``."""
    found = _SPEC.fullmatch(text)
    if not found:
        raise UsageError(f"upstream {text!r}: expected NAME, NAME:PORT, NAME=SERVICE or NAME=SERVICE:PORT")
    for part in (found["name"], found["service"]):
        if part is not None and not _NAME.fullmatch(part):
            raise UsageError(f"upstream {text!r}: {part!r} is not a name (letters, digits, and - _ . inside)")
    port = found["port"]
    if port is not None and not (port.isascii() and port.isdigit() and 0 < int(port) <= 65535):
        raise UsageError(f"upstream {text!r}: {port!r} is not a port from 1 to 65535")
    return UpstreamSpec(found["name"], found["service"] or "", int(port or 0))


def merge(*groups: tuple[UpstreamSpec, ...]) -> tuple[UpstreamSpec, ...]:
    """Join the upstreams of several places. The same one twice is one; two that disagree are an error."""
    merged: dict[str, UpstreamSpec] = {}
    for spec in (one for group in groups for one in group):
        earlier = merged.get(spec.variable)
        if earlier is None:
            merged[spec.variable] = spec
        elif (earlier.name, earlier.service, earlier.port) != (spec.name, spec.service, spec.port):
            raise UsageError(
                f"upstreams {earlier} and {spec} contradict each other: both would set {spec.variable}_ADDR"
            )
        elif spec.bind_port or spec.config:
            merged[spec.variable] = spec
    return tuple(merged.values())
