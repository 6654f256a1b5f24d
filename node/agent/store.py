"""The agent's files: its node id, the services and checks registered with it."""

from __future__ import annotations

import asyncio
import logging
import uuid
from pathlib import Path
from typing import TypeVar

import msgspec

from node.agent.definitions import CheckDefinition, ServiceDefinition
from node.agent.files import file_name, remove, write_private

log = logging.getLogger("lictor.agent")
T = TypeVar("T")


class SavedService(msgspec.Struct, frozen=True):
    """A service with its checks, as one file: they are registered and withdrawn together."""

    service: ServiceDefinition
    checks: tuple[CheckDefinition, ...] = ()


class SavedCheck(msgspec.Struct, frozen=True):
    """A check registered on its own."""

    check: CheckDefinition


class AgentStore:
    """Files below ``directory``; writes go through a thread, one at a time, in the order they were asked for."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._lock = asyncio.Lock()

    def node_id(self) -> str:
        """Return this node's uuid, made once."""
        path = self._directory / "node-id"
        try:
            return str(uuid.UUID(path.read_text().strip()))
        except FileNotFoundError:
            pass
        except ValueError:
            log.warning("%s holds no uuid; a new node id is made", path)
        made = str(uuid.uuid4())
        write_private(path, made.encode())
        return made

    def load(self) -> tuple[list[SavedService], list[SavedCheck]]:
        """Return what was saved; a file that cannot be read is set aside and reported, the others are kept."""
        return self._read("services", SavedService), self._read("checks", SavedCheck)

    async def save_service(self, saved: SavedService) -> None:
        """Persist; returns once it is durable."""
        await self._write("services", saved.service.service_id(), msgspec.json.encode(saved))

    async def save_check(self, saved: SavedCheck) -> None:
        """Persist; returns once it is durable."""
        await self._write("checks", saved.check.check_id, msgspec.json.encode(saved))

    async def forget_service(self, service_id: str) -> None:
        """Remove; returns once it is durable."""
        await self._remove("services", service_id)

    async def forget_check(self, check_id: str) -> None:
        """Remove; returns once it is durable."""
        await self._remove("checks", check_id)

    async def _write(self, folder: str, key: str, data: bytes) -> None:
        async with self._lock:
            await asyncio.to_thread(write_private, self._directory / folder / file_name(key), data)

    async def _remove(self, folder: str, key: str) -> None:
        async with self._lock:
            await asyncio.to_thread(remove, self._directory / folder / file_name(key))

    def _read(self, folder: str, kind: type[T]) -> list[T]:
        found = []
        for path in sorted((self._directory / folder).glob("*.json")):
            try:
                found.append(msgspec.json.decode(path.read_bytes(), type=kind))
            except (OSError, msgspec.DecodeError) as error:
                log.warning("%s cannot be used and is set aside as .damaged: %s", path, error)
                path.rename(path.with_suffix(".damaged"))
        return found
