"""Simulated clients: write, count and read through any server, retry with the same request id, give up at times."""

from __future__ import annotations

from typing import Any

from raftstate.errors import NotLeader
from tests.simulation.referee import Referee
from tests.simulation.server import SimServer
from tests.simulation.world import World
from tests.support.raft_machine import command

KEYS = ("a", "b", "n")
"""`n` is a counter: a write that is applied twice shows in it."""
PATIENCE_S = 0.7


class SimClient:
    """One operation at a time, for ever."""

    def __init__(
        self,
        name: str,
        world: World,
        referee: Referee,
        servers: dict[str, SimServer],
        *,
        pace_s: float,
        wander: float,
    ) -> None:
        self._wander = wander
        """Chance to ask any server rather than the one that was named the leader."""
        self._name, self._world, self._referee, self._servers, self._pace_s = name, world, referee, servers, pace_s
        self._count = 0
        self._attempt = 0
        """Answers to earlier attempts are too late."""
        self._hint: str | None = None
        self.finished = 0
        self.stopping = False
        world.after(world.rng.random() * pace_s, self._next)

    def _next(self) -> None:
        if self.stopping:
            return
        self._count += 1
        rng = self._world.rng
        floor = self._referee.floor
        if rng.random() < 0.55:
            key = rng.choice(KEYS)
            request = f"{self._name}.{self._count}"
            data = command(request, key, None if key == "n" else request)
            self._write(request, data, floor, tries=0)
        else:
            self._read(rng.choice(KEYS), rng.choice(("default", "default", "consistent", "stale")), floor, tries=0)

    def _pick(self) -> SimServer:
        hinted = self._servers.get(self._hint or "")
        if hinted is not None and self._world.rng.random() >= self._wander:
            return hinted
        return self._servers[self._world.rng.choice(list(self._servers))]

    def _rest(self) -> None:
        self._attempt += 1
        self._world.after(self._pace_s * (0.5 + self._world.rng.random()), self._next)

    def _write(self, request: str, data: bytes, floor: int, tries: int) -> None:
        self._attempt += 1
        attempt, server = self._attempt, self._pick()

        def answered(applied: Any, error: Any) -> None:
            # A lost answer is a retry with the same request id.
            if self._world.rng.random() < 0.05:
                return
            if error is None:
                self._referee.write_acknowledged(request, applied.index, applied.value, floor)
            if attempt != self._attempt:
                return
            if error is None:
                self._world.note(self._name, f"write {request} -> {applied.value} at {applied.index}")
                self.finished += 1
                self._rest()
            else:
                again(error)

        def again(error: Any) -> None:
            self._hint = error.leader if isinstance(error, NotLeader) else None
            if tries > 12 or self.stopping:
                self._rest()
            else:
                self._attempt += 1
                self._world.after(0.02, lambda: self._write(request, data, floor, tries + 1))

        def too_late() -> None:
            if attempt == self._attempt:
                again(None)

        self._world.after(PATIENCE_S, too_late)
        self._world.after(0.0005, lambda: server.write(data, answered))

    def _read(self, key: str, mode: str, floor: int, tries: int) -> None:
        self._attempt += 1
        attempt, server = self._attempt, self._pick()
        if mode == "stale":
            if server.alive and self._world.now >= server.paused_until and not server.core.install:
                value = server.machine.registers.get(key)
                self._referee.read_answered(key, value, server.core.applied, floor, stale=True)
            self._rest()
            return

        def answered(index: int | None, error: Any) -> None:
            if index is not None and attempt == self._attempt:
                value = server.machine.registers.get(key)
                self._world.note(
                    self._name, f"read {mode} {key} at {server.name} -> {value} at {server.core.applied}"
                )
                self._referee.read_answered(key, value, server.core.applied, floor, stale=False)
                self.finished += 1
                self._rest()
            elif attempt == self._attempt:
                again(error)

        def again(error: Any) -> None:
            self._hint = error.leader if isinstance(error, NotLeader) else None
            if tries > 12 or self.stopping:
                self._rest()
            else:
                self._attempt += 1
                self._world.after(0.02, lambda: self._read(key, mode, floor, tries + 1))

        def too_late() -> None:
            if attempt == self._attempt:
                again(None)

        self._world.after(PATIENCE_S, too_late)
        self._world.after(0.0005, lambda: server.read(lease=mode == "default", done=answered))
