"""What the tests with other people's programs share."""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.e2e.support_e2e import Mesh
from tests.support.promises import PATIENCE_S

NPM_CONSUL = "consul@2.0.1"


@contextmanager
def leader_killed(cluster: Mesh) -> Iterator[str]:
    """Kill the leader, wait until another leads, and start the killed one again at the end."""
    leader = cluster.wait_leader()
    cluster.cluster("kill", leader)
    try:
        cluster.wait_leader(other_than=leader)
        yield leader
    finally:
        cluster.cluster("start", leader)
        cluster.wait_caught_up()


def npm_home(directory: Path) -> Path:
    """Return a directory in which Node finds npm's ``consul`` package, as published."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "package.json").write_text('{"private": true}')
    command = ["npm", "install", "--no-audit", "--no-fund", "--loglevel=error", NPM_CONSUL]
    subprocess.run(command, cwd=directory, check=True, timeout=120, stdin=subprocess.DEVNULL)
    shutil.copy(Path(__file__).with_name("npm_consul.cjs"), directory)
    return directory


class Lines:
    """A program whose lines of output are awaited; its last lines are shown when one does not come."""

    def __init__(self, command: Sequence[str], **more: Any) -> None:
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **more
        )
        self.said: list[str] = []
        self._new = threading.Condition()
        self._taken = 0
        self._ended = False
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with self._new:
                self.said.append(line.rstrip("\n"))
                self._new.notify_all()
        with self._new:
            self._ended = True
            self._new.notify_all()

    def next(self, beginning: str, timeout_s: float = PATIENCE_S) -> str:
        """Return what follows ``beginning`` in the next line that begins so."""
        found: list[str] = []

        def look() -> bool:
            while self._taken < len(self.said):
                line = self.said[self._taken]
                self._taken += 1
                if line.startswith(beginning):
                    found.append(line.removeprefix(beginning).strip())
                    return True
            return self._ended

        with self._new:
            self._new.wait_for(look, timeout_s)
        assert found, f"no line {beginning!r} came; the last were {list(deque(self.said, 12))}"
        return found[0]

    def tell(self, text: str) -> None:
        """Send a line to its stdin."""
        assert self.process.stdin is not None
        self.process.stdin.write(text + "\n")
        self.process.stdin.flush()

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, *error: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(10)
        self._reader.join(10)
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()


def is_root() -> bool:
    """Whether this process may bind port 53 and bring a file system of its own."""
    return os.geteuid() == 0
