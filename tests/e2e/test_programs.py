"""Programs that know nothing of us, through two sidecars: curl, redis-cli, psql."""

from __future__ import annotations

import os
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from cli.demo_stage import answers_plainly, wait_until
from tests.e2e.support_e2e import Mesh, a_free_port, need, running
from tests.support.promises import PATIENCE_S


@pytest.fixture
def allowed(lictor: Mesh) -> Iterator[Mesh]:
    """A mesh in which ``caller`` may call ``app``."""
    lictor.lictor("intentions", "create", "caller", "app", host=0)
    yield lictor
    lictor.lictor("intentions", "delete", "caller", "app", host=0)
    for host, instance in ((0, "caller-1"), (1, "app-1")):
        lictor.lictor("services", "deregister", "-id", instance, host=host, may_fail=True)


def _through(mesh: Mesh, port: int) -> tuple[str, str]:
    """Stand the app's and the caller's sidecars on different hosts; return (host, port) for the caller's program."""
    mesh.stand("app", "app-1", port=port, host=1)
    mesh.stand("caller", "caller-1", upstreams="backend=app")
    host, _, found = mesh.upstream("caller-1").partition(":")
    return host, found


def _output(*command: str, attempts: int = 50) -> str:
    """Run a program until it succeeds: the caller's sidecar learns of the app's within moments."""
    done: subprocess.CompletedProcess[str] | None = None
    for _ in range(attempts):
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
        if done.returncode == 0:
            return done.stdout
    raise AssertionError(f"{command} failed: {done}")


def test_curl(allowed: Mesh, tmp_path: Path) -> None:
    need("curl")
    (tmp_path / "big").write_bytes(os.urandom(5_000_000))
    port = a_free_port()
    with running([sys.executable, "-m", "http.server", str(port), "--bind", "127.0.0.1", "-d", str(tmp_path)]):
        assert wait_until(lambda: answers_plainly(port), PATIENCE_S)
        host, found = _through(allowed, port)
        _output("curl", "-sSf", "--retry", "5", "--retry-all-errors", "--retry-delay", "0", f"http://{host}:{found}/")
        _output("curl", "-sSf", "-o", str(tmp_path / "got"), f"http://{host}:{found}/big")
    assert (tmp_path / "got").read_bytes() == (tmp_path / "big").read_bytes()


_ECHO = """
import socket
server = socket.create_server(("127.0.0.1", {port}), backlog=1024)
held = []
while True:
    connection, _ = server.accept()
    connection.sendall(b"hello")
    held.append(connection)
"""


def test_a_sidecar_holds_more_connections_than_the_usual_limit_and_leaves_its_program_that_limit(
    allowed: Mesh, tmp_path: Path
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 2000:
        pytest.skip("needs a hard limit of 2,000 descriptors")
    told, count = tmp_path / "told", 300
    resource.setrlimit(resource.RLIMIT_NOFILE, (128, hard))  # what the sidecars inherit
    try:
        allowed.stand("app", "app-1", port=(port := a_free_port()), host=1)
        command = ["sh", "-c", f"ulimit -n > {told}; exec sleep 600"]
        home = allowed.home("caller-1", [{"name": "caller", "port": 0}])
        named = ["-proxy", str(home / "proxy.json"), "-register", "-name", "caller", "-service-id", "caller-1"]
        arguments = [*named, "-upstreams", "backend=app", "-workers", "2", "--", *command]
        allowed.sidecar("caller-1", 0, arguments, {})
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 1024), hard))
    try:
        with running([sys.executable, "-c", _ECHO.format(port=port)]):
            assert wait_until(lambda: answers_plainly(port), PATIENCE_S)
            assert wait_until(lambda: told.exists() and told.read_text() == "128\n", PATIENCE_S)
            host, _, found = allowed.upstream("caller-1").partition(":")
            calls = []
            try:
                for _ in range(count):
                    calls.append(call := socket.create_connection((host, int(found)), 10))
                    assert call.recv(5) == b"hello"
            finally:
                for call in calls:
                    call.close()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_redis_cli(allowed: Mesh, tmp_path: Path) -> None:
    need("redis-server", "redis-cli")
    port = a_free_port()
    server = ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", str(tmp_path)]
    with running(server):
        assert wait_until(lambda: answers_plainly(port), PATIENCE_S)
        host, found = _through(allowed, port)
        redis = ["redis-cli", "-h", host, "-p", found]
        assert wait_until(
            lambda: subprocess.run([*redis, "ping"], capture_output=True, check=False).stdout == b"PONG\n", PATIENCE_S
        )
        assert _output(*redis, "set", "who", "lictor") == "OK\n"
        assert _output(*redis, "get", "who") == "lictor\n"
        assert _output(*redis, "--raw", "eval", "return string.rep('x', 3000000)", "0").strip("\n") == "x" * 3_000_000
        # One connection for many requests, pipelined.
        done = subprocess.run([*redis, "--pipe"], input=b"INCR n\r\n" * 5000, capture_output=True, check=False)
        assert b"errors: 0, replies: 5000" in done.stdout, done
        assert _output(*redis, "get", "n") == "5000\n"


def _postgres_directory() -> Path | None:
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    return found[-1].parent if found else None


def test_psql(allowed: Mesh, tmp_path_factory: pytest.TempPathFactory) -> None:
    need("psql")
    programs = _postgres_directory()
    if programs is None:
        need("initdb")
        return
    # PostgreSQL refuses to run as root; its directory must be reachable for the user it runs as.
    as_user: list[str] = []
    home = Path(tempfile.mkdtemp(prefix="lictor-postgres-", dir="/tmp"))
    try:
        if os.geteuid() == 0:
            need("setpriv")
            shutil.chown(home, "nobody", "nogroup")
            as_user = ["setpriv", "--reuid=nobody", "--regid=nogroup", "--clear-groups"]
        subprocess.run(
            [*as_user, str(programs / "initdb"), "-D", str(home / "data"), "-U", "app", "-A", "trust", "-N"],
            check=True, capture_output=True, cwd=home,
        )  # fmt: skip
        port = a_free_port()
        server = [
            str(programs / "postgres"),
            "-D",
            str(home / "data"),
            "-p",
            str(port),
            "-k",
            str(home),
            "-h",
            "127.0.0.1",
        ]
        with running([*as_user, *server], cwd=home):
            host, found = _through(allowed, port)
            psql = ["psql", "-h", host, "-p", found, "-U", "app", "-d", "postgres", "-At", "-c"]

            def answers() -> bool:
                return subprocess.run([*psql, "select 1"], capture_output=True, check=False).returncode == 0

            assert wait_until(answers, PATIENCE_S)
            assert _output(*psql, "select sum(n) from generate_series(1, 100000) n") == "5000050000\n"
            assert len(_output(*psql, "select repeat('x', 1000) from generate_series(1, 2000)")) == 2_002_000
    finally:
        shutil.rmtree(home, ignore_errors=True)
