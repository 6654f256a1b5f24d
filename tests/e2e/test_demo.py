"""The main job: ``lictor demo`` from here, and README's first command from a fresh clone as a plain user."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from cli.demo_stage import wait_until
from tests.e2e.support_e2e import ROOT, need
from tests.support.promises import PATIENCE_S

DEMO = [sys.executable, "-P", "-m", "cli", "demo"]


def _left_behind(marker: str) -> list[str]:
    """Return the command lines of processes that still work in a directory."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            stands = str((entry / "cwd").readlink())
        except OSError:
            continue
        if marker in line or marker in stands:
            found.append(f"{entry.name}: {line}")
    return found


def test_the_demo_holds_and_leaves_nothing_behind(tmp_path: Path) -> None:
    directory = tmp_path / "demo"
    done = subprocess.run([*DEMO, "-dir", str(directory)], capture_output=True, text=True, timeout=220, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Every step held" in done.stdout
    for measured in ("calls refused after", "next write acknowledged after", "calls answered after"):
        assert re.search(rf"{measured} +\d", done.stdout), done.stdout
    assert _left_behind(str(directory)) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupted_demo_clears_up(number: signal.Signals, tmp_path: Path) -> None:
    directory = tmp_path / "demo"
    log = tmp_path / "out"
    # A background job inherits an ignored SIGINT, and Python leaves that so; the demo is to see it as at a terminal.
    program = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler);"
        "from cli.main import main; sys.exit(main(sys.argv[1:]))"
    )
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-P", "-c", program, "demo", "-dir", str(directory)], stdout=output, stderr=output
        )
    assert wait_until(lambda: "is ready" in log.read_text(), PATIENCE_S)
    process.send_signal(number)
    assert process.wait(PATIENCE_S) == 130, log.read_text()
    assert _left_behind(str(directory)) == []


@pytest.fixture
def plain_users_home() -> Iterator[Path]:
    """A directory that belongs to a user without rights."""
    if os.geteuid() != 0:
        pytest.skip("needs root, to become another user; the tests themselves run as a plain user here")
    need("setpriv", "git")
    home = Path(tempfile.mkdtemp(prefix="lictor-plain-", dir="/tmp"))
    shutil.chown(home, "nobody", "nogroup")
    try:
        yield home
    finally:
        for line in _left_behind(str(home)):  # of a test that failed
            with suppress(ProcessLookupError):
                os.kill(int(line.partition(":")[0]), signal.SIGKILL)
        shutil.rmtree(home, ignore_errors=True)


@pytest.mark.timeout(1100)
def test_readmes_first_command_from_a_fresh_clone_as_a_plain_user(plain_users_home: Path) -> None:
    command = next(line.strip() for line in (ROOT / "README.md").read_text().splitlines() if "lictor demo" in line)
    assert command.startswith("python3 -m venv"), command
    clone = plain_users_home / "clone"
    subprocess.run(["git", "clone", "-q", "--no-hardlinks", str(ROOT), str(clone)], check=True)
    subprocess.run(["chown", "-R", "nobody:nogroup", str(clone)], check=True)
    # The interpreter of the tests, where a plain user may run it; else the system's.
    python = Path(sys.executable).resolve()
    bin_directory = plain_users_home / "bin"
    bin_directory.mkdir()
    (bin_directory / "python3").symlink_to(python if _public(python) else Path("/usr/bin/python3"))
    environment = {
        **{
            key: value for key, value in os.environ.items() if key.startswith(("PIP_", "SSL_", "http", "HTTP", "no_"))
        },
        "HOME": str(plain_users_home),
        "PATH": f"{bin_directory}:/usr/local/bin:/usr/bin:/bin",
        "TMPDIR": str(plain_users_home),
        "LANG": "C.UTF-8",
        "LICTOR_PURE": "1",  # the other way to run it; the gate itself has compiled it by the same command
    }
    for _ in range(2):  # it works again where it ran before
        done = subprocess.run(
            ["setpriv", "--reuid=nobody", "--regid=nogroup", "--clear-groups", "bash", "-c", command],
            cwd=clone,
            env=environment,
            capture_output=True,
            text=True,
            timeout=500,
            check=False,
        )
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
        assert "Every step held" in done.stdout
    assert _left_behind(str(plain_users_home)) == []


def _public(path: Path) -> bool:
    return all(parent.stat().st_mode & 0o001 for parent in [path, *path.parents])
