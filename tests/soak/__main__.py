"""Soak the data plane: ``python -m tests.soak [--minutes 10] [--seed N] [--within 1.0]``.

Mixed load (TCP, HTTP/1.1, WebSocket, gRPC) through sidecars on a real local cluster, while instances are killed and
started, intentions flapped, the certificate authority rotated and the servers restarted in turn. Exit code 1 when
anything was wrong: a wrong answer, a call served that the intentions in force forbade, an error that no killed
instance explains, memory that grows, descriptors or calls left behind.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

from tests.soak.referee import SHOWN
from tests.soak.run import Plan, soak


def main() -> int:
    """Run one soak and tell what came of it."""
    parser = argparse.ArgumentParser(prog="tests.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--within", type=float, default=1.0, help="seconds in which a withdrawal must be in force")
    parser.add_argument("--pause", type=float, default=0.1, help="seconds between two calls of one worker")
    options = parser.parse_args()
    print(f"seed {options.seed}", flush=True)
    with tempfile.TemporaryDirectory(prefix="lictor-soak-") as directory:
        plan = Plan(
            options.minutes, options.seed, options.within, options.pause, lambda text: print(text, flush=True)
        )
        report = soak(Path(directory), plan)
    print("\n".join(report.lines))
    for fault in report.faults[:SHOWN]:
        print(f"WRONG: {fault}")
    print(f"{len(report.faults)} faults" if report.faults else "no fault")
    return 1 if report.faults else 0


if __name__ == "__main__":
    sys.exit(main())
