"""Run many seeds: `python -m tests.simulation.run --seeds 10000 --start 0`. Ends with 1 if any of them failed."""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import sys
import time
from collections.abc import Iterator

from tests.simulation.scenario import Outcome, play


def play_many(seeds: range, processes: int) -> Iterator[Outcome]:
    """Outcomes in the order of the seeds, from that many processes."""
    if processes <= 1:
        yield from map(_play_quietly, seeds)
        return
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        yield from pool.imap(_play_quietly, seeds, chunksize=10)


def _play_quietly(seed: int) -> Outcome:
    logging.getLogger("raftstate").setLevel(logging.CRITICAL)
    return play(seed)


def report(outcome: Outcome, lines: int = 60) -> str:
    """What to print of a seed that failed."""
    tail = "\n".join(outcome.tail[-lines:])
    again = f"python -m tests.simulation.run --start {outcome.seed} --seeds 1"
    return f"{tail}\nseed {outcome.seed}: {outcome.violation}\nagain: {again}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=2000)
    parser.add_argument("--start", type=int, default=0)
    parser.add_argument("--processes", type=int, default=multiprocessing.cpu_count())
    parser.add_argument("--keep-going", action="store_true", help="do not stop at the first seed that fails")
    parser.add_argument("--lines", type=int, default=60, help="how much of a failed seed's transcript to print")
    args = parser.parse_args()
    began = time.monotonic()
    failed, events, finished, elections = 0, 0, 0, 0
    seeds = range(args.start, args.start + args.seeds)
    for outcome in play_many(seeds, args.processes if args.seeds > 1 else 1):
        events, finished, elections = (
            events + outcome.events,
            finished + outcome.finished,
            elections + outcome.elections,
        )
        if outcome.violation is not None:
            failed += 1
            print(report(play(outcome.seed, verbose=True), args.lines), flush=True)
            if not args.keep_going:
                break
    took_s = time.monotonic() - began
    print(
        f"{len(seeds)} seeds in {took_s:.1f} s: {failed} failed; "
        f"{finished} operations, {elections} terms led, {events} events"
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
