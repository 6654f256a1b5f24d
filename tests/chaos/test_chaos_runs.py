"""`lictor chaos run` as its user runs it: real processes, real faults, and a history that must be linearizable."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from cli.demo_stage import free_offset

FAULTS = "kill,pause,partition,one-way,kill-all"


@pytest.mark.timeout(320)
@pytest.mark.parametrize(("servers", "seed"), [(3, 1), (5, 2)])
def test_what_clients_saw_under_faults_is_linearizable(tmp_path: Path, servers: int, seed: int) -> None:
    command = [sys.executable, "-P", "-m", "cli", "chaos", "run", "-seed", str(seed), "-minutes", "0.5"]
    command += ["-servers", str(servers), "-faults", FAULTS, "-port-offset", str(free_offset(servers, 2))]
    done = subprocess.run(
        [*command, "-out", str(tmp_path / "out")], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    history = json.loads((tmp_path / "out" / "history.json").read_text())
    # Enough must have happened for the verdict to mean something.
    answered = [op for op in history["operations"] if op["kind"] != "read" and op["returned_s"] is not None]
    modes = {op["mode"] for op in history["operations"] if op["kind"] == "read"}
    assert len(history["faults"]) >= 4
    assert len(answered) >= 200
    assert modes == {"default", "consistent", "stale"}
    assert len({span["term"] for span in history["leaders"] if span["leader"]}) >= 2
    assert (tmp_path / "out" / "timeline.svg").read_text().startswith("<svg")
