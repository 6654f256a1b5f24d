"""``lictor demo``: the whole story on this machine, each step checked. It exits 0 only if every step held."""

from __future__ import annotations

import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from cli.client import Api
from cli.cluster.layout import Layout
from cli.cluster.supervisor import Supervisor
from cli.demo_stage import Stage, answers_plainly, app, calls, free_offset, free_ports, wait_until
from cli.errors import CliError, UsageError
from cli.flags import Args, Command, Family, Flag
from cli.output import paint

SETTLE_S = 5.0
"""How long a change may take to show before the step counts as failed."""
BALANCE_CALLS = 40
BALANCE_LEAST = 10
WALKTHROUGH_PORT = 8080
CREATE = ("intentions", "create", "-from", "echo-client-1", "-to", "echo-server-1", "-verb", "http")


def run(args: Args) -> int:
    """Play the demo."""
    given = args.text("dir")
    if given and Path(given).exists() and any(Path(given).iterdir()):
        raise UsageError(f"lictor demo: {given} is not empty. Give a directory that is, or none")
    directory = Path(given or tempfile.mkdtemp(prefix="lictor-demo-")).absolute()
    directory.mkdir(parents=True, exist_ok=True)
    stage = Stage(directory, free_offset(3, 2))
    before = {number: signal.signal(number, _interrupt) for number in (signal.SIGTERM, signal.SIGHUP)}
    began = time.monotonic()
    kept = failed = False
    try:
        story = Story(stage)
        story.play()
        print(f"\n{paint('Every step held', 'green')}, in {time.monotonic() - began:.0f} s. What was measured:")
        for what, value in story.measured:
            print(f"   {what:<58} {value}")
        if args.on("keep"):
            _how_to_drive(stage, story)
            kept = True
        return 0
    except CliError as error:
        failed = True
        print(f"\n{paint('A step did not hold:', 'red')} {error}", flush=True)
        return 1
    finally:
        for number in before:
            signal.signal(number, signal.SIG_IGN)  # a second Ctrl-C must not leave processes behind
        if not kept:
            _clear(stage, remove=not given, keep_logs=failed)
        for number, handler in before.items():
            signal.signal(number, handler)


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def _clear(stage: Stage, *, remove: bool, keep_logs: bool) -> None:
    interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        logs = _copy_logs(stage) if keep_logs else ""
        stage.clear()
        if remove:
            shutil.rmtree(stage.directory, ignore_errors=True)
        if logs:
            print(f"What the nodes and sidecars said is kept in {logs}", flush=True)
    finally:
        signal.signal(signal.SIGINT, interrupt)


def _time(seconds: float) -> str:
    return f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{seconds:.2f} s"


def _outcomes(lines: list[str]) -> list[bool]:
    """Return for each call whether it was answered."""
    return [not call.failed for call in calls(lines)]


def _copy_logs(stage: Stage) -> str:
    """Copy every log to a directory that stays, for whoever looks into the failure."""
    kept = Path(tempfile.mkdtemp(prefix="lictor-demo-logs-"))
    for log in stage.directory.rglob("*.log"):
        shutil.copy(log, kept / (log.name if log.parent.name == "logs" else f"{log.parent.name}.log"))
    return str(kept)


class Story:
    """The steps, in the order of the telling."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.ports = free_ports(WALKTHROUGH_PORT, 2)
        self.address = ""
        """The client's upstream, as ``connect env`` prints it."""
        self.measured: list[tuple[str, str]] = []

    def play(self) -> None:
        """Play every step. Raises :class:`cli.demo_stage.NotHeld` at the first that does not hold."""
        self.start_cluster()
        self.start_apps()
        self.refused_without_intention()
        self.allowed_by_intention()
        self.refused_after_deletion()
        self.refused_after_revocation()
        self.balanced()
        self.instance_killed()
        self.leader_killed()

    # -- helpers ------------------------------------------------------------------------------------------------

    def _measure(self, what: str, seconds: float) -> str:
        """Note a time, and return it as it is told."""
        shown = _time(seconds)
        self.measured.append((what, shown))
        return shown

    def _call(self) -> tuple[bool, str]:
        done = self.stage.call(self.address)
        return done.returncode == 0, (done.stdout or done.stderr).strip()

    def _changes(self, allowed: bool, what: str, *command: str) -> tuple[str, str]:
        """Type a command while calls go on, and wait until they are allowed (or refused) for good.

        Returns (how long after the command was typed, what the first call with the new outcome said).
        """
        stage = self.stage
        load = stage.client("load", self.address)
        stage.require(bool(wait_until(lambda: len(load.lines) >= 3, SETTLE_S)), "the client makes no calls")
        typed = time.monotonic()
        stage.lictor(*command, host=0)
        returned = time.monotonic()
        settled = wait_until(lambda: _outcomes(load.lines[-5:]) == [allowed] * 5, SETTLE_S)
        found = calls(load.finish())
        stage.require(settled, f"{what}, but the client still says {found[-1].answer!r}")
        stage.require(_outcomes(load.lines[:3]) == [not allowed] * 3, f"{what} before the command was typed")
        first = next(n for n, call in enumerate(found) if call.failed != allowed)
        back = [call.answer for call in found[first:] if call.failed == allowed]
        stage.require(not back, f"{what}, and after that a call said {back[:1]}")
        took = _time(found[first].began_s + found[first].took_ms / 1000 - typed)
        self.measured.append((f"{what} after", f"{took} (the command itself took {_time(returned - typed)})"))
        return took, found[first].answer.removeprefix("!")

    def _stays_refused(self, what: str) -> str:
        """Call a few times: a call that gets through once is a hole. The app itself must be up all the while."""

        text = ""
        for _ in range(3):
            works, text = self._call()
            self.stage.require(not works, f"{what}, and yet a call got through: {text}")
        self.stage.require(
            answers_plainly(self.ports[0]), "the echo server itself is down, so refusals prove nothing"
        )
        return text

    # -- steps --------------------------------------------------------------------------------------------------

    def start_cluster(self) -> None:
        stage = self.stage
        stage.title(1, "A cluster: three servers that replicate by Raft, a client agent on each of two hosts")
        arguments = ["cluster", "up", "-servers", "3", "-clients", "2", "-dir", str(stage.directory / "cluster")]
        if stage.offset:
            stage.tell("The standard ports are taken on this machine, so this cluster uses others.")
            arguments += ["-port-offset", str(stage.offset)]
            stage.show(f"export LICTOR_HTTP_ADDR={stage.hosts[0]}")
        began = time.monotonic()
        stage.cluster_up = True
        stage.lictor(*arguments)
        self._measure("cluster up: five nodes ready after", time.monotonic() - began)
        stage.lictor("members", host=0)

    def start_apps(self) -> None:
        stage = self.stage
        stage.title(2, "An echo server and an echo client, each behind its sidecar")
        port = str(self.ports[0])
        stage.lictor("services", "register", "-name", "echo-server", "-port", port, "-id", "echo-server-1", host=0)
        stage.lictor("services", "register", "-name", "echo-client", "-port", "0", "-id", "echo-client-1", host=0)
        self._start_server("echo-server-1", 0, self.ports[0])
        self._sidecar("echo-client", "echo-client-1", 0, 0)
        printed = stage.lictor("connect", "env", "-service-id", "echo-client-1", host=0).stdout
        variables = dict(line.removeprefix("export ").split("=", 1) for line in printed.splitlines())
        self.address = variables["BACKEND_ADDR"]
        stage.held(f"The client's program knows one thing: BACKEND_ADDR={self.address}, its own sidecar.")

    def _start_server(self, instance: str, host: int, port: int) -> None:
        self._sidecar(
            "echo-server", instance, host, port, "--", sys.executable, "-I", app("echo_server"),
            variables={"PORT": str(port)},
        )  # fmt: skip
        self.stage.require(wait_until(lambda: answers_plainly(port), SETTLE_S), f"{instance} does not listen")

    def _sidecar(
        self, name: str, instance: str, host: int, port: int, *command: str, variables: dict[str, str] | None = None
    ) -> None:
        home = self.stage.directory / instance
        home.mkdir()
        (home / "proxy.json").write_text(f'{{"services": [{{"name": "{name}", "port": {port}}}]}}\n')
        self.stage.sidecar(
            instance,
            host,
            [
                "-sidecar", "-proxy", "./proxy.json", "-register", "-name", name, "-id", instance, "-auto-register",
                "-service-id", instance, "-upstreams", f"backend:{self.ports[0]}", *command,
            ],
            variables or {},
        )  # fmt: skip

    def refused_without_intention(self) -> None:
        self.stage.title(3, "Nobody said that the client may call the server")
        text = self._stays_refused("there is no intention")
        self.stage.held(f"Refused. The client says: {text}")

    def allowed_by_intention(self) -> None:
        stage = self.stage
        stage.title(4, "An intention allows it")
        took, text = self._changes(True, "intention created: calls answered", *CREATE)
        expected = f"Hello from echo-server on port {self.ports[0]}!"
        stage.require(text == expected, f"the client was to get {expected!r} and got {text!r}")
        works, text = self._call()
        stage.require(works, f"the call was refused: {text}")
        stage.held(f"{text}   (after {took})")

    def refused_after_deletion(self) -> None:
        stage = self.stage
        stage.title(5, "The intention is deleted: the live connection ends, new calls are refused")
        holding = stage.client("hold", self.address)
        holding.wait_line("holding", SETTLE_S)
        stage.tell("A client holds a connection on which the server sends a tick every 50 ms.")
        stage.tell("Another calls every 20 ms.")
        before = time.monotonic()
        took, text = self._changes(
            False, "intention deleted: calls refused",
            "intentions", "delete", "-from", "echo-client-1", "-to", "echo-server-1",
        )  # fmt: skip
        ended = float(holding.wait_line("ended", 1.0).split()[1])
        stage.require(ended > before, "the live connection ended before the intention was deleted")
        holding.finish()
        stage.held(f"The live connection ended, and calls were refused after {took}: {text}")
        self._stays_refused("the intention was deleted")

    def refused_after_revocation(self) -> None:
        stage = self.stage
        stage.title(6, "The client's identity is revoked although an intention allows it; then it is restored")
        self._changes(True, "intention created again: calls answered", *CREATE)
        took, text = self._changes(
            False, "identity revoked: calls refused", "identity", "revoke", "-service-id", "echo-client-1"
        )
        stage.lictor("intentions", "list", host=0)
        self._stays_refused("the identity was revoked")
        stage.held(f"The intention stands, and yet calls were refused after {took}: {text}")
        took, _ = self._changes(
            True, "identity restored: calls answered", "identity", "restore", "-service-id", "echo-client-1"
        )
        stage.held(f"Restored: calls are answered again after {took}.")

    def balanced(self) -> None:
        stage = self.stage
        stage.title(7, "A second instance on the other host; one goes, the other serves on")
        port = str(self.ports[1])
        stage.lictor("services", "register", "-name", "echo-server", "-port", port, "-id", "echo-server-2", host=1)
        self._start_server("echo-server-2", 1, self.ports[1])
        stage.lictor("intentions", "create", "-from", "echo-client", "-to", "echo-server", "-verb", "http", host=0)
        second = f"on port {port}!"
        stage.require(
            wait_until(lambda: second in self._call()[1], SETTLE_S), "the second instance was not called in time"
        )
        load = stage.client("load", self.address)
        wait_until(lambda: len(load.lines) >= BALANCE_CALLS, SETTLE_S)
        found = calls(load.finish())
        counts = Counter(call.answer for call in found)
        stage.require(len(counts) == 2, f"expected the answers of two instances and nothing else, got {dict(counts)}")
        stage.require(min(counts.values()) >= BALANCE_LEAST, f"the calls are not balanced: {dict(counts)}")
        stage.held(
            f"{len(found)} calls went to both: " + ", ".join(f"{n} x {a!r}" for a, n in sorted(counts.items()))
        )

    def instance_killed(self) -> None:
        stage = self.stage
        victim = next(one for one in stage.backgrounds if one.name == "echo-server-2")

        def kill() -> None:
            stage.show("kill -9  (echo-server-2: the app and its sidecar)")
            victim.signal(signal.SIGKILL)

        self._under_load(kill, "the killed instance", cut_at_most=1)

    def _under_load(self, harm: Callable[[], None], what: str, *, cut_at_most: int) -> None:
        """Do harm while calls go on; every call but those cut in mid-flight must be answered."""

        stage = self.stage
        load = stage.client("load", self.address)
        wait_until(lambda: len(load.lines) >= 10, SETTLE_S)
        struck = time.monotonic()
        harm()
        after = len(load.lines)
        wait_until(lambda: len(load.lines) >= after + BALANCE_CALLS, SETTLE_S)
        found = calls(load.finish())
        failed = [call for call in found if call.failed]
        # A call that was on the killed instance when it died can't be saved: its request may have been acted upon.
        cut = [call for call in failed if call.began_s <= struck + 0.1]
        stage.require(
            len(failed) == len(cut) <= cut_at_most and len(found) >= 10 + BALANCE_CALLS,
            f"{len(failed)} of {len(found)} calls failed with {what}: {[call.answer for call in failed[:3]]}",
        )
        slowest = max(call.took_ms for call in found if not call.failed)
        in_flight = f" ({len(cut)} was in flight on it and broke off)" if cut else ""
        stage.held(
            f"{len(found)} calls meanwhile, {len(found) - len(cut)} answered{in_flight}, slowest {slowest:.0f} ms."
        )
        self.measured.append((f"calls during {what}: answered / all", f"{len(found) - len(cut)} / {len(found)}"))
        self.measured.append((f"slowest call during {what}", f"{slowest:.0f} ms"))

    def leader_killed(self) -> None:
        stage = self.stage
        stage.title(8, "The raft leader is killed with kill -9: another is elected, calls do not notice")
        where = ["-dir", str(stage.directory / "cluster")]
        supervisor = Supervisor(Layout(stage.directory / "cluster"))
        old = supervisor.leader()
        stage.require(bool(old), "no server says that it leads")
        before = stage.lictor("intentions", "list", "-json", host=0, quiet=True).stdout
        gap: list[float] = []

        def kill() -> None:
            stage.lictor("cluster", "kill", old, *where)
            began = time.monotonic()
            Api(stage.hosts[0], wait_s=15.0).put("/v1/kv/demo/after-leader-kill", b"written")
            gap.append(time.monotonic() - began)

        self._under_load(kill, "the leader's failure", cut_at_most=0)
        new = wait_until(lambda: (name := supervisor.leader()) != old and name, SETTLE_S)
        stage.require(new not in ("", old), f"no new leader: {new or 'nobody'} leads")
        took = self._measure("leader killed: next write acknowledged after", gap[0])
        stage.held(f"{new} leads now; a write that began right after the kill was acknowledged {took} later.")
        after = stage.lictor("intentions", "list", "-json", host=1, quiet=True).stdout
        stage.require(before == after, "the intentions are not what they were before the leader was killed")
        stage.lictor("cluster", "start", old, *where)
        stage.lictor("cluster", "status", *where)
        caught = self._caught_up(supervisor, old)
        stage.held(f"Nothing acknowledged was lost; {old} is back and has caught up ({caught}).")

    def _caught_up(self, supervisor: Supervisor, name: str) -> str:
        goal = max(one.applied for one in supervisor.status())

        def applied() -> int:
            index = next(one.applied for one in supervisor.status() if one.name == name)
            return index if index >= goal else 0

        index = wait_until(applied, SETTLE_S)
        self.stage.require(bool(index), f"{name} did not catch up to index {goal}")
        return f"applied index {index}"


def _how_to_drive(stage: Stage, story: Story) -> None:
    host, other = stage.hosts
    running = [one for one in stage.backgrounds if one.process.poll() is None]
    print("\nIt is left running. Drive it:")
    print(f"   export LICTOR_HTTP_ADDR={host}          # client-1; client-2 is {other}")
    print("   lictor members; lictor intentions list; lictor health echo-server")
    print(f"   curl http://{story.address}/            # through the client's sidecar")
    print(f"   lictor cluster status -dir {stage.directory / 'cluster'}")
    print("End it:")
    print(f"   kill {' '.join(str(one.process.pid) for one in running)}")
    print(f"   lictor cluster down -remove -dir {stage.directory / 'cluster'} && rm -r {stage.directory}", flush=True)
    for one in running:
        one.process.returncode = 0  # they outlive us on purpose, and Python need not warn of it


FAMILIES = {
    "demo": Family(
        "The whole story",
        alone=Command(
            "Run the whole story on this machine: a cluster, two apps, refusals, failures",
            run,
            (
                Flag("keep", "leave it running, and print how to drive it", switch=True),
                Flag("dir", "an empty directory to use (default: a temporary one)", "DIR"),
            ),
        ),
    )
}
