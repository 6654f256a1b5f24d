"""``proxy.json``: what a sidecar stands in front of.

    {"services": [{"name": "web", "port": 8080, "id": "web-1", "protocol": "http", "public_port": 20000,
                   "upstreams": [{"name": "backend", "service": "api", "port": 8080, "bind_port": 21000,
                                  "config": {"locality": "zone"}}]}]}

Only ``name`` and ``port`` are needed. All errors of a file are reported at once, each by its path in the file.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cli.errors import UsageError
from cli.flags import suggest
from cli.upstreams import UpstreamSpec, parse_upstream

PROTOCOLS = ("tcp", "http", "http2", "grpc")
_SERVICE_KEYS = ("name", "port", "id", "protocol", "public_port", "upstreams", "workers")
MAX_WORKERS = 64
_UPSTREAM_KEYS = ("name", "service", "port", "bind_port", "config")


@dataclass(frozen=True)
class ProxyService:
    """One entry of ``services``."""

    name: str
    port: int = 0
    """The app's own port; 0: it takes no calls."""
    id: str = ""
    protocol: str = ""
    """Empty: it is not said here."""
    public_port: int = 0
    """0: the first free one from 20000."""
    upstreams: tuple[UpstreamSpec, ...] = ()
    workers: int = 1
    """Processes that serve."""
    public_host: str = ""
    """Where other sidecars reach it; empty: it is not said here. Of a registration only, as ``config`` is."""
    config: dict[str, Any] = field(default_factory=dict)


class _Reader:
    """Collects every error of the file while it turns JSON into values."""

    def __init__(self) -> None:
        self.errors: list[str] = []

    def fail(self, path: str, text: str) -> None:
        self.errors.append(f"{path}: {text}")

    def keys(self, path: str, value: Any, known: tuple[str, ...]) -> dict[str, Any]:
        if not isinstance(value, dict):
            self.fail(path, "must be an object")
            return {}
        for key in value:
            if key not in known:
                hint = suggest(key, known) or f" Known: {', '.join(known)}."
                self.fail(f"{path}.{key}" if path else key, f"unknown key.{hint}")
        return value

    def text(self, path: str, value: Any, *, needed: bool = False) -> str:
        if value is None and not needed:
            return ""
        if not isinstance(value, str) or not value:
            self.fail(path, "is missing" if value is None else "must be a text that is not empty")
            return ""
        return value

    def port(self, path: str, value: Any, *, least: int = 0) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= 65535:
            self.fail(path, f"must be a port from {least} to 65535, not {json.dumps(value)}")
            return 0
        return value

    def workers(self, path: str, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_WORKERS:
            self.fail(path, f"must be a number from 1 to {MAX_WORKERS}, not {json.dumps(value)}")
            return 1
        return value

    def settings(self, path: str, value: Any) -> dict[str, Any]:
        if not isinstance(value, dict):
            self.fail(path, "must be an object")
            return {}
        if value:
            from proxy.upstream_settings import ignored_settings

            for wrong in ignored_settings(value):
                self.fail(path, wrong)
        return value

    def upstream(self, path: str, value: Any) -> UpstreamSpec | None:
        if isinstance(value, str):
            try:
                return parse_upstream(value)
            except UsageError as error:
                self.fail(path, str(error))
                return None
        entry = self.keys(path, value, _UPSTREAM_KEYS)
        name = self.text(f"{path}.name", entry.get("name"), needed=True)
        service = self.text(f"{path}.service", entry.get("service"))
        port = self.port(f"{path}.port", entry["port"], least=1) if "port" in entry else 0
        bind_port = self.port(f"{path}.bind_port", entry["bind_port"], least=1) if "bind_port" in entry else 0
        if not name:
            return None
        config = self.settings(f"{path}.config", entry.get("config", {}))
        try:
            parse_upstream(f"{name}={service}" if service else name)
        except UsageError as error:
            self.fail(path, str(error))
            return None
        return UpstreamSpec(name, service, port, bind_port, config)

    def service(self, path: str, value: Any) -> ProxyService:
        entry = self.keys(path, value, _SERVICE_KEYS)
        protocol = self.text(f"{path}.protocol", entry.get("protocol")) or ""
        if protocol and protocol not in PROTOCOLS:
            self.fail(f"{path}.protocol", f"must be one of {', '.join(PROTOCOLS)}, not {protocol!r}")
        upstreams = entry.get("upstreams", [])
        if not isinstance(upstreams, list):
            self.fail(f"{path}.upstreams", "must be a list")
            upstreams = []
        found = [self.upstream(f"{path}.upstreams[{place}]", one) for place, one in enumerate(upstreams)]
        return ProxyService(
            name=self.text(f"{path}.name", entry.get("name"), needed=True),
            port=self.port(f"{path}.port", entry.get("port", 0)),
            id=self.text(f"{path}.id", entry.get("id")),
            protocol=protocol,
            public_port=self.port(f"{path}.public_port", entry["public_port"], least=1)
            if "public_port" in entry
            else 0,
            upstreams=tuple(one for one in found if one is not None),
            workers=self.workers(f"{path}.workers", entry.get("workers", 1)),
        )


def parse_proxy_file(text: str, path: str) -> tuple[ProxyService, ...]:
    """Parse the text of a proxy file. Raises :class:`UsageError` with all errors, by their path in the file."""
    try:
        value = json.loads(text)
    except ValueError as error:
        raise UsageError(f"{path} is not JSON: {error}") from None
    reader = _Reader()
    entries = reader.keys("", value, ("services",)).get("services")
    services: list[ProxyService] = []
    if not isinstance(entries, list) or not entries:
        if isinstance(value, dict):
            reader.fail("services", "must be a list with at least one service")
    else:
        services = [reader.service(f"services[{place}]", entry) for place, entry in enumerate(entries)]
    if reader.errors:
        raise UsageError(f"{path}: " + "; ".join(error.removeprefix(": ") for error in reader.errors))
    return tuple(services)


def read_proxy_file(path: str) -> tuple[ProxyService, ...]:
    """Read a proxy file. Raises :class:`UsageError`."""
    try:
        text = Path(path).read_text()
    except FileNotFoundError:
        raise UsageError(
            f"there is no {path}. Write it before the sidecar starts, such as: "
            '{"services": [{"name": "web", "port": 8080}]}'
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"can't read {path}: {error}") from None
    return parse_proxy_file(text, path)


def choose(services: tuple[ProxyService, ...], name: str, instance: str, path: str) -> ProxyService:
    """Return the entry that the flags mean. Raises :class:`UsageError` when they contradict the file."""
    matching = [
        one for one in services if (not name or one.name == name) and (not instance or one.id in ("", instance))
    ]
    if len(matching) == 1:
        return matching[0]
    there = ", ".join(f"{one.name}{f' ({one.id})' if one.id else ''}" for one in services)
    wanted = " ".join([*([f"-name {name}"] if name else []), *([f"-service-id {instance}"] if instance else [])])
    if matching:
        raise UsageError(
            f"{path} has several services that fit {wanted or 'the flags'}: {there}. Give -name or an id"
        )
    raise UsageError(f"{path} contradicts the flags: it describes {there}, but the command says {wanted}")
