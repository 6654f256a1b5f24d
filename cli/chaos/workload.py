"""Concurrent clients of a chaos run: they read, write and compare-and-set KV keys through every node, register
services and intentions, and record what each call was answered."""

from __future__ import annotations

import asyncio
import base64
import random
import time
import uuid
from collections.abc import Mapping
from typing import Any

import aiohttp

from cli.chaos.history import CAS, FOREVER, READ, WRITE, Operation
from cli.client import REQUEST_ID_HEADER

MODES = ("default", "consistent", "stale")
PAUSE_AFTER_ERROR_S = 0.05
ERROR_SHOWN_MAX = 160
KEYS_AT_ONCE = 5
OPERATIONS_PER_GENERATION = 400
"""After so many operations the clients move to fresh keys, which bounds the checker's search per key."""


class Recorder:
    """Collects operations and acknowledged registrations; one per run, shared by its clients."""

    def __init__(self, clock: float) -> None:
        self.began = clock
        self.operations: list[Operation] = []
        self.services: set[str] = set()
        """Names whose registration was acknowledged."""
        self.intentions: set[tuple[str, str]] = set()
        self.errors: dict[str, int] = {}
        self._serial = 0

    def now_s(self) -> float:
        """Seconds since the run began."""
        return time.monotonic() - self.began

    def fresh(self) -> int:
        """Return a number never returned before; it makes written values unique."""
        self._serial += 1
        return self._serial

    def key(self, rng: random.Random, seed: int) -> str:
        """Return one of the keys in use now."""
        generation = len(self.operations) // OPERATIONS_PER_GENERATION
        return f"chaos/{seed}/{generation}/{rng.randrange(KEYS_AT_ONCE)}"

    def count_error(self, text: str) -> None:
        """Count an answer that was not a success, by its first words."""
        text = text.strip().split("\n")[0]
        if len(text) > ERROR_SHOWN_MAX:
            text = text[: ERROR_SHOWN_MAX - 1] + "…"
        self.errors[text] = self.errors.get(text, 0) + 1


class Client:
    """One closed-loop client. It stays with a node for a while, then moves to another."""

    def __init__(
        self, name: str, nodes: Mapping[str, str], recorder: Recorder, *, seed: int, operation_timeout_s: float
    ) -> None:
        self.name = name
        self.nodes = nodes
        self.recorder = recorder
        self.seed = seed
        self.rng = random.Random(f"{seed}/{name}")
        self.timeout = aiohttp.ClientTimeout(total=operation_timeout_s)
        self.stopping = False
        """Set it to have the client end after the operation under way: one that is cancelled would go unrecorded."""

    async def run(self, until_s: float) -> None:
        """Issue operations until the run is ``until_s`` seconds old."""
        async with aiohttp.ClientSession(timeout=self.timeout) as http:
            while not self._ends(until_s):
                node = self.rng.choice(sorted(self.nodes))
                for _ in range(self.rng.randint(1, 30)):
                    if self._ends(until_s):
                        break
                    if not await self._one(http, node):
                        await asyncio.sleep(PAUSE_AFTER_ERROR_S)
                        break

    def _ends(self, until_s: float) -> bool:
        return self.stopping or self.recorder.now_s() >= until_s

    async def _one(self, http: aiohttp.ClientSession, node: str) -> bool:
        draw = self.rng.random()
        key = self.recorder.key(self.rng, self.seed)
        base = f"http://{self.nodes[node]}"
        if draw < 0.40:
            value = f"{self.name}-{self.recorder.fresh()}"
            return await self._write(
                http, node, f"{base}/v1/kv/{key}", Operation(self.name, key, WRITE, 0, value=value)
            )
        if draw < 0.85:
            return (await self._read(http, node, base, key, self.rng.choice(MODES))) is not None
        if draw < 0.95:
            seen = await self._read(http, node, base, key, "default")
            if seen is None:
                return False
            value = f"{self.name}-{self.recorder.fresh()}"
            op = Operation(self.name, key, CAS, 0, value=value, expected=seen[0])
            return await self._write(http, node, f"{base}/v1/kv/{key}?cas={seen[1]}", op)
        return await self._register(http, base)

    async def _write(self, http: aiohttp.ClientSession, node: str, url: str, op: Operation) -> bool:
        began_s = self.recorder.now_s()
        returned_s, succeeded = FOREVER, True
        # aiohttp sends a PUT again when a kept connection broke under it; without an id it might be applied twice.
        headers = {REQUEST_ID_HEADER: uuid.uuid4().hex}
        try:
            async with http.put(url, data=op.value, headers=headers) as answer:
                text = await answer.text()
                if answer.status == 200:
                    returned_s, succeeded = self.recorder.now_s(), text.strip() == "true"
                else:
                    self.recorder.count_error(text)
        except (aiohttp.ClientError, TimeoutError) as error:
            # Even a refused connection proves nothing: it may have been the second attempt.
            self.recorder.count_error(type(error).__name__)
        self.recorder.operations.append(
            Operation(
                op.client, op.key, op.kind, began_s, returned_s,
                value=op.value, expected=op.expected, succeeded=succeeded, node=node,
            )
        )  # fmt: skip
        return returned_s != FOREVER

    async def _read(
        self, http: aiohttp.ClientSession, node: str, base: str, key: str, mode: str
    ) -> tuple[str | None, int] | None:
        """Return (value, ModifyIndex) as read, or None when no answer came."""
        began_s = self.recorder.now_s()
        flag = "" if mode == "default" else f"?{mode}"
        try:
            async with http.get(f"{base}/v1/kv/{key}{flag}") as answer:
                body: Any = await answer.json() if answer.status == 200 else await answer.text()
                if answer.status not in (200, 404):
                    self.recorder.count_error(str(body))
                    return None
                index = int(answer.headers.get("X-Consul-Index", "0"))
        except (aiohttp.ClientError, TimeoutError) as error:
            self.recorder.count_error(type(error).__name__)
            return None
        value = base64.b64decode(body[0]["Value"] or "").decode() if answer.status == 200 else None
        self.recorder.operations.append(
            Operation(
                self.name, key, READ, began_s, self.recorder.now_s(), value=value, mode=mode, node=node, index=index
            )
        )
        return value, (body[0]["ModifyIndex"] if answer.status == 200 else 0)

    async def _register(self, http: aiohttp.ClientSession, base: str) -> bool:
        """Register a service in the catalog and an intention for it; remember both if acknowledged."""
        name = f"chaos-{self.seed}-{self.name}-{self.recorder.fresh()}"
        service = {
            "Node": f"{name}-node",
            "Address": "127.0.0.1",
            "Service": {"ID": name, "Service": name, "Port": 9},
        }
        try:
            async with http.put(f"{base}/v1/catalog/register", json=service) as answer:
                if answer.status != 200:
                    self.recorder.count_error(await answer.text())
                    return False
            self.recorder.services.add(name)
            url = f"{base}/v1/connect/intentions/exact?source={name}&destination={name}-db"
            async with http.put(url, json={"Action": "allow"}) as answer:
                if answer.status != 200:
                    self.recorder.count_error(await answer.text())
                    return False
            self.recorder.intentions.add((name, f"{name}-db"))
        except (aiohttp.ClientError, TimeoutError) as error:
            self.recorder.count_error(type(error).__name__)
            return False
        return True


async def missing(address: str, recorder: Recorder, *, timeout_s: float) -> list[str]:
    """Return the acknowledged registrations and intentions that a consistent read at ``address`` does not show.

    Retries until ``timeout_s`` while no leader answers; raises :class:`TimeoutError` then.
    """
    deadline = time.monotonic() + timeout_s
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=5)) as http:
        while True:
            try:
                async with http.get(f"http://{address}/v1/catalog/services?consistent") as answer:
                    services = await answer.json() if answer.status == 200 else None
                async with http.get(f"http://{address}/v1/connect/intentions?consistent") as answer:
                    intentions = await answer.json() if answer.status == 200 else None
            except (aiohttp.ClientError, TimeoutError):
                services = intentions = None
            if services is not None and intentions is not None:
                break
            if time.monotonic() > deadline:
                raise TimeoutError(f"{address} gave no consistent answer within {timeout_s} s after the faults ended")
            await asyncio.sleep(0.1)
    pairs = {(row["SourceName"], row["DestinationName"]) for row in intentions}
    lost = [f"service {name}" for name in sorted(recorder.services - set(services))]
    return lost + [f"intention {a} => {b}" for a, b in sorted(recorder.intentions - pairs)]
