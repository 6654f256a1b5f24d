"""What is said of compiled modules that are not what their sources say."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest

import proxy.mux.core
from cli.compiled import REBUILD, ROOT, is_compiled, stale, warning

SUFFIX = EXTENSION_SUFFIXES[0]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    (tmp_path / "setup.py").touch()
    (tmp_path / "proxy" / "mux").mkdir(parents=True)
    return tmp_path


def _file(path: Path, at_s: float) -> None:
    path.touch()
    os.utime(path, (at_s, at_s))


def test_a_checkout_without_compiled_modules_has_nothing_to_say(checkout: Path) -> None:
    _file(checkout / "proxy" / "poller.py", 200)
    assert warning(checkout) is None


def test_modules_as_new_as_their_sources_are_not_stale(checkout: Path) -> None:
    for module, at_s in (("poller", 100), ("mux/core", 200)):
        _file(checkout / "proxy" / f"{module}.py", at_s)
        _file(checkout / "proxy" / f"{module}{SUFFIX}", 200)
    _file(checkout / "proxy" / f"_compiled__mypyc{SUFFIX}", 50)
    assert stale(checkout) == []


def test_a_source_that_was_edited_later_is_named_with_the_command(checkout: Path) -> None:
    for module in ("poller", "mux/core"):
        _file(checkout / "proxy" / f"{module}.py", 200)
        _file(checkout / "proxy" / f"{module}{SUFFIX}", 100)
    assert stale(checkout) == ["proxy/mux/core.py", "proxy/poller.py"]
    said = warning(checkout)
    assert said is not None
    assert "proxy/mux/core.py and 1 more" in said
    assert REBUILD in said


def test_a_module_whose_source_is_gone_is_stale(checkout: Path) -> None:
    _file(checkout / "proxy" / f"gone{SUFFIX}", 100)
    assert stale(checkout) == ["proxy/gone.py"]


def test_an_installed_package_is_not_looked_at(checkout: Path) -> None:
    (checkout / "setup.py").unlink()
    _file(checkout / "proxy" / f"gone{SUFFIX}", 100)
    assert warning(checkout) is None


def test_version_says_how_the_data_plane_runs() -> None:
    assert is_compiled() == proxy.mux.core.__file__.endswith(".so")
    command = [sys.executable, "-m", "cli", "version"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert ("Data plane: compiled" in done.stdout) == is_compiled()
