"""What a snapshot of a large state costs the event loop: beginning it, its longest chunk, writes beside it.

    python -m benchmarks.state_snapshot [ROWS]      (default 1,000,000 keys)

Times of single steps are CPU time of the thread, so that a busy machine does not count as work of ours.
"""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Iterator
from time import thread_time as cpu

from raftstate.state import commands as c
from raftstate.state.machine import StateMachine

AT = "2026-01-01T00:00:00Z"


def filled(rows: int) -> tuple[StateMachine, int]:
    """Return a machine with ``rows`` keys of 64-byte values, and its log index."""
    machine = StateMachine()
    for index in range(1, rows + 1):
        machine.apply(index, c.encode_envelope(c.Envelope("", AT, c.KVSet(f"app/{index:08}", b"x" * 64))))
    return machine, rows


def timed(chunks: Iterator[bytes], times: list[float]) -> Iterator[bytes]:
    """Yield the chunks, noting how many milliseconds of CPU each took to make."""
    while True:
        began = cpu()
        chunk = next(chunks, None)
        times.append((cpu() - began) * 1000)
        if chunk is None:
            return
        yield chunk


def told(name: str, times: list[float], unit: str = "ms") -> None:
    times = sorted(times)
    p50, p99 = times[len(times) // 2], times[int(len(times) * 0.99)]
    print(f"{name:<36} p50 {p50:8.3f} {unit}   p99 {p99:8.3f} {unit}   worst {times[-1]:8.3f} {unit}")


def main() -> None:
    rows = int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000
    began = time.perf_counter()
    machine, index = filled(rows)
    print(f"{rows} keys set in {time.perf_counter() - began:.1f} s")
    gc.collect()
    gc.freeze()
    chunk_ms: list[float] = []
    write_us: list[float] = []
    at = cpu()
    snapshot = machine.snapshot()
    print(f"{'begin':<36} {(cpu() - at) * 1000:.3f} ms")
    began, saved = time.perf_counter(), []
    for number, chunk in enumerate(timed(iter(snapshot), chunk_ms)):
        saved.append(chunk)
        for key in (number * 7919 % rows, number):  # keys ahead of the walk and behind it
            index += 1
            data = c.encode_envelope(c.Envelope(f"r{index}", AT, c.KVSet(f"app/{key + 1:08}", b"y" * 64)))
            at = cpu()
            machine.apply(index, data)
            write_us.append((cpu() - at) * 1e6)
    snapshot.close()
    size = sum(map(len, saved)) / 2**20
    print(f"whole walk {time.perf_counter() - began:.1f} s, {len(saved)} chunks, {size:.0f} MiB")
    told("chunk", chunk_ms)
    told("write while it is open", write_us, "us")
    feed_ms: list[float] = []
    copy = StateMachine()
    restorer = copy.restorer()
    began = time.perf_counter()
    for chunk in saved:
        at = cpu()
        restorer.feed(chunk)
        feed_ms.append((cpu() - at) * 1000)
    at = cpu()
    restorer.finish()
    print(f"restore {time.perf_counter() - began:.1f} s, of which the swap {(cpu() - at) * 1000:.3f} ms")
    told("restore, a chunk", feed_ms)


if __name__ == "__main__":
    main()
