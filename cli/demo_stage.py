"""What the demo plays on: commands run and shown as typed, background processes, measured waits, and the clearing up.

Everything the demo starts is remembered by its pid and ended in any case, Ctrl-C included.
"""

from __future__ import annotations

import atexit
import itertools
import os
import shlex
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, TypeVar

from cli.cluster.layout import HOST, Plan, is_free
from cli.errors import CliError
from cli.output import paint

COMMAND_TIMEOUT_S = 60.0
POLL_S = 0.02
_WIDTH = 110
_OFFSETS = (0, 10000, 12000, 14000, 16000, 3000, 5000, 7000)
"""Tried in turn: 0 gives the standard ports."""
T = TypeVar("T")
_APPS = Path(__file__).parent / "demo_apps"


class NotHeld(CliError):
    """A step of the story did not hold."""


_reserved: list[socket.socket] = []
"""Names held until this process ends, so that two demos that start at once do not take the same ports."""


def free_offset(servers: int, clients: int) -> int:
    """Return the first port offset at which every port of such a cluster is free, and nobody else begins to use."""
    for offset in _OFFSETS:
        plan = Plan(servers, clients, offset)
        ports = [(key, port) for node in plan.ports().values() for key, port in node.items()]
        if all(is_free(HOST, port, udp=key == "dns_port") for key, port in ports) and _reserve(f"ports-{offset}"):
            return offset
    raise CliError("found no range of free ports for a cluster; end other clusters: lictor cluster down")


def _reserve(what: str) -> bool:
    """Hold a name for ports: a socket's in Linux' abstract namespace, which ends with the process."""
    name = f"\0lictor-{what}"
    if any(held.getsockname() == name.encode() for held in _reserved):
        return True  # this process had them before, and they are free again
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    try:
        sock.bind(name)
    except OSError:
        sock.close()
        return False
    _reserved.append(sock)
    atexit.register(sock.close)
    return True


def free_ports(first: int, count: int) -> list[int]:
    """Return free TCP ports from ``first`` up, which nobody else who asks here begins to use."""
    upwards = (p for p in range(first, min(first + 500, 65536)) if is_free(HOST, p) and _reserve(f"port-{p}"))
    found = list(itertools.islice(upwards, count))
    if len(found) < count:
        raise CliError(f"found no {count} free ports from {first} on")
    return found


def app(name: str) -> str:
    """Return the path of one of the demo's apps."""
    return str(_APPS / f"{name}.py")


@dataclass
class Background:
    """A process the demo started, in a session of its own."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path

    def text(self) -> str:
        """Return what it has printed so far."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def signal(self, number: signal.Signals) -> None:
        """Signal the process and everything it started (its process group)."""
        try:
            os.killpg(self.process.pid, number)
        except ProcessLookupError:
            return  # it has ended, and nobody of its group is left

    def end(self) -> None:
        """End it: gracefully, and by force after 5 s."""
        if self.process.poll() is None:
            try:
                self.process.terminate()
                self.process.wait(5)
            except subprocess.TimeoutExpired:
                pass
        self.signal(signal.SIGKILL)  # also what it left behind
        self.process.wait()
        if self.process.stdin is not None:
            self.process.stdin.close()


@dataclass
class Stage:
    """The demo's directory, environment and processes."""

    directory: Path
    offset: int
    backgrounds: list[Background] = field(default_factory=list)
    cluster_up: bool = False
    ready_timeout_s: ClassVar[float] = 20.0
    """How long a sidecar may take until it is ready."""

    @property
    def hosts(self) -> tuple[str, str]:
        """Return the HTTP addresses of the two client agents."""
        ports = Plan(3, 2, self.offset).ports()
        return f"{HOST}:{ports['client-1']['http_port']}", f"{HOST}:{ports['client-2']['http_port']}"

    def environment(self, more: Mapping[str, str] | None = None) -> dict[str, str]:
        """Return the environment of what the demo starts; the user's own agent must not be asked."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("CONSUL_", "LICTOR_"))}
        return {**kept, "PYTHONUNBUFFERED": "1", "LICTOR_HTTP_ADDR": self.hosts[0], **(more or {})}

    def _address(self, host: int) -> list[str]:
        return [] if host == 0 else ["-http-addr", self.hosts[host]]

    # -- telling ------------------------------------------------------------------------------------------------

    def title(self, number: int, text: str) -> None:
        """Begin a step."""
        print(f"\n{paint(f'{number}. {text}', 'bold')}", flush=True)

    def tell(self, text: str) -> None:
        """Tell what happened."""
        for line in textwrap.wrap(text, _WIDTH - 3) or [""]:
            print(f"   {line}", flush=True)

    def held(self, text: str) -> None:
        """Tell what was seen to hold."""
        print(f" {paint('✓', 'green')} {text}", flush=True)

    def show(self, typed: str) -> None:
        """Show a command as it was typed."""
        lines = textwrap.wrap(typed, _WIDTH - 8, break_long_words=False, break_on_hyphens=False)
        joint = " \\\n       "
        print(f"   {paint('$ ' + joint.join(lines), 'cyan')}", flush=True)

    def require(self, condition: bool, text: str) -> None:
        """Raise :class:`NotHeld` unless ``condition``."""
        if not condition:
            raise NotHeld(text)

    # -- doing --------------------------------------------------------------------------------------------------

    def lictor(
        self, *arguments: str, host: int | None = None, may_fail: bool = False, quiet: bool = False
    ) -> subprocess.CompletedProcess[str]:
        """Run a command to its end and show it with its output; ``host`` says at which client agent it is typed."""
        typed = [*arguments, *([] if host is None else self._address(host))]
        if not quiet:
            self.show("lictor " + shlex.join(typed))
        done = subprocess.run(
            [sys.executable, "-P", "-m", "cli", *typed],
            check=False,
            capture_output=True,
            text=True,
            timeout=COMMAND_TIMEOUT_S,
            env=self.environment(),
            cwd=self.directory,
            stdin=subprocess.DEVNULL,
        )
        output = (done.stdout + done.stderr).rstrip()
        if output and not quiet:
            print(textwrap.indent(output, "   "), flush=True)
        if done.returncode and not may_fail:
            shown = "" if not quiet else f"\n{output}"
            raise NotHeld(f"lictor {shlex.join(typed)} failed with exit code {done.returncode}{shown}")
        return done

    def sidecar(self, instance: str, host: int, arguments: Sequence[str], variables: Mapping[str, str]) -> Background:
        """Start ``lictor connect`` in the directory of its app and wait until it is ready."""
        command = ["connect", *arguments]
        marker = command.index("--") if "--" in command else len(command)
        command[marker:marker] = self._address(host)
        shown = [os.path.basename(word) if word.endswith(".py") else word for word in command]
        prefix = "".join(f"{key}={value} " for key, value in variables.items())
        self.show(prefix + "lictor " + shlex.join("python3" if word == sys.executable else word for word in shown))
        home = self.directory / instance
        log = home / "sidecar.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "cli", *command],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=home,
                env=self.environment(variables),
                start_new_session=True,
            )
        background = Background(instance, process, log)
        self.backgrounds.append(background)
        deadline = time.monotonic() + self.ready_timeout_s
        while "is ready" not in background.text():
            if process.poll() is not None or time.monotonic() > deadline:
                raise NotHeld(f"the sidecar of {instance} did not become ready:\n{background.text()}")
            time.sleep(POLL_S)
        said = background.text().splitlines()
        for line in said[next(n for n, one in enumerate(said) if "is ready" in one) :]:
            if line.startswith(("Sidecar", "  ")):
                print(f"   {line}", flush=True)
        return background

    def call(self, address: str) -> subprocess.CompletedProcess[str]:
        """Run the echo client once."""
        return subprocess.run(
            [sys.executable, "-I", app("echo_client")],
            check=False,
            capture_output=True,
            text=True,
            timeout=COMMAND_TIMEOUT_S,
            env=self.environment({"BACKEND_ADDR": address}),
            stdin=subprocess.DEVNULL,
        )

    def client(self, mode: str, address: str) -> Client:
        """Start the echo client in one of its longer modes."""
        process = subprocess.Popen(
            [sys.executable, "-I", app("echo_client"), mode],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=self.environment({"BACKEND_ADDR": address}),
            start_new_session=True,
        )
        client = Client(process)
        self.backgrounds.append(Background(f"client {mode}", process, self.directory / "client.log"))
        return client

    def clear(self) -> None:
        """End everything. Never raises: it runs while another error is on its way."""
        for background in reversed(self.backgrounds):
            try:
                background.end()
            except OSError as error:
                print(f"could not end {background.name}, pid {background.process.pid}: {error}", file=sys.stderr)
        self.backgrounds.clear()
        if self.cluster_up:
            self.lictor(
                "cluster", "down", "-remove", "-dir", str(self.directory / "cluster"), may_fail=True, quiet=True
            )
            self.cluster_up = False


class Client:
    """A running echo client and the lines it printed."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.process = process
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as said:
            for line in said:
                self.lines.append(line.decode(errors="replace").rstrip())

    def finish(self) -> list[str]:
        """Let it end, and return what it printed."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(15)
        self._reader.join(5)
        return self.lines

    def wait_line(self, beginning: str, timeout_s: float) -> str:
        """Return the first line that begins so; raises :class:`NotHeld` when none comes in time."""
        line = wait_until(lambda: next((one for one in self.lines if one.startswith(beginning)), ""), timeout_s)
        if not line:
            raise NotHeld(f"the client did not say {beginning!r} within {timeout_s:.0f} s; it said {self.lines[-3:]}")
        return line


@dataclass(frozen=True)
class Call:
    """One line of the load: when it began (monotonic seconds), how long it took, and the answer or ``!error``."""

    began_s: float
    took_ms: float
    answer: str

    @property
    def failed(self) -> bool:
        """Tell whether there was no answer."""
        return self.answer.startswith("!")


def calls(lines: Sequence[str]) -> list[Call]:
    """Parse the load's lines."""
    found = []
    for line in lines:
        began, took, answer = line.split(" ", 2)
        found.append(Call(float(began), float(took), answer))
    return found


def wait_until(condition: Callable[[], T], timeout_s: float) -> T:
    """Ask again until the answer is true or the time is up; return the last answer."""
    deadline = time.monotonic() + timeout_s
    while not (value := condition()) and time.monotonic() < deadline:
        time.sleep(POLL_S)
    return value


def answers_plainly(port: int) -> bool:
    """Tell whether an app listens on its own port."""
    try:
        socket.create_connection((HOST, port), 1).close()
    except OSError:
        return False
    return True
