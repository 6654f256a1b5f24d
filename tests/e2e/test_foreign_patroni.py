"""Patroni, unmodified, elects PostgreSQL's leader through Lictor's sessions and keys, while Lictor loses its own."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from cli.demo_stage import free_ports, wait_until
from tests.e2e.support_e2e import Mesh, need, running
from tests.e2e.support_foreign import is_root, leader_killed
from tests.support.promises import PATIENCE_S

SCOPE = "pg"
FAILOVER_S_MAX = 45.0
"""Patroni's shortest session lives 10 s and may be found dead after twice that, as in Consul; the rest is a busy
machine."""


@dataclass(frozen=True)
class Member:
    """One Patroni with its PostgreSQL."""

    name: str
    home: Path
    rest_port: int
    sql_port: int

    def write_config(self, consul: str, programs: Path) -> Path:
        """Write what Patroni reads. JSON is YAML."""
        config = {
            "scope": SCOPE,
            "name": self.name,
            "restapi": {"listen": f"127.0.0.1:{self.rest_port}", "connect_address": f"127.0.0.1:{self.rest_port}"},
            "consul": {"host": consul, "register_service": True, "service_check_interval": "1s"},
            "bootstrap": {
                "dcs": {"ttl": 20, "loop_wait": 1, "retry_timeout": 3},
                "initdb": ["no-sync", {"auth": "trust"}, {"encoding": "UTF8"}],
            },
            "postgresql": {
                "listen": f"127.0.0.1:{self.sql_port}",
                "connect_address": f"127.0.0.1:{self.sql_port}",
                "data_dir": str(self.home / self.name),
                "bin_dir": str(programs),
                "pgpass": str(self.home / f"{self.name}.pgpass"),
                "basebackup": [{"checkpoint": "fast"}],
                "authentication": {"superuser": {"username": "admin"}, "replication": {"username": "copier"}},
                "parameters": {"unix_socket_directories": str(self.home), "shared_buffers": "16MB", "fsync": "off"},
            },
        }
        path = self.home / f"{self.name}.json"
        path.write_text(json.dumps(config))
        return path

    def role(self) -> str:
        """What Patroni's own API says this member is: ``primary``, ``replica`` or nothing yet."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.rest_port}/patroni", timeout=5) as answer:
                said = json.load(answer)
        except urllib.error.HTTPError as error:
            said = json.load(error)
        except OSError:
            return ""
        return str(said["role"]) if said["state"] in ("running", "streaming") else ""

    def kill_postgres(self) -> None:
        """PostgreSQL is in a process group of its own and outlives its Patroni."""
        pid_file = self.home / self.name / "postmaster.pid"
        if pid_file.exists():
            with suppress(ProcessLookupError):
                os.kill(int(pid_file.read_text().split("\n")[0]), signal.SIGKILL)

    def sql(self, statement: str) -> str:
        """Return what PostgreSQL answers, or nothing."""
        command = ["psql", "-h", "127.0.0.1", "-p", str(self.sql_port), "-U", "admin", "-d", "postgres", "-Atc"]
        return subprocess.run([*command, statement], capture_output=True, text=True, check=False, timeout=30).stdout


@contextmanager
def postgres_home() -> Iterator[Path]:
    """A directory that the user of PostgreSQL may write."""
    home = Path(tempfile.mkdtemp(prefix="lictor-patroni-", dir="/tmp"))
    try:
        if is_root():
            shutil.chown(home, "nobody", "nogroup")
        yield home
    finally:
        shutil.rmtree(home, ignore_errors=True)


def unprivileged() -> Sequence[str]:
    """PostgreSQL refuses to run as root. Whoever it runs as must be able to read this checkout, wherever it is."""
    if not is_root():
        return ()
    need("setpriv")
    capability = "+dac_override"
    return (
        "setpriv", "--reuid=nobody", "--regid=nogroup", "--clear-groups",
        f"--inh-caps={capability}", f"--ambient-caps={capability}",
    )  # fmt: skip


def test_patroni_fails_over_while_servers_are_killed(cluster: Mesh) -> None:
    need("psql")
    assert importlib.util.find_spec("patroni"), "install the test extra"
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    if not found:
        need("initdb")
        return
    ports = free_ports(25000, 4)
    with postgres_home() as home, ExitStack() as stack:
        members = [Member(name, home, *ports[at : at + 2]) for name, at in (("one", 0), ("two", 2))]
        processes: dict[str, subprocess.Popen[bytes]] = {}

        def start(member: Member, host: int) -> None:
            stack.callback(member.kill_postgres)
            config = member.write_config(cluster.hosts[host], found[-1].parent)
            log = stack.enter_context((cluster.directory / f"patroni-{member.name}.log").open("wb"))
            command = [*unprivileged(), sys.executable, "-m", "patroni", str(config)]
            environment = {**os.environ, "HOME": str(home)}
            processes[member.name] = stack.enter_context(
                running(command, cwd=home, env=environment, stdout=log, stderr=log)
            )

        for host, member in enumerate(members):
            start(member, host)
        api = cluster.api(1)

        def leader() -> str:
            return api.get(f"/v1/kv/service/{SCOPE}/leader", {"raw": ""}, allow_404=True).body.decode()

        def found_by(role: str) -> list[str]:
            return sorted(row["ServiceID"] for row in api.get(f"/v1/catalog/service/{SCOPE}", {"tag": role}).json())

        def shows_roles() -> bool:
            return sorted(one.role() for one in members) == ["primary", "replica"]

        assert wait_until(shows_roles, 60.0), [one.role() for one in members]
        first, second = sorted(members, key=Member.role)
        assert leader() == first.name
        assert wait_until(lambda: found_by("primary") == [f"{SCOPE}/{first.name}"], PATIENCE_S), found_by("primary")
        assert first.sql("create table kept (n int); insert into kept values (1)").startswith("CREATE TABLE")
        with leader_killed(cluster):
            # The lock outlives the election: who led leads, and writes.
            assert leader() == first.name
            assert first.sql("insert into kept values (2) returning n").startswith("2\n")
            assert wait_until(lambda: second.sql("select n from kept order by n") == "1\n2\n", PATIENCE_S)
            os.killpg(processes[first.name].pid, signal.SIGKILL)
            first.kill_postgres()
            assert wait_until(lambda: leader() == second.name and second.role() == "primary", FAILOVER_S_MAX)
        assert second.sql("insert into kept values (3) returning n").startswith("3\n")
        assert second.sql("select n from kept order by n") == "1\n2\n3\n"
        assert wait_until(lambda: f"{SCOPE}/{second.name}" in found_by("primary"), PATIENCE_S), found_by("primary")
