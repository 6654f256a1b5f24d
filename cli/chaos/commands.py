"""``lictor chaos``: faults and clients against a cluster of this machine, and a verdict on what they saw."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from cli.chaos.history import READ
from cli.errors import UsageError
from cli.flags import Args, Command, Family, Flag, truth, whole

if TYPE_CHECKING:
    from cli.chaos.runner import Options
    from cli.cluster.supervisor import Supervisor

DEFAULT_FAULTS = "kill,pause,partition,one-way,kill-all,disk-full"


def _minutes(text: str) -> float:
    value = float(text)
    if not 0 < value <= 24 * 60:
        raise ValueError("minutes, more than 0 and at most 1440")
    return value


def run(args: Args) -> int:
    """Run faults and clients; print the verdict; write report, history and timeline. Exit code 1: a violation."""
    from cli.chaos.harm import SmallDisks, skewed
    from cli.chaos.runner import FAULT_KINDS, Options
    from cli.cluster.layout import Layout, Plan, write_plan
    from cli.cluster.supervisor import Supervisor

    kinds = tuple(args.text("faults", DEFAULT_FAULTS).split(","))
    if unknown := [kind for kind in kinds if kind not in FAULT_KINDS]:
        raise UsageError(f"-faults: {unknown[0]!r} is none of {', '.join(FAULT_KINDS)}")
    if "skew" in kinds:
        skewed(1.0)  # says at once what is missing for it
    options = Options(
        seed=args.number("seed", 1),
        duration_s=60 * float(args.text("minutes", "1")),
        clients=args.number("clients", 6),
        faults=kinds,
    )
    out = Path(args.text("out", f"chaos-{options.seed}"))
    if args.given("dir"):
        return _judge(Supervisor(Layout(Path(args.text("dir")))), options, out)
    scratch = Path(tempfile.mkdtemp(prefix="lictor-chaos-"))
    try:
        layout = Layout(scratch / "cluster")
        write_plan(layout, Plan(args.number("servers", 3), 2, args.number("port-offset", 3000)))
        supervisor = Supervisor(layout)
        disks = SmallDisks(supervisor)
        if "disk-full" in kinds:
            disks.make(name for name in supervisor.names if supervisor.config.nodes[name].is_server)
        print(f"Starting {', '.join(supervisor.names)} …", flush=True)
        code = 1
        try:
            supervisor.start(supervisor.names)
            supervisor.wait_ready(supervisor.names, lambda text: None)
            code = _judge(supervisor, options, out)
        finally:
            for name in supervisor.names:
                if supervisor.state(name) == "paused":
                    supervisor.resume(name)
            supervisor.stop(supervisor.names)
            if code and not args.on("discard"):
                _keep(layout.directory, out / "cluster")
            disks.unmake()
        return code
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _keep(directory: Path, kept: Path) -> None:
    """Copy what explains a failure, without the keys."""
    shutil.rmtree(kept, ignore_errors=True)
    shutil.copytree(directory, kept, ignore=shutil.ignore_patterns("tls", "leaves", "*.sock"))
    print(f"The nodes' logs and data are kept in {kept}.")


def _judge(supervisor: Supervisor, options: Options, out: Path) -> int:
    import msgspec

    from cli.chaos import report as text
    from cli.chaos.runner import run as run_chaos
    from cli.chaos.timeline import draw
    from cli.cluster.control import LocalControl

    control = LocalControl(supervisor)
    report = asyncio.run(run_chaos(control, options, lambda line: print(line, flush=True)))
    lines = text.lines(report)
    out.mkdir(parents=True, exist_ok=True)
    (out / "report.txt").write_text("\n".join(lines) + "\n")
    (out / "timeline.svg").write_text(draw(report.history, list(control.servers)))
    # FOREVER is not JSON: an unknown return is written as null.
    history = msgspec.to_builtins(report.history)
    for op in history["operations"]:
        if op["returned_s"] == float("inf"):
            op["returned_s"] = None
    (out / "history.json").write_bytes(msgspec.json.format(msgspec.json.encode(history)))
    print("\n".join(lines))
    print(f"Timeline: {out / 'timeline.svg'}   history: {out / 'history.json'}")
    answered = sum(1 for op in report.history.operations if op.kind != READ and op.known)
    if not answered:
        print("FAILED: no write was ever acknowledged, so the run proves nothing.")
        return 1
    return 0 if report.passed else 1


FAMILIES = {
    "chaos": Family(
        "Do harm to a cluster under load and judge what its clients saw",
        {
            "run": Command(
                "Run clients and faults, then check the history for linearizability",
                run,
                (
                    Flag("seed", "what faults come when (default 1)", "N", parse=whole),
                    Flag("minutes", "how long (default 1)", "M", parse=_minutes),
                    Flag("clients", "how many concurrent clients (default 6)", "N", parse=whole),
                    Flag("faults", f"which kinds (default {DEFAULT_FAULTS}; also skew)", "LIST"),
                    Flag(
                        "servers", "how many servers the cluster made for the run has (default 3)", "N", parse=whole
                    ),
                    Flag("dir", "use the running cluster of this directory instead of making one", "DIR"),
                    Flag("out", "where report, history and timeline go (default ./chaos-SEED)", "DIR"),
                    Flag("port-offset", "add this to every port of the cluster made for the run", "N", parse=whole),
                    Flag("discard", "do not keep the nodes' logs after a failure", switch=True, parse=truth),
                ),
            )
        },
    )
}
