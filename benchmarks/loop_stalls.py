"""How long a large state keeps a server's event loop from other work: at snapshots, and when a server joins.

    python -m benchmarks.loop_stalls [--rows 1000000] [--seconds 5]

Two real servers as processes: `server-1` begins with a snapshot of so many keys and serves writes without pause;
it makes another snapshot and compacts its log; then `server-2`, with an empty disk, joins and is fed that snapshot.
A task of each loop that sleeps one millisecond notes how late it wakes: by the wall clock, which counts whatever
else runs on the machine, and in CPU time of the loop's thread, which counts what the loop itself did meanwhile.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import uvloop

from benchmarks.replication import free_ports
from benchmarks.state_snapshot import filled
from node.config import ClusterConfig, load_config
from node.main import _calm_the_collector
from node.pki import ensure_local_pki
from node.server_process import ServerNode
from raftstate.disk import RealDisk
from raftstate.snapshots import SnapshotStore
from raftstate.state import commands as c

TICK_S = 0.001
WRITERS = 4


class Watch:
    """Notes how late a sleeping task of this loop wakes."""

    def __init__(self) -> None:
        self.wall_ms: list[float] = []
        self.cpu_ms: list[float] = []
        self.collecting_ms = 0.0
        """The longest run of the collector, in whichever thread."""
        self._began = 0.0
        gc.callbacks.append(self._collects)

    def _collects(self, phase: str, _info: dict[str, int]) -> None:
        if phase == "start":
            self._began = time.thread_time()
        else:
            self.collecting_ms = max(self.collecting_ms, (time.thread_time() - self._began) * 1000)

    async def run(self) -> None:
        while True:
            wall, cpu = time.perf_counter(), time.thread_time()
            await asyncio.sleep(TICK_S)
            self.wall_ms.append((time.perf_counter() - wall - TICK_S) * 1000)
            self.cpu_ms.append((time.thread_time() - cpu) * 1000)

    def take(self) -> dict[str, Any]:
        """Return the worst since the last call."""
        wall, cpu = sorted(self.wall_ms), sorted(self.cpu_ms)
        collecting, self.wall_ms, self.cpu_ms, self.collecting_ms = self.collecting_ms, [], [], 0.0
        if not wall:
            return {}
        at = int(len(wall) * 0.999)
        return {"wall": wall[-1], "wall999": wall[at], "cpu": cpu[-1], "cpu999": cpu[at], "gc": collecting}


async def serve(config: ClusterConfig, name: str) -> None:
    """Run one server and do what each line on stdin says, answering with one line of JSON."""
    server = ServerNode(config, config.node(name))
    watch = Watch()
    tasks = [asyncio.create_task(watch.run())]
    await server.start()
    _calm_the_collector(whole=False)  # as a server does
    loop = asyncio.get_running_loop()
    lines: asyncio.Queue[str] = asyncio.Queue()

    def listen() -> None:
        for line in sys.stdin:
            loop.call_soon_threadsafe(lines.put_nowait, line.strip())
        loop.call_soon_threadsafe(lines.put_nowait, "stop")

    threading.Thread(target=listen, daemon=True).start()
    written = [0]

    def replica_index() -> int:
        return server.replica.status().snapshot_index

    def votes() -> bool:
        return any(member.id == name and member.voter for member in server.replica.members())

    watch.take()  # starting is not what this is about
    while (line := await lines.get()) != "stop":
        if line == "load":
            await server.replica.wait_leader(60)
            tasks += [asyncio.create_task(write(server, written)) for _ in range(WRITERS)]
        elif line == "snapshot":
            before = replica_index()
            server.replica._running_core().snapshot_wanted = True
            await server.replica._until(lambda before=before: replica_index() != before, 300)  # type: ignore[misc]
        elif line == "caught up":
            await server.replica._until(votes, 300)
        rows = len(server.replica.machine.store.kv.rows)  # type: ignore[attr-defined]
        print(json.dumps({"rows": rows, "written": written[0], **watch.take()}), flush=True)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await server.stop()


async def write(server: ServerNode, written: list[int]) -> None:
    while True:
        number = written[0] = written[0] + 1
        await server.backend.apply(c.KVSet(f"app/{number * 7919 % 1_000_000:08}", b"y%d" % number))


class Child:
    """A server in a process of its own."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    @classmethod
    async def start(cls, config: Path, name: str) -> Child:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "benchmarks.loop_stalls", "--serve", name, "--config", str(config)),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            limit=1 << 20,
        )
        return cls(process)

    async def ask(self, line: str) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(line.encode() + b"\n")
        answer: dict[str, Any] = json.loads(await asyncio.wait_for(self._process.stdout.readline(), 300))
        return answer

    async def stop(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(b"stop\n")
        try:
            await asyncio.wait_for(self._process.wait(), 20)
        except TimeoutError:
            self._process.kill()


def seed(config: ClusterConfig, rows: int) -> None:
    """Give server-1 a snapshot to begin with."""
    machine, index = filled(rows)
    node = config.node("server-1")
    store = SnapshotStore(RealDisk(), str(node.data_dir / "raft" / "snapshots"))
    writer = store.begin(index, 1, {node.name: [node.rpc_endpoint, True]})
    with machine.snapshot() as snapshot:
        for chunk in snapshot:
            writer.write(chunk)
    writer.commit()


def toml(ports: list[int]) -> str:
    head = '[cluster]\ndatacenter = "dc1"\ndata_dir = "data"\ntls_dir = "tls"\n'
    return head + "".join(
        f'[nodes.server-{number}]\nrole = "server"\nrpc_port = {port}\nhttp_port = {http}\ndns_port = 0\n'
        + ("join = true\n" if number > 1 else "")
        for number, (port, http) in enumerate(zip(ports[:2], ports[2:], strict=True), 1)
    )


def told(what: str, answer: dict[str, Any]) -> None:
    print(
        f"{what:<44} longest stall {answer['wall']:6.1f} ms (99.9 %: {answer['wall999']:5.1f}), of the loop's own CPU"
        f" {answer['cpu']:6.1f} ms (99.9 %: {answer['cpu999']:5.1f}; the collector's {answer['gc']:.1f})"
    )


async def measure(config_path: Path, seconds: float) -> None:
    one = await Child.start(config_path, "server-1")
    children = [one]
    try:
        answer = await one.ask("load")
        print(f"server-1 has {answer['rows']} rows")
        for what in ("writes alone", "a snapshot, and the log compacted"):
            await one.ask("begin")
            before = (await one.ask("begin"))["written"]
            began = time.perf_counter()
            if what == "writes alone":
                await asyncio.sleep(seconds)
                answer = await one.ask("end")
            else:
                answer = await one.ask("snapshot")
            took = time.perf_counter() - began
            told(f"{what} ({took:.0f} s, {(answer['written'] - before) / took:.0f} writes/s)", answer)
        two = await Child.start(config_path, "server-2")
        children.append(two)
        began = time.perf_counter()
        answer = await two.ask("caught up")
        took = time.perf_counter() - began
        told(f"fed an empty server ({took:.0f} s): the one that feeds", await one.ask("end"))
        told("  … and the one that is fed", answer)
        print(f"server-2 has {answer['rows']} rows")
    finally:
        for child in reversed(children):
            await child.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--serve", default="")
    parser.add_argument("--config", type=Path)
    options = parser.parse_args()
    if options.serve:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(serve(load_config(options.config), options.serve))
        return
    with tempfile.TemporaryDirectory(prefix="lictor-stalls-") as directory:
        path = Path(directory) / "cluster.toml"
        path.write_text(toml(free_ports(4)))
        config = load_config(path)
        ensure_local_pki(config)
        seed(config, options.rows)
        asyncio.run(measure(path, options.seconds))


if __name__ == "__main__":
    main()
