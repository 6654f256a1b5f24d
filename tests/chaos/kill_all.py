"""Kill -9 every server at once under load, restart, and look for each acknowledged write; again and again.

    python -m tests.chaos.kill_all --rounds 100

The servers' disks forget what was not synced (see `planted_server`), so that a kill is a power cut. Each write is a
compare-and-set of a key that must not exist yet. One whose outcome was unknown is sent again after the restart under
its request id: were it applied twice, the second time would find the key and say no.
Ends with 1 if anything acknowledged was lost, or anything was applied twice.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp

from cli.cluster.supervisor import Supervisor
from tests.chaos import planted_server
from tests.chaos.support_chaos import REQUEST_ID_HEADER, SETTLE_S, kill_and_restart_all, server_processes

PREFIX = "kill-all"
CLIENTS = 8
LOAD_S = (0.3, 1.2)
"""Bounds of the time between a start and the next kill."""
PAUSE_S = 0.05


@dataclass
class Ledger:
    """What the clients know. Every write has a key of its own, so that none can hide behind another."""

    acknowledged: set[str] = field(default_factory=set)
    unknown: list[str] = field(default_factory=list)
    retried: int = 0
    doubled: set[str] = field(default_factory=set)
    """Keys that a retry found to be there already: its first attempt was forgotten, and it was applied again."""

    def faults(self, rows: dict[str, str]) -> list[str]:
        """Return what the rows found after a restart, key -> value, have lost or doubled."""
        found = [f"{key} was acknowledged and is lost" for key in sorted(self.acknowledged - set(rows))]
        found += [f"{key} holds {rows[key]!r}" for key in sorted(rows) if rows[key] != key]
        return found + [f"{key} was applied twice" for key in sorted(self.doubled)]


async def _put(http: aiohttp.ClientSession, address: str, key: str) -> bool | None:
    """Return whether the key was made by this write; None when its outcome is unknown."""
    headers = {REQUEST_ID_HEADER: f"{PREFIX}-{key.replace('/', '.')}"}
    try:
        async with http.put(f"http://{address}/v1/kv/{key}?cas=0", data=key, headers=headers) as answer:
            text = await answer.text()
            return text.strip() == "true" if answer.status == 200 else None
    except (aiohttp.ClientError, TimeoutError):
        return None


async def _writer(
    http: aiohttp.ClientSession, addresses: Sequence[str], ledger: Ledger, name: str, stop: asyncio.Event
) -> None:
    """Write one key after another, through one server after another."""
    number = 0
    while not stop.is_set():
        key = f"{PREFIX}/{name}/{number}"
        made = await _put(http, addresses[number % len(addresses)], key)
        if made is not None:
            (ledger.acknowledged if made else ledger.doubled).add(key)
        else:
            ledger.unknown.append(key)
            await asyncio.sleep(PAUSE_S)
        number += 1


async def _settle(http: aiohttp.ClientSession, addresses: Sequence[str], ledger: Ledger) -> None:
    """Send the writes of unknown outcome again: what was applied before the kill must not be applied again."""
    unknown, ledger.unknown = ledger.unknown, []
    deadline = time.monotonic() + SETTLE_S
    for number, key in enumerate(unknown):
        while (made := await _put(http, addresses[number % len(addresses)], key)) is None:
            if time.monotonic() > deadline:
                raise TimeoutError(f"the cluster did not take {key} within {SETTLE_S:g} s after the restart")
            await asyncio.sleep(PAUSE_S)
        (ledger.acknowledged if made else ledger.doubled).add(key)
        ledger.retried += 1


async def _rows(http: aiohttp.ClientSession, address: str, mode: str) -> dict[str, str]:
    deadline = time.monotonic() + SETTLE_S
    while True:
        async with http.get(f"http://{address}/v1/kv/{PREFIX}/?recurse&{mode}") as answer:
            if answer.status in (200, 404):  # 404: no such key at all
                found = await answer.json() if answer.status == 200 else []
                break
        if time.monotonic() > deadline:
            raise TimeoutError(f"{address} gave no {mode} answer within {SETTLE_S:g} s after the restart")
        await asyncio.sleep(PAUSE_S)
    return {row["Key"]: base64.b64decode(row["Value"]).decode() for row in found}


async def play_round(supervisor: Supervisor, ledger: Ledger, number: int, load_s: float) -> list[str]:
    """Load, kill all, restart, look at every write of this round and all before; return what is wrong."""
    addresses = [supervisor.http_addr(name) for name in supervisor.names]
    stop, loop = asyncio.Event(), asyncio.get_running_loop()
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=SETTLE_S)) as http:
        writers = [
            asyncio.create_task(_writer(http, addresses, ledger, f"{number}-{n}", stop)) for n in range(CLIENTS)
        ]
        await asyncio.sleep(load_s)

        def killed() -> None:
            loop.call_soon_threadsafe(stop.set)

        restart = asyncio.create_task(asyncio.to_thread(kill_and_restart_all, supervisor, killed))
        await asyncio.gather(restart, *writers)
        await _settle(http, addresses, ledger)
        return ledger.faults(await _rows(http, addresses[number % len(addresses)], "consistent"))


async def play(supervisor: Supervisor, rounds: int, seed: int, *, quiet: bool = False) -> tuple[Ledger, list[str]]:
    """Play that many rounds, or until something is wrong; return what the clients know, and what is wrong."""
    rng = random.Random(seed)
    ledger = Ledger()
    began = time.monotonic()
    for number in range(1, rounds + 1):
        before = len(ledger.acknowledged)
        faults = await play_round(supervisor, ledger, number, rng.uniform(*LOAD_S))
        if not quiet:
            print(
                f"round {number:3d}: {len(ledger.acknowledged) - before} writes, {len(ledger.acknowledged)} in all,"
                f" {ledger.retried} of them known only to a retry, {len(faults)} wrong"
                f"  ({time.monotonic() - began:.0f} s)",
                flush=True,
            )
        if faults:
            return ledger, faults
    return ledger, []


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--servers", type=int, default=3)
    parser.add_argument("--seed", type=int, default=1, help="decides when the kills come")
    args = parser.parse_args()
    directory = Path(tempfile.mkdtemp(prefix="lictor-kill-all-"))
    try:
        with server_processes(directory, servers=args.servers, program=planted_server.program()) as supervisor:
            ledger, faults = asyncio.run(play(supervisor, args.rounds, args.seed))
    except BaseException:
        print(f"the servers' logs and data are kept in {directory}")
        raise
    for fault in faults[:20]:
        print(fault)
    if faults:
        print(f"FAILED: {len(faults)} faults; the servers' logs and data are kept in {directory}")
        return 1
    shutil.rmtree(directory)
    print(
        f"Passed: {args.rounds} rounds, {len(ledger.acknowledged)} acknowledged writes, none lost, none applied twice"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
