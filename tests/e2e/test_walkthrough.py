"""The walkthrough, typed line by line, with compiled Go programs and with Python ones."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cli.demo_stage import answers_plainly, app, free_ports, wait_until
from tests.e2e.support_e2e import ROOT, Mesh, need, running
from tests.support.promises import PATIENCE_S, Since

CONNECT = (
    "lictor connect -sidecar -proxy ./proxy.json -register -name {name} -id {name}-1 -auto-register"
    ' -service-id {name}-1 -upstreams "backend:{port}"'
)


@pytest.fixture(scope="module")
def go_programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The text's programs, compiled with nothing but the standard library."""
    need("go")
    target = tmp_path_factory.mktemp("go")
    for name in ("echo-server", "echo-client"):
        subprocess.run(
            ["go", "build", "-o", str(target / name), "main.go"],
            cwd=ROOT / "examples" / name,
            check=True,
            env={**os.environ, "GO111MODULE": "off", "GOFLAGS": "", "GOCACHE": str(target / "cache")},
        )
    return target


@pytest.fixture(params=["go", "python"])
def programs(request: pytest.FixtureRequest) -> tuple[list[str], list[str]]:
    """The commands of echo-server and echo-client."""
    if request.param == "python":
        return [sys.executable, app("echo_server")], [sys.executable, app("echo_client")]
    target: Path = request.getfixturevalue("go_programs")
    return [str(target / "echo-server")], [str(target / "echo-client")]


class Shell:
    """A terminal on host A: what is typed runs in a directory, with the cluster's address in the environment."""

    def __init__(self, mesh: Mesh, directory: Path) -> None:
        self.mesh = mesh
        self.directory = directory

    def type(self, line: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """Type a line and wait for it."""
        return subprocess.run(
            line,
            shell=True,
            cwd=self.directory,
            env=self.mesh.environment(variables),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            stdin=subprocess.DEVNULL,
        )


@pytest.fixture
def shell(lictor: Mesh) -> Iterator[Shell]:
    """A terminal; what was registered in it is withdrawn in the end."""
    shell = Shell(lictor, lictor.home("shell"))
    yield shell
    for instance in ("echo-server-1", "echo-client-1"):
        shell.type(f"lictor services deregister -id {instance}")
    shell.type("lictor intentions delete -from echo-client-1 -to echo-server-1")


def _good(done: subprocess.CompletedProcess[str], output: str) -> None:
    assert (done.returncode, done.stdout) == (0, output), done


def test_the_walkthrough_line_by_line(shell: Shell, programs: tuple[list[str], list[str]]) -> None:
    mesh = shell.mesh
    server, client = programs
    (port,) = free_ports(8080, 1)
    _good(
        shell.type(f"lictor services register -name echo-server -port {port} -id echo-server-1"),
        "Registered service: echo-server\n",
    )
    _good(
        shell.type("lictor services register -name echo-client -port 0 -id echo-client-1"),
        "Registered service: echo-client\n",
    )
    _good(
        shell.type("lictor intentions create -from echo-client-1 -to echo-server-1 -verb http"),
        "Created: echo-client-1 => echo-server-1 (allow)\n",
    )
    with running(server, env=mesh.environment({"PORT": str(port)})):
        assert wait_until(lambda: answers_plainly(port), PATIENCE_S)
        for name, own_port in (("echo-server", port), ("echo-client", 0)):
            home = mesh.home(f"{name}-1")
            wrote = shell.type(
                f"""cd {home} && echo '{{
  "services": [
    {{
      "name": "{name}",
      "port": {own_port}
    }}
  ]
}}' > proxy.json"""
            )
            assert wrote.returncode == 0
            typed = shlex.split(CONNECT.format(name=name, port=port))
            mesh.sidecar(f"{name}-1", 0, typed[2:], {})
        address = mesh.upstream("echo-client-1")
        assert address.startswith("localhost:21")
        done = shell.type(f'export BACKEND_ADDR="{address}"; {shlex.join(client)}')
        assert done.returncode == 0, done
        assert done.stdout.strip() == f"Client received: Hello from echo-server on port {port}!"

        # On the server's own sidecar, backend is its own local port, and it did not take the client's.
        own = mesh.upstream("echo-server-1")
        assert own.startswith("localhost:22")
        assert f"on port {port}!" in shell.type(shlex.join(client), BACKEND_ADDR=own).stdout

        _good(
            shell.type("lictor intentions delete -from echo-client-1 -to echo-server-1"),
            "Intention deleted: echo-client-1 => echo-server-1\n",
        )
        assert wait_until(lambda: shell.type(shlex.join(client), BACKEND_ADDR=address).returncode != 0, PATIENCE_S)
        assert answers_plainly(port)


def test_what_is_created_twice_is_an_error_unless_replaced(shell: Shell) -> None:
    create = "lictor intentions create -from echo-client-1 -to echo-server-1 -verb http"
    assert shell.type(create).returncode == 0
    again = shell.type(create)
    assert again.returncode == 1
    assert "-replace" in again.stderr
    assert shell.type(f"{create} -replace").returncode == 0
    listed = shell.type("lictor intention list").stdout
    assert listed.count("echo-client-1") == 1


def test_consuls_own_form_and_check_and_match(shell: Shell) -> None:
    _good(shell.type("lictor intention create -deny web db"), "Created: web => db (deny)\n")
    try:
        denied = shell.type("lictor intention check web db")
        assert (denied.returncode, denied.stdout.split()[0]) == (1, "Denied")
        assert shell.type("lictor intention match db").stdout == "web => db (deny)\n"
        shown = shell.type("lictor intention get web db").stdout
        assert "Action:       deny" in shown
    finally:
        _good(shell.type("lictor intention delete web db"), "Intention deleted: web => db\n")
    assert shell.type("lictor intention delete web db").returncode == 1


def test_the_child_gets_the_variables_and_its_status_is_ours(shell: Shell) -> None:
    shell.type("""echo '{"services": [{"name": "echo-client", "port": 0}]}' > proxy.json""")
    done = shell.type(
        "lictor connect -proxy proxy.json -register -service-id echo-client-1 -upstreams my-db=postgres,backend"
        " -- sh -c 'echo CHILD $MY_DB_ADDR $MY_DB_PORT $BACKEND_ADDR; exit 7'"
    )
    assert done.returncode == 7, done
    (said,) = [line for line in done.stdout.splitlines() if line.startswith("CHILD ")]
    _, db, db_port, backend = said.split()
    assert db == f"localhost:{db_port}"
    assert backend.startswith("localhost:")
    assert backend != db
    # The sidecar took its leave.
    assert "sidecar-proxy" not in shell.type("lictor services list").stdout


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_signals_reach_the_child(shell: Shell, number: signal.Signals, status: int) -> None:
    mesh = shell.mesh
    mesh.stand("echo-client", "echo-client-1", command=["sh", "-c", "echo started; exec sleep 60"])
    (one,) = mesh.backgrounds
    assert wait_until(lambda: "started" in one.text(), PATIENCE_S)
    one.process.send_signal(number)
    assert one.process.wait(15) == status


def test_sigterm_without_a_child_ends_in_order(shell: Shell) -> None:
    mesh = shell.mesh
    mesh.stand("echo-client", "echo-client-1")
    (one,) = mesh.backgrounds
    one.process.send_signal(signal.SIGTERM)
    assert one.process.wait(15) == 0
    listed = shell.type("lictor services list").stdout
    assert "echo-client-1" in listed
    assert "sidecar-proxy" not in listed


def test_a_second_sidecar_is_refused_and_names_the_first(shell: Shell) -> None:
    mesh = shell.mesh
    mesh.stand("echo-client", "echo-client-1")
    (first,) = mesh.backgrounds
    second = shell.type("lictor connect -service-id echo-client-1")
    assert second.returncode == 1
    assert f"pid {first.process.pid}" in second.stderr
    assert first.process.poll() is None
    first.end()
    mesh.backgrounds.clear()
    mesh.stand("echo-client", "echo-client-1")


@pytest.mark.parametrize(
    ("line", "status", "text"),
    [
        ("lictor connect -proxy missing.json -service-id x", 2, "there is no missing.json"),
        ("lictor connect -service-id nobody", 1, "Register it first"),
        ("lictor connect -proxy p.json -register -name other -service-id x", 2, "contradicts the flags"),
        ("lictor connect -proxy bad.json -register", 2, "services[0].prt: unknown key. Did you mean 'port'?"),
        ("lictor connect -proxy p.json -register -service-id echo-server-1", 1, "says port 7"),
        ("lictor connect -proxy p.json -register -service-id wrong-name", 1, "name is echo-server"),
        ("lictor connect -proxy p.json -register -upstreams a:b", 2, "'b' is not a port"),
        ("lictor connect -registre", 2, "Did you mean '-register'?"),
    ],
)
def test_contradictions_are_one_clear_error(shell: Shell, line: str, status: int, text: str) -> None:
    shell.type("""echo '{"services": [{"name": "echo-server", "port": 7}]}' > p.json""")
    shell.type("""echo '{"services": [{"name": "echo-server", "prt": 7}]}' > bad.json""")
    shell.type("lictor services register -name echo-server -port 8 -id echo-server-1")
    shell.type("lictor services register -name something -port 7 -id wrong-name")
    try:
        done = shell.type(line)
        assert (done.returncode, done.stderr.count("\n")) == (status, 1), done
        assert text in done.stderr
    finally:
        shell.type("lictor services deregister -id wrong-name")


def test_every_command_works_at_any_node(shell: Shell) -> None:
    supervisor = shell.mesh.supervisor
    shell.type("lictor services register -name echo-client -port 0 -id echo-client-1")
    for name in supervisor.names:
        at = f"-http-addr {supervisor.http_addr(name)}"
        assert wait_until(
            lambda at=at: "echo-client" in shell.type(f"lictor catalog services {at}").stdout, PATIENCE_S
        ), name
        assert "server-3" in shell.type(f"lictor members {at}").stdout
        assert shell.type(f"lictor status {at}").returncode == 0
        assert "leader" in shell.type(f"lictor operator raft list-peers {at}").stdout
        assert "Trust domain" in shell.type(f"lictor ca roots {at}").stdout
        assert shell.type(f"lictor health {at}").returncode == 0
        assert f"NodeName = {name}" in shell.type(f"lictor info {at}").stdout
        put = shell.type(f"lictor kv put at/{name} here {at}")
        assert put.stdout == f"Success! Data written to: at/{name}\n", put
        address = supervisor.http_addr(name)
        for variables in ({"LICTOR_HTTP_ADDR": address}, {"LICTOR_HTTP_ADDR": "", "CONSUL_HTTP_ADDR": address}):
            assert shell.type(f"lictor kv get at/{name}", **variables).stdout == "here\n"
    assert shell.type("lictor kv get -keys at").stdout.count("at/") == len(supervisor.names)
    assert shell.type("lictor kv delete -recurse at").returncode == 0
    assert shell.type("lictor kv get at/server-1").returncode == 1


def test_a_live_connection_ends_with_its_intention_and_with_its_identity(shell: Shell) -> None:
    mesh = shell.mesh
    (port,) = free_ports(8080, 1)
    with running([sys.executable, app("echo_server")], env=mesh.environment({"PORT": str(port)})):
        assert wait_until(lambda: answers_plainly(port), PATIENCE_S)
        mesh.stand("echo-server", "echo-server-1", port=port)
        mesh.stand("echo-client", "echo-client-1", upstreams="backend=echo-server")
        address = mesh.upstream("echo-client-1")
        for withdraw, give in (
            ("intentions delete echo-client-1 echo-server-1", "intentions create echo-client-1 echo-server-1"),
            ("identity revoke -service-id echo-client-1", "identity restore -service-id echo-client-1"),
            ("identity revoke -service echo-server", "identity restore -service echo-server"),
        ):
            if give.startswith("intentions"):
                mesh.lictor(*give.split(), host=0)
            assert wait_until(lambda: mesh.call(address).returncode == 0, PATIENCE_S)
            holding = mesh.client("hold", address)
            holding.wait_line("holding", PATIENCE_S)
            mesh.lictor(*withdraw.split(), host=0)
            returned = Since()
            ended = float(holding.wait_line("ended", PATIENCE_S).split()[1])
            returned.took(1.0, "the withdrawal", at=ended)
            holding.finish()
            assert mesh.call(address).returncode != 0
            mesh.lictor(*give.split(), host=0)
        assert wait_until(lambda: mesh.call(address).returncode == 0, PATIENCE_S)
