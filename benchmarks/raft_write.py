"""What one write costs the raft core, its driver and the journal in Python, on the leader and on its followers.

    .venv/bin/python -m benchmarks.raft_write [--writes 3000] [--rounds 5] [--calls]

Three servers in one process hand over encoded messages in memory; disks take everything at once, and no clock but the
benchmark's own moves. So there is no socket, no TLS, no wait: what is left is ours. Times are the CPU's, of the best
round; `--calls` counts function calls instead, which no other work on the machine disturbs.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import random
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from raftstate.journal import Journal
from raftstate.journal_sync import Group, SyncDone
from raftstate.messages import Message, decode_message, encode_message
from raftstate.raft import Member, Members, RaftCore
from raftstate.raft_driver import Driver
from raftstate.state.commands import Envelope, KVSet, encode_envelope
from raftstate.state.machine import StateMachine

SERVERS = ("leader", "follower-1", "follower-2")
GAP_S = 0.0008
"""Between two writes, by the benchmark's clock: as one client makes them."""


class _File:
    """A file that has always room and keeps nothing."""

    def append(self, data: bytes) -> None: ...
    def sync(self) -> None: ...
    def close(self) -> None: ...
    def descriptor(self, size: int) -> int:
        return 0


class _Disk:
    """A disk that is always empty."""

    def make_dir(self, path: str) -> None: ...
    def rename(self, source: str, target: str) -> None: ...
    def remove(self, path: str) -> None: ...
    def sync_dir(self, path: str) -> None: ...
    def listdir(self, path: str) -> list[str]:
        return []

    def create(self, path: str, room: int = 0) -> _File:
        return _File()

    def open_append(self, path: str, room: int = 0) -> _File:
        return _File()

    def read(self, path: str, offset: int = 0, size: int | None = None) -> bytes:
        return b""

    def size(self, path: str) -> int:
        return 0


class _NoSnapshots:
    def latest(self, min_index: int = 0) -> Any:
        return None

    def begin(self, index: int, term: int, members: dict[str, Any]) -> Any:
        raise NotImplementedError

    def open(self, meta: Any) -> Any:
        raise NotImplementedError


class _Timer:
    def cancel(self) -> None: ...


class _Server:
    """One server: its driver's loop and the ends of its syncs are the benchmark's queues."""

    def __init__(self, name: str, bench: Bench) -> None:
        self.name, self.bench = name, bench
        self.seconds = 0.0
        self.machine = StateMachine()
        self.journal = Journal(_Disk(), "raft")
        members = Members.of(Member(server, f"{server}:8300") for server in SERVERS)
        self.core = RaftCore(
            name,
            self.journal,
            _NoSnapshots(),
            self.machine.apply,
            bootstrap=members,
            clock=bench.clock,
            rng=random.Random(name),
        )
        self.driver = Driver(
            self.core,
            self.journal,
            self,
            clock=bench.clock,
            run_sync=self._run_sync,
            send=self._send,
            after=lambda: None,
            on_failure=self._fail,
        )

    def call_soon(self, callback: Callable[[], None]) -> None:
        self.bench.due.append((self, callback))

    def call_later(self, delay: float, callback: Callable[[], None]) -> _Timer:
        return _Timer()  # nothing here waits for time

    def _run_sync(self, group: Group, done: SyncDone, *, here: bool) -> bool:
        number = group.write()
        if here and number >= 0:
            group.synced(None)
            return True

        def ends() -> None:
            if number < 0:
                group.sync()
            else:
                group.synced(None)
            done(None)

        self.bench.syncs.append((self, ends))
        return False

    def _send(self, peer: str, message: Message) -> None:
        data = encode_message(message)
        self.bench.due.append((self.bench.servers[peer], lambda: self.bench.servers[peer].take(self.name, data)))

    def take(self, peer: str, data: bytes) -> None:
        self.core.receive(peer, decode_message(data))
        self.driver.heard()
        self.driver.pump_if_poked()

    @staticmethod
    def _fail(error: BaseException) -> None:
        raise error


class Bench:
    """The three, and a world in which everything happens at once but in order."""

    def __init__(self) -> None:
        self.now = 100.0
        self.due: deque[tuple[_Server, Callable[[], None]]] = deque()
        self.syncs: deque[tuple[_Server, Callable[[], None]]] = deque()
        self.servers = {name: _Server(name, self) for name in SERVERS}
        self.leader = self.servers["leader"]
        self._count = 0
        for server in self.servers.values():
            server.driver.poke()
        self.settle()
        self.now += 10.0
        self.leader.core.tick()
        self.leader.driver.poke()
        self.settle()
        assert self.leader.core.is_leader

    def clock(self) -> float:
        return self.now

    def settle(self) -> None:
        """Let happen what is due; a sync ends when nothing else is left to do."""
        while self.due or self.syncs:
            server, action = (self.due or self.syncs).popleft()
            began = time.thread_time()
            action()
            server.seconds += time.thread_time() - began

    def write(self) -> None:
        """Replicate one command and see it applied."""
        self._count += 1
        self.now += GAP_S
        command = KVSet(f"bench/{self._count}", b"v" * 256)
        data = encode_envelope(Envelope(f"{self._count:032x}", "2026-01-01T00:00:00.000000+00:00", command))
        outcome: list[Any] = []

        def propose() -> None:
            self.leader.core.propose(data, lambda _value, error: outcome.append(error))
            self.leader.driver.poke()

        self.due.append((self.leader, propose))
        self.settle()
        assert outcome == [None]

    def round(self, writes: int) -> list[float]:
        """Return what a write took each server, in microseconds."""
        for server in self.servers.values():
            server.seconds = 0.0
        for _ in range(writes):
            self.write()
        return [server.seconds / writes * 1e6 for server in self.servers.values()]


def main() -> None:
    """Parse the options and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--writes", type=int, default=3000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--calls", action="store_true", help="count function calls, with the dearest functions")
    options = parser.parse_args()
    bench = Bench()
    bench.round(500)
    if options.calls:
        profile = cProfile.Profile()
        profile.runcall(bench.round, options.writes)
        stats = pstats.Stats(profile)
        print(f"{stats.total_calls / options.writes:,.0f} calls a write")  # type: ignore[attr-defined]
        stats.sort_stats("tottime").print_stats(30)
        return
    best = min((bench.round(options.writes) for _ in range(options.rounds)), key=sum)
    for name, micros in zip(SERVERS, best, strict=True):
        print(f"{name:12}{micros:8.1f} us a write")


if __name__ == "__main__":
    main()
