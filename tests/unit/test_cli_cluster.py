"""The local cluster's paths, ports and processes; nothing here starts a node."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from cli.cluster.layout import Layout, Plan, is_free, refuse_taken_ports, write_plan
from cli.cluster.processes import DEAD, PAUSED, RUNNING, Process, _children, _stat, spawn
from cli.cluster.supervisor import Supervisor, log_end, remove
from cli.errors import CliError, UsageError
from cli.main import main
from node.config import load_config
from tests.e2e.support_e2e import ROOT
from tests.support.promises import PATIENCE_S


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    """A process to be harmed."""
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    yield process
    process.kill()
    process.wait()


def _of(process: subprocess.Popen[bytes]) -> Process:
    stat = _stat(process.pid)
    assert stat
    return Process(process.pid, stat[1])


def test_states_follow_signals(sleeper: subprocess.Popen[bytes]) -> None:
    process = _of(sleeper)
    assert process.state() == RUNNING
    assert process.send(signal.SIGSTOP)
    assert process.wait_for(PAUSED, PATIENCE_S)
    assert process.send(signal.SIGCONT)
    assert process.wait_for(RUNNING, PATIENCE_S)
    assert process.send(signal.SIGKILL)
    assert process.wait_for(DEAD, PATIENCE_S)
    assert not process.send(signal.SIGTERM)


HALF_DEAD = """
import ctypes, platform, socket, sys, threading
held = socket.create_server(("127.0.0.1", 0))
print(held.getsockname()[1], flush=True)
threading.Thread(target=sys.stdin.read).start()
exit_this_thread = {"x86_64": 60, "aarch64": 93}[platform.machine()]
ctypes.CDLL(None).syscall(exit_this_thread, 0)
"""
"""Its first thread has ended, so the kernel calls it a zombie; another still holds the port. So does every process of
several threads for a moment after kill -9."""


@pytest.mark.parametrize("ours", [False, True])
def test_a_process_is_dead_only_once_its_port_is_free(ours: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    child = subprocess.Popen([sys.executable, "-c", HALF_DEAD], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.stdout
    assert child.stdin
    try:
        port = int(child.stdout.readline())
        process = _of(child)
        if ours:  # then it is reaped by us, as the supervisor's own children are
            monkeypatch.setitem(_children, child.pid, child)
        deadline = time.monotonic() + PATIENCE_S
        while (stat := _stat(child.pid)) and stat[0] != "Z":
            assert time.monotonic() < deadline, "the first thread did not end"
            time.sleep(0.01)
        assert process.state() == RUNNING
        assert not is_free("127.0.0.1", port)
        process.send(signal.SIGKILL)
        assert process.wait_for(DEAD, PATIENCE_S)
        assert is_free("127.0.0.1", port)
    finally:
        child.kill()
        child.wait()
        child.stdin.close()
        child.stdout.close()


def test_what_somebody_else_has_killed_is_reaped_before_the_next_one_starts(tmp_path: Path) -> None:
    program = (sys.executable, "-c", "import time; time.sleep(60)")
    killed, lives = (spawn((), tmp_path / "log", tmp_path / f"{n}.pid", program) for n in range(2))
    try:
        os.kill(killed.pid, signal.SIGKILL)  # as `lictor cluster kill` in another process
        os.waitid(os.P_PID, killed.pid, os.WEXITED | os.WNOWAIT)
        spawn(("x",), tmp_path / "log", tmp_path / "next.pid", ("true",))
        assert killed.pid not in _children
        assert _stat(killed.pid) is None, "a zombie is left"
        assert lives.pid in _children
        assert lives.state() == RUNNING
    finally:
        lives.send(signal.SIGKILL)
        assert lives.wait_for(DEAD, PATIENCE_S)
        assert Process.read(tmp_path / "next.pid").wait_for(DEAD, PATIENCE_S)  # type: ignore[union-attr]


def test_a_reused_pid_is_not_our_process(sleeper: subprocess.Popen[bytes], tmp_path: Path) -> None:
    mine = _of(sleeper)
    other = Process(mine.pid, mine.started - 1)
    assert other.state() == DEAD
    assert not other.send(signal.SIGKILL)
    assert sleeper.poll() is None
    mine.write(tmp_path / "run" / "n.pid")
    assert Process.read(tmp_path / "run" / "n.pid") == mine


@pytest.mark.parametrize("text", ["", "12", "{}", '{"pid": "x", "started": 1}', "[1]", "\x00"])
def test_a_damaged_pid_file_means_no_process(text: str, tmp_path: Path) -> None:
    (tmp_path / "n.pid").write_text(text)
    assert Process.read(tmp_path / "n.pid") is None


def test_the_first_client_has_the_standard_ports() -> None:
    ports = Plan(3, 2).ports()
    assert ports["client-1"] == {"http_port": 8500, "dns_port": 8600}
    assert ports["client-2"] == {"http_port": 8510, "dns_port": 8610}
    assert ports["server-2"] == {"rpc_port": 8301, "http_port": 8530, "dns_port": 8630}


@pytest.mark.parametrize("plan", [Plan(1, 0), Plan(3, 2), Plan(7, 50), Plan(5, 3, 10000)])
def test_every_plan_is_a_file_that_loads(plan: Plan, tmp_path: Path) -> None:
    layout = Layout(tmp_path / "c")
    write_plan(layout, plan)
    config = load_config(layout.config)
    assert len(config.servers()) == plan.servers
    assert len(config.nodes) == plan.servers + plan.clients
    assert config.fault_injection
    ports = [port for ports in plan.ports().values() for port in ports.values()]
    assert len(ports) == len(set(ports))
    assert config.data_dir == layout.directory / "data"
    assert tomllib.loads(layout.config.read_text())["cluster"]["tls_dir"] == "tls"


@pytest.mark.parametrize(("servers", "clients", "offset"), [(0, 1, 0), (8, 1, 0), (3, 51, 0), (3, 2, 60000)])
def test_bad_plans(servers: int, clients: int, offset: int) -> None:
    with pytest.raises(UsageError):
        Plan(servers, clients, offset)


def _held_port() -> socket.socket:
    sock = socket.socket()
    sock.bind(("127.0.0.1", 0))
    sock.listen()
    return sock


def test_a_taken_port_is_named_with_its_owner(tmp_path: Path) -> None:
    with closing(_held_port()) as held:
        port = held.getsockname()[1]
        assert not is_free("127.0.0.1", port)
        layout = Layout(tmp_path)
        text = f'[nodes.s]\nrole = "server"\nhttp_port = {port}\ndns_port = 0\nrpc_port = 0\n'
        layout.config.write_text(text)
        with pytest.raises(CliError) as error:
            refuse_taken_ports(layout.load().nodes.values())
    assert f"127.0.0.1:{port} of s is taken" in str(error.value)
    assert "pid" in str(error.value)


def test_nodes_are_found_by_unique_beginnings(tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    write_plan(layout, Plan(3, 1, 20000))
    supervisor = Supervisor(layout)
    assert supervisor.find("c") == "client-1"
    assert supervisor.find("server-2") == "server-2"
    with pytest.raises(UsageError, match="could be server-1, server-2, server-3"):
        supervisor.find("server")
    with pytest.raises(UsageError, match="no node of this cluster"):
        supervisor.find("x")
    with pytest.raises(CliError, match="lictor cluster start server-1"):
        supervisor.kill("server-1")
    with pytest.raises(UsageError, match="other side"):
        supervisor.partition(supervisor.names)
    assert [one.state for one in supervisor.status()] == [DEAD] * 4


def test_up_refuses_another_shape_and_down_removes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    layout = Layout(tmp_path / "d")
    write_plan(layout, Plan(3, 1, 20000))
    where = ["-dir", str(layout.directory)]
    assert main(["cluster", "up", "-servers", "5", *where]) == 2
    assert main(["cluster", "up", "-port-offset", "5", *where]) == 2
    assert "describes 3 servers, not 5" in capsys.readouterr().err
    (layout.directory / "mine.txt").write_text("the user's")
    assert main(["cluster", "down", "-remove", *where]) == 0
    assert [path.name for path in layout.directory.iterdir()] == ["mine.txt"]
    assert main(["cluster", "status", *where]) == 1
    assert "lictor cluster up" in capsys.readouterr().err


def test_a_broken_file_is_one_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "cluster.toml").write_text("[nodes.a]\nrole = 'king'\n")
    assert main(["cluster", "status", "-dir", str(tmp_path)]) == 1
    assert "role" in capsys.readouterr().err


def test_the_end_of_a_log(tmp_path: Path) -> None:
    path = tmp_path / "n.log"
    assert log_end(path, 3) == "(no log yet)"
    path.write_text("".join(f"line {n}\n" for n in range(20000)))
    assert log_end(path, 2) == "line 19998\nline 19999"


def test_remove_leaves_what_is_not_ours(tmp_path: Path) -> None:
    layout = Layout(tmp_path / "gone")
    write_plan(layout, Plan(1, 0, 20000))
    remove(layout)
    assert not layout.directory.exists()


@pytest.mark.parametrize(
    "ask",
    [
        "from cli.demo_stage import free_offset as f; f = f(3, 2)",
        "from cli.demo_stage import free_ports as f; f = f(8080, 2)",
        "from tests.support.ports import free_ports as f; f = f(2)",
    ],
)
def test_two_processes_never_take_the_same_ports(ask: str) -> None:
    program = f"{ask}; print(f, flush=True); input()"
    holders = []
    try:
        for _ in range(2):
            holders.append(
                subprocess.Popen(
                    [sys.executable, "-c", program],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                    cwd=ROOT,
                )
            )
        found = [holder.stdout.readline().strip() for holder in holders if holder.stdout]
        assert all(found), "both got some"
        assert len(set(found)) == 2, found
    finally:
        for holder in holders:
            holder.communicate("\n", timeout=10)
