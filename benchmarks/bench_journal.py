"""How fast the journal appends and syncs on this disk.

    python benchmarks/bench_journal.py [-directory DIR] [-seconds S]

For groups of 1, 16, 64 and 512 entries of 256 bytes: groups and entries a second with a sync per group, and the
time of one group. Beside it the bare disk: the same bytes appended to one file with fdatasync.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable

from raftstate.disk import RealDisk
from raftstate.journal import Journal

ENTRY_BYTES = 256


def measure(group: Callable[[], None], seconds: float) -> list[float]:
    times: list[float] = []
    end = time.perf_counter() + seconds
    while (start := time.perf_counter()) < end:
        group()
        times.append(time.perf_counter() - start)
    return times


def report(name: str, entries: int, times: list[float]) -> None:
    times.sort()
    rate = len(times) / sum(times)
    print(
        f"{name:8} {entries:4} entries/group {rate:8.0f} groups/s {rate * entries:9.0f} entries/s   "
        f"p50 {statistics.median(times) * 1e3:6.2f} ms  p99 {times[int(len(times) * 0.99)] * 1e3:6.2f} ms"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("-directory", default=None, help="where to write (default: the temporary directory)")
    parser.add_argument("-seconds", type=float, default=1.0, help="per line of the report")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.directory) as directory:
        for entries in (1, 16, 64, 512):
            file = RealDisk().create(f"{directory}/bare-{entries}")
            data = bytes((ENTRY_BYTES + 25) * entries)

            def bare() -> None:
                file.append(data)  # noqa: B023
                file.sync()  # noqa: B023

            report("bare", entries, measure(bare, args.seconds))
            file.close()

            journal = Journal(RealDisk(), f"{directory}/journal-{entries}")
            command = bytes(ENTRY_BYTES)

            def group() -> None:
                index = journal.last_index  # noqa: B023
                for offset in range(1, entries + 1):  # noqa: B023
                    journal.add(command, index + offset, 1)  # noqa: B023
                pending = journal.take_pending()  # noqa: B023
                assert pending is not None
                pending.sync()

            report("journal", entries, measure(group, args.seconds))
            held = len(journal)
            journal.close()
            start = time.perf_counter()
            Journal(RealDisk(), f"{directory}/journal-{entries}").close()
            print(f"reopen   {held} entries in {time.perf_counter() - start:.2f} s")


if __name__ == "__main__":
    main()
