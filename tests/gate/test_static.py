"""Style, types, arrows between packages, and the bans that keep the core pure. Each ban says why."""

from __future__ import annotations

import ast
import functools
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("raftstate", "proxy", "node", "cli")
BIN = Path(sys.executable).parent

PURE = (
    "raftstate/model",
    "raftstate/state",
    "raftstate/acl",
    "raftstate/chain",
    "raftstate/messages.py",
    "raftstate/journal_format.py",
    "raftstate/snapshot_format.py",
    "raftstate/raft_config.py",
    "raftstate/raft_progress.py",
    "proxy/authz",
    "proxy/balancer.py",
    "proxy/balancing",
    "proxy/mux/core.py",
    "proxy/mux/flow.py",
    "proxy/mux/frames.py",
    "proxy/http/head.py",
    "proxy/http/parser.py",
    "node/ca/policy.py",
    "node/agent/upstreams.py",
)
"""Given the same input they give the same output on every node and in every simulation: no I/O, clock or chance."""
IMPURE = {"asyncio", "time", "random", "os", "socket", "ssl", "threading", "subprocess", "secrets"}


def _run(*command: str) -> None:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"


def _tool(name: str) -> str:
    return str(BIN / name)


def _sources(*places: str) -> Iterator[Path]:
    for place in places:
        path = ROOT / place
        yield from sorted(path.rglob("*.py")) if path.is_dir() else [path]


@functools.cache
def _imports(path: Path) -> frozenset[str]:
    """Return the modules that a file imports, types-only imports left out: they do not run."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    skipped = {
        id(inner)
        for node in nodes
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    found = set()
    for node in nodes:
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return frozenset(found)


def test_ruff_check() -> None:
    _run(_tool("ruff"), "check", "--no-cache", ".")


def test_ruff_format() -> None:
    _run(_tool("ruff"), "format", "--no-cache", "--check", ".")


def test_types_are_strict() -> None:
    _run(_tool("mypy"))


def test_arrows_between_packages() -> None:
    _run(_tool("lint-imports"), "--no-cache")


def test_pure_modules_import_no_io_clock_or_chance() -> None:
    for path in _sources(*PURE):
        assert path.exists(), f"{path} is listed as pure and is gone"
        roots = {name.partition(".")[0] for name in _imports(path)}
        assert not roots & IMPURE, f"{path.relative_to(ROOT)} imports {sorted(roots & IMPURE)}; hand it in instead"
        # An id made from a digest is pure, one made of chance is not.
        assert not re.search(r"\buuid[14]\(", path.read_text()), f"{path.relative_to(ROOT)} makes a random id"


def test_pysyncobj_has_one_door() -> None:
    """Only the adapter knows it: everything else must survive its replacement."""
    for path in _sources(*PACKAGES):
        if any(name.partition(".")[0] == "pysyncobj" for name in _imports(path)):
            where = path.relative_to(ROOT)
            assert where.parent == Path("raftstate"), where
            assert where.name.startswith("raft"), where


def test_production_does_not_import_tests() -> None:
    for path in _sources(*PACKAGES):
        assert "tests" not in {name.partition(".")[0] for name in _imports(path)}, path


def test_nothing_unpickles() -> None:
    """A pickle runs what its writer likes; nothing that came over the wire or from disk may be one."""
    for path in _sources(*PACKAGES):
        roots = {name.partition(".")[0] for name in _imports(path)}
        assert not roots & {"pickle", "marshal", "shelve", "dill"}, path


def _tracked() -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False)
    if listed.returncode:
        pytest.fail("the tests run in a git checkout: git ls-files failed")
    names = [name for name in listed.stdout.decode().split("\0") if name]
    return [ROOT / name for name in names if (ROOT / name).is_file()]


MARKERS = ("TO" + "DO", "FIX" + "ME", "XX" + "X")
FOREIGN = re.compile(
    r"(?<![\w.*}])/(?:" + "|".join(("wo" + "rk", "ro" + "ot", "ho" + "me/[a-z]+", "Us" + r"ers/\w+")) + r")/"
)


UNFINISHED = re.compile(rf"\b(?:{'|'.join(MARKERS)})\b")


def test_no_file_knows_this_machine_or_is_unfinished() -> None:
    for path in _tracked():
        try:
            text = path.read_text()
        except UnicodeDecodeError:
            continue  # a picture or the like
        for number, line in enumerate(text.splitlines(), 1):
            where = f"{path.relative_to(ROOT)}:{number}"
            assert not FOREIGN.search(line), f"{where} names a directory of somebody's machine: {line.strip()}"
            assert not UNFINISHED.search(line), f"{where} is unfinished: {line}"


def test_the_lock_names_versions_only() -> None:
    for line in (ROOT / "requirements.lock").read_text().splitlines():
        assert "://" not in line, f"{line}: the lock must work with any index"
        assert not line.startswith("-"), line


def test_the_lock_covers_what_the_project_names() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["test"]]
    locked = {line.partition("==")[0].lower() for line in (ROOT / "requirements.lock").read_text().splitlines()}
    names = {re.split(r"[^A-Za-z0-9._-]", line)[0].lower() for line in wanted}
    assert names <= locked, f"{sorted(names - locked)} not locked; see CONTRIBUTING.md"
