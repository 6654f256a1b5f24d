"""``lictor chaos run``: clients and faults against a local cluster, and a verdict on what they saw."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

from cli.cluster.commands import cluster_dir_flag
from cli.cluster.layout import DEFAULT_DIR, Layout
from cli.errors import UsageError
from cli.flags import Args, Command, Family, Flag, whole

FAULTS = ("kill", "pause", "partition", "kill-all")


def _minutes(text: str) -> float:
    try:
        minutes = float(text)
    except ValueError:
        raise ValueError("a number of minutes") from None
    if not 0 < minutes <= 24 * 60:
        raise ValueError("more than 0 and at most a day of minutes")
    return minutes


def run(args: Args) -> int:
    """Run, report, and draw. The exit code is 1 when something was lost or could not be explained."""
    from cli.chaos.runner import Options
    from cli.chaos.runner import run as run_chaos
    from cli.chaos.timeline import draw
    from cli.cluster.control import LocalControl
    from cli.cluster.processes import forget_children
    from cli.cluster.supervisor import Supervisor

    faults = tuple(part for part in args.text("faults", ",".join(FAULTS)).split(",") if part)
    unknown = [fault for fault in faults if fault not in FAULTS]
    if unknown or not faults:
        raise UsageError(f"lictor chaos run: -faults must be out of {', '.join(FAULTS)}")
    supervisor = Supervisor(Layout(Path(args.text("dir", DEFAULT_DIR))))
    seed = args.number("seed", random.SystemRandom().randrange(1 << 32))
    options = Options(seed, args.seconds("minutes", 1.0) * 60, clients=args.number("clients", 6), faults=faults)
    print(f"Seed {seed}: the faults of this run can be had again with -seed {seed}", flush=True)
    control = LocalControl(supervisor)
    try:
        report = asyncio.run(run_chaos(control, options, lambda text: print(text, flush=True)))
    finally:
        forget_children()
    picture = Path(args.text("picture", f"chaos-{seed}.svg"))
    picture.write_text(draw(report.history, supervisor.names))
    bad = [verdict for verdict in report.verdicts if not verdict.linearizable]
    print(f"{len(report.history.operations)} operations, {len(report.history.faults)} faults; timeline: {picture}")
    print(f"acknowledged registrations and intentions: {report.acknowledged}, lost: {len(report.lost)}")
    for text in [*report.lost, *report.sessions, *(str(verdict) for verdict in bad)]:
        print(f"  {text}")
    for text, count in sorted(report.errors.items(), key=lambda item: -item[1]):
        print(f"  {count:6d} x {text}")
    print("PASSED: every answer can be explained, nothing was lost" if report.passed else "FAILED")
    return 0 if report.passed else 1


FAMILIES = {
    "chaos": Family(
        "Run clients and faults against a cluster and judge what they saw",
        {
            "run": Command(
                "Kill, pause and cut off the servers of a local cluster under load, then check every answer",
                run,
                (
                    Flag("seed", "the sequence of faults (default: a new one)", "N", parse=whole),
                    Flag("minutes", "how long (default 1)", "M", parse=_minutes),
                    Flag("clients", "how many clients (default 6)", "N", parse=whole),
                    Flag("faults", f"which of {','.join(FAULTS)} (default all)", "LIST"),
                    Flag("picture", "where to draw the timeline (default chaos-SEED.svg)", "FILE"),
                    cluster_dir_flag,
                ),
            )
        },
    )
}
