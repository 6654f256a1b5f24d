"""``lictor cluster``: a cluster on this machine to play with, and to do harm to."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

from cli.cluster.layout import DEFAULT_DIR, Layout, Plan, write_plan
from cli.cluster.processes import DEAD, forget_children
from cli.cluster.supervisor import Supervisor, remove
from cli.errors import CliError, UsageError
from cli.flags import Args, Command, Family, Flag, whole
from cli.output import colourful, print_json, table

DEFAULT_SERVERS, DEFAULT_CLIENTS = 3, 2
_FOLLOW_POLL_S = 0.2


def _layout(args: Args) -> Layout:
    return Layout(Path(args.text("dir", DEFAULT_DIR)))


def _supervisor(args: Args) -> Supervisor:
    return Supervisor(_layout(args))


def up(args: Args) -> int:
    """Start the cluster; nodes that run already are left alone."""
    layout = _layout(args)
    if layout.config.exists():
        supervisor = Supervisor(layout)
        _refuse_other_shape(args, supervisor)
    else:
        plan = Plan(
            args.number("servers", DEFAULT_SERVERS),
            args.number("clients", DEFAULT_CLIENTS),
            args.number("port-offset"),
        )
        write_plan(layout, plan)
        try:
            supervisor = Supervisor(layout)
            _refuse_taken(supervisor)
        except CliError:
            remove(layout)  # so that the next try may choose other ports
            raise
    try:
        started = supervisor.start(supervisor.names)
        if not started:
            print(f"The cluster in {layout.directory} runs already: {', '.join(supervisor.names)}.")
        else:
            _wait(supervisor, started)
    finally:
        forget_children()
    clients = [name for name in supervisor.names if not supervisor.config.nodes[name].is_server]
    first = supervisor.http_addr((clients or supervisor.names)[0])
    print(f"Leader: {supervisor.leader() or '(none yet)'}.  Agent: {first}")
    if first != "127.0.0.1:8500":
        print(f"  export LICTOR_HTTP_ADDR={first}")
    where = "" if str(layout.directory) == DEFAULT_DIR else f" -dir {layout.directory}"
    print(f"Next: lictor members; lictor cluster status{where}; lictor cluster down{where}")
    return 0


def _refuse_taken(supervisor: Supervisor) -> None:
    from cli.cluster.layout import refuse_taken_ports

    refuse_taken_ports(supervisor.config.nodes.values())


def _refuse_other_shape(args: Args, supervisor: Supervisor) -> None:
    servers = len(supervisor.config.servers())
    clients = len(supervisor.names) - servers
    for flag, there in (("servers", servers), ("clients", clients)):
        if args.given(flag) and args.number(flag) != there:
            raise UsageError(
                f"{supervisor.layout.config} describes {there} {flag}, not {args.number(flag)}. Use another -dir, or"
                " lictor cluster down -remove first"
            )
    if args.given("port-offset"):
        raise UsageError(
            f"{supervisor.layout.config} exists, so -port-offset would be ignored. Use another -dir, or"
            " lictor cluster down -remove first"
        )


def _wait(supervisor: Supervisor, names: list[str]) -> None:
    if not colourful(sys.stdout):
        print(f"Starting {', '.join(names)} …", flush=True)
        supervisor.wait_ready(names, lambda text: print(f"  {text}", flush=True))
        return
    from rich.console import Console

    console = Console(highlight=False)
    with console.status(f"Starting {', '.join(names)} …"):
        supervisor.wait_ready(names, lambda text: console.print(f"  [green]✓[/green] {text}"))


def status(args: Args) -> int:
    """Show every node. The exit code is 1 when one does not run."""
    found = _supervisor(args).status()
    if args.on("json"):
        print_json([{field: getattr(one, field) for field in one.__dataclass_fields__} for one in found])
    else:
        rows = [
            (o.name, o.role, o.pid or "-", o.state, o.raft, o.term or "-", o.applied or "-", o.http) for o in found
        ]
        print(table(("Node", "Role", "Pid", "State", "Raft", "Term", "Applied", "HTTP"), rows))
    return 0 if all(one.state != DEAD for one in found) else 1


def start(args: Args) -> int:
    """Start nodes that ended."""
    supervisor = _supervisor(args)
    names = [supervisor.find(word) for word in args.words]
    try:
        started = supervisor.start(names)
        for name in names:
            if name not in started:
                print(f"{name} runs already.")
        if started and not args.on("no-wait"):
            _wait(supervisor, started)
    finally:
        forget_children()
    return 0


def _each(verb: str, done: str) -> Callable[[Args], int]:
    """Return the command that does one thing to every node typed."""

    def run(args: Args) -> int:
        supervisor = _supervisor(args)
        names = [supervisor.find(word) for word in args.words]
        for name in names:
            getattr(supervisor, verb)(name)
            print(f"{done} {name}")
        return 0

    return run


def partition(args: Args) -> int:
    """Cut nodes off."""
    supervisor = _supervisor(args)
    names = [supervisor.find(word) for word in args.words]
    supervisor.partition(names)
    print(f"Cut off: {', '.join(names)}")
    return 0


def heal(args: Args) -> int:
    """Undo partitions."""
    _supervisor(args).heal()
    print("Healed: every node reaches every other")
    return 0


def logs(args: Args) -> int:
    """Print the end of a node's log, and with ``-f`` what is added."""
    supervisor = _supervisor(args)
    name = supervisor.find(args.words[0])
    path = supervisor.layout.log(name)
    position = path.stat().st_size if path.exists() else 0
    print(supervisor.log_end(name, args.number("n", 40)), flush=True)
    while args.on("f"):
        if path.exists() and path.stat().st_size > position:
            with path.open("rb") as file:
                file.seek(position)
                added = file.read()
            position += len(added)
            sys.stdout.write(added.decode("utf-8", "replace"))
            sys.stdout.flush()
        time.sleep(_FOLLOW_POLL_S)
    return 0


def down(args: Args) -> int:
    """End the cluster."""
    layout = _layout(args)
    supervisor = Supervisor(layout)
    clients = [name for name in supervisor.names if not supervisor.config.nodes[name].is_server]
    servers = [name for name in supervisor.names if name not in clients]
    # Clients first: they tell the servers goodbye.
    forced = supervisor.stop(clients) + supervisor.stop(servers)
    if forced:
        print(f"Had to be killed: {', '.join(forced)}")
    if args.on("remove"):
        remove(layout)
    print(f"The cluster in {layout.directory} is down" + (", its data removed." if args.on("remove") else "."))
    return 0


cluster_dir_flag = Flag("dir", f"the cluster's directory (default ./{DEFAULT_DIR})", "DIR")
_NODES = "NODE…"
FAMILIES = {
    "cluster": Family(
        "Run a cluster on this machine and do it harm. NODE is a name, the beginning of one, or: leader",
        {
            "up": Command(
                "Start servers and client agents, each a process of its own",
                up,
                (
                    Flag("servers", f"how many servers (default {DEFAULT_SERVERS})", "N", parse=whole),
                    Flag("clients", f"how many client agents (default {DEFAULT_CLIENTS})", "N", parse=whole),
                    Flag("port-offset", "add this to every port", "N", parse=whole, aliases=("port-base",)),
                    cluster_dir_flag,
                ),
            ),
            "status": Command("Show every node", status, (cluster_dir_flag, Flag("json", "print JSON", switch=True))),
            "start": Command(
                "Start nodes that ended",
                start,
                (cluster_dir_flag, Flag("no-wait", "do not wait until they are ready", switch=True)),
                _NODES,
                1,
                None,
            ),
            "kill": Command("Kill nodes (SIGKILL)", _each("kill", "Killed"), (cluster_dir_flag,), _NODES, 1, None),
            "pause": Command("Pause nodes (SIGSTOP)", _each("pause", "Paused"), (cluster_dir_flag,), _NODES, 1, None),
            "resume": Command(
                "Let paused nodes go on", _each("resume", "Resumed"), (cluster_dir_flag,), _NODES, 1, None
            ),
            "partition": Command("Cut nodes off from the others", partition, (cluster_dir_flag,), _NODES, 1, None),
            "heal": Command("Undo every partition", heal, (cluster_dir_flag,)),
            "logs": Command(
                "Print the end of a node's log",
                logs,
                (
                    cluster_dir_flag,
                    Flag("f", "go on with what is added", switch=True),
                    Flag("n", "lines", "N", parse=whole),
                ),
                "NODE",
                1,
                1,
            ),
            "down": Command(
                "End every node",
                down,
                (cluster_dir_flag, Flag("remove", "delete the cluster's data too", switch=True)),
            ),
        },
    )
}
